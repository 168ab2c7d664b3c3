"""What a setting trains on, and where its dense model comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

# What a model is called with, its labels included.
Batch = dict[str, Tensor]

# Held-out data: the first chooses learning rates, only the second is reported.
SPLITS = ("validation", "test")


class Task(ABC):
    """Data and a dense model. Tasks are small and picklable: files are read on use."""

    @abstractmethod
    def prepare(self, folder: Path) -> dict[str, Any]:
        """Write into a folder what all runs need, once; say what the data are, for the report."""

    @abstractmethod
    def dense(self, folder: Path, seed: int) -> PreTrainedModel:
        """The model that all methods start from. Whatever it draws is drawn with the seed."""

    @abstractmethod
    def batch(self, folder: Path, step: int, seed: int) -> Batch:
        """What a training step sees: a function of step and seed alone, so that runs resume."""

    @abstractmethod
    def evaluate(self, model: PreTrainedModel, folder: Path, split: str) -> dict[str, float]:
        """Held-out results; ``loss`` is one of them, in nats."""


def draws(*key: int) -> np.random.Generator:
    """A generator that is a function of numbers: seed, step and so on."""
    return np.random.default_rng(key)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)

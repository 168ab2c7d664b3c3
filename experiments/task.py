"""Tasks: the data of a setting, and the source of its dense model."""

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

# Arguments of a model's call, labels included.
Batch = dict[str, Tensor]

# Held-out data: validation chooses learning rates, and reports use only the test.
SPLITS = ("validation", "test")


class Task(ABC):
    """A source of data and of a dense model.

    Tasks are small and picklable: they read their files on use.
    """

    @abstractmethod
    def prepare(self, folder: Path) -> dict[str, Any]:
        """Write into a folder what all runs need; return a description of the data for reports."""

    @abstractmethod
    def dense(self, folder: Path, seed: int) -> PreTrainedModel:
        """Make the model that all methods start from; the seed determines its random numbers."""

    @abstractmethod
    def batch(self, folder: Path, step: int, seed: int) -> Batch:
        """Return the batch of a training step, a function of step and seed, so that runs resume."""

    @abstractmethod
    def evaluate(self, model: PreTrainedModel, folder: Path, split: str) -> dict[str, float]:
        """Return held-out results; ``loss`` is one of them, in nats."""


def random_generator(*key: int) -> np.random.Generator:
    """Return a random generator that is a function of numbers: seed, step and so on."""
    return np.random.default_rng(key)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Run a block without dropout and gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)

"""Checks that a model, or the tensors of a folder, suit what is about to be done."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tnmoe.errors import InputError
from tnmoe.hf.record import ENTRY
from tnmoe.system.tables import listed

# The part of an expert's tensor name that says which matrix the tensor belongs to.
EXPERT_TENSOR = re.compile(r"\.experts\.(up|gate|down)\.")


def check_model(model: object) -> None:
    """Raise a TypeError unless this is a model of transformers, and not a wrapper around one.

    In a wrapper, torch.compile's or PEFT's, networks have other names than in the saved model.
    """
    if not isinstance(model, PreTrainedModel):
        wraps = isinstance(model, nn.Module) and hasattr(model, "config")
        raise TypeError(
            f"model must be a model of transformers, got {type(model).__qualname__}"
            + (": give the model that it wraps" if wraps else "")
        )


def check_in_memory(model: nn.Module, alternative: str) -> None:
    """Raise an InputError if tensors of a model are not in memory: offloaded, or never loaded.

    Parameters
    ----------
    model : Module
    alternative : str
        Name of the function that does the same work from folder to folder, for the message.
    """
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise InputError(
            f"{type(model).__name__} has {len(absent)} tensors that are not in memory, "
            f"{absent[0]} for one: load it without offloading, or use {alternative}, which never "
            "holds a whole model"
        )


def check_unconverted(model: nn.Module) -> None:
    """Raise an InputError for a model that is already converted or quantized."""
    config = getattr(model, "config", None)
    quantized: Any = getattr(config, "quantization_config", None)
    # A model that was loaded from a GGUF file holds floats. transformers 5.0 has no class for that
    # method yet, so it is recognised by its name.
    if getattr(quantized, "quant_method", None) == "gguf":
        quantized = None
    if quantized is not None or getattr(config, ENTRY, None) is not None:
        raise InputError(f"{type(model).__name__} is already converted or quantized")


def check_all_described(unused: Iterable[str], mixtures: Iterable[str], folder: Any) -> None:
    """Raise an InputError if a folder holds tensors of mixtures that its config.json leaves out.

    Parameters
    ----------
    unused : iterable of str
        Tensors of the folder that the model does not have.
    mixtures : iterable of str
        Paths of the model's mixtures.
    folder : path
        For the message.
    """
    unused = list(unused)
    others = {name[: found.start()] for name in unused if (found := EXPERT_TENSOR.search(name))}
    inside = tuple(f"{path}." for path in {*mixtures, *others})
    if left := [name for name in unused if name.startswith(inside)]:
        raise InputError(
            f"{folder} holds {len(left)} tensors of mixtures that its config.json does not "
            f"describe: {listed(left)}"
        )

"""PEFT's wrappers around modules: what they train, and which of that PEFT saves."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from tnmoe.nn.experts import Experts
from tnmoe.nn.routing.router import Router


def modules_in_use(model: nn.Module) -> Iterator[nn.Module]:
    """Iterate over a model's modules, except originals that PEFT replaced by trained copies."""
    yield model
    for name, module in model.named_children():
        if not (name == "original_module" and _wraps_trained_copy(model)):
            yield from modules_in_use(module)


def replaced_by_copies(model: nn.Module) -> set[int]:
    """Return the ids of parameters that PEFT keeps beside the copies that it trains."""
    used = {
        id(parameter)
        for module in modules_in_use(model)
        for parameter in module.parameters(recurse=False)
    }
    return {id(parameter) for parameter in model.parameters()} - used


def warn_of_unsaved(model: nn.Module, stacklevel: int = 3) -> None:
    """Warn of trained experts and routers that PEFT will not save with its adapters.

    Parameters
    ----------
    model : Module
        A model of PEFT, or a model that contains adapters. For other models nothing happens.
    stacklevel : int
        Stack level of the warning.

    Warns
    -----
    UserWarning
        If parameters of experts or routers require gradients outside PEFT's trained copies.
    """
    peft = sys.modules.get("peft")
    if peft is None:
        return
    adapted = (peft.PeftModel, peft.tuners.tuners_utils.BaseTunerLayer)
    if not any(isinstance(module, adapted) for module in model.modules()):
        return
    unsaved = sorted(_unsaved_names(model))
    if unsaved:
        warnings.warn(
            f"PEFT does not save the trained parameters of {' and '.join(unsaved)}: name them in "
            "modules_to_save of the adapter's configuration",
            stacklevel=stacklevel,
        )


def _unsaved_names(model: nn.Module, name: str = "") -> set[str]:
    """Return the last parts of the names of experts and routers that are trained in place."""
    if _wraps_trained_copy(model):
        return set()
    if isinstance(model, Experts | Router):
        return {name} if _trains_unsaved(model) else set()
    adapters = _adapter_names(model)
    return {
        unsaved
        for name, child in model.named_children()
        if name not in adapters
        for unsaved in _unsaved_names(child, name)
    }


def _trains_unsaved(module: nn.Module) -> bool:
    """Return whether parameters are trained that are not in an adapter or a trained copy."""
    if _wraps_trained_copy(module):
        return False
    adapters = _adapter_names(module)
    return any(each.requires_grad for each in module.parameters(recurse=False)) or any(
        _trains_unsaved(child) for name, child in module.named_children() if name not in adapters
    )


def _adapter_names(module: Any) -> tuple[str, ...]:
    """Return the names of the children that PEFT saves with an adapter."""
    peft: Any = sys.modules["peft"]
    is_adapted = isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    return module.adapter_layer_names if is_adapted else ()


def _wraps_trained_copy(module: nn.Module) -> bool:
    """Return whether a module is PEFT's wrapper around a copy that PEFT trains and saves."""
    peft: Any = sys.modules.get("peft")
    return peft is not None and isinstance(module, peft.utils.other.AuxiliaryTrainingWrapper)

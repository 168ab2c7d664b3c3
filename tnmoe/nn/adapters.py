"""PEFT's wrappers around modules: what is trained in them, and what PEFT saves of it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from tnmoe.nn.experts import Experts
from tnmoe.nn.routing.router import Router


def modules_in_use(model: nn.Module) -> Iterator[nn.Module]:
    """All modules of a model but originals that PEFT keeps beside those that it trains instead."""
    yield model
    for name, module in model.named_children():
        if not (name == "original_module" and _is_saved_whole(model)):
            yield from modules_in_use(module)


def warn_of_unsaved(model: nn.Module, stacklevel: int = 3) -> None:
    """Warn of experts and routers that are trained and that PEFT will not save with its adapters.

    Parameters
    ----------
    model : Module
        Of PEFT, or a model that has adapters in it. Nothing is said of others.
    stacklevel : int
        Of the warning.
    """
    peft = sys.modules.get("peft")
    if peft is None:
        return
    adapted = (peft.PeftModel, peft.tuners.tuners_utils.BaseTunerLayer)
    if not any(isinstance(module, adapted) for module in model.modules()):
        return
    lost = sorted(_names_of_unsaved(model))
    if lost:
        warnings.warn(
            f"PEFT does not save what is trained of {' and '.join(lost)}: name them in "
            "modules_to_save of the adapter's configuration",
            stacklevel=stacklevel,
        )


def _names_of_unsaved(model: nn.Module, name: str = "") -> set[str]:
    """Last parts of the names of experts and routers that are trained in place."""
    if _is_saved_whole(model):
        return set()
    if isinstance(model, Experts | Router):
        return {name} if any(each.requires_grad for each in model.parameters()) else set()
    children = model.named_children()
    return {found for name, child in children for found in _names_of_unsaved(child, name)}


def _is_saved_whole(module: nn.Module) -> bool:
    """Whether PEFT put a copy of a module here, which it trains and saves."""
    peft: Any = sys.modules.get("peft")
    return peft is not None and isinstance(module, peft.utils.other.AuxiliaryTrainingWrapper)

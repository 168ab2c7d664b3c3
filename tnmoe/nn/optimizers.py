"""The optimiser behind wrappers: the one whose steps can be hooked into."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from tnmoe.errors import InputError


def innermost(optimizer: Any, otherwise: str = "") -> Optimizer:
    """The torch optimiser itself, or the one that a wrapper like accelerate's holds.

    Parameters
    ----------
    optimizer : Optimizer, or a wrapper with one as ``optimizer``
    otherwise : str
        What the error says to do instead.

    Raises
    ------
    InputError
        If it is neither.
    """
    found = optimizer
    while isinstance(getattr(found, "optimizer", None), Optimizer):
        found = found.optimizer
    if not isinstance(found, Optimizer):
        raise InputError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}{otherwise}"
        )
    return found

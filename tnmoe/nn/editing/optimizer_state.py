"""The state of an optimiser when the rows of its parameters are exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tnmoe.errors import InputError
from tnmoe.nn.owned_rows import OwnedRows, select_rows
from tnmoe.nn.training.step_hook import unwrap_optimizer

# Optimisers whose state is not one of zeros at first, or not one per parameter.
_REFUSED = (torch.optim.ASGD, torch.optim.LBFGS, torch.optim.Rprop)

NewState = list[tuple[dict[str, Any], dict[str, Any]]]


def check_optimizer(optimizer: Any, owned: Sequence[OwnedRows]) -> Optimizer:
    """Return the torch optimiser itself, of a kind whose state can follow.

    Parameters
    ----------
    optimizer : Optimizer, or a wrapper of one
    owned : sequence of OwnedRows
        The tensors of the layer.

    Raises
    ------
    InputError
        If it is no optimiser, one of the kinds that cannot follow, or holds no parameter of the
        layer.
    """
    inner = unwrap_optimizer(optimizer)
    if isinstance(inner, _REFUSED) or isinstance(getattr(inner, "optim", None), Optimizer):
        raise InputError(
            f"the state of {type(inner).__name__} cannot follow the experts: make a new optimizer "
            "after the change"
        )
    held = {id(each) for group in inner.param_groups for each in group["params"]}
    if not any(id(each.tensor) in held for each in owned):
        raise InputError(
            "the optimizer holds no parameter that experts of the layer own: wrapping or copying a "
            "model replaces its parameters"
        )
    return inner


def selected_state(
    optimizer: Optimizer, owned: Sequence[OwnedRows], experts: list[int], fresh: frozenset[int]
) -> NewState:
    """Return the state of every owned parameter, with what its rows are to become.

    Parameters
    ----------
    optimizer, owned
        As :func:`check_optimizer` returns and takes them.
    experts : list of int
        Which old expert every new one was.
    fresh : frozenset of int
        Places in ``experts`` whose state starts at zero.

    Returns
    -------
    list of (dict, dict)
        Pairs of a state and its new entries.

    Raises
    ------
    InputError
        If a tensor of the state has neither the rows of its parameter nor a single one.
    """
    changes: NewState = []
    for each in owned:
        state = optimizer.state.get(each.tensor)
        if state:
            entries = {
                key: select_rows(value, each, experts, fresh)
                for key, value in state.items()
                if _has_rows(key, value, each)
            }
            changes.append((state, entries))
    return changes


def _has_rows(key: str, value: Any, owned: OwnedRows) -> bool:
    """Return whether an entry of a state has the rows of its parameter; others stay as they are."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return False
    size, found = owned.tensor.shape, value.shape
    # Adafactor keeps means over an axis, of length 1.
    fits = len(found) == len(size) and all(
        one in (1, other) for one, other in zip(found, size, strict=True)
    )
    if not fits:
        raise InputError(
            f"the optimizer keeps {key!r} of shape {tuple(found)} for {owned.name} of shape "
            f"{tuple(size)}: its state cannot follow; make a new optimizer after the change"
        )
    return found[0] == size[0]

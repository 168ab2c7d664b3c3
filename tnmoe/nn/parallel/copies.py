"""Copies of what computes a layer's calls over ranks, beside a copy of the layer."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn
from torch.distributed import ProcessGroup

Call = TypeVar("Call")


def copied(call: Call, memo: dict[int, Any], group: ProcessGroup | None = None) -> Call:
    """Copy an object as ``copy.deepcopy`` does, but for its group of ranks, which nobody can copy.

    Parameters
    ----------
    call : object
    memo : dict
        As in ``__deepcopy__``; it knows the copy of the layer.
    group : ProcessGroup, optional
        Of which the copy has the same one.
    """
    new = memo[id(call)] = object.__new__(type(call))
    if group is not None:
        memo[id(group)] = group
    vars(new).update(copy.deepcopy(vars(call), memo))
    return new


def forget_tensors(modules: Iterable[nn.Module]) -> None:
    """Drop the tensors that modules got for their last call."""
    for module in modules:
        module._parameters.update(dict.fromkeys(module._parameters))

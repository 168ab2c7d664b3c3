"""The rows of experts in the tensors of a mixture's layer: those of its projections and router."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tnmoe.errors import InputError, check_index, short_repr
from tnmoe.nn.experts import Experts
from tnmoe.nn.moe import MPOMoE
from tnmoe.nn.projection import Projection
from tnmoe.nn.routing.load_bias import LoadBias
from tnmoe.nn.routing.router import Router
from tnmoe.nn.stored_cores import StoredCores, is_gathered


@dataclass(frozen=True, eq=False)
class OwnedRows:
    """One tensor of a layer, and which of its rows belong to which expert.

    Attributes
    ----------
    name : str
        Name of the tensor in the layer.
    module : Module
        The module that holds it.
    attribute : str
        Its name there.
    rows : tuple of slice
        One for every expert.
    """

    name: str
    module: nn.Module
    attribute: str
    rows: tuple[slice, ...]

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now."""
        return getattr(self.module, self.attribute)


def owned_rows(moe: MPOMoE) -> list[OwnedRows]:
    """Return the tensors of a layer that have rows of experts, each once.

    Parameters
    ----------
    moe : MPOMoE

    Raises
    ------
    InputError
        If it is no MPOMoE, wrappers stand in place of its router, experts or projections, or rows
        cannot be read or written: the layer is sharded or offloaded, a tensor is parametrized or of
        a class of its own, or a router has more tensors than it says.
    """
    check_layer(moe)
    found: dict[int, OwnedRows] = {}
    for part in ("router", "experts"):
        for path, module in getattr(moe, part).named_modules(prefix=part):
            if isinstance(module, Projection | Router | LoadBias):
                for each in _rows_of(path, module, moe.experts.num_experts):
                    found.setdefault(id(each.tensor), each)
    return list(found.values())


def check_layer(moe: MPOMoE) -> None:
    """Raise an InputError unless a layer is an MPOMoE whose parts are here and not wrapped."""
    if not isinstance(moe, MPOMoE):
        raise InputError(f"the layer must be an MPOMoE, got {type(moe).__name__}")
    parts: list[tuple[str, nn.Module, type]] = [
        ("router", moe.router, Router),
        ("experts", moe.experts, Experts),
    ]
    if isinstance(moe.experts, Experts):
        parts += [(name, each, Projection) for name, each in moe.experts.projections().items()]
    for name, module, kind in parts:
        if not isinstance(module, kind):
            raise InputError(
                f"the layer's {name} must be a {kind.__name__}, got {type(module).__name__}: "
                "remove what wraps it first"
            )
    if moe.experts.exchange is not None:
        raise InputError("the layer's experts are spread over ranks: edit it before that")
    if moe.router.weight.is_meta:
        raise InputError("the layer is on the meta device: load its numbers first")
    for name, module in moe.named_modules():
        if is_gathered(module):
            raise InputError(f"{name or 'the layer'} is sharded or offloaded: edit it before that")


def check_experts(moe: MPOMoE, experts: Any) -> list[int]:
    """Return numbers of experts; raise an InputError unless they exist, each given once.

    Parameters
    ----------
    moe : MPOMoE
    experts : int or iterable of int
    """
    check_layer(moe)
    is_one = not isinstance(experts, Iterable) or isinstance(experts, str)
    count = moe.experts.num_experts
    numbers = [
        check_index("every expert", one, count) for one in ([experts] if is_one else experts)
    ]
    if not numbers or len(set(numbers)) < len(numbers):
        raise InputError(
            f"experts must be one at least, and each given once, got {short_repr(numbers)}"
        )
    return numbers


def _rows_of(path: str, module: nn.Module, count: int) -> Iterator[OwnedRows]:
    of_experts = [module.expert_rows(expert) for expert in range(count)]  # type: ignore[operator]
    if isinstance(module, Router):
        _check_tensors_of_router(module, of_experts[0])
    for attribute in of_experts[0]:
        name, rows = f"{path}.{attribute}", tuple(each[attribute] for each in of_experts)
        check_plain(name, module, attribute)
        yield OwnedRows(name, module, attribute, rows)


def _check_tensors_of_router(router: Router, known: dict[str, slice]) -> None:
    own = {**router._parameters, **router._buffers}
    for name, tensor in own.items():
        if tensor is None or name in known or name == "open_experts":
            continue
        if tensor.ndim and len(tensor) == router.num_experts:
            raise InputError(
                f"{type(router).__name__} has a tensor {name!r} of {len(tensor)} rows, perhaps one "
                "per expert: override expert_rows to say what belongs to an expert"
            )


def check_plain(name: str, module: nn.Module, attribute: str) -> None:
    """Raise an InputError unless a tensor of a module can get new rows.

    Parameters
    ----------
    name : str
        Of the tensor, in the error.
    module : Module
    attribute : str
        Its name in the module.
    """
    if isinstance(module, StoredCores) and not isinstance(
        module._parameters.get(attribute), nn.Parameter
    ):
        raise InputError(f"{name} is not a parameter of its own, but parametrized or pruned")
    kind = type(getattr(module, attribute))
    if kind not in (Tensor, nn.Parameter):
        raise InputError(f"{name} is a {kind.__name__}: edit the layer before it is sharded")


def select_rows(
    tensor: Tensor, owned: OwnedRows, experts: list[int], zero: frozenset[int]
) -> Tensor:
    """Return the rows of some experts, one after the other.

    Parameters
    ----------
    tensor : Tensor
        The tensor of ``owned``, or one with the same rows, such as its gradient.
    owned : OwnedRows
    experts : list of int
        Numbers of experts; they may repeat.
    zero : frozenset of int
        Places in ``experts`` whose rows are zeros instead.
    """
    parts = [tensor[owned.rows[expert]] for expert in experts]
    return torch.cat(
        [torch.zeros_like(part) if place in zero else part for place, part in enumerate(parts)]
    )

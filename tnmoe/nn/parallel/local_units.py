"""The hidden units of one rank: a layer's modules on this rank's part of the hidden side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from tnmoe.errors import InputError
from tnmoe.nn.experts import Experts
from tnmoe.nn.hidden_projection import HiddenProjection
from tnmoe.nn.linear import has_matrix, is_transposed, size_of_linear
from tnmoe.nn.mpo_projection import MPOProjection
from tnmoe.nn.parallel.copies import copied, forget_tensors
from tnmoe.nn.parallel.divisions import Division, hidden_legs
from tnmoe.nn.parallel.local_experts import local_part
from tnmoe.nn.parallel.sums import GatheredLinear, sum_gradients, sum_outputs
from tnmoe.nn.projection import Projection
from tnmoe.nn.residual_projection import ResidualProjection
from tnmoe.nn.stored_cores import mark_gathered
from tnmoe.options import ProjectionName
from tnmoe.shapes import MPOShape

# Makes a rank's part of a tensor.
Part = Callable[[Tensor], Tensor]

_WITH_BASE = (HiddenProjection, ResidualProjection)


class LocalUnits:
    """The calls of a layer whose hidden units are divided between ranks.

    The layer's modules keep the parameters. Copies of them, with fewer hidden units, compute:
    before every call they take over the layer's tensors as they are now, and of divided ones this
    rank's part. What wraps the layer's parameters, such as FSDP, needs to know nothing of that.

    Parameters
    ----------
    experts : Experts
    divisions : mapping from str to Division
        Of all projections.
    mesh : DeviceMesh
        Losses are averaged over its other dimensions. Gradients of divided tensors are divided by
        the number of ranks there, since they are sums over these.
    dim : str
        Name of the dimension whose ranks divide the units. They have the same tokens.
    """

    def __init__(
        self,
        experts: Experts,
        divisions: Mapping[ProjectionName, Division],
        mesh: DeviceMesh,
        dim: str,
    ) -> None:
        self._group, self._dim = mesh.get_group(dim), dim
        self._rank, self._ranks = self._group.rank(), self._group.size()
        self._copies = mesh.size() // self._ranks
        # Modules with parameters, their copies, and what a copy takes of some parameters.
        self._pairs: list[tuple[nn.Module, nn.Module, dict[str, Part]]] = []
        self._experts = _copy_of(experts)
        self._experts.intermediate_size //= self._ranks
        twins = self._experts.projections()
        for name, projection in experts.projections().items():
            self._narrow(name, projection, twins[name], divisions[name])
        forget_tensors(twin for _, twin, _ in self._pairs)

    def __call__(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute as :meth:`Experts.forward`, with the hidden units of all ranks."""
        whole = {id(each): each for *_, each in self._tensors() if not isinstance(each, DTensor)}
        states, weights, *shared = sum_gradients((states, weights, *whole.values()), self._group)
        local = dict(zip(whole, shared, strict=True))
        for twin, name, part, tensor in self._tensors():
            mine = self._local(tensor) if isinstance(tensor, DTensor) else local[id(tensor)]
            taken: dict[str, Any] = twin._parameters
            taken[name] = part(mine)
        # Hooks on the layer run around its own call.
        return sum_outputs(self._experts.forward(states, index, weights), self._group)

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalUnits:
        forget_tensors(twin for _, twin, _ in self._pairs)
        return copied(self, memo, self._group)

    def modules(self) -> list[nn.Module]:
        """Return the modules of the layer whose parameters the copies take over."""
        return [module for module, *_ in self._pairs]

    def _tensors(self) -> Iterator[tuple[nn.Module, str, Part, Tensor]]:
        """Return the tensors of the layer, and for each which copy takes what of it."""
        for module, twin, parts in self._pairs:
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    yield twin, name, parts.get(name, _all), tensor

    def _local(self, tensor: DTensor) -> Tensor:
        """Return this rank's part of a divided tensor."""
        names = tensor.device_mesh.mesh_dim_names or ()
        divided = zip(names, map(is_divided, tensor.placements), strict=False)
        if [name for name, here in divided if here] != [self._dim]:
            raise InputError(
                "a layer whose hidden units are divided needs its tensors whole in every call, but "
                f"got one with placements {tensor.placements}: give fully_shard the layer or what "
                "contains it, and not its projections"
            )
        return local_part(tensor, is_divided, 1 / self._copies)

    def _narrow(
        self, name: ProjectionName, module: Projection, twin: Projection, division: Division
    ) -> None:
        """Divide the hidden side of the copy of a projection."""
        side = "in_features" if name == "down" else "out_features"
        setattr(twin, side, getattr(twin, side) // self._ranks)
        of_bias = self._once if name == "down" else partial(self._units, run=division.run)
        self._pairs.append((module, twin, {"bias": of_bias}))
        mark_gathered(twin)
        if isinstance(twin, MPOProjection) and division.site is not None:
            twin.shape = _divided_shape(twin, name, division.site, self._ranks)
        if isinstance(module, ResidualProjection) and isinstance(twin, ResidualProjection):
            self._narrow(name, module.delta, twin.delta, division)
        if isinstance(module, _WITH_BASE) and isinstance(twin, _WITH_BASE):
            twin.base = self._local_base(name, module.base, division)

    def _local_base(self, name: ProjectionName, base: nn.Module, division: Division) -> nn.Module:
        """Return the linear module that computes in place of one that experts share."""
        if not has_matrix(base):
            return base
        rows, columns = size_of_linear(base)
        parts: dict[str, Part] = {"weight": torch.t} if is_transposed(base) else {}
        is_divided = any(module is base for module, *_ in division.tensors)
        if name == "down":
            parts["bias"] = self._once
        elif is_divided:
            parts["bias"] = partial(self._units, run=rows // self._ranks)
        local: nn.Module
        if division.gathers:
            local = GatheredLinear(rows, columns, self._group)
        else:
            share = self._ranks if is_divided else 1
            size = (columns // share, rows) if name == "down" else (columns, rows // share)
            local = nn.Linear(*size, bias=False, device="meta")
        self._pairs.append((base, local, parts))
        return local

    def _units(self, tensor: Tensor, run: int) -> Tensor:
        """Return this rank's hidden units of a bias, (..., F)."""
        return tensor.unflatten(-1, (-1, self._ranks, run))[..., self._rank, :].flatten(-2)

    def _once(self, bias: Tensor) -> Tensor:
        """Return a bias on the first rank and zeros on all others: outputs are summed."""
        return bias if self._rank == 0 else torch.zeros_like(bias)


def is_divided(placement: Placement) -> bool:
    """Return whether ranks have different parts of a tensor."""
    return not isinstance(placement, Replicate)


def _copy_of(experts: Experts) -> Experts:
    """Copy the modules of a layer, but neither their parameters nor shared modules."""
    kept: dict[int, Any] = {id(each): each for each in experts.parameters()}
    for module in experts.modules():
        if isinstance(module, _WITH_BASE):
            kept[id(module.base)] = module.base
    return copy.deepcopy(experts, kept)


def _divided_shape(chain: MPOProjection, name: ProjectionName, site: int, ranks: int) -> MPOShape:
    """Return the shape of a chain one of whose legs on the hidden side is divided."""
    shape, legs = chain.shape, list(hidden_legs(chain, name))
    legs[site] //= ranks
    # The size of the matrix on the hidden side is divided already.
    size = chain.out_features, chain.in_features
    if name == "down":
        return MPOShape(shape.out_dims, legs, *size)
    return MPOShape(legs, shape.in_dims, *size)


def _all(tensor: Tensor) -> Tensor:
    return tensor

"""The experts of one rank: a layer's modules on this rank's rows of what experts own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Shard

from tnmoe.nn.experts import Experts
from tnmoe.nn.parallel.copies import copied, forget_tensors
from tnmoe.nn.projection import Projection
from tnmoe.nn.stored_cores import mark_gathered


class LocalExperts:
    """Experts on one rank, which read the parameters of a layer that is spread over ranks.

    The layer's modules keep the parameters. Copies of them, with fewer experts, compute: before
    every call they take over the layer's tensors as they are now, and of owned ones this rank's
    rows. What wraps the layer's parameters, such as FSDP, needs to know nothing of that.

    Parameters
    ----------
    experts : Experts
        Whose owned tensors are DTensors.
    numbers : range
        Numbers of this rank's experts.
    ranks : int
        Ranks over which losses are averaged. Gradients of owned tensors are divided by it, since
        they are sums over the ranks that have their tokens.
    """

    def __init__(self, experts: Experts, numbers: range, ranks: int) -> None:
        self._ranks = ranks
        kept: dict[int, object] = {id(each): each for each in experts.parameters()}
        owners = [module for module in experts.modules() if isinstance(module, Projection)]
        parts = {id(part) for owner in (experts, *owners) for part in owner.children()}
        # Shared modules compute for all ranks alike, and what wraps them must see their calls.
        kept |= {
            id(module): module
            for module in experts.modules()
            if id(module) in parts and not isinstance(module, Projection)
        }
        self._experts = copy.deepcopy(experts, kept)
        self._experts._keep_experts(numbers)
        self._pairs = [
            (module, twin)
            for module, twin in zip(experts.modules(), self._experts.modules(), strict=True)
            if module is not twin
        ]
        self._buffers: dict[nn.Module, dict[str, slice]] = {
            module: _owned_buffers(module, numbers) for module in owners
        }
        for _, twin in self._pairs:
            mark_gathered(twin)

    def __call__(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute as :meth:`Experts.forward`, with numbers of this rank's experts in ``index``."""
        for module, twin in self._pairs:
            twin.training = module.training
            stored: Mapping[str, Tensor | None] = module._parameters
            twin._parameters.update({name: self._local(each) for name, each in stored.items()})
            for name, rows in self._buffers.get(module, {}).items():
                twin._buffers[name] = getattr(module, name)[rows]
        # Hooks on the layer run around its own call.
        return self._experts.forward(states, index, weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalExperts:
        forget_tensors(twin for _, twin in self._pairs)
        return copied(self, memo)

    def _local(self, tensor: Tensor | None) -> nn.Parameter | None:
        """Return this rank's rows of an owned tensor, and any other tensor as it is."""
        if not isinstance(tensor, DTensor) or not any(map(is_rows, tensor.placements)):
            return tensor  # type: ignore[return-value]
        return local_part(tensor, is_rows, 1 / self._ranks)  # type: ignore[return-value]


def _owned_buffers(module: Projection, numbers: range) -> dict[str, slice]:
    """Return the rows of some experts in the buffers of a projection."""
    first, last = module.expert_rows(numbers[0]), module.expert_rows(numbers[-1])
    return {
        name: slice(rows.start, last[name].stop)
        for name, rows in first.items()
        if name in module._buffers
    }


def is_rows(placement: object) -> bool:
    """Return whether a placement spreads rows over ranks."""
    return isinstance(placement, Shard) and placement.dim == 0


def local_part(tensor: DTensor, is_divided: Callable[[Placement], bool], factor: float) -> Tensor:
    """Return this rank's part of a tensor; its gradient is multiplied by a factor.

    Parameters
    ----------
    tensor : DTensor
    is_divided : callable
        Whether a placement divides the tensor. Every rank of the other dimensions of the mesh has
        a part of the gradient, of its own tokens. These are summed.
    factor : float
    """
    gradients = [each if is_divided(each) else Partial() for each in tensor.placements]
    return _SummedGradient.apply(tensor, factor).to_local(grad_placements=gradients)


class _SummedGradient(torch.autograd.Function):
    """A tensor as it is; its gradient is summed over ranks that have parts, and multiplied."""

    @staticmethod
    def forward(ctx, tensor, factor):  # type: ignore[no-untyped-def]
        ctx.factor, ctx.placements = factor, tensor.placements
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return (ctx.factor * gradient).redistribute(placements=ctx.placements), None

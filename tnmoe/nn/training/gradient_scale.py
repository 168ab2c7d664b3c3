"""A factor on the gradients of shared cores."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tnmoe.errors import InputError, check_number_in
from tnmoe.nn.projection import Projection
from tnmoe.nn.stored_cores import is_gathered
from tnmoe.nn.training.hooks import AttachedHooks, Removable, hook_gradient
from tnmoe.nn.training.shared_cores import require_shared_parameters, sharing_projections


class SharedGradientScale(AttachedHooks):
    """A hook that multiplies the gradients of shared cores by a factor.

    Adam and other optimisers that divide by the size of past gradients undo a constant factor.
    What remains is a smaller share of a norm that is clipped. With SGD the factor acts as a
    smaller learning rate.

    Parameters
    ----------
    model : Module
    scale : float, optional
        The factor; by default 1/E, where E is the number of experts of each layer.

    Raises
    ------
    InputError
        If nothing is shared, the scale is negative, or layers that share a core differ in E and no
        scale is given.

    Notes
    -----
    With ``fully_shard`` or ``FullyShardedDataParallel``, create the hook after sharding the model.

    Examples
    --------
    >>> import torch
    >>> from tnmoe.nn import MPOExperts
    >>> experts = MPOExperts(4, 8, 16, sites=3)
    >>> with SharedGradientScale(experts):
    ...     index, weights = torch.zeros(3, 1, dtype=int), torch.ones(3, 1)
    ...     experts(torch.randn(3, 8), index, weights).sum().backward()
    """

    def __init__(self, model: nn.Module, scale: float | None = None) -> None:
        require_shared_parameters(model)
        self.scale = scale if scale is None else check_number_in("scale", scale, "[0, inf)")
        factors = _factors(model, self.scale)
        handles: list[Removable] = [
            hook_gradient(core, partial(_multiplied, factor=factor))
            for core, factor in factors.values()
        ]
        handles += [
            _GatheredScale(module, names, factor, set(factors))
            for module, (names, factor) in _gathering(model, self.scale).items()
        ]
        super().__init__(*handles)

    def __repr__(self) -> str:
        return f"SharedGradientScale(scale={self.scale}, tensors={len(self._handles)})"


class _GatheredScale(AttachedHooks):
    """A factor on the gradients of the tensors that FSDP gathers in place of the parameters.

    The parameters themselves receive no gradients. The gathered tensors exist from the first
    forward pass on, and they may be new ones in every pass.
    """

    def __init__(
        self, module: nn.Module, names: list[str], factor: float, parameters: set[int]
    ) -> None:
        super().__init__(module.register_forward_pre_hook(self._before_forward))
        self._names = names
        self._factor = factor
        self._parameters = parameters  # have their own hooks
        # Holding the tensors keeps their ids from being used again.
        self._hooked: dict[int, tuple[Tensor, RemovableHandle]] = {}

    def _before_forward(self, module: nn.Module, _: Any) -> None:
        tensors = (getattr(module, name) for name in self._names)
        gathered = [
            tensor
            for tensor in tensors
            if tensor.requires_grad and id(tensor) not in self._parameters
        ]
        multiplied = partial(_multiplied, factor=self._factor)
        self._hooked = {
            id(core): self._hooked.get(id(core)) or (core, core.register_hook(multiplied))
            for core in gathered
        }

    def remove(self) -> None:
        super().remove()
        for _, handle in self._hooked.values():
            handle.remove()


def _gathering(model: nn.Module, scale: float | None) -> dict[nn.Module, tuple[list[str], float]]:
    """Return the modules whose shared parameters FSDP gathers, with their names and factor."""
    found: dict[nn.Module, tuple[list[str], float]] = {}
    for projection, parameters in sharing_projections(model).items():
        shared = set(map(id, parameters))
        for module in filter(is_gathered, projection.modules()):
            names = [name for name, each in module._parameters.items() if id(each) in shared]
            if names:
                found.setdefault(module, (names, _factor(projection, scale)))
    return found


def _factors(model: nn.Module, scale: float | None) -> dict[int, tuple[nn.Parameter, float]]:
    """Return every shared core of a model with its factor, by the core's id."""
    factors: dict[int, tuple[nn.Parameter, float]] = {}
    for projection, shared in sharing_projections(model).items():
        factor = _factor(projection, scale)
        for core in shared:
            if factors.setdefault(id(core), (core, factor))[1] != factor:
                raise InputError(
                    "give scale: layers that share a core differ in their numbers of experts"
                )
    return factors


def _factor(projection: Projection, scale: float | None) -> float:
    return 1 / projection.num_experts if scale is None else scale


def _multiplied(gradient: Tensor, factor: float) -> Tensor:
    return gradient * factor

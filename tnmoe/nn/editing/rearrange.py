"""The change of a layer's experts: new rows in all tensors, or no change at all."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnmoe.errors import InputError
from tnmoe.nn.editing.optimizer_state import check_optimizer, selected_state
from tnmoe.nn.moe import MPOMoE
from tnmoe.nn.owned_rows import OwnedRows, check_layer, owned_rows, select_rows
from tnmoe.nn.stored_cores import StoredCores
from tnmoe.nn.training.frozen_experts import frozen_experts_of

# Makes the rows of a fresh expert, given the tensor, the expert's new number and the rows that it
# copies.
NewRows = Callable[[OwnedRows, int, Tensor], Tensor]


def rearrange(
    moe: MPOMoE,
    experts: Sequence[int],
    *,
    fresh: Iterable[int] = (),
    is_open: Sequence[bool],
    new_rows: NewRows | None = None,
    optimizer: Any = None,
) -> None:
    """Give a layer other experts. If that fails, nothing has changed.

    Parameters stay the same objects, so that optimisers and hooks still hold them.

    Parameters
    ----------
    moe : MPOMoE
    experts : sequence of int
        Which old expert every new one is; numbers may repeat.
    fresh : iterable of int
        New numbers of experts that did not exist before. Their gradients and their state in the
        optimiser are zeros.
    is_open : sequence of bool
        Whether the router may choose every new expert.
    new_rows : callable, optional
        Makes the rows of the fresh experts; by default they are copies.
    optimizer : Optimizer, or a wrapper of one, optional
        Its state follows the experts.

    Raises
    ------
    InputError
        If the router cannot choose among the new number of experts, or the layer or the optimiser
        cannot be changed.
    """
    numbers, new = list(experts), frozenset(fresh)
    owned = owned_rows(moe)
    _check_untied(moe)
    if len(numbers) != moe.router.num_experts:
        _check_not_replicated(owned)
    moe.router.check_experts(len(numbers))
    moe.router.check_experts(sum(is_open))
    # Tensors that are made in inference mode could not be trained.
    with torch.inference_mode(False), torch.no_grad():
        tensors = [_new_tensor(each, numbers, new, new_rows) for each in owned]
        gradients = [
            None if (grad := each.tensor.grad) is None else select_rows(grad, each, numbers, new)
            for each in owned
        ]
        states = []
        if optimizer is not None:
            states = selected_state(check_optimizer(optimizer, owned), owned, numbers, new)
        places = [place for place, one in enumerate(is_open) if one]
        device = moe.router.weight.device
        opened = None if all(is_open) else torch.tensor(places, device=device)
        for each, tensor, gradient in zip(owned, tensors, gradients, strict=True):
            _exchange(each, tensor, gradient)
        for state, entries in states:
            state.update(entries)
    moe.router._keep_experts(numbers)
    moe.experts._keep_experts(numbers)
    moe.router.open_experts = opened
    for frozen in frozen_experts_of(moe):
        frozen._renumber(numbers, new)


def are_open(moe: MPOMoE) -> list[bool]:
    """Return whether every expert of a layer is open."""
    check_layer(moe)
    if moe.router.open_experts is None:
        return [True] * moe.router.num_experts
    places = set(moe.router.open_experts.tolist())
    return [expert in places for expert in range(moe.router.num_experts)]


def _check_untied(moe: MPOMoE) -> None:
    for name, module in moe.experts.named_modules():
        if not isinstance(module, StoredCores):
            continue
        if owned := sorted(module._tied_sites - module.shared_sites):
            raise InputError(
                f"{name} has cores of site {owned[0]}, which experts own, in common with another "
                "layer: the experts of one layer cannot change alone"
            )


def _check_not_replicated(owned: Sequence[OwnedRows]) -> None:
    """Raise an InputError if DistributedDataParallel holds a parameter, and with it its shape.

    Nothing on a parameter tells. Its gradients would no longer be reduced, without a message.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    held = {id(each.tensor) for each in owned}
    gc.collect()  # models that nobody uses any more may still be there
    for each in gc.get_objects():
        if issubclass(type(each), nn.parallel.DistributedDataParallel) and any(
            id(parameter) in held for parameter in each.module.parameters()
        ):
            raise InputError(
                "the layer is in a model that DistributedDataParallel wraps: delete the wrapper, "
                "change the experts and wrap the model again"
            )


def _new_tensor(
    owned: OwnedRows, experts: list[int], fresh: frozenset[int], new_rows: NewRows | None
) -> Tensor:
    parts = [owned.tensor.detach()[owned.rows[expert]] for expert in experts]
    if new_rows is not None:
        for place in sorted(fresh):
            parts[place] = new_rows(owned, place, parts[place]).to(parts[place].dtype)
    return torch.cat(parts)


def _exchange(owned: OwnedRows, tensor: Tensor, gradient: Tensor | None) -> None:
    parameter = owned.tensor
    if not isinstance(parameter, nn.Parameter):
        setattr(owned.module, owned.attribute, tensor)
        return
    parameter.grad = None
    if parameter.shape != tensor.shape:
        # Autograd remembers the shape of a parameter as long as somebody keeps an old loss. It
        # forgets what it remembers when the dtype changes.
        other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
        parameter.data = tensor.new_empty(0, dtype=other)
    parameter.data = tensor
    parameter.grad = gradient

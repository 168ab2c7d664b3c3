"""Experts that stay as they are, with their routes, while other experts of their layer train."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from tnmoe.errors import InputError
from tnmoe.nn.moe import MPOMoE
from tnmoe.nn.owned_rows import OwnedRows, check_experts, owned_rows
from tnmoe.nn.training.hooks import AttachedHooks, Removable, hook_gradient
from tnmoe.nn.training.step_hook import Arguments, StepHook, unwrap_optimizer

# Whoever changes the numbers of experts tells those that remember them.
_attached: WeakSet[FrozenExperts] = WeakSet()


class FrozenExperts(AttachedHooks):
    """A hook that keeps experts and their routes as they are, bit for bit, while others train.

    A step of the optimiser changes neither the cores, matrices and biases that these experts own
    nor their rows in the router: weights, biases and load biases. What all experts of the layer
    share does not train at all, since the frozen experts would change with it: shared cores,
    linear modules, common biases, also those that other layers are tied to. Each of the other
    experts trains what it owns.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any optimiser of torch or derived from it, or a wrapper such as accelerate's. Between its
        steps everything may be changed.
    moe : MPOMoE
    experts : int or iterable of int
        Numbers of the experts to freeze. Functions that edit the layer keep them up to date.

    Raises
    ------
    InputError
        If an expert does not exist or is given twice, all experts of the layer are given, or the
        optimiser holds no parameter that experts own.

    Notes
    -----
    An optimiser moves rows with a gradient of zero, by momentum and by weight decay. So the hook
    zeroes their gradients, which clipping then ignores, and after the step writes back what they
    were. Momenta of these rows fade meanwhile.

    **Routes.** A router compares experts. The scores of frozen experts stay, but an open expert
    that trains may come to score higher and take over tokens. While the other experts are closed
    (:func:`close_experts`), the layer computes bit for bit what it did before they were trained:
    close them for old tasks. The shared expert of a layer and the rest of the model train on.
    Freeze them by ``requires_grad_(False)``.

    ``DistributedDataParallel`` waits for a gradient of every tensor that required one when it was
    made. Freeze experts before wrapping, or give it ``find_unused_parameters=True``.

    **Order.** Hooks of an optimiser run in the order of their creation. Freeze experts after
    creating a :class:`BiasBalancer`, whose changes of their load biases are then undone.

    Examples
    --------
    >>> from tnmoe.nn import MPOExperts, TopKRouter
    >>> layer = MPOMoE(TopKRouter(8, 4), MPOExperts(4, 8, 16, layout="residual"))
    >>> optimizer = torch.optim.AdamW(layer.parameters())
    >>> before = layer.router.weight.clone()
    >>> with FrozenExperts(optimizer, layer, [0, 1]):
    ...     layer(torch.randn(32, 8)).square().sum().backward()
    ...     optimizer.step()
    >>> (layer.router.weight == before).all(1)
    tensor([ True,  True, False, False])
    """

    def __init__(self, optimizer: torch.optim.Optimizer, moe: MPOMoE, experts: Any) -> None:
        owned, inner = owned_rows(moe), unwrap_optimizer(optimizer)
        self.experts = check_experts(moe, experts)
        if len(self.experts) == moe.experts.num_experts:
            raise InputError(
                f"no expert would train: all {len(self.experts)} of the layer are to be frozen"
            )
        held = {id(each) for group in inner.param_groups for each in group["params"]}
        if not any(id(each.tensor) in held for each in owned):
            raise InputError("the optimizer holds no parameter that experts of the layer own")
        if others := frozen_experts_of(moe):
            raise InputError(f"experts of the layer are frozen already: remove {others[0]!r} first")
        self._moe = moe
        self._index_rows()
        self._shared = _shared_parameters(moe, owned)
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []
        handles: list[Removable] = [StepHook(inner, self._before_step, self._after_step)]
        handles += [
            hook_gradient(each.tensor, partial(self._without_frozen, each.name))
            for each in owned
            if isinstance(each.tensor, nn.Parameter)
        ]
        super().__init__(*handles)
        for parameter in self._shared:
            parameter.requires_grad_(False)
            parameter.grad = None
        _attached.add(self)

    def __repr__(self) -> str:
        return f"FrozenExperts({self.experts} of {self._moe.experts.num_experts})"

    def remove(self) -> None:
        """Detach the hook: from now on all experts train, and what they share."""
        super().remove()
        for parameter in self._shared:
            parameter.requires_grad_(True)
        self._shared = []
        _attached.discard(self)

    def _renumber(self, experts: Sequence[int], fresh: frozenset[int]) -> None:
        """Follow the frozen experts of a layer whose experts have changed.

        Parameters
        ----------
        experts : sequence of int
            Which old expert every new one is.
        fresh : frozenset of int
            New numbers of experts that did not exist before.
        """
        self.experts = [
            place
            for place, expert in enumerate(experts)
            if expert in self.experts and place not in fresh
        ]
        self._index_rows()

    def _index_rows(self) -> None:
        """Note the tensors of the layer, and the numbers of their frozen rows."""
        self._rows = {
            each.name: (each, _numbers([each.rows[expert] for expert in self.experts]))
            for each in owned_rows(self._moe)
        }

    def _without_frozen(self, name: str, gradient: Tensor) -> Tensor:
        return gradient.index_fill(0, self._rows[name][1].to(gradient.device), 0)

    @torch.no_grad()
    def _before_step(self, args: tuple, kwargs: dict[str, Any]) -> Arguments:
        self._before = []
        for each, numbers in self._rows.values():
            tensor, rows = each.tensor, numbers.to(each.tensor.device)
            if tensor.grad is not None:  # from before the freezing
                tensor.grad.index_fill_(0, rows, 0)
            self._before.append((tensor, rows, tensor.index_select(0, rows)))
        return args, kwargs

    @torch.no_grad()
    def _after_step(self) -> None:
        for tensor, rows, values in self._before:
            tensor.index_copy_(0, rows, values)
        self._before = []


def _numbers(rows: Iterable[slice]) -> Tensor:
    """Return the numbers of the rows in slices."""
    return torch.tensor([number for each in rows for number in range(each.start, each.stop)]).long()


def frozen_experts_of(moe: MPOMoE) -> list[FrozenExperts]:
    """Return the hooks that freeze experts of a layer."""
    return [frozen for frozen in _attached if frozen._moe is moe]


def _shared_parameters(moe: MPOMoE, owned: list[OwnedRows]) -> list[nn.Parameter]:
    """Return the trained parameters of a layer's experts that no single expert owns."""
    of_experts = {id(each.tensor) for each in owned}
    return [
        parameter
        for parameter in moe.experts.parameters()
        if id(parameter) not in of_experts and parameter.requires_grad
    ]

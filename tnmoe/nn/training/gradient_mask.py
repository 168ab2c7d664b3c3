"""The gradient mask: spare the tensors that experts share some of the optimiser's steps.

A shared tensor is updated by the tokens of all experts, an expert's own by its tokens only; the
mask evens that out (Gao et al., arXiv:2203.01104, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from tnmoe.errors import InputError, flag, integer_from_zero, number_in
from tnmoe.nn.experts import Experts
from tnmoe.nn.mpo_projection import MPOProjection
from tnmoe.nn.training.shared_cores import find_shared, hook_gradient
from tnmoe.nn.training.step_hook import Arguments, StepHook, innermost

Probability = float | Callable[[int], float]


def checked_probability(probability: Probability) -> Probability:
    """The probability as a float, or the schedule; an InputError unless it is in [0, 1]."""
    if callable(probability):
        return probability
    return number_in("probability", probability, "[0, 1]")


class _Mask:
    """Which tensors sit out which steps, as a function of (seed, step), and what came of it.

    Attributes
    ----------
    step : int
        Number of the coming step.
    masked_steps : int
        Steps so far that spared at least one tensor.
    updates : dict from str to int
        How many updates each tensor has received, by its name in the model, or its number where
        tensors were given.
    """

    def __init__(
        self,
        parameters_or_model: nn.Module | Iterable[nn.Parameter],
        probability: Probability,
        seed: int,
        per_layer: bool,
    ) -> None:
        self._model = parameters_or_model if isinstance(parameters_or_model, nn.Module) else None
        if isinstance(parameters_or_model, nn.Module):
            self._tensors = _named_shared(parameters_or_model)
            layer_of = _layers(parameters_or_model)
        else:
            self._tensors = {str(i): each for i, each in enumerate(parameters_or_model)}
            layer_of = {id(each): i for i, each in enumerate(self._tensors.values())}
        if not self._tensors:
            raise InputError("there is nothing to mask: no tensor was given")
        per_layer = flag("per_layer", per_layer)
        self._layer = {
            name: layer_of[id(each)] if per_layer else 0 for name, each in self._tensors.items()
        }
        self.probability = checked_probability(probability)
        self.seed = integer_from_zero("seed", seed)
        self.per_layer = per_layer
        self.step = 0
        self.masked_steps = 0
        self.updates = dict.fromkeys(self._tensors, 0)
        self.probability_at(0)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(probability={self.probability}, seed={self.seed}, "
            f"per_layer={self.per_layer}, tensors={len(self._tensors)}, step={self.step}, "
            f"masked_steps={self.masked_steps})"
        )

    def _check_among(self, held: Iterable[Tensor], failing: str) -> None:
        """Raise an InputError unless the tensors to mask are among others, by identity."""
        there = {id(each) for each in held}
        missing = [name for name, each in self._tensors.items() if id(each) not in there]
        if missing:
            raise InputError(
                f"{failing} {len(missing)} of the {len(self._tensors)} shared tensors to mask: "
                f"{', '.join(missing[:4])}{', …' if len(missing) > 4 else ''}; what wraps or "
                "copies a model makes other parameters: make first the optimizer and then the "
                "mask of the model that is trained"
            )

    def probability_at(self, step: int) -> float:
        """Probability of being masked at a step.

        Raises
        ------
        InputError
            If it is not in [0, 1].
        """
        if not callable(self.probability):
            return number_in("probability", self.probability, "[0, 1]")
        return number_in(f"probability at step {step}", self.probability(step), "[0, 1]")

    def masks(self, step: int) -> dict[str, bool]:
        """Which tensors sit out a step, by name."""
        draws = np.random.default_rng((self.seed, step)).random(1 + max(self._layer.values()))
        masked = draws < self.probability_at(step)
        return {name: bool(masked[layer]) for name, layer in self._layer.items()}

    def _masked_now(self) -> list[nn.Parameter]:
        masks = self.masks(self.step)
        return [each for name, each in self._tensors.items() if masks[name]]

    def _finish_step(self, updated: Callable[[Tensor], bool]) -> None:
        """Count the step that was made, and go on to the next one."""
        masks = self.masks(self.step)
        for name, each in self._tensors.items():
            self.updates[name] += not masks[name] and updated(each)
        self.masked_steps += any(masks.values())
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to continue the sequence of draws.

        A schedule of probabilities is a function, and not part of it.
        """
        return {
            "seed": self.seed,
            "step": self.step,
            "masked_steps": self.masked_steps,
            "probability": None if callable(self.probability) else self.probability_at(self.step),
            "per_layer": self.per_layer,
            "updates": dict(self.updates),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a sequence of draws.

        Raises
        ------
        InputError
            If the state is of a mask of other tensors or of another kind, or lacks something, or
            holds what no mask can have. Nothing is changed then.
        """
        if missing := sorted(set(_Mask.state_dict(self)) - set(state)):
            raise InputError(f"the state of a mask lacks {', '.join(missing)}")
        if not isinstance(state["updates"], Mapping) or set(state["updates"]) != set(self.updates):
            raise InputError(
                f"the state is of a mask of {_names(state['updates'])}, "
                f"this one is of {_names(self.updates)}"
            )
        if state["per_layer"] != self.per_layer:
            raise InputError(
                f"the state is of a mask with per_layer={state['per_layer']}, "
                f"this one has per_layer={self.per_layer}"
            )
        counts = {
            name: integer_from_zero(f"the state's {name}", state[name])
            for name in ("seed", "step", "masked_steps")
        }
        updates = {
            name: integer_from_zero(f"the state's updates of {name}", count)
            for name, count in state["updates"].items()
        }
        probability = state["probability"]
        if not callable(self.probability) and probability is not None:
            self.probability = number_in("the state's probability", probability, "[0, 1]")
        self.seed, self.step, self.masked_steps = counts.values()
        self.updates = updates


class GradientMask(_Mask):
    """Skip the update of shared tensors with a probability, drawn anew at every step.

    A masked tensor is hidden from the optimiser for the step (``grad = None``), so that momentum
    and weight decay leave it alone too, which a gradient of zero would not achieve. There is one
    draw per step of the optimiser, however many backward passes came before it.

    The draws are a function of (seed, step) only: all ranks of a distributed run agree, and a
    resumed run continues the sequence.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any of torch's, or derived from them, or a wrapper of one such as accelerate's; the mask
        hooks into its ``step``.
    parameters_or_model : Module or iterable of Parameter
        A model, whose shared tensors are masked, or the parameters themselves.
    probability : float, or callable from int to float
        Probability of skipping, per step: 0 never, 1 freezes the tensors. Or a schedule: a
        function of the step's number, which starts at 0.
    seed : int
        Seed of the draws.
    per_layer : bool
        Draw for every layer of experts by itself; by default one draw is for all.
    on_arrival : bool
        Zero gradients as soon as a backward pass has them, so that whatever clips does not count
        them. Not for ``DistributedDataParallel``, which needs them when they arrive.

    Raises
    ------
    InputError
        If the probability is not in [0, 1], there is nothing to mask, or the optimiser does not
        hold the parameters.

    Notes
    -----
    **Clipping.** A norm taken over all gradients before ``step`` counts those that the mask is
    about to drop, and the others are cut by more than need be. :meth:`clip_grad_norm_` zeroes them
    first; so does :meth:`apply`, before any other way of clipping, and so does ``on_arrival``.

    **GradScaler.** ``scaler.step(optimizer)`` makes no step, and no draw, where it finds infinity;
    with a fused optimiser, which looks for infinity itself, the draw is spent and the update
    counted.

    **Closures.** Gradients that ``step(closure)`` computes are masked after every evaluation. A
    masked tensor's values are restored after the step, for optimisers like LBFGS, which move it
    by what they remember; their memory then has a step in it that was not made.

    Examples
    --------
    >>> import torch
    >>> from tnmoe.nn import MPOExperts, GradientMask
    >>> experts = MPOExperts(2, 8, 16, sites=2)
    >>> optimizer = torch.optim.AdamW(experts.parameters())
    >>> index, weights = torch.zeros(3, 1, dtype=int), torch.ones(3, 1)
    >>> before = experts.up.center.clone()
    >>> with GradientMask(optimizer, experts, probability=1.0) as mask:
    ...     experts(torch.randn(3, 8), index, weights).sum().backward()
    ...     norm = mask.clip_grad_norm_(experts.parameters(), 1.0)
    ...     optimizer.step()
    >>> bool((experts.up.center == before).all()), mask.updates
    (True, {'up.center': 0, 'down.center': 0})

    A schedule, from 0.9 down to 0 over a thousand steps:

    >>> mask = GradientMask(optimizer, experts, lambda step: max(0.0, 0.9 * (1 - step / 1000)))
    >>> mask.remove()
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters_or_model: nn.Module | Iterable[nn.Parameter],
        probability: Probability,
        seed: int = 0,
        per_layer: bool = False,
        on_arrival: bool = False,
    ) -> None:
        super().__init__(parameters_or_model, probability, seed, per_layer)
        optimizer = innermost(optimizer, "; for engines with their own steps, use AutogradMask")
        self._optimizer = optimizer
        self._check_held()
        # Values that masked tensors have before a step with a closure.
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        self._handles: list[Any] = [StepHook(optimizer, self._before_step, self._after_step)]
        if on_arrival:
            self._handles += [
                hook_gradient(each, partial(self._arrived, name))
                for name, each in self._tensors.items()
            ]

    def _check_held(self) -> None:
        """Raise an InputError unless the optimizer has all the tensors that are to be masked."""
        self._check_among(
            (each for group in self._optimizer.param_groups for each in group["params"]),
            "the optimizer does not hold",
        )

    def apply(self) -> None:
        """Zero the gradients that the coming step is to do without; it drops them altogether.

        Until then they are there: a GradScaler wants to see one at least.
        """
        for parameter in self._masked_now():
            _zero_gradient(parameter)

    def _drop(self) -> None:
        for parameter in self._masked_now():
            parameter.grad = None

    def _arrived(self, name: str, parameter: Tensor) -> None:
        if self.masks(self.step)[name]:
            _zero_gradient(parameter)

    def clip_grad_norm_(
        self, parameters: Iterable[Tensor], max_norm: float, **options: Any
    ) -> Tensor:
        """Clip as ``torch.nn.utils.clip_grad_norm_`` does, without what is about to be dropped.

        Parameters
        ----------
        parameters, max_norm, **options
            As for torch's function.

        Returns
        -------
        Tensor
            Norm of the gradients that are left.
        """
        self.apply()
        return nn.utils.clip_grad_norm_(parameters, max_norm, **options)

    def _before_step(self, args: tuple, kwargs: dict[str, Any]) -> Arguments:
        # What wraps a model may exchange its parameters, those of the optimiser as well.
        self._check_held()
        self._drop()
        self._before = []
        closure = args[0] if args else kwargs.get("closure")
        if closure is None:
            return args, kwargs
        self._before = [(each, each.detach().clone()) for each in self._masked_now()]

        def masked_closure() -> Any:
            try:
                loss = closure()
            except BaseException:
                self._restore()
                raise
            self._drop()
            return loss

        if args:
            return (masked_closure, *args[1:]), kwargs
        return args, {**kwargs, "closure": masked_closure}

    @torch.no_grad()
    def _restore(self) -> None:
        for parameter, value in self._before:
            parameter.copy_(value)
        self._before = []

    def _after_step(self) -> None:
        self._restore()
        self._finish_step(lambda parameter: parameter.grad is not None)

    def remove(self) -> None:
        """Detach from the optimiser."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class AutogradMask(_Mask):
    """The gradient mask for engines whose optimiser steps inside ``backward``.

    There is no moment between gradient and update in which a gradient could be dropped. So
    masked tensors require no gradient during the step: none arrives, none is computed, and no
    engine updates them.

    Parameters
    ----------
    parameters_or_model, probability, seed, per_layer
        As for :class:`GradientMask`; the same seed gives the same draws.

    Raises
    ------
    InputError
        If the probability is not in [0, 1] or there is nothing to mask.

    Notes
    -----
    ``DistributedDataParallel`` waits for every gradient that it has seen a tensor require: give
    it ``find_unused_parameters=True``.

    Examples
    --------
    >>> import torch
    >>> from tnmoe.nn import MPOExperts
    >>> experts = MPOExperts(2, 8, 16, sites=2)
    >>> index, weights = torch.zeros(3, 1, dtype=int), torch.ones(3, 1)
    >>> mask = AutogradMask(experts, probability=1.0)
    >>> with mask.next_step():
    ...     experts(torch.randn(3, 8), index, weights).sum().backward()
    >>> experts.up.center.grad is None, experts.up.center.requires_grad
    (True, True)
    """

    def __init__(
        self,
        parameters_or_model: nn.Module | Iterable[nn.Parameter],
        probability: Probability,
        seed: int = 0,
        per_layer: bool = False,
    ) -> None:
        super().__init__(parameters_or_model, probability, seed, per_layer)

    @contextmanager
    def next_step(self) -> Iterator[None]:
        """Mask one step: all its forward and backward passes belong into the block.

        A block that ends with an exception counts as no step.
        """
        if self._model is not None:
            self._check_among(self._model.parameters(), "the model no longer has")
        masked = [each for each in self._masked_now() if each.requires_grad]
        for parameter in masked:
            parameter.requires_grad_(False)
            # An optimiser would go on with one that has been left there, a zero even.
            parameter.grad = None
        try:
            yield
        finally:
            for parameter in masked:
                parameter.requires_grad_(True)
        self._finish_step(lambda parameter: parameter.requires_grad)


def _zero_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad.zero_()


def _names(updates: Any) -> Any:
    return sorted(updates) if isinstance(updates, Mapping) else updates


def _named_shared(model: nn.Module) -> dict[str, nn.Parameter]:
    """Shared tensors of a model by their names."""
    shared = {id(each) for each in find_shared(model)}
    return {name: each for name, each in model.named_parameters() if id(each) in shared}


def _layers(model: nn.Module) -> dict[int, int]:
    """Number of the layer of experts, the first one, that each shared tensor belongs to."""
    numbers: dict[int, int] = {}
    layers = [each for each in model.modules() if isinstance(each, Experts | MPOProjection)]
    for number, layer in enumerate(layers):
        for projection in layer.modules():
            if isinstance(projection, MPOProjection):
                for core in projection.shared_cores:
                    numbers.setdefault(id(core), number)
    return numbers

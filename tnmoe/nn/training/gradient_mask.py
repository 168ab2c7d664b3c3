"""The gradient mask: it lets the cores that experts share skip some of the optimiser's steps.

The tokens of all experts update a shared core, but only an expert's own tokens update the cores
that it owns. The mask compensates for that (Gao et al., arXiv:2203.01104, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tnmoe.nn.training.base_mask import BaseMask, Probability
from tnmoe.nn.training.clipping import clip_grad_norm_
from tnmoe.nn.training.hooks import AttachedHooks, Removable, hook_accumulated_gradient
from tnmoe.nn.training.step_hook import Arguments, StepHook, unwrap_optimizer


class GradientMask(BaseMask, AttachedHooks):
    """A hook that skips the update of shared cores with a probability, drawn at every step.

    In a masked step the optimiser does not see the core (``grad = None``), so momentum and weight
    decay do not move it either. A gradient of zero would not achieve that. There is one
    draw per step of the optimiser, however many backward passes precede it.

    The draws are a function of (seed, step) only: all ranks of a distributed run agree, and a
    resumed run continues the sequence.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any optimiser of torch or derived from it, or a wrapper such as accelerate's. The mask
        hooks into its ``step``.
    parameters_or_model : Module or iterable of Parameter
        A model, whose shared cores are masked, or the parameters themselves.
    probability : float, or callable from int to float
        Probability of skipping a step: 0 never skips, 1 freezes the tensors. Or a schedule: a
        function of the step's number, which starts at 0.
    seed : int
        Seed of the draws.
    per_layer : bool
        Draw for every layer of experts separately; by default one draw applies to all layers.
    zero_in_backward : bool
        Zero masked gradients as soon as a backward pass computes them, so that clipping by any
        means ignores them. Not for ``DistributedDataParallel``, which needs the gradients then.

    Raises
    ------
    InputError
        If the probability is not in [0, 1], there is nothing to mask, or the optimiser does not
        hold the parameters.

    Notes
    -----
    **Clipping.** A norm over all gradients before ``step`` includes those that the mask is about
    to drop, and the remaining gradients are clipped more than necessary.
    :meth:`clip_grad_norm_` zeroes the masked gradients first. For other ways of clipping, call
    :meth:`zero_masked_gradients` first, or set ``zero_in_backward``.

    **GradScaler.** Where it finds infinity, ``scaler.step(optimizer)`` makes no step and no draw.
    A fused optimiser looks for infinity itself: then the draw is spent and the update counts.

    **Closures.** Gradients that ``step(closure)`` computes are masked after every evaluation.
    LBFGS and similar optimisers move a tensor by what they remember, so the mask restores the
    values of masked tensors after the step. The optimiser's memory then contains a step that was
    not made.

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
        *,
        seed: int = 0,
        per_layer: bool = False,
        zero_in_backward: bool = False,
    ) -> None:
        BaseMask.__init__(self, parameters_or_model, probability, seed, per_layer)
        advice = "; for engines with their own steps, use AutogradMask"
        self._optimizer = unwrap_optimizer(optimizer, advice)
        self._check_optimizer_holds_tensors()
        # Values that masked tensors had before a step with a closure.
        self._values_before: list[tuple[nn.Parameter, Tensor]] = []
        handles: list[Removable] = [StepHook(self._optimizer, self._before_step, self._after_step)]
        if zero_in_backward:
            handles += [
                hook_accumulated_gradient(tensor, partial(self._zero_if_masked, name))
                for name, tensor in self._tensors.items()
            ]
        AttachedHooks.__init__(self, *handles)

    def zero_masked_gradients(self) -> None:
        """Zero the gradients that the coming step drops.

        They exist until the step: a GradScaler needs to see at least one gradient.
        """
        for parameter in self._masked_tensors():
            _zero_gradient(parameter)

    def clip_grad_norm_(
        self, parameters: Iterable[Tensor], max_norm: float, **options: Any
    ) -> Tensor:
        """Clip as :func:`tnmoe.nn.clip_grad_norm_` does, without the masked gradients.

        Parameters
        ----------
        parameters, max_norm, **options
            As for that function.

        Returns
        -------
        Tensor
            Norm of the remaining gradients.
        """
        self.zero_masked_gradients()
        return clip_grad_norm_(parameters, max_norm, **options)

    def _check_optimizer_holds_tensors(self) -> None:
        groups = self._optimizer.param_groups
        parameters = (parameter for group in groups for parameter in group["params"])
        self._check_tensors_in(parameters, "the optimizer does not hold")

    def _before_step(self, args: tuple, kwargs: dict[str, Any]) -> Arguments:
        # Wrappers of a model may exchange its parameters, in the optimiser as well.
        self._check_optimizer_holds_tensors()
        self._drop_masked_gradients()
        self._values_before = []
        closure = args[0] if args else kwargs.get("closure")
        if closure is None:
            return args, kwargs
        masked = self._masked_tensors()
        self._values_before = [(parameter, parameter.detach().clone()) for parameter in masked]
        masked_closure = partial(self._evaluate, closure)
        if args:
            return (masked_closure, *args[1:]), kwargs
        return args, {**kwargs, "closure": masked_closure}

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """Call the closure of a step, and drop the masked gradients that it computed."""
        try:
            loss = closure()
        except BaseException:
            self._restore_values()
            raise
        self._drop_masked_gradients()
        return loss

    def _after_step(self) -> None:
        self._restore_values()
        self._finish_step(lambda parameter: parameter.grad is not None)

    def _drop_masked_gradients(self) -> None:
        for parameter in self._masked_tensors():
            parameter.grad = None

    @torch.no_grad()
    def _restore_values(self) -> None:
        for parameter, value in self._values_before:
            parameter.copy_(value)
        self._values_before = []

    def _zero_if_masked(self, name: str, parameter: Tensor) -> None:
        if self.masks(self.step)[name]:
            _zero_gradient(parameter)


def _zero_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad.zero_()

"""The gradient mask: spare the shared central tensors some of the optimiser's steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from tnmoe.errors import InputError
from tnmoe.nn.projection import SharedProjection


def central_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Central tensors of all shared projections of a model, each once."""
    centers = [m.center for m in model.modules() if isinstance(m, SharedProjection)]
    return list({id(center): center for center in centers}.values())


class GradientMask:
    """Skip the update of central tensors with a probability, drawn anew at every step.

    A central tensor is updated by the tokens of all experts, an auxiliary one only by its own
    expert's; the mask evens that out (Gao et al., arXiv:2203.01104, section 3.3). A masked tensor
    is hidden from the optimiser for the step (``grad = None``), so that momentum and weight decay
    leave it alone too, which a gradient of zero would not achieve.

    The draw is a function of (seed, step) only: all ranks of a distributed run agree, and a
    resumed run continues the sequence.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        The mask hooks into its ``step``; gradients must exist when ``step`` is called, so
        optimisers that compute them inside a closure are not covered.
    parameters_or_model : Module or iterable of Parameter
        A model, whose central tensors are masked, or the parameters themselves.
    probability : float
        Probability of skipping, per step: 0 never, 1 freezes the tensors.
    seed : int
        Seed of the draws.

    Raises
    ------
    InputError
        If the probability is not in [0, 1], there is nothing to mask, or the optimiser does not
        hold the parameters.

    Examples
    --------
    >>> import torch
    >>> from tnmoe.nn import MPOExperts, GradientMask
    >>> experts = MPOExperts(2, 8, 16, sites=2)
    >>> optimizer = torch.optim.AdamW(experts.parameters())
    >>> index, weights = torch.zeros(3, 1, dtype=int), torch.ones(3, 1)
    >>> before = experts.up.center.clone()
    >>> with GradientMask(optimizer, experts, probability=1.0):
    ...     experts(torch.randn(3, 8), index, weights).sum().backward()
    ...     optimizer.step()
    >>> bool((experts.up.center == before).all())
    True
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters_or_model: nn.Module | Iterable[nn.Parameter],
        probability: float,
        seed: int = 0,
    ) -> None:
        if not 0 <= probability <= 1:
            raise InputError(f"probability must be in [0, 1], got {probability!r}")
        if isinstance(parameters_or_model, nn.Module):
            self.parameters = central_parameters(parameters_or_model)
        else:
            self.parameters = list(parameters_or_model)
        if not self.parameters:
            raise InputError("there is nothing to mask: found no central tensor")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = sum(id(parameter) not in held for parameter in self.parameters)
        if missing:
            raise InputError(
                f"the optimizer does not hold {missing} of the {len(self.parameters)} central "
                "tensors to mask"
            )
        self.probability = probability
        self.seed = seed
        self.step = 0
        self.masked_steps = 0
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def masks(self, step: int) -> bool:
        """Whether the central tensors sit out this step."""
        return bool(np.random.default_rng((self.seed, step)).random() < self.probability)

    def _before_step(self, *_: Any) -> None:
        if self.masks(self.step):
            self.masked_steps += 1
            for parameter in self.parameters:
                parameter.grad = None
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to continue the sequence of draws."""
        return {
            "seed": self.seed,
            "step": self.step,
            "masked_steps": self.masked_steps,
            "probability": self.probability,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a sequence of draws."""
        self.seed = state["seed"]
        self.step = state["step"]
        self.masked_steps = state["masked_steps"]
        self.probability = state["probability"]

    def remove(self) -> None:
        """Detach from the optimiser."""
        self._handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

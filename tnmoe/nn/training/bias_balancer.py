"""The balancer of load biases, which moves them after every step of an optimiser."""

from __future__ import annotations

import torch
from torch import nn

from tnmoe.errors import InputError, check_number_in
from tnmoe.nn.routing.load_bias import LoadBias
from tnmoe.nn.training.hooks import AttachedHooks
from tnmoe.nn.training.step_hook import StepHook, unwrap_optimizer


class BiasBalancer(AttachedHooks):
    """A hook that moves the load biases of a model's routers after every step of an optimiser.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        The biases move after each of its steps.
    model : Module
        Its routers with ``load_bias=True`` are balanced.
    rate : float
        How far a bias moves in a step. DeepSeek-V3 used 0.001, and 0 at the end of training.

    Raises
    ------
    InputError
        If no router has a load bias or the rate is negative.

    Examples
    --------
    >>> import torch
    >>> from tnmoe.nn import TopKRouter
    >>> router = TopKRouter(8, 4, top_k=2, score_function="sigmoid", load_bias=True)
    >>> optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    >>> with BiasBalancer(optimizer, router, rate=0.001):
    ...     _, weights, _ = router(torch.randn(16, 8))
    ...     weights.square().sum().backward()
    ...     optimizer.step()
    >>> bool(router.load_bias.value.abs().max() <= 0.001)
    True
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, rate: float = 1e-3
    ) -> None:
        self.biases = [module for module in model.modules() if isinstance(module, LoadBias)]
        if not self.biases:
            raise InputError("there is nothing to balance: no router has load_bias=True")
        self.rate = check_number_in("rate", rate, "[0, inf)")
        self._routers = {
            bias: module
            for module in model.modules()
            for bias in module.children()
            if isinstance(bias, LoadBias)
        }
        super().__init__(StepHook(unwrap_optimizer(optimizer), after=self._update_biases))

    def __repr__(self) -> str:
        return f"BiasBalancer(rate={self.rate}, routers={len(self.biases)})"

    def _update_biases(self) -> None:
        for bias in self.biases:
            bias.update(self.rate, getattr(self._routers.get(bias), "open_experts", None))

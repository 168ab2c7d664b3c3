"""Balance without a loss: a bias on the scores that choose experts, moved by their load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from tnmoe.errors import InputError, number_in
from tnmoe.nn.routing.counts import choices_per_expert
from tnmoe.nn.training.step_hook import StepHook, innermost
from tnmoe.nn.transforms import in_backward


class LoadBias(nn.Module):
    """A bias per expert, and how many choices each got since the bias was last moved.

    Wang et al., arXiv:2408.15664, algorithm 1; DeepSeek-V3, arXiv:2412.19437, section 2.1.2.

    Parameters
    ----------
    num_experts : int
        Number of experts E.
    device : device or str, optional
        Where it is.

    Attributes
    ----------
    value : Tensor of float32, shape (E,)
        A buffer, saved with the model. It stays in float32 when the model is cast: in half
        precision its small steps would be lost.
    counts : Tensor of int64, shape (E,)
        Not a buffer: neither saved nor, in a distributed run, overwritten by another rank's.

    Examples
    --------
    >>> bias = LoadBias(3)
    >>> bias.count(torch.tensor([[0], [0], [1]]), mask=None)  # experts of three tokens
    >>> bias.update(rate=0.1)
    >>> bias.value
    tensor([-0.1000,  0.0000,  0.1000])
    """

    value: Tensor

    def __init__(self, num_experts: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        zeros = torch.zeros(num_experts, dtype=torch.float32, device=device)
        self.register_buffer("value", zeros)
        self.counts = torch.zeros_like(zeros, dtype=torch.int64)

    def forward(self, scores: Tensor) -> Tensor:
        """``scores``, (T, E), and the bias of every expert."""
        return scores + self.value.to(scores.dtype)

    def reset(self) -> None:
        """Start again without a bias."""
        self.value.zero_()
        self.counts = torch.zeros_like(self.value, dtype=torch.int64)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.value
        super()._apply(fn, recurse)
        if self.value.dtype != torch.float32:
            moved = torch.zeros_like(self.value, dtype=torch.float32)
            self.value = moved if before.is_meta else moved.copy_(before)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.value = self.value.float()

    @torch.no_grad()
    def count(self, index: Tensor, mask: Tensor | None) -> None:
        """Add the choices of tokens.

        Parameters
        ----------
        index : Tensor of int64, shape (T, k)
            Experts of every token; E stands for none.
        mask : Tensor of bool, shape (T,), or None
            Tokens where it is False do not count.
        """
        if in_backward():
            return
        if self.counts.device != index.device:
            self.counts = torch.zeros_like(self.counts, device=index.device)
        self.counts += choices_per_expert(index, mask, self.counts.shape[0])

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """Raise the bias of experts with less than the mean load by ``rate``, lower the others'.

        In a distributed run the load is that of all ranks.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.counts)
        counts = self.counts.to(self.value.device, torch.float32)
        self.value += rate * (counts.mean() - counts).sign()
        self.counts.zero_()


class BiasBalancer:
    """Move the load biases of a model's routers after every step of an optimiser.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        After each of its steps the biases are moved.
    model : Module
        Its routers with ``load_bias=True`` are balanced.
    rate : float
        How far a bias moves in a step; DeepSeek-V3 used 0.001, and 0 at the end of training.

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
        self.rate = number_in("rate", rate, "[0, inf)")
        self._handle = StepHook(innermost(optimizer), after=self._after_step)

    def __repr__(self) -> str:
        return f"BiasBalancer(rate={self.rate}, routers={len(self.biases)})"

    def _after_step(self) -> None:
        for bias in self.biases:
            bias.update(self.rate)

    def remove(self) -> None:
        """Detach from the optimiser."""
        self._handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

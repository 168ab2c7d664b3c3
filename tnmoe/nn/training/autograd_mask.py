"""The gradient mask for engines whose optimiser steps inside ``backward``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from tnmoe.nn.training.base_mask import BaseMask, Probability


class AutogradMask(BaseMask):
    """The gradient mask for engines whose optimiser steps inside ``backward``.

    Such an engine leaves no moment between gradient and update in which a gradient could be
    dropped. So masked tensors require no gradient during the step: autograd computes none, and no
    engine updates the tensors.

    Parameters
    ----------
    parameters_or_model, probability, seed, per_layer
        As for :class:`GradientMask`. The same seed gives the same draws.

    Raises
    ------
    InputError
        If the probability is not in [0, 1] or there is nothing to mask.

    Notes
    -----
    ``DistributedDataParallel`` waits for a gradient of every tensor that required one when it was
    made. Give it ``find_unused_parameters=True``.

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
        *,
        seed: int = 0,
        per_layer: bool = False,
    ) -> None:
        super().__init__(parameters_or_model, probability, seed, per_layer)

    @contextmanager
    def next_step(self) -> Iterator[None]:
        """Mask one step: all its forward and backward passes belong in the block.

        A block that ends with an exception does not count as a step.
        """
        if self._model is not None:
            self._check_tensors_in(self._model.parameters(), "the model no longer has")
        masked = [tensor for tensor in self._masked_tensors() if tensor.requires_grad]
        for parameter in masked:
            parameter.requires_grad_(False)
            # An optimiser would apply an old gradient, even one of zeros.
            parameter.grad = None
        try:
            yield
        finally:
            for parameter in masked:
                parameter.requires_grad_(True)
        self._finish_step(lambda parameter: parameter.requires_grad)

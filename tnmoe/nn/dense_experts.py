"""Experts that share nothing: an ordinary mixture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import numpy as np
import torch
from torch import Tensor

from tnmoe.errors import check_generator
from tnmoe.nn.experts import Experts
from tnmoe.nn.pretrained_ffn import PretrainedFFN, Source
from tnmoe.nn.projection import Bias, StackedProjection
from tnmoe.nn.settings import projection_sizes


class DenseExperts(Experts):
    """Experts that each own their whole matrices: an ordinary mixture of experts.

    Parameters
    ----------
    num_experts, hidden_size, intermediate_size : int
        Sizes E, H, F.
    activation, dropout
        As for :class:`Experts`.
    gated : bool
        Whether there is a gate projection.
    bias : bool or "common"
        Whether the projections of every expert have biases of their own, or all experts have them
        in common.
    device, dtype : optional
        Device and dtype of the parameters, as for torch's own layers.

    Examples
    --------
    >>> experts = DenseExperts(num_experts=4, hidden_size=8, intermediate_size=16)
    >>> experts.up.weight().shape, experts.down.weight().shape
    (torch.Size([4, 16, 8]), torch.Size([4, 8, 16]))
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str | Callable[..., Tensor] = "relu",
        *,
        gated: bool = False,
        bias: Bias = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        projections = {
            name: StackedProjection(num_experts, *size, bias=bias, device=device, dtype=dtype)
            for name, size in projection_sizes(hidden_size, intermediate_size, gated).items()
        }
        super().__init__(**projections, activation=activation, dropout=dropout)

    @classmethod
    def from_dense(
        cls,
        up: Source,
        down: Source,
        gate: Source | None = None,
        *,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        gate_bias: Tensor | None = None,
        common_bias: bool = False,
        num_experts: int = 8,
        activation: str | Callable[..., Tensor] = "relu",
        dropout: float = 0.0,
        noise: float = 0.0,
        rng: np.random.Generator | int | None = None,
    ) -> Self:
        """Start all experts as one pretrained FFN (sparse upcycling, arXiv:2212.05055).

        Parameters
        ----------
        up, down, gate, up_bias, down_bias, gate_bias, common_bias, num_experts
            As for :meth:`MPOExperts.from_dense`.
        activation, dropout
            As for :class:`Experts`.
        noise : float
            Noise on every expert's matrices, relative to the root mean square of each matrix.
        rng : numpy Generator or int, optional
            Source of the noise.

        Raises
        ------
        InputError
            If the matrices or biases do not fit each other.
        """
        rng = check_generator(rng)
        given = PretrainedFFN.of(
            {"up": up, "down": down, "gate": gate},
            {"up": up_bias, "down": down_bias, "gate": gate_bias},
        )
        projections = {
            name: StackedProjection.from_dense(matrix, num_experts, noise, rng)
            for name, matrix in given.weights.items()
        }
        return cls._from_projections(
            projections,
            given.biases,
            common_bias=common_bias,
            activation=activation,
            dropout=dropout,
        )

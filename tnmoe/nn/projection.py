"""Projections: one matrix per expert, as a module; here with matrices that are stored whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import sqrt
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from tnmoe.contraction.layer_plan import Work
from tnmoe.errors import (
    InputError,
    check_generator,
    check_one_of,
    check_positive_int,
    to_python_scalar,
)
from tnmoe.nn.compute.grouped import grouped_linear, per_row
from tnmoe.nn.compute.once_per_token import FirstProduct, LastProduct, Load
from tnmoe.nn.compute.slots import DenseDispatch, Groups
from tnmoe.shared_mpo import replicate

Bias = bool | Literal["common"]
BIASES = (False, True, "common")


class Projection(nn.Module, ABC):
    """E matrices (out, in), one per expert, and optionally a bias each.

    Parameters
    ----------
    num_experts, out_features, in_features : int
        Sizes.
    bias : bool or "common"
        Whether every expert has a bias of its own, or all experts have one in common.
    device, dtype
        Device and dtype of the parameters, as for torch's own layers.

    Attributes
    ----------
    bias : Parameter of shape (E, out), or (1, out) if all experts have it in common; or None

    Raises
    ------
    InputError
        If a size is not a positive integer, or ``bias`` is not one of its values.

    Examples
    --------
    >>> matrices = StackedProjection(num_experts=4, out_features=16, in_features=8, bias=True)
    >>> matrices.weight().shape, matrices.bias.shape
    (torch.Size([4, 16, 8]), torch.Size([4, 16]))
    """

    num_experts: int
    out_features: int
    in_features: int
    bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        out_features: int,
        in_features: int,
        *,
        bias: Bias = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        bias = to_python_scalar(bias)
        check_one_of("bias", bias, BIASES)
        self.num_experts = check_positive_int("num_experts", num_experts)
        self.out_features = check_positive_int("out_features", out_features)
        self.in_features = check_positive_int("in_features", in_features)
        rows = 1 if bias == "common" else self.num_experts
        self.bias = (
            nn.Parameter(torch.empty(rows, self.out_features, device=device, dtype=dtype))
            if bias
            else None
        )

    @abstractmethod
    def weight(self) -> Tensor:
        """Return all matrices, shape (E, out, in)."""

    @abstractmethod
    def multiply(self, rows: Tensor, groups: Groups) -> Tensor:
        """Multiply rows by their experts' matrices: (N, in) → (N, out).

        Parameters
        ----------
        rows : Tensor, shape (N, in)
            In the order of experts.
        groups : Groups
            Which rows belong to which expert.

        Raises
        ------
        InputError
            If the route that was set is unknown, or ``cached`` where gradients are needed.
        """

    def forward(self, rows: Tensor, groups: Groups | DenseDispatch) -> Tensor:
        """Multiply rows by their experts' matrices, and add their experts' biases.

        Parameters
        ----------
        rows : Tensor, shape (N, in), or (T, E, in) for a DenseDispatch
        groups : Groups or DenseDispatch
            Which rows belong to which expert.

        Returns
        -------
        Tensor, shape (N, out), or (T, E, out) for a DenseDispatch
        """
        if isinstance(groups, Groups):
            return self.add_bias(self.multiply(rows, groups), groups)
        weight = self._masked_weight(groups).to(rows.dtype)
        result, biases = torch.einsum("tei,eoi->teo", rows, weight), self._masked_biases(groups)
        return result if biases is None else result + biases.to(result.dtype)

    def _masked_weight(self, groups: Groups | DenseDispatch) -> Tensor:
        """Return all matrices; those of experts without tokens may hold any numbers."""
        return self.weight()

    def _masked_biases(self, groups: Groups | DenseDispatch) -> Tensor | None:
        """Return all biases; those of experts without tokens may hold any numbers."""
        return self.expert_biases()

    def add_bias(self, result: Tensor, groups: Groups) -> Tensor:
        """Add to every row of ``result``, (N, out), the bias of its expert in ``groups``."""
        if self.bias is None:
            return result
        bias = self.bias.to(result.dtype)
        return result + (bias if len(bias) < self.num_experts else per_row(bias, groups))

    def uses_joint_route(self, rows: int) -> bool:
        """Return whether, in inference, ``rows`` rows take the route ``joint``."""
        return False

    def first_product(self, load: Load) -> FirstProduct | None:
        """Return the product as a part per token and a part per slot, in this order.

        Parameters
        ----------
        load : Load
            Tokens and slots of the call.

        Returns
        -------
        FirstProduct or None
            None where nothing that experts share acts first, or where computing it once per token
            does not pay.
        """
        return None

    def last_product(self, load: Load) -> LastProduct | None:
        """Return the product as a part per slot and a part per token, in this order.

        Parameters
        ----------
        load : Load
            Tokens and slots of the call.

        Returns
        -------
        LastProduct or None
            None where nothing that experts share acts last, or where computing it once per token
            does not pay.
        """
        return None

    def work_of_call(self, load: Load) -> Work:
        """Count what a call of the projection costs, all of which acts on slots.

        Parameters
        ----------
        load : Load
            Tokens and slots of the call.
        """
        size = self.out_features * self.in_features
        return Work("matrices of experts", "slot", 2 * size, 0, size * self._itemsize)

    @property
    def _itemsize(self) -> int:
        return next(self.parameters()).element_size()

    def expert_rows(self, expert: int) -> dict[str, slice]:
        """Return the rows of one expert in every tensor of this module that has rows of experts.

        The tensors of submodules are not among them. A subclass adds its own tensors.

        Parameters
        ----------
        expert : int

        Returns
        -------
        dict from str to slice
            By the names of the tensors.
        """
        # Of a single expert, a common bias is one of its own.
        is_owned = self.bias is not None and len(self.bias) == self.num_experts
        return {"bias": slice(expert, expert + 1)} if is_owned else {}

    def _keep_experts(self, experts: Sequence[int]) -> None:
        """Take over the number of experts, after the rows of the tensors were exchanged.

        Parameters
        ----------
        experts : sequence of int
            Which old expert every new one was.
        """
        self.num_experts = len(experts)

    @property
    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters that all experts share, without biases: every token updates them."""
        return []

    @property
    def owned_parameters(self) -> list[nn.Parameter]:
        """Parameters of the cores that experts own, without biases; a whole matrix is no core."""
        return []

    def expert_biases(self) -> Tensor | None:
        """Return the biases of all experts, (E, out), or None."""
        return None if self.bias is None else self.bias.expand(self.num_experts, -1)

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw new weights with the variance of ``torch.nn.Linear``'s, 1 / (3·in)."""

    def set_bias(self, bias: Tensor | None, common: bool = False, name: str = "bias") -> None:
        """Replace the bias by one per expert, by a common one, or by None.

        Parameters
        ----------
        bias : Tensor, shape (out,) or (E, out), or None
            A single bias is copied for every expert, unless it is common.
        common : bool
            Whether all experts have one bias in common.
        name : str
            Name of the bias in an error.

        Raises
        ------
        InputError
            If the bias has another shape.
        """
        if bias is None:
            self.bias = None
            return
        allowed: list[tuple[int, ...]] = [(self.out_features,)]
        if not common:
            allowed.append((self.num_experts, self.out_features))
        if tuple(bias.shape) not in allowed:
            expected = " or ".join(map(str, allowed))
            raise InputError(f"{name} must be of shape {expected}, got {tuple(bias.shape)}")
        rows = 1 if common else self.num_experts
        self.bias = nn.Parameter(bias.detach().expand(rows, self.out_features).clone())

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, out_features={self.out_features}, "
            f"in_features={self.in_features}, bias={self.bias is not None}"
        )


class StackedProjection(Projection):
    """Matrices that experts own whole, as in an ordinary mixture of experts.

    Parameters
    ----------
    num_experts, out_features, in_features, bias, device, dtype
        As for :class:`Projection`.

    Examples
    --------
    >>> matrices = StackedProjection.from_dense(torch.eye(3), num_experts=2)
    >>> matrices.weight().shape
    torch.Size([2, 3, 3])
    """

    stacked: nn.Parameter

    def __init__(
        self,
        num_experts: int,
        out_features: int,
        in_features: int,
        *,
        bias: Bias = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_experts, out_features, in_features, bias=bias, device=device, dtype=dtype
        )
        size = self.num_experts, self.out_features, self.in_features
        self.stacked = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        num_experts: int,
        noise: float = 0.0,
        rng: np.random.Generator | int | None = None,
    ) -> StackedProjection:
        """Start all experts as copies of one matrix.

        Parameters
        ----------
        weight : Tensor, shape (out, in)
        num_experts : int
            Number of experts E.
        noise : float
            Noise on every expert's matrix, relative to the root mean square of ``weight``.
        rng : numpy Generator or int, optional
            Source of the noise.

        Raises
        ------
        InputError
            If ``weight`` is not a matrix, or contains NaN or infinity.
        """
        if weight.ndim != 2:
            raise InputError(f"weight must be of shape (out, in), got {tuple(weight.shape)}")
        if not torch.isfinite(weight).all():
            raise InputError(f"the {tuple(weight.shape)} matrix contains NaN or infinity")
        projection = cls(num_experts, *weight.shape, device="meta", dtype=weight.dtype)
        stacked = replicate(weight.detach(), projection.num_experts, noise, check_generator(rng))
        projection.stacked = nn.Parameter(stacked)
        return projection

    @classmethod
    def from_matrices(cls, matrices: Tensor) -> StackedProjection:
        """Take over the matrices of all experts.

        Parameters
        ----------
        matrices : Tensor, shape (E, out, in)

        Raises
        ------
        InputError
            If the tensor is of another shape.
        """
        if matrices.ndim != 3:
            raise InputError(f"matrices must be of shape (E, out, in), got {tuple(matrices.shape)}")
        projection = cls(*matrices.shape, device="meta", dtype=matrices.dtype)
        projection.stacked = nn.Parameter(matrices.detach().contiguous())
        return projection

    def weight(self) -> Tensor:
        return self.stacked

    def expert_rows(self, expert: int) -> dict[str, slice]:
        return super().expert_rows(expert) | {"stacked": slice(expert, expert + 1)}

    def multiply(self, rows: Tensor, groups: Groups) -> Tensor:
        return grouped_linear(rows, self.stacked.to(rows.dtype), groups.offsets)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = 1 / sqrt(self.in_features)
        self.stacked.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

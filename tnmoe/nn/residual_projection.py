"""Matrices that are a shared linear module plus a small MPO per expert: the layout ``residual``."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt

import numpy as np
import torch
from torch import Tensor, nn

from tnmoe.backends import backend_named
from tnmoe.contraction.layer_plan import Work
from tnmoe.errors import InputError, check_generator, check_number_in
from tnmoe.mpo import MPO
from tnmoe.nn.compute.once_per_token import (
    FirstBias,
    FirstProduct,
    FirstSum,
    LastBias,
    LastProduct,
    LastSum,
    Load,
    work_of_module,
)
from tnmoe.nn.compute.slots import DenseDispatch, Groups
from tnmoe.nn.linear import (
    bias_of_linear,
    call_linear,
    parameters_of_linear,
    reset_linear,
    size_of_linear,
    weight_of_linear,
)
from tnmoe.nn.mpo_projection import MPOProjection
from tnmoe.nn.projection import Bias, Projection
from tnmoe.nn.snapshot import has_hooks
from tnmoe.shapes import MPOShape
from tnmoe.shared_mpo import SharedMPO

_TORCH = backend_named("torch")


class ResidualProjection(Projection):
    """Matrices W_e = W + M_e: a linear module that all experts share, and an MPO of each expert.

    With two sites that have the legs (out | in), M_e is of low rank, as in LoRA (arXiv:2106.09685).
    With more sites it is a tensor train. A layer calls the module once per token, however many
    experts the token visits.

    Parameters
    ----------
    base : Module
        The linear module: a ``torch.nn.Linear``, transformers' Conv1D, or another one with
        ``in_features`` and ``out_features``. It is used as it stands, its bias included.
    delta : MPOProjection
        The MPOs, for matrices of the module's size, without biases.
    bias : bool or "common"
        Whether every expert has a bias of its own, or all experts have one in common, beside the
        module's.

    Raises
    ------
    InputError
        If the module is not linear, or ``delta`` is for matrices of another size or has biases.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> delta = MPOProjection(3, MPOShape((32, 1), (1, 16)), max_bond=4, shared_sites="none")
    >>> matrices = ResidualProjection(nn.Linear(16, 32), delta)
    >>> matrices.weight().shape, matrices.delta.expert(0).bond_dims
    (torch.Size([3, 32, 16]), (4,))
    """

    def __init__(self, base: nn.Module, delta: MPOProjection, *, bias: Bias = False) -> None:
        size = size_of_linear(base)
        if size != (delta.out_features, delta.in_features):
            raise InputError(f"delta ({delta}) is not for the {size[0]}×{size[1]} module {base}")
        if delta.bias is not None:
            raise InputError(f"delta must have no biases, got {delta}")
        like = delta.last_core
        super().__init__(delta.num_experts, *size, bias=bias, device=like.device, dtype=like.dtype)
        self.base, self.delta = base, delta
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def weight(self) -> Tensor:
        return weight_of_linear(self.base) + self.delta.weight()

    def _masked_weight(self, groups: Groups | DenseDispatch) -> Tensor:
        return weight_of_linear(self.base) + self.delta._masked_weight(groups)

    def multiply(self, rows: Tensor, groups: Groups) -> Tensor:
        return call_linear(self.base, rows) + self.delta(rows, groups)

    def expert_biases(self) -> Tensor | None:
        of_base, own = bias_of_linear(self.base), super().expert_biases()
        if of_base is None:
            return own
        return of_base.expand(self.num_experts, -1) if own is None else of_base + own

    def to_shared_mpo(self) -> SharedMPO:
        """Return a SharedMPO that shares memory and gradients with this module.

        Its ``base`` is the module's matrix as an MPO of one site.
        """
        weight, delta = weight_of_linear(self.base), self.delta.to_shared_mpo()
        whole = MPOShape((self.out_features,), (self.in_features,))
        base = MPO([weight[None, :, :, None].to(delta.center.dtype)], whole)
        return SharedMPO(delta.cores, delta.shape, delta.center_site, base=base)

    def expert(self, index: int) -> MPO:
        """Return M_e of one expert: an MPO that shares memory and gradients with this module.

        Parameters
        ----------
        index : int
            From 0 to E − 1.

        Raises
        ------
        InputError
            If there is no such expert.
        """
        return self.delta.expert(index)

    def first_product(self, load: Load) -> FirstProduct | None:
        if has_hooks(self) or has_hooks(self.delta):
            return None
        delta = self.delta._first_chain(1 + max(self.delta._owned_sites))
        product = FirstSum(self.base, delta)
        return product if self.bias is None else FirstBias(product, self.bias, self.num_experts)

    def last_product(self, load: Load) -> LastProduct | None:
        if has_hooks(self) or has_hooks(self.delta):
            return None
        delta = self.delta._last_chain(min(self.delta._owned_sites))
        product = LastSum(self.base, delta)
        return product if self.bias is None else LastBias(product, self.bias, self.num_experts)

    def work_of_call(self, load: Load) -> Work:
        base, delta = work_of_module(self.base), self.delta.work_of_call(load)
        return Work(
            f"shared module and {delta.what}",
            "slot",
            base.flops + delta.flops,
            base.shared_bytes + delta.shared_bytes,
            delta.owned_bytes,
        )

    # The MPOs have rows of their own.
    def _keep_experts(self, experts: Sequence[int]) -> None:
        super()._keep_experts(experts)
        self.delta._keep_experts(experts)

    @property
    def shared_parameters(self) -> list[nn.Parameter]:
        return [*parameters_of_linear(self.base), *self.delta.shared_parameters]

    @property
    def owned_parameters(self) -> list[nn.Parameter]:
        return self.delta.owned_parameters

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the module and the MPOs anew; the latter start at zero."""
        reset_linear(self.base)
        start_at_zero(self.delta)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


@torch.no_grad()
def start_at_zero(
    delta: MPOProjection,
    scale: float = 0.0,
    rng: np.random.Generator | int | None = None,
) -> None:
    """Draw MPOs anew such that every matrix is zero, or random of a Frobenius norm.

    All cores become isometries, except the one that acts last of those that experts own: that core
    carries the norm. Training can therefore change every matrix from the first step on.

    Parameters
    ----------
    delta : MPOProjection
        Changed in place; on the meta device nothing is drawn.
    scale : float
        Expected Frobenius norm of every matrix.
    rng : numpy Generator or int, optional
        Source of the random numbers.

    Raises
    ------
    InputError
        If ``scale`` is negative or not finite.
    """
    scale, rng = check_number_in("scale", scale, "[0, inf)"), check_generator(rng)
    if delta.last_core.is_meta:
        return
    last = scaling_site(delta)
    for site in range(delta.shape.sites):
        core = delta.core_at(site)
        if site == last:
            numbers = _TORCH.normal(core.shape, rng, like=core) if scale else torch.zeros_like(core)
            core.copy_(numbers * (scale / sqrt(prod(core.shape[-4:]))))
        else:
            core.copy_(_random_isometries(core, site < last, rng))


def scaling_site(delta: MPOProjection) -> int:
    """Return the site of the core that acts last of those that experts own."""
    return min(set(range(delta.shape.sites)) - delta.shared_sites)


def _random_isometries(core: Tensor, from_left: bool, rng: np.random.Generator) -> Tensor:
    """Draw cores, (..., D, out, in, D'), that preserve norms from one side to the other."""
    dtype = torch.promote_types(core.dtype, torch.float32)  # LAPACK has no half precision
    numbers = _TORCH.normal(core.shape, rng, like=core.to(dtype))
    matrices = numbers.flatten(-4, -2) if from_left else numbers.flatten(-3, -1)
    is_tall = matrices.shape[-2] >= matrices.shape[-1]
    factor = torch.linalg.qr(matrices if is_tall else matrices.mT)[0]
    return (factor if is_tall else factor.mT).reshape(core.shape).to(core.dtype)

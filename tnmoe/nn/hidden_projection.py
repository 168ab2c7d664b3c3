"""Matrices around a linear module that all experts share: the layout ``hidden``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tnmoe.errors import InputError, check_generator
from tnmoe.nn.compute.cores import ExpertCores
from tnmoe.nn.compute.grouped import per_row
from tnmoe.nn.compute.once_per_token import FirstChain, LastChain
from tnmoe.nn.compute.slots import DenseDispatch, Groups
from tnmoe.nn.linear import (
    as_linear,
    bias_of_linear,
    check_has_matrix,
    device_of_linear,
    dtype_of_linear,
    parameters_of_linear,
    reset_bias,
    size_of_linear,
    weight_of_linear,
)
from tnmoe.nn.mpo_projection import MPOProjection
from tnmoe.nn.projection import Bias
from tnmoe.nn.settings import end_site, square_bonds
from tnmoe.shapes import MPOShape
from tnmoe.shared_mpo import replicate

# Chains multiply by a module in place of its core.
_NOT_READ = torch.empty(0)


class HiddenProjection(MPOProjection):
    """Matrices whose central core is a linear module, which all experts share.

    The central core stands at one end of the chain and has all legs of one side, so that its
    matrix is the module's as it lies in memory. Experts own the other cores, whose legs are on the
    other side: W_e = (L_e ⊗ 1)·C where the module acts first, W_e = C·(R_e ⊗ 1) where it acts last.
    A layer calls the module once per token, however many experts the token visits.

    Parameters
    ----------
    num_experts, bias, bond_dims, center_site, device, dtype
        As for :class:`MPOProjection`. The default of ``center_site`` is the end that the shape
        allows, the right one first.
    shape : MPOShape
        With the central site at the right end and all input legs there, or at the left end and all
        output legs there.

    Attributes
    ----------
    base : Module
        The linear module; a bias of its own acts once per token, too.
    center : Tensor, shape (D, out, in, D')
        The module's matrix as a core.

    Raises
    ------
    InputError
        If the shape has legs elsewhere, or is padded.

    Examples
    --------
    >>> shape = MPOShape((4, 8), (1, 16))
    >>> matrices = HiddenProjection(3, shape)
    >>> matrices.base, matrices.aux_0.shape
    (Linear(in_features=16, out_features=32, bias=False), torch.Size([3, 1, 4, 1, 4]))
    """

    base: nn.Module

    def __init__(
        self,
        num_experts: int,
        shape: MPOShape,
        *,
        bias: Bias = False,
        bond_dims: Sequence[int] | None = None,
        center_site: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_experts,
            shape,
            bias=bias,
            bond_dims=bond_dims,
            center_site=end_site(shape, center_site),
            device=device,
            dtype=dtype,
        )

    @classmethod
    def from_linear(
        cls,
        module: nn.Module,
        num_experts: int,
        shape: MPOShape,
        center_site: int | None = None,
        noise: float = 0.0,
        rng: np.random.Generator | int | None = None,
    ) -> HiddenProjection:
        """Start all experts as one linear module, which becomes ``base`` as it stands.

        Parameters
        ----------
        module : Module
            A ``torch.nn.Linear``, transformers' Conv1D, or another linear module with
            ``in_features`` and ``out_features``.
        num_experts, shape, center_site
            As for the class.
        noise : float
            Noise on every expert's own cores, relative to each core's root mean square.
        rng : numpy Generator or int, optional
            Source of the noise.

        Raises
        ------
        InputError
            If the module is not linear, or the shape is for a matrix of another size.
        """
        if size_of_linear(module) != (shape.out_features, shape.in_features):
            rows, columns = size_of_linear(module)
            raise InputError(f"a {rows}×{columns} module needs a shape of its size, got {shape}")
        site = end_site(shape, center_site)
        bonds = square_bonds(shape, site)
        projection = cls(num_experts, shape, bond_dims=bonds, center_site=site, device="meta")
        rng = check_generator(rng)
        like = torch.empty(0, dtype=dtype_of_linear(module), device=device_of_linear(module))
        for number, core in enumerate(projection.aux):
            identity = _identity_core(core.shape[1:], like)
            cores = replicate(identity, projection.num_experts, noise, rng)
            projection.register_parameter(f"aux_{number}", nn.Parameter(cores))
        projection.base = module
        return projection

    @property
    def center(self) -> Tensor:  # type: ignore[override]
        """The module's matrix as a core, (D, out, in, D')."""
        bonds = (1, *self._bond_dims, 1)
        site = self.center_site
        legs = self.shape.out_dims[site], self.shape.in_dims[site]
        return weight_of_linear(self.base).reshape(bonds[site], *legs, bonds[site + 1])

    def _store_core(self, name: str, core: Tensor) -> None:
        if name != "center":
            super()._store_core(name, core)
            return
        if core.ndim != 4:
            raise InputError(f"a HiddenProjection has one central core, got {len(core)} of them")
        left, out, in_, right = core.shape
        self.base = as_linear(core.reshape(left * out, in_ * right))

    def parameters_at(self, site: int) -> list[nn.Parameter]:
        if site != self.center_site:
            return super().parameters_at(site)
        return parameters_of_linear(self.base)

    def set_core(self, site: int, core: nn.Parameter) -> None:
        if site == self.center_site:
            raise InputError(
                f"the core of site {site} is the matrix of a linear module: replace `base` instead"
            )
        super().set_core(site, core)

    @property
    def cores(self) -> ExpertCores:
        return self._cores_around(self.center)

    def _stored(self) -> tuple[nn.Parameter, ...]:
        return self.aux

    @property
    def _holds_all_cores(self) -> bool:
        return all(name in self._parameters for name in self._names if name != "center")

    def _cores_around(self, center: Tensor) -> ExpertCores:
        """Return the cores of all sites, with a tensor for that of the module."""
        stored = list(self.aux)
        stored.insert(self.center_site, center)  # type: ignore[arg-type]
        size = self.shape, self.center_site, self.num_experts, self._bond_dims
        # The view of the module's matrix is a new tensor for every call.
        return ExpertCores(tuple(stored), *size, transient=True)

    def multiply(self, rows: Tensor, groups: Groups) -> Tensor:
        # A call of the module runs its hooks. Those of FSDP and accelerate bring its numbers.
        if self.route in (None, "joint") or self.is_gathered:
            if self.center_site == 0:
                last = self._last_chain(1)
                return last.of_tokens(last.of_slots(rows, last.weights, groups))
            first = self._first_chain(self.center_site)
            return first.of_slots(first.of_tokens(rows, {}), first.weights, groups)
        result, biases = super().multiply(rows, groups), self._biases_of_base(groups)
        return result if biases is None else result + per_row(biases.to(result.dtype), groups)

    def expert_biases(self) -> Tensor | None:
        return self._with_own(self._biases_of_base())

    def _masked_biases(self, groups: Groups | DenseDispatch) -> Tensor | None:
        return self._with_own(self._biases_of_base(groups))

    def _with_own(self, of_base: Tensor | None) -> Tensor | None:
        own = super().expert_biases()
        return own if of_base is None else of_base if own is None else of_base + own

    def _biases_of_base(self, groups: Groups | DenseDispatch | None = None) -> Tensor | None:
        """Return what the module's bias adds to the outputs of every expert, (E, out).

        With ``groups``, experts without rows may get any numbers.
        """
        bias = bias_of_linear(self.base)
        if bias is None:
            return None
        biases = bias.expand(self.num_experts, -1)
        if self.center_site == 0:
            return biases
        # The experts' cores act on the module's bias as on its products.
        cores = self._cores_around(_NOT_READ)
        if groups is not None:
            cores = cores.mask_unused(groups)
        chain = FirstChain(cores, self.center_site)
        one_each = Groups.of(torch.arange(self.num_experts, device=bias.device), self.num_experts)
        return chain.of_slots((biases,), chain.weights, one_each)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        check_has_matrix(self.base)
        super().reset_parameters()
        reset_bias(self.base)

    def _first_chain(self, stop: int) -> FirstChain:
        return FirstChain(self._cores_around(_NOT_READ), stop, self.base)

    def _last_chain(self, start: int) -> LastChain:
        return LastChain(self._cores_around(_NOT_READ), start, self.base)


def _identity_core(size: Sequence[int], like: Tensor) -> Tensor:
    """Return the core (D, out, in, D') of an identity matrix between its legs and a bond."""
    identity = torch.eye(max(size[0], size[3]), dtype=like.dtype, device=like.device)
    return identity.reshape(*size)

"""One linear projection of all experts of a layer: a stack of matrices, shared or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnmoe.backends import backend_named
from tnmoe.contraction import apply_cores, contraction_plan, stacked_to_padded_matrices
from tnmoe.errors import InputError
from tnmoe.nn.cache import cached_linear, weight_cache
from tnmoe.nn.grouped import Groups, grouped_linear
from tnmoe.nn.in_order import chain_linear, chain_linears
from tnmoe.nn.materialize import Legs, environments, shared_linear
from tnmoe.routes import ContractionPlan
from tnmoe.shapes import MPOShape, positive_int
from tnmoe.shared import SharedMPO

_TORCH = backend_named("torch")


class Projection(nn.Module, ABC):
    """E matrices (out, in), one per expert, and optionally a bias each.

    Attributes
    ----------
    bias : Parameter, shape (E, out), or None
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
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.num_experts = positive_int("num_experts", num_experts)
        self.out_features = positive_int("out_features", out_features)
        self.in_features = positive_int("in_features", in_features)
        self.bias = (
            nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype))
            if bias
            else None
        )

    @abstractmethod
    def weight(self) -> Tensor:
        """All matrices, shape (E, out, in)."""

    @abstractmethod
    def multiply(self, rows: Tensor, groups: Groups) -> Tensor:
        """Rows (T, in), sorted by expert, times their experts' matrices: (T, out)."""

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        """Every expert's matrix, and its bias, on its own rows: (T, in) → (T, out)."""
        return self._add_bias(self.multiply(rows, groups), groups)

    def _add_bias(self, result: Tensor, groups: Groups) -> Tensor:
        if self.bias is None:
            return result
        # A product with the experts' indicators: its gradient, too, is one, not a scatter.
        mine = groups.experts[:, None] == torch.arange(self.num_experts, device=result.device)
        return torch.addmm(result, mine.to(result.dtype), self.bias.to(result.dtype))

    def forward_beside(
        self, other: Projection, rows: Tensor, groups: Groups
    ) -> tuple[Tensor, Tensor]:
        """This projection and another one of the same rows, sharing work where they can."""
        return self(rows, groups), other(rows, groups)

    def joins_experts(self, rows: int) -> bool:
        """Whether so many rows, in inference, go through products for all experts together."""
        return False

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw new weights with the variance of ``torch.nn.Linear``'s, 1 / (3·in)."""

    def set_bias(self, bias: Tensor | None) -> None:
        """Start every expert with one bias (out,), or take a stack (E, out) or none as it is."""
        if bias is None:
            self.bias = None
            return
        stacked = bias.detach().expand(self.num_experts, self.out_features).clone()
        self.bias = nn.Parameter(stacked)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, out_features={self.out_features}, "
            f"in_features={self.in_features}, bias={self.bias is not None}"
        )


class StackedProjection(Projection):
    """Every expert owns its whole matrix: an ordinary mixture of experts.

    Parameters
    ----------
    num_experts, out_features, in_features : int
        Sizes.
    bias : bool
        Whether every expert has a bias.
    """

    stacked: nn.Parameter

    def __init__(
        self,
        num_experts: int,
        out_features: int,
        in_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts, out_features, in_features, bias, device, dtype)
        self.stacked = nn.Parameter(
            torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype)
        )
        self.reset_parameters()

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None, num_experts: int) -> StackedProjection:
        """Experts that all start as one matrix (out, in)."""
        projection = cls(num_experts, *weight.shape, device="meta", dtype=weight.dtype)
        projection.stacked = nn.Parameter(weight.detach().expand(num_experts, -1, -1).clone())
        projection.set_bias(bias)
        return projection

    def weight(self) -> Tensor:
        return self.stacked

    def multiply(self, rows: Tensor, groups: Groups) -> Tensor:
        return grouped_linear(rows, self.stacked.to(rows.dtype), groups.offsets)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = 1 / sqrt(self.in_features)
        self.stacked.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)


class SharedProjection(Projection):
    """All experts share one central tensor; each owns only its auxiliary cores.

    Parameters
    ----------
    num_experts : int
        Number of experts E.
    shape : MPOShape
        Legs and size of every expert's matrix; at least two sites.
    bias : bool
        Whether every expert has a bias.
    max_bond : int, optional
        Largest bond dimension; exact bonds by default.

    Attributes
    ----------
    center : Parameter, shape (D, out, in, D')
        The shared central tensor.
    aux : ParameterList of shapes (E, D, out, in, D')
        The other sites, left to right.
    """

    center: nn.Parameter
    aux: nn.ParameterList
    # One of "shared", "chain", "dense", "cached" to fix the route; by default it is planned.
    route: str | None = None

    def __init__(
        self,
        num_experts: int,
        shape: MPOShape,
        bias: bool = False,
        max_bond: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts, shape.out_features, shape.in_features, bias, device, dtype)
        if shape.sites < 2:
            raise InputError(
                f"experts that share a central core need a shape of at least 2 sites, got {shape}"
            )
        self.shape = shape
        self.site = shape.center
        cores = [
            torch.empty(core, device=device, dtype=dtype) for core in shape.core_shapes(max_bond)
        ]
        self.center = nn.Parameter(cores.pop(self.site))
        self.aux = nn.ParameterList(
            nn.Parameter(core.new_empty(num_experts, *core.shape)) for core in cores
        )
        self.reset_parameters()

    @classmethod
    def from_shared(cls, shared: SharedMPO, bias: Tensor | None = None) -> SharedProjection:
        """Take over the cores of a SharedMPO of torch tensors, with any bonds and centre."""
        projection = cls(shared.num_experts, shared.shape, max_bond=1, device="meta")
        projection.site = shared.center
        projection.center = nn.Parameter(shared.center_core.detach().contiguous())
        projection.aux = nn.ParameterList(
            nn.Parameter(core.detach().contiguous()) for core in shared.aux
        )
        projection.set_bias(bias)
        return projection

    @property
    def aux_cores(self) -> tuple[nn.Parameter, ...]:
        """The cores in ``aux``; a ParameterList takes a microsecond for each."""
        cores = tuple(self.aux._parameters.values())
        # Under a parametrization they are attributes of another kind.
        return cores if len(cores) == len(self.aux) else tuple(self.aux)  # type: ignore[return-value]

    def to_shared(self) -> SharedMPO:
        """The cores as a SharedMPO that shares memory and gradients with this module."""
        return SharedMPO(self.center, self.aux_cores, self.shape, self.site)

    def weight(self) -> Tensor:
        aux = self.aux_cores
        matrices = stacked_to_padded_matrices(
            _TORCH, self.center, aux[: self.site], aux[self.site :]
        )
        return matrices[:, : self.out_features, : self.in_features]

    def plan(self, rows: int, training: bool) -> ContractionPlan:
        """How so many rows go through; ``print`` it to see what every route would cost."""
        return contraction_plan(
            self.shape,
            self._bond_dims,
            rows,
            experts=self.num_experts,
            center=self.site,
            training=training,
            cached=not training and weight_cache.has_room(self.center, self._matrices_bytes),
            device=self.center.device.type,
            itemsize=self.center.element_size(),
        )

    def joins_experts(self, rows: int) -> bool:
        return (self.route or self.plan(rows, training=False).route) == "shared"

    def multiply(self, rows: Tensor, groups: Groups) -> Tensor:
        route = self.route or self._chosen_route(rows, groups)
        if route == "cached":
            size = self.out_features, self.in_features
            cores = self.center, self.aux_cores
            return cached_linear(rows, groups.offsets, *cores, self.site, self.legs, size)
        multiply = {"dense": self._dense, "shared": self._shared, "chain": self._chain}.get(route)
        if multiply is None:
            raise InputError(
                f"route must be one of shared, chain, dense, cached or None, got {route!r}"
            )
        return multiply(self._padded(rows), groups)[:, : self.out_features]

    def forward_beside(
        self, other: Projection, rows: Tensor, groups: Groups
    ) -> tuple[Tensor, Tensor]:
        """Both projections; cores on the input side that are the same tensor are applied once."""
        if (
            not isinstance(other, SharedProjection)
            or other.aux[-1] is not self.aux[-1]
            or other.shape != self.shape
            or {each.route or each._chosen_route(rows, groups) for each in (self, other)}
            != {"shared"}
        ):
            return super().forward_beside(other, rows, groups)
        chains = [each._cores(rows.dtype) for each in (self, other)]
        first, second = chain_linears(self._padded(rows), chains, groups)
        return (
            self._add_bias(first[:, : self.out_features], groups),
            other._add_bias(second[:, : self.out_features], groups),
        )

    def _padded(self, rows: Tensor) -> Tensor:
        missing = self.shape.padded_in - self.in_features
        return F.pad(rows, (0, missing)) if missing else rows

    def _chosen_route(self, rows: Tensor, groups: Groups) -> str:
        training = self._in_training(rows)
        if not torch.compiler.is_compiling():
            return self.plan(groups.rows, training).route
        # What is compiled must do for any number of rows.
        if self.shape.is_split(self.site):
            return "shared"
        return "dense" if training else "cached"

    def _in_training(self, rows: Tensor) -> bool:
        return torch.is_grad_enabled() and any(
            each.requires_grad for each in (rows, self.center, *self.aux_cores)
        )

    def _cores(self, dtype: torch.dtype) -> list[Tensor]:
        """Cores of all sites, in one dtype; those that experts own have an expert axis."""
        cores = [core.to(dtype) for core in self.aux_cores]
        cores.insert(self.site, self.center.to(dtype))
        return cores

    def _dense(self, rows: Tensor, groups: Groups) -> Tensor:
        aux = [core.to(rows.dtype) for core in self.aux_cores]
        left, right = environments(aux[: self.site], aux[self.site :])
        return shared_linear(
            rows, self.center.to(rows.dtype), left, right, self.legs, groups.offsets
        )

    def _shared(self, rows: Tensor, groups: Groups) -> Tensor:
        return chain_linear(rows, self._cores(rows.dtype), groups)

    def _chain(self, rows: Tensor, groups: Groups) -> Tensor:
        cores = self._cores(rows.dtype)
        blocks = [
            apply_cores(
                _TORCH,
                self.shape,
                [core if core.ndim == 4 else core[expert] for core in cores],
                rows[block],
            )
            for expert, block in groups.spans
        ]
        return torch.cat(blocks) if blocks else rows.new_zeros(0, self.shape.padded_out)

    @property
    def _matrices_bytes(self) -> int:
        numbers = self.num_experts * self.out_features * self.in_features
        return numbers * self.center.element_size()

    @property
    def _bond_dims(self) -> tuple[int, ...]:
        bonds = [core.size(1) for core in self.aux_cores]
        bonds.insert(self.site, self.center.size(0))
        return tuple(bonds[1:])

    @property
    def legs(self) -> Legs:
        """Legs of the sites on either side of the shared one, taken together."""

        def split(dims: tuple[int, ...]) -> tuple[int, int, int]:
            return prod(dims[: self.site]), dims[self.site], prod(dims[self.site + 1 :])

        return Legs(split(self.shape.out_dims), split(self.shape.in_dims))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Isometric auxiliary cores and a Gaussian central one: the centre carries the scale."""
        for index, stack in enumerate(self.aux):
            left_of_center = index < self.site
            for core in stack:
                rows = core.shape[0] if not left_of_center else prod(core.shape[:-1])
                if not core.is_meta:
                    nn.init.orthogonal_(core.view(rows, -1))
        variance = self.shape.padded_out / (3 * self.center.numel())
        self.center.normal_(std=sqrt(variance))
        if self.bias is not None:
            bound = 1 / sqrt(self.in_features)
            self.bias.uniform_(-bound, bound)

    def extra_repr(self) -> str:
        bonds = tuple(core.shape[1] for core in self.aux_cores)
        return f"{super().extra_repr()}, shape={self.shape}, aux_left_bonds={bonds}"

"""One linear projection of all experts of a layer: a stack of matrices, shared or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod, sqrt
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tnmoe.backends import backend_named
from tnmoe.contraction.apply import apply_cores, state_width
from tnmoe.contraction.build import stacked_to_padded_matrices
from tnmoe.contraction.core_by_core import core_by_core_width
from tnmoe.contraction.pieces import rows_per_piece
from tnmoe.contraction.plan import ContractionPlan, contraction_plan
from tnmoe.errors import InputError, generator_of, index_in, one_of, plain, positive_int
from tnmoe.mpo import MPO
from tnmoe.nn.compute.cache import cached_linear, weight_cache
from tnmoe.nn.compute.grouped import Groups, Visits, grouped_linear, per_row
from tnmoe.nn.compute.half_precision import reused
from tnmoe.nn.compute.joint import joint_linear
from tnmoe.nn.compute.pieces import in_pieces
from tnmoe.nn.compute.rebuilt import Legs, common_dtype, environments, rebuilt_linear
from tnmoe.nn.transforms import has_values, needs_native_operators
from tnmoe.options import NamedSites, Route
from tnmoe.shapes import MPOShape
from tnmoe.shared_mpo import SharedMPO, replicate

_TORCH = backend_named("torch")

Bias = bool | Literal["common"]
BIASES = (False, True, "common")


class Projection(nn.Module, ABC):
    """E matrices (out, in), one per expert, and optionally a bias each.

    Parameters
    ----------
    num_experts, out_features, in_features : int
        Sizes.
    bias : bool or "common"
        Whether every expert has a bias, or all have one together.
    device, dtype
        Of the parameters, as for torch's own layers.

    Attributes
    ----------
    bias : Parameter, shape (E, out), or (1, out) if all experts share it; or None

    Raises
    ------
    InputError
        If a size is not a positive integer, or ``bias`` is none of its values.

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
        bias: Bias,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        bias = plain(bias)
        one_of("bias", bias, BIASES)
        self.num_experts = positive_int("num_experts", num_experts)
        self.out_features = positive_int("out_features", out_features)
        self.in_features = positive_int("in_features", in_features)
        rows = 1 if bias == "common" else self.num_experts
        self.bias = (
            nn.Parameter(torch.empty(rows, self.out_features, device=device, dtype=dtype))
            if bias
            else None
        )

    @abstractmethod
    def weight(self) -> Tensor:
        """All matrices, shape (E, out, in)."""

    @abstractmethod
    def multiply(self, rows: Tensor, groups: Groups) -> Tensor:
        """Rows times their experts' matrices: (T, in) → (T, out).

        Parameters
        ----------
        rows : Tensor, shape (T, in)
            Sorted by expert.
        groups : Groups
            Which rows are whose.

        Raises
        ------
        InputError
            If a route was set that there is not, or ``cached`` where gradients are needed.
        """

    def forward(self, rows: Tensor, groups: Groups | Visits) -> Tensor:
        """Rows times their experts' matrices, and their experts' biases.

        Parameters
        ----------
        rows : Tensor, shape (T, in), or (T, E, in) for visits
        groups : Groups or Visits
            Which rows are whose: as for :meth:`multiply`, or a row of every token for every
            expert.

        Returns
        -------
        Tensor, shape (T, out), or (T, E, out) for visits
        """
        if isinstance(groups, Groups):
            return self._add_bias(self.multiply(rows, groups), groups)
        result = torch.einsum("tei,eoi->teo", rows, self._weight_for(groups).to(rows.dtype))
        return result if self.bias is None else result + self.bias.to(result.dtype)

    def _weight_for(self, visits: Visits) -> Tensor:
        """All matrices, of which those of experts without tokens need not be right."""
        return self.weight()

    def _add_bias(self, result: Tensor, groups: Groups) -> Tensor:
        if self.bias is None:
            return result
        bias = self.bias.to(result.dtype)
        return result + (bias if len(bias) < self.num_experts else per_row(bias, groups))

    def multiplies_jointly(self, rows: int) -> bool:
        """Whether ``rows`` slots, in inference, go through products for all experts together."""
        return False

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw new weights with the variance of ``torch.nn.Linear``'s, 1 / (3·in)."""

    def set_bias(self, bias: Tensor | None, common: bool = False, name: str = "bias") -> None:
        """Start with one bias (out,) for all experts, or take a stack (E, out) or none as it is.

        Parameters
        ----------
        bias : Tensor, shape (out,) or (E, out), or None
        common : bool
            Keep one bias for all experts, and not a copy for each.
        name : str
            What an error calls it.

        Raises
        ------
        InputError
            If the bias is of another shape.
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
    """Every expert owns its whole matrix: an ordinary mixture of experts.

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
        bias: Bias = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts, out_features, in_features, bias, device, dtype)
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
        """Experts that all start as one matrix.

        Parameters
        ----------
        weight : Tensor, shape (out, in)
        num_experts : int
        noise : float
            Relative to the matrix's root mean square; drawn for every expert.
        rng : numpy Generator or int, optional
            Source of the noise.

        Raises
        ------
        InputError
            If ``weight`` is no matrix, or holds NaN or infinity.
        """
        if weight.ndim != 2:
            raise InputError(f"weight must be of shape (out, in), got {tuple(weight.shape)}")
        if not torch.isfinite(weight).all():
            raise InputError(f"the {tuple(weight.shape)} matrix contains NaN or infinity")
        projection = cls(num_experts, *weight.shape, device="meta", dtype=weight.dtype)
        stacked = replicate(weight.detach(), projection.num_experts, noise, generator_of(rng))
        projection.stacked = nn.Parameter(stacked)
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


class MPOProjection(Projection):
    """Matrices as MPOs: experts share the central core, or any other sites; the rest they own.

    A core that experts own is stored as a stack with an expert axis, one that they share once.

    Parameters
    ----------
    num_experts : int
        Number of experts E.
    shape : MPOShape
        Legs and size of every expert's matrix; at least two sites.
    bias : bool or "common"
        Whether every expert has a bias, or all have one together.
    max_bond : int, optional
        Largest bond dimension; exact bonds by default.
    shared_sites : {"center", "none"} or iterable of int
        Sites that all experts share; not all of them.
    device, dtype
        Of the parameters, as for torch's own layers.

    Attributes
    ----------
    center : Parameter, shape (D, out, in, D') if shared, or (E, D, out, in, D')
        The central core.
    aux_0, aux_1, … : Parameter, shape (E, D, out, in, D'), or (1, D, out, in, D') if shared
        The cores of the other sites, left to right; :attr:`aux` is all of them.
    shared_sites : frozenset of int
        Sites whose cores all experts share.

    Raises
    ------
    InputError
        If sizes, bonds or shared sites do not fit the shape, or it has a single site.

    Examples
    --------
    >>> matrices = MPOProjection(4, MPOShape((2, 4, 2), (2, 2, 2)))
    >>> matrices.center.shape, [core.shape[0] for core in matrices.aux]
    (torch.Size([4, 4, 2, 4]), [4, 4])
    """

    center: nn.Parameter
    shared_sites: frozenset[int]
    # Fixes the route; by default it is planned.
    route: Route | None = None

    def __init__(
        self,
        num_experts: int,
        shape: MPOShape,
        bias: Bias = False,
        max_bond: int | None = None,
        shared_sites: NamedSites | Iterable[int] = "center",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts, shape.out_features, shape.in_features, bias, device, dtype)
        if shape.sites < 2:
            raise InputError(
                f"experts that share cores need a shape of at least 2 sites, got {shape}"
            )
        self.shape = shape
        self.center_site = shape.center_site
        common = resolve_shared_sites(shared_sites, shape.sites, self.center_site)
        cores = [
            torch.empty(core, device=device, dtype=dtype) for core in shape.core_shapes(max_bond)
        ]
        self._set_cores(
            [
                core if site in common else core.new_empty(self.num_experts, *core.shape)
                for site, core in enumerate(cores)
            ]
        )
        self.reset_parameters()

    @classmethod
    def from_mpo(
        cls,
        mpo: MPO,
        num_experts: int,
        shared_sites: NamedSites | Iterable[int] = "center",
        noise: float = 0.0,
        rng: np.random.Generator | int | None = None,
    ) -> MPOProjection:
        """Experts that all start as one MPO of torch tensors, whose shared cores are not copied.

        Parameters
        ----------
        mpo : MPO
            The matrix, with any bonds and centre.
        num_experts, shared_sites
            As for the class.
        noise : float
            Noise on every expert's own cores, relative to each core's root mean square.
        rng : numpy Generator or int, optional
            Source of the noise.

        Raises
        ------
        InputError
            If the cores are no torch tensors, or sites, noise or numbers do not fit.
        """
        _check_torch(mpo.cores)
        projection = cls(num_experts, mpo.shape, max_bond=1, device="meta")
        projection.center_site = (
            mpo.shape.center_site if mpo.center_site is None else mpo.center_site
        )
        common = resolve_shared_sites(shared_sites, mpo.shape.sites, projection.center_site)
        rng = generator_of(rng)
        projection._set_cores(
            [
                core if site in common else replicate(core, projection.num_experts, noise, rng)
                for site, core in enumerate(mpo.cores)
            ]
        )
        return projection

    @classmethod
    def from_shared_mpo(cls, shared: SharedMPO) -> MPOProjection:
        """Take over cores, with any bonds and centre.

        Parameters
        ----------
        shared : SharedMPO
            Of torch tensors. Its central core is shared; the others are every expert's own.

        Raises
        ------
        InputError
            If the cores are no torch tensors.
        """
        _check_torch([shared.center])
        projection = cls(shared.num_experts, shared.shape, max_bond=1, device="meta")
        projection.center_site = shared.center_site
        cores = list(shared.aux)
        cores.insert(shared.center_site, shared.center)
        projection._set_cores(cores)
        return projection

    def _set_cores(self, cores: list[Tensor]) -> None:
        """Make parameters of all sites' cores, which have an expert axis where they are owned."""
        self.shared_sites = frozenset(site for site, core in enumerate(cores) if core.ndim == 4)
        parameters = [
            nn.Parameter(
                (core[None] if core.ndim == 4 and site != self.center_site else core).contiguous()
            )
            for site, core in enumerate(core.detach() for core in cores)
        ]
        self.center = parameters.pop(self.center_site)
        # Parameters of this very module, not of a list in it: whatever moves the parameters of a
        # module in and out of memory around its forward, as accelerate does, must find them.
        self._aux_names = tuple(f"aux_{number}" for number in range(len(parameters)))
        for name, parameter in zip(self._aux_names, parameters, strict=True):
            self.register_parameter(name, parameter)
        # Known once: where a core is sharded between its uses, it has no such shape there.
        self._bond_dims = tuple(core.shape[-4] for core in cores[1:])

    @property
    def shared_cores(self) -> list[nn.Parameter]:
        """Cores that all experts share: every token of the layer updates them."""
        return [each for site in sorted(self.shared_sites) for each in self.parameters_at(site)]

    def parameters_at(self, site: int) -> list[nn.Parameter]:
        """What the core of ``site`` is stored as: itself, or what a parametrization makes it of.

        Parameters
        ----------
        site : int
            From 0, left to right.

        Raises
        ------
        InputError
            If the core is no parameter any more, but a part of one.
        """
        name = self._name_of(site)
        if is_parametrized(self, name):
            return list(self.get_submodule(f"parametrizations.{name}").parameters())
        # torch.nn.utils.prune keeps the tensor itself under another name.
        for stored in (name, f"{name}_orig"):
            if isinstance(found := self._parameters.get(stored), nn.Parameter):
                return [found]
        raise InputError(
            f"the core {name!r} is no parameter by itself, but part of a larger one, in which it "
            "cannot be told from others: use FullyShardedDataParallel with use_orig_params=True, "
            "or fully_shard; and not while a model runs"
        )

    def _tensors_at(self, site: int) -> list[Tensor]:
        """As :meth:`parameters_at`, but the tensors that FSDP gathers in the parameters' place."""
        gathered = vars(self).get(self._name_of(site))
        if isinstance(gathered, Tensor) and f"{self._name_of(site)}_orig" not in self._parameters:
            return [gathered]
        return list(self.parameters_at(site))

    def _name_of(self, site: int) -> str:
        return (
            "center"
            if site == self.center_site
            else self._aux_names[site - (site > self.center_site)]
        )

    def core_at(self, site: int) -> nn.Parameter:
        """The stored core of a site, (E, D, out, in, D') or, if shared at the centre, without E.

        Parameters
        ----------
        site : int
            From 0, left to right.

        Raises
        ------
        InputError
            If there is no such site.
        """
        return getattr(self, self._name_of(index_in("site", site, self.shape.sites)))

    def set_core(self, site: int, core: nn.Parameter) -> None:
        """Store a tensor, another projection's perhaps, as the core of a site.

        Parameters
        ----------
        site : int
            From 0, left to right.
        core : Parameter
            In the shape of :meth:`core_at`.

        Raises
        ------
        InputError
            If there is no such site.
        """
        site = index_in("site", site, self.shape.sites)
        setattr(self, self._name_of(site), core)

    @property
    def aux(self) -> tuple[nn.Parameter, ...]:
        """The cores of all sites but the centre, left to right."""
        stored: dict[str, Any] = self._parameters
        # Parametrized or pruned cores are attributes of another kind.
        return tuple(
            stored[name] if name in stored else getattr(self, name) for name in self._aux_names
        )

    def to_shared_mpo(self) -> SharedMPO:
        """The cores as a SharedMPO that shares memory and gradients with this module.

        Raises
        ------
        InputError
            If experts own their central cores.
        """
        if self.center.ndim == 5:
            raise InputError("a SharedMPO has one central core, but these experts own theirs")
        return SharedMPO(self.center, self._stacked(), self.shape, self.center_site)

    def expert(self, index: int) -> MPO:
        """One expert's matrix as an MPO that shares memory and gradients with this module.

        Parameters
        ----------
        index : int
            From 0 to E − 1.

        Raises
        ------
        InputError
            If there is no such expert.
        """
        index = index_in("expert", index, self.num_experts)
        cores = [core if core.ndim == 4 else core[index] for core in self._cores()]
        return MPO([core.to(self.center.dtype) for core in cores], self.shape)

    def weight(self) -> Tensor:
        return self._matrices((self.center, *self._stacked()))

    def _weight_for(self, visits: Visits) -> Tensor:
        return self._matrices(self._of_visited((self.center, *self._stacked()), visits))

    def _matrices(self, cores: Sequence[Tensor]) -> Tensor:
        """Matrices (E, out, in) from the central core and the stacked ones."""
        dtype = common_dtype(cores)
        center, *aux = (core.to(dtype) for core in cores)
        with _TORCH.full_precision(center):
            left, right = aux[: self.center_site], aux[self.center_site :]
            matrices = stacked_to_padded_matrices(_TORCH, center, left, right)
        return matrices[:, : self.out_features, : self.in_features]

    def _stacked(self) -> list[Tensor]:
        """Auxiliary cores of every expert, shared ones repeated without a copy."""
        return [core.expand(self.num_experts, -1, -1, -1, -1) for core in self.aux]

    def train(self, mode: bool = True) -> Self:
        """As of any module; kept matrices are forgotten when the mode changes."""
        if mode != self.training:
            weight_cache.forget(self._stored)
        return super().train(mode)

    # Torch may swap tensors with others when it moves or loads them, and not while the cache
    # watches them.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        weight_cache.forget(self._stored)
        return super()._apply(partial(_applied, fn), recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        weight_cache.forget(self._stored)
        super()._load_from_state_dict(*args, **kwargs)

    def plan(self, rows: int, training: bool) -> ContractionPlan:
        """How a number of rows goes through; ``print`` it to see what every route would cost.

        Parameters
        ----------
        rows : int
            Slots (token, choice) of all experts together.
        training : bool
            Whether a backward pass follows, for which no matrices are kept.

        Returns
        -------
        ContractionPlan
        """
        return contraction_plan(
            self.shape,
            self._bond_dims,
            rows,
            experts=self.num_experts,
            center_site=self.center_site,
            training=training,
            cached=not training
            and not self._is_gathered
            and not needs_native_operators()
            and weight_cache.has_room(self._stored, self._matrices_bytes),
            device=self.center.device.type,
            itemsize=self.center.element_size(),
        )

    def multiplies_jointly(self, rows: int) -> bool:
        return (self.route or self.plan(rows, training=False).route) == "joint"

    def multiply(self, rows: Tensor, groups: Groups) -> Tensor:
        route = self.route or self._chosen_route(rows, groups)
        if route == "cached" and self._is_gathered:
            route = "rebuilt"
        if route == "cached":
            if self.route and needs_native_operators():
                raise InputError("route='cached' has no derivatives: set another, or None")
            if self.route and self._in_training(rows):
                raise InputError("route='cached' has no gradients: use it under torch.no_grad()")
            size = self.out_features, self.in_features
            cores = self.center, self.aux
            return cached_linear(rows, groups.offsets, *cores, self.center_site, self.legs, size)
        multiply = {
            "rebuilt": self._rebuilt,
            "joint": self._joint,
            "per_expert": self._per_expert,
        }.get(route)
        if multiply is None:
            raise InputError(
                f"route must be one of joint, per_expert, rebuilt, cached or None, got {route!r}"
            )
        return multiply(self._padded(rows), groups)[:, : self.out_features]

    def _shares_input_with(self, other: nn.Module, rows: Tensor, groups: Groups) -> bool:
        """Whether both may go through cores on the input side, the same tensors, only once."""
        return (
            isinstance(other, MPOProjection)
            # What is hooked is to be called.
            and not (_is_hooked(self) or _is_hooked(other))
            and other.aux[-1] is self.aux[-1]
            and other.shape == self.shape
            and all(
                (each.route or each._chosen_route(rows, groups)) == "joint"
                for each in (self, other)
            )
        )

    def _both(self, other: Any, rows: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """What this and another projection that shares cores on the input side give of rows."""
        sites = self.shape.sites
        tied = [self.core_at(site) is other.core_at(site) for site in range(sites)]

        def through(rows: Tensor, cores: list[Tensor], groups: Groups) -> Sequence[Tensor]:
            first, second = cores[:sites], cores[sites:]
            # The same tensor again, whatever its dtype had to be changed to.
            both = zip(tied, first, second, strict=True)
            return joint_linear(
                rows, [first, [one if same else two for same, one, two in both]], groups
            )

        cores = [*self._cores(), *other._cores()]
        step = min(self._rows_in_order, other._rows_in_order)
        first, second = in_pieces(through, self._padded(rows), cores, groups, step)
        return (
            self._add_bias(first[:, : self.out_features], groups),
            other._add_bias(second[:, : self.out_features], groups),
        )

    def _padded(self, rows: Tensor) -> Tensor:
        missing = self.shape.padded_in - self.in_features
        return F.pad(rows, (0, missing)) if missing else rows

    def _chosen_route(self, rows: Tensor, groups: Groups) -> str:
        training = self._in_training(rows)
        compiling = torch.compiler.is_compiling()
        if not compiling and has_values(rows):
            return self.plan(groups.rows, training).route
        # What is compiled, or has no numbers, must do for any number of rows.
        if self.shape.is_split(self.center_site):
            return "joint"
        return "cached" if compiling and not training else "rebuilt"

    @property
    def _is_gathered(self) -> bool:
        """Whether the cores come here before every use: FSDP's, or those accelerate offloads.

        FSDP writes to them in ways that leave no trace, and accelerate makes new ones every time,
        so matrices cannot be kept.
        """
        hook = getattr(self, "_hf_hook", None)
        offloaded = any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook]))
        return offloaded or getattr(self, "_is_fsdp_managed_module", False)

    def _in_training(self, rows: Tensor) -> bool:
        return torch.is_grad_enabled() and any(each.requires_grad for each in (rows, *self._stored))

    def _cores(self) -> list[Tensor]:
        """Cores of all sites; those that experts own have an expert axis."""
        cores: list[Tensor] = [core[0] if len(core) == 1 else core for core in self.aux]
        cores.insert(self.center_site, self.center)
        return cores

    def _of_visited(self, cores: Iterable[Tensor], groups: Groups | Visits) -> list[Tensor]:
        """Cores, but zeros for those of experts without rows.

        What these hold, NaN even, would be multiplied by a gradient of 0 and reach cores that
        experts share.
        """
        if not torch.is_grad_enabled():
            return list(cores)
        none = groups.visited.logical_not().view(-1, 1, 1, 1, 1)
        return [
            core.masked_fill(none, 0) if len(core) == len(none) and core.ndim == 5 else core
            for core in cores
        ]

    def _rebuilt(self, rows: Tensor, groups: Groups) -> Tensor:
        if self.center.ndim == 5:
            return self._owned(rows, groups)
        aux = self._of_visited((core.to(rows.dtype) for core in self.aux), groups)
        left, right = environments(
            aux[: self.center_site], aux[self.center_site :], self.num_experts
        )
        return rebuilt_linear(
            rows, self.center.to(rows.dtype), left, right, self.legs, groups.offsets
        )

    def _owned(self, rows: Tensor, groups: Groups) -> Tensor:
        """The route ``rebuilt`` of experts that own their central cores: all matrices at once."""
        center, *aux = self._of_visited(
            (core.to(rows.dtype) for core in (self.center, *self._stacked())), groups
        )
        matrices = stacked_to_padded_matrices(
            _TORCH, center, aux[: self.center_site], aux[self.center_site :]
        )
        return grouped_linear(rows, matrices, groups.offsets)

    @property
    def _rows_in_order(self) -> int:
        """Rows that go through together on the route ``joint``."""
        return self._rows_at_once(core_by_core_width(self.shape, self._bond_dims))

    def _rows_at_once(self, width: float) -> int:
        return rows_per_piece(width, max(self.shape.padded_in, self.shape.padded_out))

    def _joint(self, rows: Tensor, groups: Groups) -> Tensor:
        def through(rows: Tensor, cores: list[Tensor], groups: Groups) -> Sequence[Tensor]:
            return joint_linear(rows, [cores], groups)

        return in_pieces(through, rows, self._cores(), groups, self._rows_in_order)[0]

    def _per_expert(self, rows: Tensor, groups: Groups) -> Tensor:
        if not groups.spans:
            # Without rows, too, cores have gradients: zeros.
            return self._rebuilt(rows, groups)
        most = max(block.stop - block.start for _, block in groups.spans)
        step = self._rows_at_once(state_width(self.shape, self._bond_dims, most))
        return in_pieces(self._one_by_one, rows, self._cores(), groups, step)[0]

    def _one_by_one(self, rows: Tensor, cores: list[Tensor], groups: Groups) -> Sequence[Tensor]:
        """Rows of one expert after the other times its chain of cores."""
        core_of = [_by_expert(core) for core in cores]
        blocks = [
            apply_cores(_TORCH, self.shape, [core(expert) for core in core_of], rows[block])
            for expert, block in groups.spans
        ]
        return (torch.cat(blocks),)

    @property
    def _stored(self) -> tuple[nn.Parameter, ...]:
        return (self.center, *self.aux)

    @property
    def _matrices_bytes(self) -> int:
        numbers = self.num_experts * self.out_features * self.in_features
        return numbers * self.center.element_size()

    @property
    def legs(self) -> Legs:
        """Legs of the sites on either side of the centre, taken together."""

        def split(dims: tuple[int, ...]) -> tuple[int, int, int]:
            return (
                prod(dims[: self.center_site]),
                dims[self.center_site],
                prod(dims[self.center_site + 1 :]),
            )

        return Legs(split(self.shape.out_dims), split(self.shape.in_dims))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Isometric auxiliary cores and a Gaussian central one: the centre carries the scale."""
        for index, stack in enumerate(self.aux):
            left_of_center = index < self.center_site
            for core in stack:
                rows = core.shape[0] if not left_of_center else prod(core.shape[:-1])
                if not core.is_meta:
                    # LAPACK knows no half precision.
                    isometry = torch.empty_like(
                        core, dtype=torch.promote_types(core.dtype, torch.float32)
                    )
                    core.copy_(nn.init.orthogonal_(isometry.view(rows, -1)).view_as(core))
        variance = self.shape.padded_out / (3 * prod(self.center.shape[-4:]))
        self.center.normal_(std=sqrt(variance))
        if self.bias is not None:
            bound = 1 / sqrt(self.in_features)
            self.bias.uniform_(-bound, bound)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, shape={self.shape}, bond_dims={self._bond_dims}, "
            f"shared_sites={sorted(self.shared_sites)}"
        )


def side_by_side(
    first: nn.Module, second: nn.Module, rows: Tensor, groups: Groups
) -> tuple[Tensor, Tensor]:
    """Two projections of the same rows, sharing work where they can.

    Parameters
    ----------
    first, second : Projection, or a wrapper of one
        With as many experts and inputs.
    rows, groups
        As for :meth:`Projection.forward`.

    Returns
    -------
    tuple of Tensor, shapes (T, out)
    """
    if isinstance(first, MPOProjection) and first._shares_input_with(second, rows, groups):
        return first._both(second, rows, groups)
    return first(rows, groups), second(rows, groups)


def _by_expert(core: Tensor) -> Callable[[int], Tensor]:
    """What gives an expert's core of a site, (D, out, in, D') if shared or (E, D, out, in, D')."""
    if core.ndim == 5:
        return core.unbind().__getitem__
    use = reused(core, core.dtype)
    return lambda expert: use()


def _is_hooked(module: nn.Module) -> bool:
    """Whether something happens when a module is called besides its own forward."""
    return bool(
        # As accelerate does it.
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _applied(fn: Callable[[Tensor], Tensor], core: Tensor) -> Tensor:
    """A core moved or cast by a function that may also arrange images of four or five axes anew.

    Cores have as many axes and are no images: with more axes they stay as they lie.
    """
    if core.ndim not in (4, 5) or type(core) not in (Tensor, nn.Parameter):
        return fn(core)
    return fn(core.detach()[None, None])[0, 0]


def _check_torch(cores: Iterable[Any]) -> None:
    if odd := {type(core).__name__ for core in cores if not isinstance(core, Tensor)}:
        raise InputError(f"cores must be torch tensors, got {', '.join(odd)}")


def resolve_shared_sites(
    shared_sites: str | Iterable[int], sites: int, center_site: int
) -> frozenset[int]:
    """Sites that experts share, from a name or from their numbers.

    Raises
    ------
    InputError
        If the name is unknown, a site is not there, or no site is left that experts own.
    """
    if isinstance(shared_sites, str):
        named: dict[str, frozenset[int]] = {"center": frozenset({center_site}), "none": frozenset()}
        if shared_sites not in named:
            raise InputError(
                f"shared_sites must be one of {', '.join(named)} or sites, got {shared_sites!r}"
            )
        return named[shared_sites]
    if not isinstance(shared_sites, Iterable):
        raise InputError(
            f"shared_sites must be a name or the numbers of sites, got {shared_sites!r}"
        )
    chosen = frozenset(index_in("every shared site", site, sites) for site in shared_sites)
    if len(chosen) == sites:
        raise InputError(f"experts that share all {sites} sites would be one: leave some out")
    return chosen

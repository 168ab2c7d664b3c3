"""Projections whose matrices are MPOs that share the cores of some sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod, sqrt
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from tnmoe.contraction.expert_routes import once_per_token_sites
from tnmoe.contraction.layer_plan import Work
from tnmoe.contraction.plan import ContractionPlan
from tnmoe.errors import InputError, check_generator, check_index, check_positive_int
from tnmoe.mpo import MPO
from tnmoe.nn.compute import routes
from tnmoe.nn.compute.cache import weight_cache
from tnmoe.nn.compute.cores import ExpertCores
from tnmoe.nn.compute.matrices import exact_matrices
from tnmoe.nn.compute.once_per_token import (
    FirstBias,
    FirstChain,
    FirstProduct,
    LastBias,
    LastChain,
    LastProduct,
    Load,
)
from tnmoe.nn.compute.slots import DenseDispatch, Groups
from tnmoe.nn.projection import Bias, Projection
from tnmoe.nn.snapshot import has_hooks
from tnmoe.nn.stored_cores import StoredCores
from tnmoe.options import Route
from tnmoe.shapes import (
    MPOShape,
    SharedSites,
    chain_shapes,
    resolve_center_site,
    resolve_shared_sites,
)
from tnmoe.shared_mpo import SharedMPO, replicate


class MPOProjection(StoredCores, Projection):
    """Matrices as MPOs, whose experts share the cores of some sites and own those of the rest.

    The module stores a core that experts own as a stack with an expert axis, and a shared core
    once.

    Parameters
    ----------
    num_experts : int
        Number of experts E.
    shape : MPOShape
        Legs and size of every expert's matrix; at least two sites.
    bias : bool or "common"
        Whether every expert has a bias of its own, or all experts have one in common.
    max_bond : int, optional
        Largest bond dimension; exact bonds by default.
    bond_dims : sequence of int, optional
        Inner bond dimensions instead. They may be larger than one matrix needs.
    center_site : int, optional
        Site of the central core; ``shape.center_site`` by default.
    shared_sites : {"center", "none"} or iterable of int
        Sites whose cores all experts share; not all of them.
    device, dtype
        Device and dtype of the parameters, as for torch's own layers.

    Attributes
    ----------
    center : Parameter, shape (D, out, in, D') if shared, or (E, D, out, in, D')
        The central core.
    aux_0, aux_1, … : Parameter, shape (E, D, out, in, D'), or (1, D, out, in, D') if shared
        The cores of the other sites, left to right; :attr:`aux` has all of them.
    shared_sites : frozenset of int
        Sites whose cores all experts share.
    route : {"joint", "per_expert", "rebuilt", "cached"} or None
        How rows are multiplied; planned for every forward pass if None.

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

    route: Route | None = None

    def __init__(
        self,
        num_experts: int,
        shape: MPOShape,
        *,
        bias: Bias = False,
        max_bond: int | None = None,
        bond_dims: Sequence[int] | None = None,
        center_site: int | None = None,
        shared_sites: SharedSites = "center",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_experts,
            shape.out_features,
            shape.in_features,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        if shape.sites < 2:
            raise InputError(
                f"experts that share cores need a shape of at least 2 sites, got {shape}"
            )
        self.shape = shape
        center_site = resolve_center_site(shape, center_site)
        shared = resolve_shared_sites(shared_sites, shape.sites, center_site)
        bonds = _check_bonds(shape, max_bond, bond_dims)
        cores = []
        for site, size in enumerate(chain_shapes(shape, bonds)):
            experts = () if site in shared else (self.num_experts,)
            cores.append(torch.empty(*experts, *size, device=device, dtype=dtype))
        self._store(cores, center_site)
        self.reset_parameters()

    @classmethod
    def from_mpo(
        cls,
        mpo: MPO,
        num_experts: int,
        shared_sites: SharedSites = "center",
        noise: float = 0.0,
        rng: np.random.Generator | int | None = None,
    ) -> MPOProjection:
        """Start all experts as one MPO of torch tensors, without copies of the shared cores.

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
            If the cores are not torch tensors, or sites, noise or numbers do not fit.
        """
        _check_torch(mpo.cores)
        center_site = mpo.shape.center_site if mpo.center_site is None else mpo.center_site
        projection = cls(num_experts, mpo.shape, max_bond=1, device="meta")
        shared = resolve_shared_sites(shared_sites, mpo.shape.sites, center_site)
        rng = check_generator(rng)
        cores = [
            core if site in shared else replicate(core, projection.num_experts, noise, rng)
            for site, core in enumerate(mpo.cores)
        ]
        projection._store(cores, center_site)
        return projection

    @classmethod
    def from_shared_mpo(cls, shared: SharedMPO) -> MPOProjection:
        """Take over the cores of a SharedMPO, with any bonds, centre and shared sites.

        Parameters
        ----------
        shared : SharedMPO
            Of torch tensors and of at least two sites, without a base.

        Raises
        ------
        InputError
            If the cores are not torch tensors, there is one site only, or there is a base.
        """
        _check_torch(shared.cores)
        if shared.base is not None:
            raise InputError(f"an MPOProjection has no base: got {shared!r}")
        projection = cls(
            shared.num_experts,
            shared.shape,
            bond_dims=shared.bond_dims,
            center_site=shared.center_site,
            device="meta",
        )
        projection._store(shared.cores, shared.center_site)
        return projection

    @property
    def cores(self) -> ExpertCores:
        """The cores of all sites as they are now, for the functions of ``tnmoe.nn.compute``."""
        return ExpertCores(
            self._stored(),
            self.shape,
            self.center_site,
            self.num_experts,
            self._bond_dims,
            transient=self.is_gathered,
        )

    def to_shared_mpo(self) -> SharedMPO:
        """Return a SharedMPO that shares memory and gradients with this module.

        Cores of several dtypes are cast to one that holds the numbers of all.
        """
        cores = self.cores.to(self.cores.dtype).stored
        chain = (
            core[0] if site in self.shared_sites and core.ndim == 5 else core
            for site, core in enumerate(cores)
        )
        return SharedMPO(tuple(chain), self.shape, self.center_site)

    def expert(self, index: int) -> MPO:
        """Return one expert's matrix as an MPO that shares memory and gradients with this module.

        Parameters
        ----------
        index : int
            From 0 to E − 1.

        Raises
        ------
        InputError
            If there is no such expert.
        """
        index = check_index("expert", index, self.num_experts)
        cores = self.cores
        sites = (core if core.ndim == 4 else core[index] for core in cores.sites())
        return MPO([core.to(cores.center.dtype) for core in sites], self.shape)

    def weight(self) -> Tensor:
        return exact_matrices(self.cores)

    def _masked_weight(self, groups: Groups | DenseDispatch) -> Tensor:
        return exact_matrices(self.cores.mask_unused(groups))

    def plan(self, rows: int, training: bool) -> ContractionPlan:
        """Plan a route; ``print`` the plan to see what every route would cost.

        Parameters
        ----------
        rows : int
            Slots of all experts together.
        training : bool
            Whether a backward pass follows, for which no matrices are kept.

        Returns
        -------
        ContractionPlan
        """
        return routes.plan(self.cores, rows, training)

    def uses_joint_route(self, rows: int) -> bool:
        return (self.route or self.plan(rows, training=False).route) == "joint"

    def multiply(self, rows: Tensor, groups: Groups) -> Tensor:
        return routes.expert_linear(rows, self.cores, groups, self.route)

    def first_product(self, load: Load) -> FirstProduct | None:
        stop = 1 + max(self._owned_sites)
        if stop == self.shape.sites or not self._acts_once_per_token("up", load):
            return None
        product = self._first_chain(stop)
        return product if self.bias is None else FirstBias(product, self.bias, self.num_experts)

    def last_product(self, load: Load) -> LastProduct | None:
        start = min(self._owned_sites)
        if start == 0 or not self._acts_once_per_token("down", load):
            return None
        product = self._last_chain(start)
        return product if self.bias is None else LastBias(product, self.bias, self.num_experts)

    def _first_chain(self, stop: int) -> FirstChain:
        return FirstChain(self.cores, stop)

    def _last_chain(self, start: int) -> LastChain:
        return LastChain(self.cores, start)

    def _acts_once_per_token(self, matrix: Literal["up", "down"], load: Load) -> bool:
        """Return whether shared cores at one end act once per token in a call of the layer."""
        # The parts of a product bypass the call of the module, and with it its hooks.
        if has_hooks(self) or self.route not in (None, "joint"):
            return False
        once = once_per_token_sites(self.shape.sites, self.shared_sites, matrix)
        if self.route == "joint" or self.center_site in once:
            return True
        if not load.is_known:
            return False
        top_k = max(1, load.slots // max(1, load.tokens))
        planned = routes.plan(self.cores, load.slots, load.training, matrix=matrix, top_k=top_k)
        return planned.route == "joint"

    def work_of_call(self, load: Load) -> Work:
        cores, sizes = self.cores, chain_shapes(self.shape, self._bond_dims)
        planned = routes.plan(cores, load.slots, load.training, route=self.route)
        shared, owned = (
            sum(prod(sizes[site]) * cores.stored[site].element_size() for site in sites)
            for sites in (self.shared_sites, self._owned_sites)
        )
        flops = planned.flops / max(1, load.slots)
        return Work(f"cores, route {planned.route}", "slot", flops, shared, owned)

    @property
    def shared_parameters(self) -> list[nn.Parameter]:
        return self.shared_cores

    @property
    def owned_parameters(self) -> list[nn.Parameter]:
        return [core for site in sorted(self._owned_sites) for core in self.parameters_at(site)]

    def expert_rows(self, expert: int) -> dict[str, slice]:
        owned = {self._names[site]: slice(expert, expert + 1) for site in sorted(self._owned_sites)}
        return super().expert_rows(expert) | owned

    def _keep_experts(self, experts: Sequence[int]) -> None:
        super()._keep_experts(experts)
        weight_cache.forget(self._stored())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw isometric auxiliary cores and a Gaussian central one, which carries the scale."""
        kept = 1.0
        for number, stack in enumerate(self.aux):
            from_left = number < self.center_site
            for core in stack:
                _draw_isometry(core, from_left)
            # A bond that is larger than one matrix needs loses a share of the central core.
            towards_center = stack.shape[-1] if from_left else stack.shape[-4]
            kept *= min(1.0, prod(stack.shape[-4:]) / towards_center**2)
        variance = self.shape.padded_out / (3 * prod(self.center.shape[-4:]) * kept)
        self.center.normal_(std=sqrt(variance))
        if self.bias is not None:
            bound = 1 / sqrt(self.in_features)
            self.bias.uniform_(-bound, bound)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as any module does; a change of mode drops kept matrices."""
        if mode != self.training:
            weight_cache.forget(self._stored())
        return super().train(mode)

    # Torch may swap tensors with others when it moves or loads them. It refuses that for tensors
    # with weak references, which the cache holds.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        weight_cache.forget(self._stored())
        return super()._apply(partial(_apply_to_core, fn), recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        weight_cache.forget(self._stored())
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, shape={self.shape}, bond_dims={self._bond_dims}, "
            f"shared_sites={sorted(self.shared_sites)}"
        )


def project_pair(
    first: nn.Module, second: nn.Module, rows: Tensor, groups: Groups
) -> tuple[Tensor, Tensor]:
    """Apply two projections to the same rows; contract cores that both store only once.

    Parameters
    ----------
    first, second : Projection, or a wrapper of one
        Both of the same number of experts and inputs.
    rows, groups
        As for :meth:`Projection.forward`.

    Returns
    -------
    tuple of Tensor, shapes (N, out)
    """
    if (
        isinstance(first, MPOProjection)
        and isinstance(second, MPOProjection)
        # Contracting cores once bypasses the calls of the modules, and with them their hooks.
        and not (has_hooks(first) or has_hooks(second))
        and first.last_core is second.last_core
        and first.shape == second.shape
    ):
        first_cores, second_cores = first.cores, second.cores
        if all(
            (route or routes.choose_route(cores, rows, groups)) == "joint"
            for route, cores in ((first.route, first_cores), (second.route, second_cores))
        ):
            products = routes.tied_linear(rows, first_cores, second_cores, groups)
            return first.add_bias(products[0], groups), second.add_bias(products[1], groups)
    return first(rows, groups), second(rows, groups)


def _draw_isometry(core: Tensor, from_left: bool) -> None:
    """Fill a core (D, out, in, D') such that it preserves norms towards the centre."""
    if core.is_meta:
        return
    rows = prod(core.shape[:-1]) if from_left else core.shape[0]
    # LAPACK has no half precision.
    isometry = torch.empty_like(core, dtype=torch.promote_types(core.dtype, torch.float32))
    core.copy_(nn.init.orthogonal_(isometry.view(rows, -1)).view_as(core))


def _apply_to_core(fn: Callable[[Tensor], Tensor], core: Tensor) -> Tensor:
    """Move or cast a core by a function that may also change the memory format of images.

    Such functions take tensors of four or five axes for images. Two more axes protect the core.
    """
    if core.ndim not in (4, 5) or type(core) not in (Tensor, nn.Parameter):
        return fn(core)
    return fn(core.detach()[None, None])[0, 0]


def _check_bonds(
    shape: MPOShape, max_bond: int | None, bond_dims: Sequence[int] | None
) -> tuple[int, ...]:
    """Return the inner bond dimensions of new cores."""
    if bond_dims is None:
        return shape.bond_dims(max_bond)
    if max_bond is not None:
        raise InputError(f"give max_bond={max_bond} or bond_dims={tuple(bond_dims)}, not both")
    if len(bond_dims) != shape.sites - 1:
        raise InputError(
            f"bond_dims needs one value per bond: got {tuple(bond_dims)} for {shape.sites - 1} "
            "bonds"
        )
    return tuple(check_positive_int("every bond dimension", bond) for bond in bond_dims)


def _check_torch(cores: Iterable[Any]) -> None:
    if foreign := {type(core).__name__ for core in cores if not isinstance(core, Tensor)}:
        raise InputError(f"cores must be torch tensors, got {', '.join(foreign)}")

"""Projections of every layout: new ones, and those of a pretrained matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tnmoe.decompose import decompose
from tnmoe.errors import InputError
from tnmoe.mpo import MPO
from tnmoe.nn.hidden_projection import HiddenProjection
from tnmoe.nn.linear import as_linear, weight_of_linear
from tnmoe.nn.mpo_projection import MPOProjection
from tnmoe.nn.projection import Bias, Projection
from tnmoe.nn.residual_projection import ResidualProjection, start_at_zero
from tnmoe.nn.settings import MPOSettings
from tnmoe.options import Gauge, Method
from tnmoe.shapes import resolve_shared_sites
from tnmoe.shared_mpo import replicate
from tnmoe.truncation.info import TruncationInfo

Report = Callable[[TruncationInfo], None]


def new_projection(
    num_experts: int,
    settings: MPOSettings,
    *,
    bias: Bias = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Projection:
    """Make a projection with random matrices.

    Parameters
    ----------
    num_experts, bias, device, dtype
        As for :class:`Projection`.
    settings : MPOSettings
    """
    shape = settings.shape
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    if settings.layout == "hidden":
        return HiddenProjection(
            num_experts,
            shape,
            bond_dims=settings.bond_dims,
            center_site=settings.center_site,
            bias=bias,
            **place,
        )
    if settings.layout == "residual":
        # torch's global generator seeds the draw, as it draws the numbers of torch's own layers.
        seed = int(torch.randint(2**62, (), device="cpu"))
        delta = new_delta(num_experts, settings, rng=seed, **place)
        base = nn.Linear(shape.in_features, shape.out_features, bias=False, **place)
        return ResidualProjection(base, delta, bias=bias)
    return MPOProjection(
        num_experts,
        shape,
        bond_dims=settings.bond_dims,
        bias=bias,
        shared_sites=settings.shared_sites,
        **place,
    )


def pretrained_projection(
    source: Tensor | nn.Module,
    num_experts: int,
    settings: MPOSettings,
    *,
    gauge: Gauge = "identity",
    noise: float = 0.0,
    rng: np.random.Generator,
    report: Report | None = None,
) -> Projection:
    """Start the matrices of all experts as one pretrained matrix.

    Parameters
    ----------
    source : Tensor of shape (out, in), or linear Module
        A module whose matrix stays as it stands (``settings.keeps_matrix``) becomes a part of the
        projection, its bias included. Otherwise the projection has no bias. A tensor is copied.
    num_experts : int
        Number of experts E.
    settings : MPOSettings
    gauge, noise, rng
        As for :meth:`tnmoe.nn.MPOExperts.from_dense`.
    report : callable, optional
        Called with the TruncationInfo of a decomposition.
    """
    if settings.keeps_matrix:
        # A matrix stays the caller's: training must not change it.
        module = as_linear(source.clone()) if isinstance(source, Tensor) else source
        _check_finite(weight_of_linear(module))
        if settings.layout == "hidden":
            site = settings.center_site
            return HiddenProjection.from_linear(
                module, num_experts, settings.shape, site, noise, rng
            )
        return _residual_of(module, num_experts, settings, noise, rng)
    matrix = source if isinstance(source, Tensor) else weight_of_linear(source)
    mpo = _decompose(matrix.detach(), settings, gauge, report)
    if settings.layout == "hidden":
        mpo = mpo.canonicalize(settings.center_site)
    if settings.enlarged_bond is None and settings.layout != "hidden":
        return MPOProjection.from_mpo(mpo, num_experts, settings.shared_sites, noise, rng)
    return _from_enlarged(mpo, num_experts, settings, noise, rng)


def new_delta(
    num_experts: int,
    settings: MPOSettings,
    scale: float = 0.0,
    rng: np.random.Generator | int | None = None,
    **place: Any,
) -> MPOProjection:
    """Make the MPOs of a residual projection, of this Frobenius norm."""
    # On the meta device the constructor draws nothing.
    delta = MPOProjection(
        num_experts,
        settings.shape,
        bond_dims=settings.bond_dims,
        shared_sites=settings.shared_sites,
        device="meta",
        dtype=place["dtype"],
    )
    delta.to_empty(device=torch.empty(0, **place).device)
    start_at_zero(delta, scale, rng)
    return delta


def _residual_of(
    module: nn.Module,
    num_experts: int,
    settings: MPOSettings,
    noise: float,
    rng: np.random.Generator,
) -> ResidualProjection:
    weight = weight_of_linear(module)
    norm = float(torch.linalg.vector_norm(weight.detach())) if noise else 0.0
    place = {"device": weight.device, "dtype": weight.dtype}
    return ResidualProjection(module, new_delta(num_experts, settings, noise * norm, rng, **place))


def _from_enlarged(
    mpo: MPO, num_experts: int, settings: MPOSettings, noise: float, rng: np.random.Generator
) -> MPOProjection:
    """Start all experts as one MPO with a bond that is larger than one matrix needs."""
    center = mpo.shape.center_site if mpo.center_site is None else mpo.center_site
    shared = resolve_shared_sites(settings.shared_sites, mpo.shape.sites, center)
    cores = [
        core if site in shared else replicate(core, num_experts, 0.0, rng)
        for site, core in enumerate(mpo.cores)
    ]
    if settings.enlarged_bond is not None:
        number, dimension = settings.enlarged_bond
        cores[number : number + 2] = _enlarged(cores[number], cores[number + 1], dimension)
    cores = [
        core if site in shared else _with_noise(core, noise, rng) for site, core in enumerate(cores)
    ]
    make = HiddenProjection if settings.layout == "hidden" else MPOProjection
    # One-dimensional bonds: the cores follow.
    projection: MPOProjection = make(
        num_experts,
        settings.shape,
        bond_dims=[1] * (mpo.shape.sites - 1),
        center_site=center,
        device="meta",
    )
    projection._store(cores, center)
    return projection


def _enlarged(left: Tensor, right: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """Enlarge the bond between a core that experts own and one that they share.

    The shared core repeats itself along the bond. Every expert picks one of the repetitions of
    every entry, the experts in turn. So all experts keep their matrix, and with as many repetitions
    as experts each has a part of the shared core to itself.
    """
    if left.ndim == 4:
        right, left = _enlarged(right.transpose(-4, -1), left.transpose(-4, -1), dimension)
        return left.transpose(-4, -1), right.transpose(-4, -1)
    size = left.shape[-1]
    entries = torch.arange(size, device=left.device)
    repeated = torch.arange(dimension, device=left.device) % size
    repetitions = torch.bincount(repeated, minlength=size)
    enlarged = left.new_zeros(*left.shape[:-1], dimension)
    for expert, core in enumerate(left):
        enlarged[expert].index_copy_(-1, entries + size * (expert % repetitions), core)
    return enlarged, right.index_select(0, repeated)


def _with_noise(core: Tensor, noise: float, rng: np.random.Generator) -> Tensor:
    """Add noise relative to the root mean square of every expert's core."""
    return torch.cat([replicate(each, 1, noise, rng) for each in core])


def _decompose(matrix: Tensor, settings: MPOSettings, gauge: Gauge, report: Report | None) -> MPO:
    """Decompose a pretrained matrix, and report what the truncation cut."""
    # ``auto`` leaves identity matrices at bonds where nothing can be cut.
    method: Method = "auto" if gauge == "identity" else "eigh"
    if report is None:
        return decompose(matrix, settings.shape, max_bond=settings.max_bond, method=method)
    # The report needs spectra, which cost more than an exact decomposition without them.
    mpo, info = decompose(
        matrix, settings.shape, max_bond=settings.max_bond, method=method, return_info=True
    )
    report(info)
    return mpo


def _check_finite(matrix: Tensor) -> None:
    if not torch.isfinite(matrix).all():
        raise InputError(f"the {tuple(matrix.shape)} matrix contains NaN or infinity")

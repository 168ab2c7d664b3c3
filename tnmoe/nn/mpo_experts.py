"""Experts whose matrices are MPOs that share cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tnmoe.decompose import decompose
from tnmoe.errors import check_generator, check_one_of
from tnmoe.mpo import MPO
from tnmoe.nn.experts import Experts, check_ffn
from tnmoe.nn.mpo_projection import MPOProjection
from tnmoe.nn.projection import Bias, Projection, StackedProjection
from tnmoe.nn.settings import MPOSettings, mpo_settings, projection_sizes
from tnmoe.options import GAUGES, MATRICES, Gauge, Layout, Matrix, Method
from tnmoe.shapes import MPOShape, SharedSites
from tnmoe.truncation.info import TruncationInfo


class MPOExperts(Experts):
    """Experts whose matrices share a central core (MPOE, arXiv:2203.01104, section 3.2).

    Per projection the layer holds one ``center`` (D, out, in, D') and stacked auxiliary cores
    ``aux_0``, ``aux_1``, … (E, D, out, in, D').

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
    layout : {"interleaved", "split"}
        How matrices split over sites: as :meth:`tnmoe.MPOShape.for_matrix` splits them, or as
        :meth:`tnmoe.MPOShape.split` does, in groups of 64 or the greatest common divisor with 64.
    sites : int
        Number of sites of interleaved shapes.
    up_shape, down_shape : MPOShape, optional
        Shapes instead of the layout's; ``up_shape`` is the gate's, too.
    max_bond : int, or mapping from "up", "gate", "down" to int or None, optional
        Largest bond dimension, of all projections or of each; exact bonds by default.
    shared_sites : {"center", "none"}, iterable of int, or mapping
        Sites whose cores all experts share, of all projections or of each; not all sites.
        ``"center"`` is MPOE; ``"none"`` gives every expert an MPO of its own.
    matrices : iterable of "up", "gate", "down"
        Which matrices are MPOs. Experts own the remaining ones whole, as in an ordinary mixture.
    device, dtype : optional
        Device and dtype of the parameters, as for torch's own layers.

    Raises
    ------
    InputError
        If sizes, shapes or bonds do not fit each other, or a name is unknown.

    Examples
    --------
    >>> import torch
    >>> experts = MPOExperts(4, hidden_size=16, intermediate_size=32, sites=3)
    >>> index, weights = torch.tensor([[0], [3]]), torch.ones(2, 1)
    >>> experts(torch.randn(2, 16), index, weights).shape
    torch.Size([2, 16])
    >>> other = MPOExperts(4, 16, 32, sites=3, shared_sites={"up": {0, 1}}, max_bond={"down": 8})
    >>> [len(core) for core in other.up.aux], [len(core) for core in other.down.aux]
    ([1, 4], [4, 4])
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
        layout: Layout = "interleaved",
        sites: int = 5,
        up_shape: MPOShape | None = None,
        down_shape: MPOShape | None = None,
        max_bond: int | Mapping[str, int | None] | None = None,
        shared_sites: SharedSites | Mapping[str, SharedSites] = "center",
        matrices: Iterable[Matrix] = MATRICES,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = projection_sizes(hidden_size, intermediate_size, gated)
        settings = mpo_settings(
            sizes,
            layout=layout,
            sites=sites,
            up_shape=up_shape,
            down_shape=down_shape,
            max_bond=max_bond,
            shared_sites=shared_sites,
            matrices=matrices,
        )
        common: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        projections: dict[str, Projection] = {
            name: MPOProjection(num_experts, **vars(settings[name]), **common)
            if name in settings
            else StackedProjection(num_experts, *size, **common)
            for name, size in sizes.items()
        }
        super().__init__(**projections, activation=activation, dropout=dropout)

    @classmethod
    def from_dense(
        cls,
        up: Tensor,
        down: Tensor,
        gate: Tensor | None = None,
        *,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        gate_bias: Tensor | None = None,
        common_bias: bool = False,
        num_experts: int = 8,
        activation: str | Callable[..., Tensor] = "relu",
        dropout: float = 0.0,
        layout: Layout = "interleaved",
        sites: int = 5,
        up_shape: MPOShape | None = None,
        down_shape: MPOShape | None = None,
        max_bond: int | Mapping[str, int | None] | None = None,
        shared_sites: SharedSites | Mapping[str, SharedSites] = "center",
        matrices: Iterable[Matrix] = MATRICES,
        gauge: Gauge = "identity",
        noise: float = 0.0,
        rng: np.random.Generator | int | None = None,
        on_matrix: Callable[[str, TruncationInfo], None] | None = None,
    ) -> Self:
        """Start all experts as one pretrained FFN.

        With exact bonds and no noise every expert is that FFN, to rounding.

        Parameters
        ----------
        up, gate : Tensor, shape (F, H)
            Pretrained matrices, laid out as in ``torch.nn.Linear.weight``.
        down : Tensor, shape (H, F)
            Pretrained matrix.
        up_bias, gate_bias, down_bias : Tensor, shapes (F,), (F,), (H,), optional
            Pretrained biases.
        common_bias : bool
            Keep one copy of the biases for all experts instead of one per expert.
        num_experts : int
            Number of experts E.
        activation, dropout, layout, sites, up_shape, down_shape, max_bond, shared_sites, matrices
            As for the class.
        gauge : {"identity", "schmidt"}
            How a matrix becomes cores where nothing is cut. With ``identity`` auxiliary cores
            start as identity matrices, and the centre as the matrix with its entries rearranged.
            An optimiser that scales entry by entry, such as Adam, then moves the centre as it
            would move the matrix. ``schmidt`` rotates all bonds to the Schmidt basis, which
            truncated bonds always have.
        noise : float
            Noise on every expert's own cores, relative to each core's root mean square: experts
            then differ from the start. Shared cores get no noise.
        rng : numpy Generator or int, optional
            Source of the noise.
        on_matrix : callable, optional
            Called with the projection's name and the TruncationInfo of its decomposition.

        Raises
        ------
        InputError
            If the matrices do not fit each other or the shapes, a bias does not fit its matrix,
            or they contain NaN or infinity.
        """
        given = check_ffn(up, down, gate, gate_bias)
        settings = mpo_settings(
            {name: (matrix.shape[0], matrix.shape[1]) for name, matrix in given.items()},
            layout=layout,
            sites=sites,
            up_shape=up_shape,
            down_shape=down_shape,
            max_bond=max_bond,
            shared_sites=shared_sites,
            matrices=matrices,
        )
        check_one_of("gauge", gauge, GAUGES)
        rng = check_generator(rng)
        projections: dict[str, Projection] = {}
        for name, matrix in given.items():
            if name in settings:
                report = None if on_matrix is None else partial(on_matrix, name)
                mpo = _decompose(matrix.detach(), settings[name], gauge, report)
                shared = settings[name].shared_sites
                projections[name] = MPOProjection.from_mpo(mpo, num_experts, shared, noise, rng)
            else:
                projections[name] = StackedProjection.from_dense(matrix, num_experts, noise, rng)
        return cls._from_projections(
            projections,
            {"up": up_bias, "down": down_bias, "gate": gate_bias},
            common_bias=common_bias,
            activation=activation,
            dropout=dropout,
        )


def _decompose(
    matrix: Tensor,
    settings: MPOSettings,
    gauge: Gauge,
    report: Callable[[TruncationInfo], None] | None,
) -> MPO:
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

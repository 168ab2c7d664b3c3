"""Experts whose matrices are MPOs that share cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tnmoe.errors import check_generator, check_one_of
from tnmoe.nn.experts import Experts
from tnmoe.nn.layouts import new_projection, pretrained_projection
from tnmoe.nn.pretrained_ffn import PretrainedFFN, Source
from tnmoe.nn.projection import Bias, Projection, StackedProjection
from tnmoe.nn.settings import (
    GROUP_SIZE,
    GroupSize,
    check_projections,
    mpo_settings,
    projection_sizes,
)
from tnmoe.nn.structure import ProjectionStructure, projection_of
from tnmoe.options import GAUGES, MATRICES, Gauge, Layout, Matrix
from tnmoe.shapes import MPOShape, SharedSites
from tnmoe.shared_mpo import SharedMPO
from tnmoe.truncation.info import TruncationInfo

# Matrices of all experts, in any form that a projection can be made of.
Matrices = SharedMPO | Tensor | Projection


class MPOExperts(Experts):
    """Experts whose matrices share cores, or a matrix: by default MPOE.

    Per projection the layer holds one ``center`` (D, out, in, D') and stacked auxiliary cores
    ``aux_0``, ``aux_1``, … (E, D, out, in, D'), as MPOE does (arXiv:2203.01104, section 3.2). In
    the layouts ``hidden`` and ``residual`` a linear module ``base`` holds what experts share.

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
    layout : {"interleaved", "split", "hidden", "residual"}
        What experts share and own. ``interleaved``: chains split as
        :meth:`tnmoe.MPOShape.for_matrix` does. ``split``: chains split as
        :meth:`tnmoe.MPOShape.split` does, in groups of ``group_size``. ``hidden``: the same with
        groups on the hidden side only; the shared core is a linear module
        (:class:`HiddenProjection`). ``residual``: a shared linear module plus a small MPO of every
        expert, which starts at zero (:class:`ResidualProjection`). In the last two, what experts
        share is computed once per token, however many experts the token visits.
    sites : int, optional
        Number of sites of interleaved shapes, 5 by default, or of residual ones, 2 by default.
        With 2 sites a residual matrix has low rank, with more it is a tensor train.
    group_size : int or sequence of int
        Groups of split and hidden shapes; a single number stands for its greatest common divisor
        with the size that it divides. A sequence gives experts several cores.
    bond_ratio : float
        How many times as large as one matrix needs the bond on the hidden side of the shared core
        is, in ``split`` and ``hidden``. The shared core then holds as many matrices. With a ratio
        of E, experts can be as different as those of an ordinary mixture.
    up_shape, down_shape : MPOShape, optional
        Shapes instead of the layout's; ``up_shape`` is the gate's, too.
    max_bond : int, or mapping from "up", "gate", "down" to int or None, optional
        Largest bond dimension, of all projections or of each. By default bonds are exact, or 16 in
        ``residual``.
    shared_sites : {"center", "none"}, iterable of int, or mapping, optional
        Sites whose cores all experts share, of all projections or of each; not all sites.
        ``"center"``, the default, is MPOE. ``"none"`` gives every expert an MPO of its own; it is
        the default of ``residual``.
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
        sites: int | None = None,
        group_size: GroupSize = GROUP_SIZE,
        bond_ratio: float = 1.0,
        up_shape: MPOShape | None = None,
        down_shape: MPOShape | None = None,
        max_bond: int | Mapping[str, int | None] | None = None,
        shared_sites: SharedSites | Mapping[str, SharedSites] | None = None,
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
            group_size=group_size,
            bond_ratio=bond_ratio,
            up_shape=up_shape,
            down_shape=down_shape,
            max_bond=max_bond,
            shared_sites=shared_sites,
            matrices=matrices,
        )
        common: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        projections: dict[str, Projection] = {
            name: new_projection(num_experts, settings[name], **common)
            if name in settings
            else StackedProjection(num_experts, *size, **common)
            for name, size in sizes.items()
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
        layout: Layout = "interleaved",
        sites: int | None = None,
        group_size: GroupSize = GROUP_SIZE,
        bond_ratio: float = 1.0,
        up_shape: MPOShape | None = None,
        down_shape: MPOShape | None = None,
        max_bond: int | Mapping[str, int | None] | None = None,
        shared_sites: SharedSites | Mapping[str, SharedSites] | None = None,
        matrices: Iterable[Matrix] = MATRICES,
        gauge: Gauge = "identity",
        noise: float = 0.0,
        rng: np.random.Generator | int | None = None,
        on_matrix: Callable[[str, TruncationInfo], None] | None = None,
    ) -> Self:
        """Start all experts as one pretrained FFN.

        With exact bonds, or any bonds in ``residual``, and no noise every expert is that FFN, to
        rounding.

        Parameters
        ----------
        up, gate : Tensor of shape (F, H), or linear Module
            Pretrained matrices, laid out as in ``torch.nn.Linear.weight``, or the modules that hold
            them. In ``hidden``, unless bonds are truncated or enlarged, and in ``residual`` the
            experts use a module as it stands; its bias remains a common one, to which experts add
            their own.
        down : Tensor of shape (H, F), or linear Module
            Pretrained matrix.
        up_bias, gate_bias, down_bias : Tensor, shapes (F,), (F,), (H,), optional
            Pretrained biases, of matrices that are given as tensors.
        common_bias : bool
            Keep one copy of the biases for all experts instead of one per expert.
        num_experts : int
            Number of experts E.
        activation, dropout, layout, sites, group_size, bond_ratio, up_shape, down_shape, max_bond
        shared_sites, matrices
            As for the class.
        gauge : {"identity", "schmidt"}
            How a matrix becomes cores where nothing is cut. With ``identity`` auxiliary cores
            start as identity matrices, and the centre as the matrix with its entries rearranged.
            An optimiser that scales entry by entry, such as Adam, then moves the centre as it
            would move the matrix. ``schmidt`` rotates all bonds to the Schmidt basis, which
            truncated bonds always have.
        noise : float
            Noise on every expert's own cores, relative to each core's root mean square: experts
            then differ from the start. Shared cores get no noise. In ``residual``, the Frobenius
            norm of every expert's MPO relative to that of the matrix.
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
        ffn = PretrainedFFN.of(
            {"up": up, "down": down, "gate": gate},
            {"up": up_bias, "down": down_bias, "gate": gate_bias},
        )
        settings = mpo_settings(
            {name: (matrix.shape[0], matrix.shape[1]) for name, matrix in ffn.weights.items()},
            layout=layout,
            sites=sites,
            group_size=group_size,
            bond_ratio=bond_ratio,
            up_shape=up_shape,
            down_shape=down_shape,
            max_bond=max_bond,
            shared_sites=shared_sites,
            matrices=matrices,
        )
        check_one_of("gauge", gauge, GAUGES)
        rng = check_generator(rng)
        projections: dict[str, Projection] = {}
        for name, source in ffn.sources.items():
            if name not in settings:
                weight = ffn.weights[name]
                projections[name] = StackedProjection.from_dense(weight, num_experts, noise, rng)
                continue
            projections[name] = pretrained_projection(
                source,
                num_experts,
                settings[name],
                gauge=gauge,
                noise=noise,
                rng=rng,
                report=None if on_matrix is None else partial(on_matrix, name),
            )
        kept = {name for name in settings if settings[name].keeps_matrix}
        biases = {
            name: _bias_beside(ffn.sources.get(name), bias, common_bias) if name in kept else bias
            for name, bias in ffn.biases.items()
        }
        return cls._from_projections(
            projections,
            biases,
            common_bias=common_bias,
            activation=activation,
            dropout=dropout,
        )

    @classmethod
    def from_shared(
        cls,
        up: Matrices | None = None,
        down: Matrices | None = None,
        gate: Matrices | None = None,
        *,
        gate_up: Matrices | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        gate_bias: Tensor | None = None,
        gate_up_bias: Tensor | None = None,
        activation: str | Callable[..., Tensor] = "relu",
        dropout: float = 0.0,
    ) -> Self:
        """Take over matrices that differ from expert to expert: a mixture made smaller.

        Parameters
        ----------
        up, gate : SharedMPO, Tensor or Projection, (E, F, H)
            What :func:`tnmoe.decompose_shared` returns, of torch tensors; or whole matrices; or a
            projection, which experts use as it stands.
        down : SharedMPO, Tensor or Projection, (E, H, F)
        gate_up : SharedMPO, Tensor or Projection, (E, 2F, H)
            Instead of ``gate`` and ``up``: the rows of the gate and below them those of up.
        up_bias, gate_bias, down_bias, gate_up_bias : Tensor, optional
            Biases of all experts, (E, F), (E, F), (E, H) and (E, 2F). A projection keeps its own if
            none is given.
        activation, dropout
            As for :class:`Experts`.

        Raises
        ------
        InputError
            If the matrices or biases do not fit each other, are not torch tensors, or are not those
            that :class:`Experts` can have.

        Examples
        --------
        >>> import torch
        >>> from tnmoe import decompose_shared
        >>> up, down = torch.randn(4, 32, 16), torch.randn(4, 16, 32)
        >>> shared = decompose_shared(up, residual=True, max_bond=4)
        >>> experts = MPOExperts.from_shared(shared, down, activation="gelu")
        >>> type(experts.up).__name__, type(experts.down).__name__
        ('ResidualProjection', 'StackedProjection')
        """
        given = {"gate_up": gate_up, "gate": gate, "up": up, "down": down}
        projections = {
            name: _as_projection(matrices)
            for name, matrices in given.items()
            if matrices is not None
        }
        return cls._from_projections(
            projections,
            {"gate_up": gate_up_bias, "gate": gate_bias, "up": up_bias, "down": down_bias},
            common_bias=False,
            activation=activation,
            dropout=dropout,
        )

    @classmethod
    def from_structures(
        cls,
        structures: Mapping[str, ProjectionStructure],
        num_experts: int,
        *,
        activation: str | Callable[..., Tensor] = "relu",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Make experts whose projections have these structures, with random numbers.

        Parameters
        ----------
        structures : mapping from str to ProjectionStructure
            Of ``up``, ``down`` and perhaps ``gate``, or of ``gate_up`` and ``down``.
        num_experts : int
            Number of experts E.
        activation, dropout
            As for :class:`Experts`.
        device, dtype : optional
            Device and dtype of the parameters, as for torch's own layers.

        Raises
        ------
        InputError
            If the names are not those of projections that :class:`Experts` can have, or the
            structures do not fit each other.
        """
        check_projections(structures)
        experts = cls.__new__(cls)
        Experts.__init__(
            experts,
            **{
                name: structure.build(num_experts, device=device, dtype=dtype)
                for name, structure in structures.items()
            },
            activation=activation,
            dropout=dropout,
        )
        return experts


def _as_projection(matrices: Matrices) -> Projection:
    if isinstance(matrices, Projection):
        return matrices
    if isinstance(matrices, Tensor):
        return StackedProjection.from_matrices(matrices)
    return projection_of(matrices)


def _bias_beside(source: Source | None, bias: Tensor | None, common_bias: bool) -> Tensor | None:
    """Return the bias that experts own where they use a module as it stands, with its own bias."""
    if bias is None or isinstance(source, Tensor):
        return bias
    return None if common_bias else torch.zeros_like(bias)

"""Feed-forward experts: routed tokens in, weighted sums of the experts' outputs back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import gcd
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnmoe.contraction.pieces import rows_per_piece
from tnmoe.decompose import decompose
from tnmoe.errors import InputError, flag, generator_of, number_in, one_of
from tnmoe.nn.activations import resolve_activation
from tnmoe.nn.compute.grouped import Groups, Visits, cleared, spread
from tnmoe.nn.compute.pieces import in_pieces
from tnmoe.nn.projection import (
    Bias,
    MPOProjection,
    Projection,
    StackedProjection,
    side_by_side,
)
from tnmoe.nn.transforms import (
    autocast_dtype,
    is_transformed,
    needs_native_operators,
    values_are_readable,
)
from tnmoe.options import GAUGES, LAYOUTS, MATRICES, Gauge, Layout, Matrix, NamedSites
from tnmoe.shapes import MPOShape
from tnmoe.truncation.info import TruncationInfo

# Sites whose cores experts share.
SharedSites = NamedSites | Iterable[int]

# Groups of a split shape: large enough to leave experts some freedom, small enough to stay cheap.
_SPLIT_GROUP = 64


def layout_shape(layout: str, out_features: int, in_features: int, sites: int = 5) -> MPOShape:
    """Shape that a layout gives a matrix.

    Parameters
    ----------
    layout : {"interleaved", "split"}
        ``interleaved`` is ``MPOShape.for_matrix`` with ``sites`` sites; ``split`` is
        ``MPOShape.split`` with groups of 64, or the largest common divisor with 64.
    out_features, in_features : int
        Size of the matrix.
    sites : int
        Number of sites of an interleaved shape.

    Raises
    ------
    InputError
        If the layout is unknown, or neither size has a divisor in common with 64.
    """
    one_of("layout", layout, LAYOUTS)
    if layout == "interleaved":
        return MPOShape.for_matrix(out_features, in_features, sites)
    groups = (gcd(out_features, _SPLIT_GROUP), gcd(in_features, _SPLIT_GROUP))
    if groups == (1, 1):
        raise InputError(
            f"layout='split' has no groups for a {out_features}×{in_features} matrix, whose sizes "
            f"share no divisor with {_SPLIT_GROUP}: experts would own one number each; give "
            "shapes, or layout='interleaved'"
        )
    return MPOShape.split(out_features, in_features, *groups)


def _shape_for(
    name: str,
    given: MPOShape | None,
    layout: Layout,
    sites: int,
    out_features: int,
    in_features: int,
) -> MPOShape:
    """The given shape, if it is of that size; a layout's without one."""
    one_of("layout", layout, LAYOUTS)
    if given is None:
        return layout_shape(layout, out_features, in_features, sites)
    if (given.out_features, given.in_features) != (out_features, in_features):
        raise InputError(f"{name} must be for a {out_features}×{in_features} matrix, got {given}")
    return given


class Experts(nn.Module):
    """E feed-forward networks ``down(act(up(x)))``, or ``down(act(gate(x)) · up(x))`` if gated.

    Parameters
    ----------
    up, down : Projection
        (E, F, H) and (E, H, F).
    gate : Projection, optional
        (E, F, H); gated if given.
    activation : str or callable
        Name of an activation, or an elementwise function or module; with a gate also the name of
        a gated unit or a :class:`Gated`.
    dropout : float
        Probability, in training, of dropping an activated intermediate value (as in T5).

    Raises
    ------
    InputError
        If the projections do not fit each other, the activation is unknown, or the dropout is
        not in [0, 1].

    Examples
    --------
    >>> up, down = StackedProjection(4, 16, 8), StackedProjection(4, 8, 16)
    >>> experts = Experts(up, down, activation="gelu")
    >>> index = torch.tensor([[0], [3], [3]])  # one expert for each of three tokens
    >>> experts(torch.randn(3, 8), index, torch.ones(3, 1)).shape
    torch.Size([3, 8])
    """

    def __init__(
        self,
        up: Projection,
        down: Projection,
        gate: Projection | None = None,
        activation: str | Callable[..., Tensor] = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = (up.num_experts, up.in_features, up.out_features)
        for name, projection, fits in (
            ("down", down, (down.num_experts, down.out_features, down.in_features)),
            ("gate", gate, gate and (gate.num_experts, gate.in_features, gate.out_features)),
        ):
            if projection is not None and fits != sizes:
                raise InputError(f"{name} ({projection}) does not fit up ({up})")
        self.num_experts, self.hidden_size, self.intermediate_size = sizes
        self.up, self.gate, self.down = up, gate, down
        self.activation = resolve_activation(activation, gated=gate is not None)
        self.dropout = number_in("dropout", dropout, "[0, 1]")

    @classmethod
    def _from_projections(
        cls, projections: Mapping[str, Projection], activation: Any, dropout: float
    ) -> Self:
        """An instance with given projections, past a subclass's own constructor."""
        experts = cls.__new__(cls)
        up, down, gate = (projections.get(name) for name in ("up", "down", "gate"))
        assert up is not None
        assert down is not None
        Experts.__init__(experts, up, down, gate, activation, dropout)
        return experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send every token through its experts and sum their outputs.

        The signature is that of Hugging Face's experts modules.

        Parameters
        ----------
        hidden_states : Tensor, shape (T, H)
        top_k_index : Tensor of int64, shape (T, k)
            Experts of every token; E is none of them, and gives zero whatever its weight.
        top_k_weights : Tensor, shape (T, k)
            Their weights in the sum.

        Returns
        -------
        Tensor, shape (T, H)
            In the dtype of ``hidden_states``.

        Raises
        ------
        InputError
            If the shapes do not fit, the states are no floating-point numbers, or an expert is
            none of the layer's. The latter is not looked for on an accelerator, which would have
            to be waited for.
        """
        self._check_shapes(hidden_states, top_k_index, top_k_weights)
        if is_transformed():
            return self._all_on_all(hidden_states, top_k_index, top_k_weights)
        states = hidden_states.to(autocast_dtype(hidden_states) or hidden_states.dtype)
        if values_are_readable(states):
            groups = Groups.of(top_k_index.reshape(-1), self.num_experts)
            routed, weights = self._count_routed(groups), top_k_weights
            if routed < groups.rows:
                weights = weights.masked_fill(top_k_index == self.num_experts, 0)
            if self._takes_turns(states, groups):
                outputs = self._one_by_one(states, groups, weights)
            else:
                outputs = self._together(states, groups, weights, routed)
        else:
            outputs = self._without_waiting(states, top_k_index, top_k_weights)
        outputs = outputs.sum(1) if outputs.shape[1] > 1 else outputs.squeeze(1)
        return outputs.to(hidden_states.dtype)

    def _check_shapes(self, states: Tensor, index: Tensor, weights: Tensor) -> None:
        if not states.is_floating_point():
            raise InputError(f"hidden_states must be floating-point, got {states.dtype}")
        fits = (
            states.ndim == index.ndim == 2
            and states.shape[1] == self.hidden_size
            and index.shape[0] == states.shape[0]
            and index.shape == weights.shape
        )
        if not fits:
            raise InputError(
                f"expected hidden_states (T, {self.hidden_size}), top_k_index and top_k_weights "
                f"(T, k), got hidden_states {tuple(states.shape)}, top_k_index "
                f"{tuple(index.shape)}, top_k_weights {tuple(weights.shape)}"
            )
        if index.is_floating_point():
            raise InputError(f"top_k_index must hold integers, got {index.dtype}")

    def _count_routed(self, groups: Groups) -> int:
        """Slots that have an expert; they come first."""
        if not groups.rows:
            return 0
        lowest, highest = groups.experts[0].item(), groups.experts[-1].item()
        if lowest < 0 or highest > self.num_experts:
            raise InputError(
                f"top_k_index must hold experts from 0 to {self.num_experts - 1}, or "
                f"{self.num_experts} for none, got {lowest} to {highest}"
            )
        return groups.rows if highest < self.num_experts else int(groups.offsets[-1])

    def _without_waiting(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """:meth:`_together` where it cannot be known how many slots have no expert.

        These go, as zeros and for nothing, to an expert that others visit.
        """
        nowhere = index >= self.num_experts
        visited = F.pad(index.masked_fill(nowhere, 0).reshape(-1), (0, 1)).amax()
        groups = Groups.of(torch.where(nowhere, visited, index).reshape(-1), self.num_experts)
        weights = weights.masked_fill(nowhere, 0)
        nowhere = nowhere.reshape(-1).index_select(0, groups.order)
        return self._together(states, groups, weights, groups.rows, nowhere)

    def _together(
        self,
        states: Tensor,
        groups: Groups,
        weights: Tensor,
        routed: int,
        nowhere: Tensor | None = None,
    ) -> Tensor:
        """Weighted outputs (T, k, H) of all experts, each projection for all of them at once.

        Rows after the first ``routed``, and those where ``nowhere`` is true, have no expert.
        """
        tokens, choices = weights.shape
        rows = spread(states, groups.order, groups.inverse, choices)
        if routed == groups.rows:
            outputs = cleared(self._feed_forward(cleared(rows, nowhere), groups), nowhere)
        else:
            outputs = self._feed_forward(rows[:routed], groups.first(routed))
            outputs = F.pad(outputs, (0, 0, 0, groups.rows - routed))
        outputs = spread(outputs, groups.inverse, groups.order)
        return outputs.view(tokens, choices, self.hidden_size) * weights[..., None]

    def _one_by_one(self, states: Tensor, groups: Groups, weights: Tensor) -> Tensor:
        """Weighted outputs (T, k, H) of one expert after the other.

        What lies between the projections is still in a cache when the second one starts.
        """
        (tokens, choices), flat = weights.shape, weights.reshape(-1, 1)
        dtype = torch.result_type(states, weights)
        outputs = states.new_zeros(tokens * choices, self.hidden_size, dtype=dtype)
        for block, alone in groups.apart():
            slots = groups.order[block]
            part = self._feed_forward(states.index_select(0, slots // choices), alone)
            outputs.index_copy_(0, slots, part * flat.index_select(0, slots))
        return outputs.view(tokens, choices, self.hidden_size)

    def _feed_forward(self, rows: Tensor, groups: Groups) -> Tensor:
        if torch.is_grad_enabled() or not values_are_readable(rows):
            return self._network(rows, groups)

        def through(rows: Tensor, _: list[Tensor], groups: Groups) -> Sequence[Tensor]:
            return (self._network(rows, groups),)

        # What backward passes need is kept, but at inference nothing between the projections is.
        step = rows_per_piece(self.intermediate_size, self.hidden_size)
        return in_pieces(through, rows, (), groups, step)[0]

    def _network(self, rows: Tensor, groups: Groups) -> Tensor:
        if self.gate is None:
            inner = self.activation(self.up(rows, groups))
        else:
            inner = self.activation(*side_by_side(self.gate, self.up, rows, groups))
        return self.down(self._drop(inner), groups)

    def _drop(self, inner: Tensor) -> Tensor:
        return F.dropout(inner, self.dropout, self.training) if self.dropout else inner

    def _takes_turns(self, states: Tensor, groups: Groups) -> bool:
        """Whether one expert after the other is faster: where all at once spill from the caches.

        Not in training, where all is kept for the backward anyway.
        """
        if torch.is_grad_enabled() or needs_native_operators():
            return False
        if groups.rows * self.intermediate_size <= _CACHED:
            return False
        return not (
            self.up.multiplies_jointly(groups.rows) or self.down.multiplies_jointly(groups.rows)
        )

    def _all_on_all(self, states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Every expert on every token, or on zeros where it was not chosen.

        Under ``torch.func`` how many tokens an expert gets is not a number that code may depend
        on, so this costs E times as much there.
        """
        visits = Visits.of(top_k_index, top_k_weights, self.num_experts)
        rows = visits.spread(states)
        sides = (self.up,) if self.gate is None else (self.gate, self.up)
        inner = self.activation(*(visits.cleared(side(rows, visits)) for side in sides))
        outputs = self.down(visits.cleared(self._drop(inner)), visits)
        return visits.collect(outputs).to(states.dtype)


# Numbers that a CPU's last cache holds, roughly.
_CACHED = 1 << 22


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
        Whether every expert's projections have biases, or all experts have them together.
    device, dtype : optional
        Where parameters are made, and of what dtype, as for any module of torch.

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
        gated: bool = False,
        bias: Bias = False,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        def projection(out_features: int, in_features: int) -> StackedProjection:
            return StackedProjection(
                num_experts, out_features, in_features, bias, device=device, dtype=dtype
            )

        super().__init__(
            projection(intermediate_size, hidden_size),
            projection(hidden_size, intermediate_size),
            projection(intermediate_size, hidden_size) if flag("gated", gated) else None,
            activation,
            dropout,
        )

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
        noise: float = 0.0,
        rng: np.random.Generator | int | None = None,
    ) -> Self:
        """Experts that all start as one pretrained FFN (sparse upcycling, arXiv:2212.05055).

        Parameters
        ----------
        up, down, gate, up_bias, down_bias, gate_bias, common_bias, num_experts
            As for :meth:`MPOExperts.from_dense`.
        activation, dropout
            As for :class:`Experts`.
        noise : float
            Noise on every expert's matrices, relative to each one's root mean square.
        rng : numpy Generator or int, optional
            Source of the noise.

        Raises
        ------
        InputError
            If the matrices or biases do not fit each other.
        """
        matrices = check_ffn(up, down, gate, gate_bias)
        rng = generator_of(rng)
        projections = {
            name: StackedProjection.from_dense(matrix, num_experts, noise, rng)
            for name, matrix in matrices.items()
        }
        biases = {"up": up_bias, "down": down_bias, "gate": gate_bias}
        _set_biases(projections, biases, common_bias)
        return cls._from_projections(projections, activation, dropout)


class MPOExperts(Experts):
    """Experts whose matrices share a central tensor (MPOE, arXiv:2203.01104, section 3.2).

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
        Whether every expert's projections have biases, or all experts have them together.
    layout : {"interleaved", "split"}
        How matrices split over sites: as :meth:`tnmoe.MPOShape.for_matrix` splits them, or as
        :meth:`tnmoe.MPOShape.split` does, in groups of 64 or the greatest common divisor with 64.
    sites : int
        Number of sites of interleaved shapes.
    up_shape, down_shape : MPOShape, optional
        Shapes instead of the layout's; ``up_shape`` is the gate's too.
    max_bond : int, or mapping from "up", "gate", "down" to int or None, optional
        Largest bond dimension, of all projections or of each; exact bonds by default.
    shared_sites : {"center", "none"}, iterable of int, or mapping
        Sites whose cores all experts share, of all projections or of each; not all of them.
        ``"center"`` is MPOE; ``"none"`` gives every expert an MPO of its own.
    matrices : iterable of "up", "gate", "down"
        Which matrices are MPOs; every expert owns the others whole, as in an ordinary mixture.
    device, dtype : optional
        Where parameters are made, and of what dtype, as for any module of torch.

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
        gated: bool = False,
        bias: Bias = False,
        layout: Layout = "interleaved",
        sites: int = 5,
        up_shape: MPOShape | None = None,
        down_shape: MPOShape | None = None,
        max_bond: int | Mapping[str, int | None] | None = None,
        shared_sites: SharedSites | Mapping[str, SharedSites] = "center",
        dropout: float = 0.0,
        *,
        matrices: Iterable[Matrix] = MATRICES,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        gated = flag("gated", gated)
        chosen = check_matrices(matrices, MATRICES if gated else ("up", "down"))
        sizes = intermediate_size, hidden_size
        up_shape = _shape_for("up_shape", up_shape, layout, sites, *sizes)
        down_shape = _shape_for("down_shape", down_shape, layout, sites, *sizes[::-1])
        bonds = per_projection("max_bond", max_bond, None)
        common = per_projection("shared_sites", shared_sites, "center")

        def projection(name: str, shape: MPOShape) -> Projection:
            if name not in chosen:
                size = shape.out_features, shape.in_features
                return StackedProjection(num_experts, *size, bias, device=device, dtype=dtype)
            return MPOProjection(
                num_experts, shape, bias, bonds[name], common[name], device=device, dtype=dtype
            )

        super().__init__(
            projection("up", up_shape),
            projection("down", down_shape),
            projection("gate", up_shape) if gated else None,
            activation,
            dropout,
        )

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
        """Experts that all start as one pretrained FFN.

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
            Keep them once for all experts, and not a copy for each.
        num_experts : int
            Number of experts E.
        activation, dropout, layout, sites, up_shape, down_shape, max_bond, shared_sites, matrices
            As for the class.
        gauge : {"identity", "schmidt"}
            How a matrix becomes cores where nothing is cut. With ``identity`` auxiliary cores
            start as identity matrices, and the centre as the matrix with its entries arranged
            anew: an optimiser that scales entry by entry, such as Adam, then moves it as it
            would move the matrix. ``schmidt`` rotates all bonds to the Schmidt basis, which is
            what truncated bonds always have.
        noise : float
            Noise on every expert's own cores, relative to each core's root mean square: experts
            then differ from the start. What all experts share has none.
        rng : numpy Generator or int, optional
            Source of the noise.
        on_matrix : callable, optional
            Called with the projection's name and what its decomposition cut.

        Raises
        ------
        InputError
            If the matrices do not fit each other or the shapes, a bias does not fit its matrix,
            or they hold NaN or infinity.
        """
        given = check_ffn(up, down, gate, gate_bias)
        chosen = check_matrices(matrices, given)
        up_shape = _shape_for("up_shape", up_shape, layout, sites, *up.shape)
        down_shape = _shape_for("down_shape", down_shape, layout, sites, *down.shape)
        bonds = per_projection("max_bond", max_bond, None)
        common = per_projection("shared_sites", shared_sites, "center")
        biases = {"up": up_bias, "down": down_bias, "gate": gate_bias}
        one_of("gauge", gauge, GAUGES)
        # ``auto`` leaves identity matrices at bonds where nothing can be cut.
        method = "auto" if gauge == "identity" else "eigh"
        rng = generator_of(rng)
        projections: dict[str, Projection] = {}
        for name, matrix in given.items():
            if name not in chosen:
                projections[name] = StackedProjection.from_dense(matrix, num_experts, noise, rng)
                continue
            shape = down_shape if name == "down" else up_shape
            cut: dict[str, Any] = {"max_bond": bonds[name], "method": method}
            if on_matrix is None:
                mpo = decompose(matrix.detach(), shape, **cut)
            else:
                # Spectra cost more than an exact conversion, which needs none.
                mpo, info = decompose(matrix.detach(), shape, **cut, return_info=True)
                on_matrix(name, info)
            projections[name] = MPOProjection.from_mpo(mpo, num_experts, common[name], noise, rng)
        _set_biases(projections, biases, common_bias)
        return cls._from_projections(projections, activation, dropout)


def _set_biases(
    projections: Mapping[str, Projection], biases: Mapping[str, Tensor | None], common: bool
) -> None:
    common = flag("common_bias", common)
    for name, projection in projections.items():
        projection.set_bias(biases[name], common, f"{name}_bias")


def check_matrices(names: Iterable[str], present: Iterable[str] = MATRICES) -> tuple[Matrix, ...]:
    """Names of matrices, one of which a network has at least; an InputError unless they are."""
    several = (names,) if isinstance(names, str) else names
    chosen: tuple[Any, ...] = tuple(several) if isinstance(several, Iterable) else ()
    if not chosen or not all(name in MATRICES for name in chosen):
        raise InputError(f"matrices must be some of {', '.join(MATRICES)}, got {names!r}")
    if not set(chosen) & set(present):
        raise InputError(f"matrices={[*chosen]} are none of the network's {', '.join(present)}")
    return chosen


def per_projection(name: str, value: Any, default: Any) -> dict[str, Any]:
    """A setting of every projection, from one for all or one for some.

    Raises
    ------
    InputError
        If a mapping has a projection that there is none of.
    """
    if not isinstance(value, Mapping):
        return dict.fromkeys(MATRICES, value)
    if unknown := sorted(set(value) - set(MATRICES)):
        raise InputError(f"{name} is for {', '.join(MATRICES)}, got {unknown}")
    return {**dict.fromkeys(MATRICES, default), **value}


def check_ffn(
    up: Tensor, down: Tensor, gate: Tensor | None, gate_bias: Tensor | None = None
) -> dict[str, Tensor]:
    """The matrices by name, or an InputError unless they are those of one feed-forward network."""
    matrices = {"up": up, "down": down} | ({} if gate is None else {"gate": gate})
    for name, matrix in matrices.items():
        if not isinstance(matrix, Tensor):
            raise InputError(f"{name} must be a Tensor, got a {type(matrix).__name__}")
    if gate is None and gate_bias is not None:
        raise InputError("gate_bias was given without a gate")
    fits = up.ndim == 2 and all(
        matrix.shape == (up.shape[::-1] if name == "down" else up.shape)
        for name, matrix in matrices.items()
    )
    if not fits:
        given = ", ".join(f"{name} {tuple(matrix.shape)}" for name, matrix in matrices.items())
        raise InputError(f"up and gate must be (F, H) and down (H, F), got {given}")
    return matrices

"""Feed-forward experts: routed tokens in, weighted sums of the experts' outputs back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from tnmoe.decompose import decompose
from tnmoe.errors import InputError
from tnmoe.nn.grouped import Groups, spread
from tnmoe.nn.projection import Projection, SharedProjection, StackedProjection
from tnmoe.shapes import MPOShape
from tnmoe.shared import SharedMPO
from tnmoe.truncation import TruncationInfo

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_new": partial(nn.GELU, approximate="tanh"),
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
}

LAYOUTS = ("interleaved", "split")

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
    """
    if layout == "interleaved":
        return MPOShape.for_matrix(out_features, in_features, sites)
    if layout == "split":
        groups = (gcd(out_features, _SPLIT_GROUP), gcd(in_features, _SPLIT_GROUP))
        return MPOShape.split(out_features, in_features, *groups)
    raise InputError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


class Experts(nn.Module):
    """E feed-forward networks ``down(act(up(x)))``, or ``down(act(gate(x)) · up(x))`` if gated.

    Parameters
    ----------
    up, down : Projection
        (E, F, H) and (E, H, F).
    gate : Projection, optional
        (E, F, H); gated if given.
    activation : str or callable
        Name of an activation, or an elementwise function or module.

    Raises
    ------
    InputError
        If the projections do not fit each other or the activation is unknown.
    """

    def __init__(
        self,
        up: Projection,
        down: Projection,
        gate: Projection | None = None,
        activation: str | Activation = "relu",
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
        self.activation = resolve_activation(activation)

    @classmethod
    def _from_projections(
        cls,
        up: Projection,
        down: Projection,
        gate: Projection | None,
        activation: str | Activation,
    ) -> Self:
        """An instance with given projections, past a subclass's own constructor."""
        experts = cls.__new__(cls)
        Experts.__init__(experts, up, down, gate, activation)
        return experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send every token through its experts and sum their outputs.

        The signature is that of Hugging Face's experts modules.

        Parameters
        ----------
        hidden_states : Tensor, shape (T, H)
        top_k_index : Tensor of int64, shape (T, k)
            Experts of every token.
        top_k_weights : Tensor, shape (T, k)
            Their weights in the sum.

        Returns
        -------
        Tensor, shape (T, H)
            In the dtype of ``hidden_states``.

        Raises
        ------
        InputError
            If the shapes do not fit, or an expert is none of the layer's. The latter is not looked
            for on an accelerator, which would have to be waited for.
        """
        self._check_shapes(hidden_states, top_k_index, top_k_weights)
        if _is_transformed():
            return self._all_on_all(hidden_states, top_k_index, top_k_weights)
        tokens, choices = top_k_index.shape
        groups = Groups.of(top_k_index.reshape(-1), self.num_experts)
        kind = hidden_states.device.type
        if kind == "cpu" and groups.rows and not torch.compiler.is_compiling():
            lowest, highest = groups.experts[0].item(), groups.experts[-1].item()
            if lowest < 0 or highest >= self.num_experts:
                raise InputError(
                    f"top_k_index must hold experts from 0 to {self.num_experts - 1}, "
                    f"got {lowest} to {highest}"
                )
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        states = hidden_states.to(dtype or hidden_states.dtype)
        if self._takes_turns(states, groups):
            outputs = self._one_by_one(states, groups, top_k_weights)
        else:
            rows = spread(states, groups.order, groups.inverse, choices)
            outputs = spread(self._feed_forward(rows, groups), groups.inverse, groups.order)
            outputs = outputs.view(tokens, choices, self.hidden_size) * top_k_weights[..., None]
        outputs = outputs.sum(1) if choices > 1 else outputs.squeeze(1)
        return outputs.to(hidden_states.dtype)

    def _check_shapes(self, states: Tensor, index: Tensor, weights: Tensor) -> None:
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

    def _one_by_one(self, states: Tensor, groups: Groups, weights: Tensor) -> Tensor:
        """Weighted outputs (T, k, H) of one expert after the other.

        What lies between the projections is still in a cache when the second one starts.
        """
        (tokens, choices), flat = weights.shape, weights.reshape(-1, 1)
        dtype = torch.result_type(states, weights)
        outputs = states.new_empty(tokens * choices, self.hidden_size, dtype=dtype)
        for block, alone in groups.apart():
            slots = groups.order[block]
            part = self._feed_forward(states.index_select(0, slots // choices), alone)
            outputs.index_copy_(0, slots, part * flat.index_select(0, slots))
        return outputs.view(tokens, choices, self.hidden_size)

    def _feed_forward(self, rows: Tensor, groups: Groups) -> Tensor:
        if self.gate is None:
            inner = self.activation(self.up(rows, groups))
        else:
            gate, up = self.gate.forward_beside(self.up, rows, groups)
            inner = self.activation(gate) * up
        return self.down(inner, groups)

    def _takes_turns(self, states: Tensor, groups: Groups) -> bool:
        """Whether one expert after the other is faster: where all at once spill from the caches.

        Not in training, where all is kept for the backward anyway.
        """
        if states.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if groups.rows * self.intermediate_size <= _CACHED:
            return False
        return not (self.up.joins_experts(groups.rows) or self.down.joins_experts(groups.rows))

    def _all_on_all(self, states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Every expert on every token, unchosen ones weighted 0.

        Under ``torch.func`` how many tokens an expert gets is not a number that code may depend
        on, so this costs E times as much there.
        """
        experts = torch.arange(self.num_experts, device=states.device)
        chosen = top_k_index[..., None] == experts
        weights = (chosen * top_k_weights[..., None]).sum(-2)

        def project(projection: Projection, equation: str, states: Tensor) -> Tensor:
            result = torch.einsum(equation, states, projection.weight())
            return result if projection.bias is None else result + projection.bias

        inner = self.activation(project(self.gate or self.up, "th,efh->tef", states))
        if self.gate is not None:
            inner = inner * project(self.up, "th,efh->tef", states)
        outputs = project(self.down, "tef,ehf->teh", inner)
        return torch.einsum("teh,te->th", outputs, weights.to(outputs.dtype)).to(states.dtype)


# Numbers that a CPU's last cache holds, roughly.
_CACHED = 1 << 22


def _is_transformed() -> bool:
    """Whether a transformation of ``torch.func`` is under way."""
    # Tracing cannot look inside, and compiles the transformed function as it is.
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
    )


class DenseExperts(Experts):
    """Experts that each own their whole matrices: an ordinary mixture of experts.

    Parameters
    ----------
    num_experts, hidden_size, intermediate_size : int
        Sizes E, H, F.
    activation : str or callable
        Activation between the projections.
    gated, bias : bool
        Whether there is a gate projection, and whether projections have biases.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str | Activation = "relu",
        gated: bool = False,
        bias: bool = False,
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
            projection(intermediate_size, hidden_size) if gated else None,
            activation,
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
        num_experts: int = 8,
        activation: str | Activation = "relu",
    ) -> Self:
        """Experts that all start as one pretrained FFN (sparse upcycling, arXiv:2212.05055)."""
        check_ffn(up, down, gate)
        stack = partial(StackedProjection.from_dense, num_experts=num_experts)
        return cls._from_projections(
            stack(up, up_bias),
            stack(down, down_bias),
            None if gate is None else stack(gate, gate_bias),
            activation,
        )


class MPOExperts(Experts):
    """Experts whose matrices share a central tensor (MPOE, arXiv:2203.01104, section 3.2).

    Per projection the layer holds one ``center`` (D, out, in, D') and stacked auxiliary cores
    ``aux.0 …`` (E, D, out, in, D').

    Parameters
    ----------
    num_experts, hidden_size, intermediate_size : int
        Sizes E, H, F.
    activation : str or callable
        Activation between the projections.
    gated, bias : bool
        Whether there is a gate projection, and whether every expert's projections have biases.
    layout : {"interleaved", "split"}
        How matrices split over sites; see :func:`layout_shape`.
    sites : int
        Number of sites of interleaved shapes.
    up_shape, down_shape : MPOShape, optional
        Shapes instead of the layout's; ``up_shape`` is the gate's too.
    max_bond : int, optional
        Largest bond dimension; exact bonds by default.

    Examples
    --------
    >>> import torch
    >>> experts = MPOExperts(4, hidden_size=16, intermediate_size=32, sites=3)
    >>> index, weights = torch.tensor([[0], [3]]), torch.ones(2, 1)
    >>> experts(torch.randn(2, 16), index, weights).shape
    torch.Size([2, 16])
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str | Activation = "relu",
        gated: bool = False,
        bias: bool = False,
        layout: str = "interleaved",
        sites: int = 5,
        up_shape: MPOShape | None = None,
        down_shape: MPOShape | None = None,
        max_bond: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        up_shape = up_shape or layout_shape(layout, intermediate_size, hidden_size, sites)
        down_shape = down_shape or layout_shape(layout, hidden_size, intermediate_size, sites)

        def projection(shape: MPOShape) -> SharedProjection:
            return SharedProjection(num_experts, shape, bias, max_bond, device=device, dtype=dtype)

        super().__init__(
            projection(up_shape),
            projection(down_shape),
            projection(up_shape) if gated else None,
            activation,
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
        num_experts: int = 8,
        activation: str | Activation = "relu",
        layout: str = "interleaved",
        sites: int = 5,
        up_shape: MPOShape | None = None,
        down_shape: MPOShape | None = None,
        max_bond: int | None = None,
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
            Pretrained biases; every expert gets its own copy.
        noise : float
            Noise on every expert's auxiliary cores, relative to each core's root mean square.
        rng : numpy Generator or int, optional
            Source of the noise.
        on_matrix : callable, optional
            Called with the projection's name and what its decomposition cut.

        Raises
        ------
        InputError
            If the matrices do not fit each other or the shapes, or hold NaN or infinity.
        """
        check_ffn(up, down, gate)
        up_shape = up_shape or layout_shape(layout, up.shape[0], up.shape[1], sites)
        down_shape = down_shape or layout_shape(layout, down.shape[0], down.shape[1], sites)
        rng = np.random.default_rng(rng)

        def share(
            name: str, matrix: Tensor, bias: Tensor | None, shape: MPOShape
        ) -> SharedProjection:
            # The Schmidt gauge spreads every auxiliary core over all its entries; the identity
            # matrices of method="qr" would leave nearly all of them zero, and noise without scale.
            mpo, info = decompose(
                matrix.detach(), shape, max_bond=max_bond, method="eigh", return_info=True
            )
            if on_matrix is not None:
                on_matrix(name, info)
            shared = SharedMPO.replicate(mpo, num_experts, noise, rng)
            return SharedProjection.from_shared(shared, bias)

        return cls._from_projections(
            share("up", up, up_bias, up_shape),
            share("down", down, down_bias, down_shape),
            None if gate is None else share("gate", gate, gate_bias, up_shape),
            activation,
        )


def resolve_activation(activation: str | Activation) -> Activation:
    """The activation of that name, or the callable itself."""
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        raise InputError(
            f"unknown activation {activation!r}: give a callable or one of {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[activation]()


def check_ffn(up: Tensor, down: Tensor, gate: Tensor | None) -> None:
    """Raise an InputError unless the matrices are those of one feed-forward network."""
    shapes = {"up": up.shape, "down": down.shape, "gate": up.shape if gate is None else gate.shape}
    if up.ndim != 2 or down.shape != up.shape[::-1] or shapes["gate"] != up.shape:
        given = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise InputError(f"up and gate must be (F, H) and down (H, F), got {given}")

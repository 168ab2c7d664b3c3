"""The activations between the projections of experts, alone or with a gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from tnmoe.errors import InputError, check_number_in

Activation = Callable[[Tensor], Tensor]


class Gated(nn.Module):
    """A gated linear unit: the activated gate times the other projection.

    Shazeer, arXiv:2002.05202: SwiGLU is ``Gated(silu)``, GEGLU ``Gated(gelu)``.

    Parameters
    ----------
    activation : callable
        Elementwise function for the gate.

    Examples
    --------
    >>> swiglu = Gated(torch.nn.functional.silu)
    >>> swiglu(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0]))
    tensor([0.0000, 1.4621])
    """

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Multiply the activated ``gate`` by ``up``, entry by entry; shapes (..., hidden)."""
        return self.activation(gate) * up


class ClampedSwiGLU(Gated):
    """The SwiGLU of gpt-oss (arXiv:2508.10925): clamped inputs, a steeper gate, ``up`` plus 1.

    (min(max(up, −c), c) + 1) · g · σ(α g) with g = min(gate, c).

    Parameters
    ----------
    alpha : float
        Steepness α of the gate's sigmoid.
    limit : float
        Bound c on both inputs.

    Raises
    ------
    InputError
        If ``limit`` is not positive, or ``alpha`` is not a finite number.

    Examples
    --------
    >>> ClampedSwiGLU()(torch.tensor([0.0, 100.0]), torch.tensor([3.0, -100.0]))
    tensor([  0.0000, -41.9997])
    """

    def __init__(self, alpha: float = 1.702, limit: float = 7.0) -> None:
        limit = check_number_in("limit", limit, "(0, inf]")
        alpha = check_number_in("alpha", alpha, "(-inf, inf)")
        super().__init__(partial(_steep_silu, alpha=alpha))
        self.alpha, self.limit = alpha, limit

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Apply the formula above to ``gate`` and ``up``, entry by entry."""
        up = up.clamp(-self.limit, self.limit)
        return self.activation(gate.clamp(max=self.limit)) * (up + 1)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, limit={self.limit}"


class _SquaredReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class _QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _steep_silu(x, 1.702)


def _steep_silu(x: Tensor, alpha: float) -> Tensor:
    return x * torch.sigmoid(alpha * x)


# The names are those of transformers.
ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu2": _SquaredReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "gelu_new": partial(nn.GELU, approximate="tanh"),
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": _QuickGELU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "linear": nn.Identity,
}

GATED_ACTIVATIONS: Mapping[str, Callable[[], Gated]] = {
    "swiglu": lambda: Gated(nn.SiLU()),
    "geglu": lambda: Gated(nn.GELU()),
    "reglu": lambda: Gated(nn.ReLU()),
    "clamped_swiglu": ClampedSwiGLU,
}


def resolve_activation(activation: str | Callable[..., Tensor], gated: bool) -> Callable:
    """Return the function between the projections: of ``up``, or of ``gate`` and ``up``.

    Parameters
    ----------
    activation : str or callable
        Name of an activation, or an elementwise function; or, for gated experts, the name of a
        gated unit or an instance of :class:`Gated`.
    gated : bool
        Whether there is a gate, to which an elementwise function is then applied.

    Raises
    ------
    InputError
        If the name is unknown, or a gated unit comes without a gate.
    """
    given = activation
    if isinstance(activation, str):
        known = {**ACTIVATIONS, **GATED_ACTIVATIONS}
        if activation not in known:
            raise InputError(
                f"unknown activation {activation!r}: give a callable or one of {', '.join(known)}"
            )
        activation = known[activation]()
    if isinstance(activation, Gated):
        if not gated:
            raise InputError(f"activation {given!r} is for gated experts: give gated=True")
        return activation
    if not callable(activation) or isinstance(activation, type):
        raise InputError(f"activation must be a name or a function of tensors, got {activation!r}")
    return Gated(activation) if gated else activation


def is_repeatable(activation: Callable[..., Tensor], sides: int, width: int) -> bool:
    """Return whether an activation gives the same again, and trains nothing.

    It is tried: torch's generator then shows whether the activation draws random numbers, and the
    result whether the activation has parameters, its own or others.

    Parameters
    ----------
    activation : callable
        Of one tensor, or of two with a gate.
    sides, width : int
        Number of its tensors, and their width.
    """
    own = activation.parameters() if isinstance(activation, nn.Module) else iter(())
    like = next(own, torch.empty(0))
    before = torch.get_rng_state()
    numbers = torch.linspace(-1, 1, width, dtype=like.dtype, device=like.device)[None]
    with torch.enable_grad():
        result = activation(*[numbers] * sides)
    draws = not torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(before)
    return not (draws or result.requires_grad)

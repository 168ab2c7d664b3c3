"""One dense feed-forward network of a model: its matrices, its activation, its formula."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tnmoe.backends import backend_named
from tnmoe.errors import InputError
from tnmoe.nn.activations import resolve_activation
from tnmoe.nn.linear import size_of_linear

# Sizes of the rows on which a network is compared with its formula. A clamp does not change small
# ones.
_PROBE_SCALES = (1.0, 1e2, 1e4)

# Largest relative difference from the formula: far above rounding in float32, far below what a
# norm, a scale or a clamp makes.
_FORMULA_TOLERANCE = 1e-3


class FusedHalf(nn.Module):
    """One half of a linear layer that holds gate and up in one matrix.

    Its weight and bias are views into that layer's: writing into a view writes into the layer.

    Parameters
    ----------
    fused : Linear
        The layer of 2 F rows.
    half : {0, 1}
        0 for the upper half, 1 for the lower one.
    """

    def __init__(self, fused: nn.Linear, half: int) -> None:
        super().__init__()
        self.fused = fused
        size = fused.out_features // 2
        self.rows = slice(half * size, (half + 1) * size)

    @property
    def weight(self) -> Tensor:
        """The half's matrix (F, H)."""
        return self.fused.weight[self.rows]

    @property
    def bias(self) -> Tensor | None:
        """The half's bias (F,), or None for a layer without one."""
        return None if self.fused.bias is None else self.fused.bias[self.rows]


Matrix = nn.Linear | Conv1D | FusedHalf


@dataclass(frozen=True)
class Place:
    """Where a layer calls a network: one attribute computes it, others pass its output on.

    Attributes
    ----------
    owner : Module
        The module whose attribute a new network replaces.
    name : str
        That attribute.
    bypassed : tuple of (Module, str)
        Modules and their attributes that belong to the network too. A new network makes them
        identities, or 0 if the attribute is a probability.

    Examples
    --------
    A layer that itself calls ``fc1``, ``act`` and ``fc2``:

    >>> layer = nn.Module()
    >>> layer.fc1, layer.act, layer.fc2 = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)
    >>> Place(layer, "fc1", ((layer, "act"), (layer, "fc2"))).install(nn.Tanh())
    >>> layer.fc1, layer.fc2
    (Tanh(), Identity())
    """

    owner: nn.Module
    name: str
    bypassed: tuple[tuple[nn.Module, str], ...] = ()

    def install(self, module: nn.Module) -> None:
        """Put a module in the network's place.

        Parameters
        ----------
        module : Module
            (..., H) → (..., H).
        """
        setattr(self.owner, self.name, module)
        for owner, name in self.bypassed:
            is_number = isinstance(getattr(owner, name), int | float)
            setattr(owner, name, 0.0 if is_number else nn.Identity())


@dataclass(frozen=True)
class FFN:
    """One dense feed-forward network found in a model.

    Attributes
    ----------
    up, down : Linear, Conv1D or FusedHalf
        Into and out of the intermediate size.
    gate : Linear, Conv1D, FusedHalf or None
        Second matrix into the intermediate size; its output is activated and multiplied with
        ``up``'s.
    activation : callable
        The model's own activation.
    places : tuple of Place
        Where the model calls the network.
    dropout, output_dropout : float
        The network's dropout probabilities: between its matrices, and on its output.
    name, family : str
        Path of the layer that holds the network, and the family that recognised it.
    network : Module, optional
        The model's module that computes the network and nothing else. A conversion runs it on a
        few rows, and refuses it if it does more than its matrices and its activation.

    Examples
    --------
    >>> from tnmoe.hf import find_ffns
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_layer=1, n_embd=16, n_head=2))
    >>> (ffn,) = find_ffns(model)
    >>> ffn.name, ffn.family, ffn.num_params, list(ffn.matrices)
    ('transformer.h.0', 'GPT-2', 2128, ['up', 'down'])
    """

    up: Matrix
    down: Matrix
    gate: Matrix | None
    activation: Callable
    places: tuple[Place, ...]
    dropout: float = 0.0
    output_dropout: float = 0.0
    name: str = ""
    family: str = ""
    network: nn.Module | None = None

    def __repr__(self) -> str:
        inner, outer = size_of(self.up)
        return (
            f"FFN({self.name!r}, {self.family}, {outer}→{inner}→{outer}, "
            f"matrices={[*self.matrices]}, activation={type(self.activation).__name__})"
        )

    @property
    def matrices(self) -> dict[str, Matrix]:
        """The matrices by name: up, down and, in a gated network, gate."""
        found = {"up": self.up, "down": self.down}
        return found if self.gate is None else {**found, "gate": self.gate}

    @property
    def parameters(self) -> set[nn.Parameter]:
        """The parameters of the matrices and of the activation."""
        parts = [*self.matrices.values(), self.activation]
        modules = [part for part in parts if isinstance(part, nn.Module)]
        return {parameter for module in modules for parameter in module.parameters()}

    @property
    def num_params(self) -> int:
        """Number of parameters of the matrices, biases and activation."""
        return sum(parameter.numel() for parameter in self.parameters)

    def install(self, module: nn.Module) -> None:
        """Put a module in the network's place.

        Parameters
        ----------
        module : Module
            (..., H) → (..., H).
        """
        for place in self.places:
            place.install(module)


def weight_of(matrix: Matrix) -> Tensor:
    """Return the matrix as (out, in).

    A Conv1D, GPT-2's kind of linear layer, stores it transposed.
    """
    return matrix.weight.T if isinstance(matrix, Conv1D) else matrix.weight


def size_of(matrix: Matrix) -> tuple[int, int]:
    """Return a matrix's rows and columns, however it is stored."""
    if isinstance(matrix, FusedHalf):
        return matrix.rows.stop - matrix.rows.start, matrix.fused.in_features
    return size_of_linear(matrix)


def linear_modules(ffn: FFN) -> dict[str, nn.Linear | Conv1D]:
    """Return a network's linear modules by projection; one that holds gate and up is ``gate_up``.

    Parameters
    ----------
    ffn : FFN

    Examples
    --------
    >>> from tnmoe.hf import find_ffns
    >>> from transformers import Phi3Config, Phi3Model
    >>> config = Phi3Config(vocab_size=32, hidden_size=16, intermediate_size=32,
    ...                     num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)
    >>> (ffn,) = find_ffns(Phi3Model(config))
    >>> list(linear_modules(ffn))
    ['gate_up', 'down']
    """
    found: dict[str, nn.Linear | Conv1D] = {}
    for name, matrix in ffn.matrices.items():
        if isinstance(matrix, FusedHalf):
            found["gate_up"] = matrix.fused
        else:
            found[name] = matrix
    return found


def check_formula(ffn: FFN) -> None:
    """Refuse a network that does more than its matrices and its activation.

    A family is recognised by the names of its parts. A norm between them, a clamp or a scale shows
    only in the output.

    Raises
    ------
    InputError
        If the network computes something else on a few rows.
    """
    for name, matrix in ffn.matrices.items():
        if tuple(weight_of(matrix).shape) != size_of(matrix):
            raise InputError(f"{ffn.name}: {name} is quantized ({type(matrix).__name__})")
    if ffn.network is not None and not _equals_formula(ffn.network, ffn):
        raise InputError(
            f"the feed-forward network of {ffn.name} does more than its matrices and activation: "
            "leave it out with layers=, or register a finder that describes all of it"
        )


@torch.no_grad()
def _equals_formula(network: nn.Module, ffn: FFN) -> bool:
    """Check on a few rows that a network computes its formula and nothing else."""
    if set(network.parameters()) - ffn.parameters:
        return False
    network, matrices, activation = copy.deepcopy((network, ffn.matrices, ffn.activation))
    network.float().eval()

    def product(name: str, rows: Tensor) -> Tensor:
        return F.linear(rows, weight_of(matrices[name]), matrices[name].bias)

    rows = _probe_rows(weight_of(ffn.up))
    with backend_named("torch").full_precision(rows):
        sides = [product(name, rows) for name in ("gate", "up") if name in matrices]
        expected = product("down", resolve_activation(activation, len(sides) == 2)(*sides))
        try:
            difference = (network(rows) - expected).norm(dim=-1)
        except TypeError:  # the network takes more than one tensor, or returns something else
            return False
    return not bool((difference > _FORMULA_TOLERANCE * expected.norm(dim=-1)).any())


def _probe_rows(weight: Tensor) -> Tensor:
    """Return rows (1, 3, H) of float32 for a matrix (F, H), on its device."""
    like = torch.empty(0, dtype=torch.float32, device=weight.device)
    count, width = len(_PROBE_SCALES), weight.shape[1]
    rows = torch.sin(torch.arange(count * width, device=weight.device).to(like))
    return rows.view(1, count, width) * like.new_tensor(_PROBE_SCALES)[:, None]

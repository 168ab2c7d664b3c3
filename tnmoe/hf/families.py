"""Where pretrained models keep their feed-forward networks: one small finder per family."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tnmoe.errors import InputError

Matrix = nn.Linear | Conv1D


@dataclass(frozen=True)
class FFN:
    """One dense feed-forward network found in a model.

    Attributes
    ----------
    up, down : Linear or Conv1D
        Into and out of the intermediate size.
    gate : Linear, Conv1D or None
        Second matrix into the intermediate size, activated and multiplied onto ``up``'s output.
    activation : callable
        The model's own activation.
    install : callable
        Puts a module (..., H) → (..., H) in the network's place.
    dropout, output_dropout : float
        The network's own dropout between its matrices, and of its output.
    name : str
        Path of the layer that holds it.
    """

    up: Matrix
    down: Matrix
    gate: Matrix | None
    activation: Callable
    install: Callable[[nn.Module], None]
    dropout: float = 0.0
    output_dropout: float = 0.0
    name: str = ""

    @property
    def matrices(self) -> dict[str, Matrix]:
        """Its matrices by name: up, down, and gate if there is one."""
        found = {"up": self.up, "down": self.down}
        return found if self.gate is None else {**found, "gate": self.gate}

    @property
    def num_params(self) -> int:
        """Numbers in its matrices and biases."""
        return sum(p.numel() for matrix in self.matrices.values() for p in matrix.parameters())


def weight_of(matrix: Matrix) -> Tensor:
    """The matrix (out, in); a Conv1D, GPT-2's kind of linear layer, stores it transposed."""
    return matrix.weight.T if isinstance(matrix, Conv1D) else matrix.weight


# Given a module of a model: the feed-forward network it directly holds, if it has that family's.
Finder = Callable[[nn.Module], FFN | None]

_FAMILIES: dict[str, Finder] = {}


def register_family(name: str) -> Callable[[Finder], Finder]:
    """Decorator: add a finder for a family of feed-forward networks.

    Parameters
    ----------
    name : str
        Name of the family; an existing one is replaced.
    """

    def register(finder: Finder) -> Finder:
        _FAMILIES[name] = finder
        return finder

    return register


def of_module(
    holder: str,
    up: str,
    down: str,
    gate: str | None = None,
    activation: str = "act",
    dropout: str | None = None,
    output_dropout: str | None = None,
) -> Finder:
    """A finder for networks that are a module of their own, which gives way as a whole.

    Parameters
    ----------
    holder : str
        Attribute of a layer that is the network.
    up, down, gate, activation : str
        Attributes of the network that are its matrices and its activation.
    dropout, output_dropout : str, optional
        Attributes that are its ``torch.nn.Dropout`` between the matrices, and after the last one.

    Examples
    --------
    A family of one's own, of layers with ``layer.ff.inner``, ``layer.ff.outer``:

    >>> finder = register_family("mine")(of_module("ff", "inner", "outer", activation="act"))
    >>> _ = _FAMILIES.pop("mine")
    """

    def find(layer: Any) -> FFN | None:
        network = getattr(layer, holder, None)
        found = {name: _matrix(network, name) for name in (up, down, gate) if name is not None}
        act = getattr(network, activation, None)
        if act is None or any(matrix is None for matrix in found.values()):
            return None

        def rate(name: str | None) -> float:
            return 0.0 if name is None else getattr(network, name).p

        return FFN(
            found[up],  # type: ignore[arg-type]
            found[down],  # type: ignore[arg-type]
            None if gate is None else found[gate],
            act,
            lambda module: setattr(layer, holder, module),
            rate(dropout),
            rate(output_dropout),
        )

    return find


# Llama, Mistral, Qwen, Gemma.
register_family("gated MLP")(of_module("mlp", "up_proj", "down_proj", "gate_proj", "act_fn"))
register_family("GPT-2")(of_module("mlp", "c_fc", "c_proj", output_dropout="dropout"))
register_family("GPT-J")(of_module("mlp", "fc_in", "fc_out", output_dropout="dropout"))
# Falcon too.
register_family("GPT-NeoX")(of_module("mlp", "dense_h_to_4h", "dense_4h_to_h"))
# CLIP, SigLIP and Phi too.
register_family("ViT")(of_module("mlp", "fc1", "fc2", activation="activation_fn"))
# T5, mT5, UMT5, LongT5; Flan-T5 is the gated one.
register_family("T5")(of_module("DenseReluDense", "wi", "wo", dropout="dropout"))
register_family("gated T5")(
    of_module("DenseReluDense", "wi_1", "wo", gate="wi_0", dropout="dropout")
)


@register_family("BERT-like")
def _bert_like(layer: Any) -> FFN | None:
    """BERT, RoBERTa, MPNet, ELECTRA: ``intermediate.dense``, activation, ``output.dense``.

    ``output`` goes on to dropout, residual and norm, so only its ``dense`` gives way.
    """
    inner, outer = getattr(layer, "intermediate", None), getattr(layer, "output", None)
    up, down = _matrix(inner, "dense"), _matrix(outer, "dense")
    activation = getattr(inner, "intermediate_act_fn", None)
    if up is None or down is None or activation is None:
        return None

    def install(module: nn.Module) -> None:
        layer.intermediate = module
        layer.output.dense = nn.Identity()

    return FFN(up, down, None, activation, install)


@register_family("BART-like")
def _bart_like(layer: Any) -> FFN | None:
    """BART, Whisper, OPT, Marian, M2M-100: ``fc1``, activation, dropout, ``fc2`` of the layer."""
    up, down = _matrix(layer, "fc1"), _matrix(layer, "fc2")
    activation = getattr(layer, "activation_fn", None)
    if up is None or down is None or activation is None or not hasattr(layer, "self_attn"):
        return None

    def install(module: nn.Module) -> None:
        layer.fc1, layer.activation_fn, layer.fc2 = module, nn.Identity(), nn.Identity()
        layer.activation_dropout = 0.0

    dropout = float(getattr(layer, "activation_dropout", 0.0))
    return FFN(up, down, None, activation, install, dropout)


def _matrix(module: object, name: str) -> Matrix | None:
    child = getattr(module, name, None)
    return child if isinstance(child, nn.Linear | Conv1D) else None


def find_ffns(
    model: nn.Module, layers: Sequence[int] | str | None = None, every: int = 1
) -> list[FFN]:
    """Feed-forward networks of a model, in the order of its modules.

    Parameters
    ----------
    model : Module
    layers : sequence of int, or str, optional
        Positions in that order to keep, or a regular expression to look for in the names of the
        layers: ``"encoder"``, ``r"block\\.(3|5)\\."``. All by default.
    every : int
        Keep the last of each so many of them: 2 keeps every second, from the second on, as
        Switch does.

    Raises
    ------
    InputError
        If there is none of a known family, ``layers`` names one that is not there, or none is
        left.
    """
    found = []
    for name, module in model.named_modules():
        for finder in _FAMILIES.values():
            if (ffn := finder(module)) is not None:
                found.append(replace(ffn, name=name))
                break
    if not found:
        raise InputError(
            f"{type(model).__name__} has no feed-forward network of a known family "
            f"({', '.join(_FAMILIES)}); tnmoe.hf.register_family adds another"
        )
    chosen = _chosen(found, layers, type(model).__name__)[every - 1 :: every]
    if not chosen:
        raise InputError(
            f"layers={layers!r}, every={every} leave none of the {len(found)} feed-forward "
            f"networks of {type(model).__name__}: {found[0].name} … {found[-1].name}"
        )
    return chosen


def _chosen(found: list[FFN], layers: Sequence[int] | str | None, model: str) -> list[FFN]:
    if layers is None:
        return found
    if isinstance(layers, str):
        try:
            re.compile(layers)
        except re.error as error:
            raise InputError(f"layers={layers!r} is no regular expression: {error}") from error
        return [ffn for ffn in found if re.search(layers, ffn.name)]
    if bad := [layer for layer in layers if not 0 <= layer < len(found)]:
        raise InputError(f"layers must be from 0 to {len(found) - 1} in {model}, got {bad}")
    return [found[layer] for layer in sorted(set(layers))]

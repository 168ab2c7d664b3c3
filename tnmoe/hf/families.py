"""Where pretrained models keep their feed-forward networks: one small finder per family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tnmoe.errors import InputError


@dataclass(frozen=True)
class FFN:
    """One dense feed-forward network found in a model.

    Attributes
    ----------
    up, down : Linear
        Into and out of the intermediate size.
    gate : Linear or None
        Second matrix into the intermediate size, activated and multiplied onto ``up``'s output.
    activation : callable
        The model's own activation.
    install : callable
        Puts a module (..., H) → (..., H) in the network's place.
    name : str
        Path of the layer that holds it.
    """

    up: nn.Linear
    down: nn.Linear
    gate: nn.Linear | None
    activation: Callable
    install: Callable[[nn.Module], None]
    name: str = ""

    @property
    def num_params(self) -> int:
        """Numbers in its matrices and biases."""
        modules = [self.up, self.down] + ([self.gate] if self.gate is not None else [])
        return sum(p.numel() for module in modules for p in module.parameters())


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


@register_family("BERT-like")
def _bert_like(layer: Any) -> FFN | None:
    """BERT, RoBERTa, MPNet, ELECTRA: ``intermediate.dense``, activation, ``output.dense``.

    ``output`` goes on to dropout, residual and norm, so only its ``dense`` gives way.
    """
    inner, outer = getattr(layer, "intermediate", None), getattr(layer, "output", None)
    up, down = _linear(inner, "dense"), _linear(outer, "dense")
    activation = getattr(inner, "intermediate_act_fn", None)
    if up is None or down is None or activation is None:
        return None

    def install(module: nn.Module) -> None:
        layer.intermediate = module
        layer.output.dense = nn.Identity()

    return FFN(up, down, None, activation, install)


@register_family("gated MLP")
def _gated_mlp(layer: Any) -> FFN | None:
    """Llama, Mistral, Qwen, Gemma: ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``."""
    mlp = getattr(layer, "mlp", None)
    up, down, gate = (_linear(mlp, name) for name in ("up_proj", "down_proj", "gate_proj"))
    activation = getattr(mlp, "act_fn", None)
    if up is None or down is None or gate is None or activation is None:
        return None

    def install(module: nn.Module) -> None:
        layer.mlp = module

    return FFN(up, down, gate, activation, install)


def _linear(module: object, name: str) -> nn.Linear | None:
    child = getattr(module, name, None)
    return child if isinstance(child, nn.Linear) else None


def find_ffns(model: nn.Module, layers: Sequence[int] | None = None) -> list[FFN]:
    """Feed-forward networks of a model, in the order of its modules.

    Parameters
    ----------
    model : Module
    layers : sequence of int, optional
        Positions in that order to keep; all by default.

    Raises
    ------
    InputError
        If there is none of a known family, or ``layers`` names one that is not there.
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
    if layers is None:
        return found
    if bad := [layer for layer in layers if not 0 <= layer < len(found)]:
        raise InputError(
            f"layers must be from 0 to {len(found) - 1} in {type(model).__name__}, got {bad}"
        )
    return [found[layer] for layer in sorted(set(layers))]

"""Finding a model's feed-forward networks and its mixtures of experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from torch import nn

from tnmoe.errors import InputError, check_int_from_zero, check_positive_int, short_repr
from tnmoe.hf.families import family_names, network_in
from tnmoe.hf.ffn import FFN
from tnmoe.nn.moe import MPOMoE


class _HasName(Protocol):
    @property
    def name(self) -> str: ...


Named = TypeVar("Named", bound=_HasName)


def find_ffns(
    model: nn.Module, layers: Sequence[int] | str | None = None, every: int = 1
) -> list[FFN]:
    """Find the feed-forward networks of a model, in the order of its modules.

    Parameters
    ----------
    model : Module
    layers : sequence of int, or str, optional
        Positions of the networks to keep, in that order from 0; or a regular expression to search
        for in the names of the layers: ``"encoder"``, ``r"block\\.(3|5)\\."``. All by default.
    every : int
        Of these, keep every ``every``-th network: with 2 the second, the fourth and so on, as
        Switch does.

    Raises
    ------
    InputError
        If the model has no network of a known family, ``layers`` has a position that no network
        has, nothing is left, or the model ties parameters of a network by name.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2Model
    >>> model = GPT2Model(GPT2Config(vocab_size=32, n_layer=4, n_embd=16, n_head=2))
    >>> [ffn.name for ffn in find_ffns(model, every=2)]
    ['h.1', 'h.3']
    """
    chosen = choose_ffns(all_ffns(model), model, layers, every)
    _check_untied(model, chosen)
    return chosen


def choose_ffns(
    found: list[FFN], model: nn.Module, layers: Sequence[int] | str | None, every: int
) -> list[FFN]:
    """Return those of all networks of a model that ``layers`` and ``every`` choose.

    Parameters
    ----------
    found : list of FFN
        In the order of the model's modules.
    model, layers, every
        As for :func:`find_ffns`.

    Raises
    ------
    InputError
        If there is no network, ``layers`` has a position that no network has, or nothing is left.
    """
    layers, every = check_layers(layers), check_positive_int("every", every)
    if not found and hasattr(model, "peft_config"):
        raise InputError(
            f"{type(model).__name__} has no feed-forward network without adapters: merge or unload "
            "the adapters of PEFT first"
        )
    if not found:
        raise InputError(
            f"{type(model).__name__} has no feed-forward network of a known family "
            f"({', '.join(family_names())}); tnmoe.hf.register_family adds another"
        )
    chosen = chosen_layers(found, layers, type(model).__name__)[every - 1 :: every]
    if not chosen:
        raise InputError(
            f"layers={layers!r}, every={every} select none of the {len(found)} feed-forward "
            f"networks of {type(model).__name__}: {found[0].name} … {found[-1].name}"
        )
    return chosen


def all_ffns(model: nn.Module) -> list[FFN]:
    """Find all dense networks of known families, in the order of the model's modules."""
    by_matrix: dict[int, FFN] = {}
    for name, module in model.named_modules():
        ffn = network_in(module)
        if ffn is not None:
            key = id(next(ffn.up.parameters()))
            known = by_matrix.get(key)
            ffn = replace(ffn, name=name)
            # Two layers may use one network, which is replaced in both.
            if known is not None:
                ffn = replace(known, places=known.places + ffn.places)
            by_matrix[key] = ffn
    return list(by_matrix.values())


def _check_untied(model: nn.Module, ffns: list[FFN]) -> None:
    """Refuse networks that a model ties by name: their experts would have other names."""
    tied = getattr(model, "all_tied_weights_keys", {})
    of_networks = {parameter for ffn in ffns for parameter in ffn.parameters}
    names = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter in of_networks
    }
    if found := sorted(names & {*tied, *tied.values()}):
        raise InputError(
            f"{type(model).__name__} ties {found[0]} by name, which a converted network lacks"
        )


def check_layers(layers: Iterable[int] | str | None) -> tuple[int, ...] | str | None:
    """Return positions of networks, sorted and without repetitions, or a regular expression.

    Raises
    ------
    InputError
        If these are neither positions from 0 nor a valid regular expression.
    """
    if layers is None:
        return None
    if isinstance(layers, str):
        try:
            re.compile(layers)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(
                f"layers={short_repr(layers)} is not a regular expression: {error}"
            ) from error
        return layers
    if not isinstance(layers, Iterable):
        raise InputError(
            f"layers must be integers or a regular expression, got {short_repr(layers)}"
        )
    name = f"every layer of layers={short_repr(layers)}"
    return tuple(sorted({check_int_from_zero(name, layer) for layer in layers}))


def chosen_layers(
    found: list[Named], layers: Sequence[int] | str | None, model: str
) -> list[Named]:
    """Return those of a model's networks, or mixtures, that ``layers`` chooses.

    Raises
    ------
    InputError
        If a position is beyond the last one.
    """
    if layers is None:
        return found
    if isinstance(layers, str):
        return [each for each in found if re.search(layers, each.name)]
    if bad := [layer for layer in layers if layer >= len(found)]:
        raise InputError(f"layers must be from 0 to {len(found) - 1} in {model}, got {bad}")
    return [found[layer] for layer in layers]


def ffns_named(model: nn.Module, names: Iterable[str]) -> list[FFN]:
    """Find the dense networks of a model whose layers have one of these names.

    As with tensors of a checkpoint, a name may begin with the model's ``base_model_prefix`` or
    leave it out: ``encoder.layer.0`` of a BertModel is ``bert.encoder.layer.0`` of a
    BertForMaskedLM. It may also count from a module inside that has the model's configuration.
    """
    recorded, names_of = set(names), possible_names(model)
    return [ffn for ffn in all_ffns(model) if not recorded.isdisjoint(names_of(ffn.name))]


def mixtures_in(model: nn.Module) -> dict[str, MPOMoE]:
    """Return the mixtures of experts of a model by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MPOMoE)}


def mixtures_not_named(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return paths of mixtures in layers that have none of these names; see :func:`ffns_named`."""
    recorded, names_of = set(names), possible_names(model)

    def is_named(path: str) -> bool:
        parts = path.split(".")
        layers = (".".join(parts[:end]) for end in range(len(parts)))
        return any(not recorded.isdisjoint(names_of(layer)) for layer in layers)

    return [path for path in mixtures_in(model) if not is_named(path)]


def possible_names(model: nn.Module) -> Callable[[str], set[str]]:
    """Return a function from a layer's name in a model to all names that a record may give it."""
    config = getattr(model, "config", None)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    roots = {
        path
        for path, module in model.named_modules()
        if path and config is not None and getattr(module, "config", None) is config
    }

    def names_of(name: str) -> set[str]:
        parts = name.split(".")
        inside = {
            ".".join(parts[end:]) for end in range(1, len(parts)) if ".".join(parts[:end]) in roots
        }
        return {name, prefix + name, name.removeprefix(prefix)} | inside

    return names_of

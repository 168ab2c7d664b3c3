"""Checkpoints converted from folder to folder: a few matrices in memory, and never the model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from tnmoe.errors import InputError, index_in, one_of
from tnmoe.hf.checks import check_all_described
from tnmoe.hf.config import MPOEConfig
from tnmoe.hf.export import average_into
from tnmoe.hf.export_targets import Target, target_of
from tnmoe.hf.ffn import FFN, check_formula
from tnmoe.hf.find import ffns_named, mixtures_in
from tnmoe.hf.folders.checkpoint import Checkpoint, Spec
from tnmoe.hf.folders.conversion import Conversion, Piece, copies
from tnmoe.hf.folders.skeleton import (
    Skeleton,
    check_dense,
    config_from,
    held,
    model_without_numbers,
    saved_class,
    stored_name,
)
from tnmoe.hf.layers import converted_mixture, draw_start, install_new_mixtures
from tnmoe.hf.record import (
    Record,
    add_records,
    decode_entries,
    encode_entries,
    record_in_entries,
    with_records,
    without_records,
)
from tnmoe.nn.moe import MPOMoE
from tnmoe.options import EXPORT_FORMATS, SEEDS, ExportFormat


def prepare_upcycle(folder: str | os.PathLike, config: MPOEConfig, seed: int = 0) -> Conversion:
    """How a dense checkpoint becomes an MPOE checkpoint, a layer at a time.

    ``plan.run(target)`` does it: the result is what ``upcycle`` and ``save_pretrained`` make of
    the loaded model after ``torch.manual_seed(seed)``, to rounding.

    Parameters
    ----------
    folder : path
        A Hugging Face folder with config.json and safetensors files, of any size.
    config : MPOEConfig
    seed : int
        Of routers and noise.

    Returns
    -------
    Conversion
        Nothing but headers has been read for it.

    Raises
    ------
    InputError
        If the checkpoint is incomplete or damaged, its tensors do not suit its config.json,
        nothing in it can be converted, or it is converted or quantized already.

    Examples
    --------
    >>> import tempfile
    >>> from transformers import GPT2Config, GPT2Model
    >>> folder = tempfile.mkdtemp()
    >>> GPT2Model(GPT2Config(n_layer=1, n_embd=16, n_head=2)).save_pretrained(folder)
    >>> plan = prepare_upcycle(folder, MPOEConfig(num_experts=4, sites=3))
    >>> [piece.name for piece in plan.pieces if piece.make]
    ['h.0.mlp']
    >>> [path.name for path in plan.run(f"{folder}-mpoe")]
    ['model.safetensors']
    """
    source = Checkpoint(folder)
    check_dense(source.config, source.folder)
    dense, moe = Skeleton(source), Skeleton(source).model
    networks = dense.networks(config)
    dense.give_dtypes(moe)
    names = [ffn.name for ffn, _ in networks]
    install_new_mixtures(moe, config, names)
    add_records(moe, config, names)
    conversions = _conversions([ffn for ffn, _ in networks], config, index_in("seed", seed, SEEDS))
    pieces = [
        _upcycled(dense, ffn, names, path, layer, convert)
        for (ffn, names), (path, layer), convert in zip(
            networks, mixtures_in(moe).items(), conversions, strict=True
        )
    ]
    replaced = {name for piece in pieces for name in piece.reads}
    kept = copies(source, {name: name for name in source.specs if name not in replaced})
    entries = with_records(source.config, moe.config) | {"architectures": [type(moe).__name__]}
    return Conversion(source, (*kept, *pieces), encode_entries(entries), {"seed": seed})


def prepare_export(folder: str | os.PathLike, to: ExportFormat) -> Conversion:
    """How an MPOE checkpoint becomes one that other software runs, a layer at a time.

    Parameters
    ----------
    folder : path
        A Hugging Face folder with an MPOE checkpoint, of any size.
    to : {"moe", "dense"}
        An ordinary mixture of the family, as :func:`to_moe`, or a dense model with the mean of
        the experts, as :func:`average_experts`.

    Returns
    -------
    Conversion
        Nothing but headers has been read for it.

    Raises
    ------
    InputError
        If the folder holds no sound MPOE checkpoint, or something that the other class cannot
        express.

    Examples
    --------
    >>> import tempfile
    >>> from tnmoe.hf import upcycle
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=32, **small))
    >>> folder = tempfile.mkdtemp()
    >>> upcycle(model, MPOEConfig(num_experts=4, sites=3)).save_pretrained(folder)
    >>> plan = prepare_export(folder, to="moe")
    >>> plan.config["architectures"]
    ['MixtralForCausalLM']
    """
    one_of("to", to, EXPORT_FORMATS)
    source = Checkpoint(folder)
    entries = decode_entries(source.config)
    record, plain = record_in_entries(entries, source.folder), without_records(entries)
    saved_class(config_from(plain))
    skeleton = Skeleton(source, plain)
    install_new_mixtures(skeleton.model, record.config, record.networks)
    mixtures = mixtures_in(skeleton.model)
    reads = skeleton.names_of(each.parameters() for each in mixtures.values())
    skeleton.match(chain.from_iterable(reads))
    used = {
        skeleton.rename(f"{path}.{name}")
        for path, layer in mixtures.items()
        for name in layer.state_dict()
    }
    if lost := sorted(used - set(source.specs)):
        raise InputError(f"{source.folder} lacks {len(lost)} tensors: {', '.join(lost[:4])}")
    rest = [name for name in source.specs if name not in used]
    routers = [skeleton.rename(f"{path}.router.weight") for path in mixtures]
    paths = [name.removesuffix(".router.weight") for name in routers]
    check_all_described(rest, paths, source.folder)
    if to == "dense":
        return _to_dense(skeleton, mixtures, reads, plain, record, rest)
    return _to_moe(skeleton, mixtures, reads, record.config, rest)


def _upcycled(
    dense: Skeleton,
    ffn: FFN,
    reads: list[str],
    path: str,
    layer: MPOMoE,
    convert: Callable[[], MPOMoE],
) -> Piece:
    """The piece that makes a mixture of one network."""

    def named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {dense.rename(f"{path}.{name}"): each for name, each in tensors.items()}

    @torch.no_grad()
    def make() -> dict[str, Tensor]:
        with dense.filled(reads):
            check_formula(ffn)
            return named(convert().state_dict())

    sources = tuple(map(dense.rename, reads))
    return Piece(dense.rename(path), sources, _specs(named(layer.state_dict())), make)


def _to_dense(
    skeleton: Skeleton,
    mixtures: Mapping[str, MPOMoE],
    reads: Iterable[list[str]],
    plain: Mapping[str, Any],
    record: Record,
    rest: Iterable[str],
) -> Conversion:
    dense = Skeleton(skeleton.source, plain)
    ffns = ffns_named(dense.model, record.networks)
    written = dense.names_of(ffn.parameters for ffn in ffns)
    pieces = [
        _averaged(skeleton, path, layer, each, dense, ffn, names)
        for (path, layer), each, ffn, names in zip(
            mixtures.items(), reads, ffns, written, strict=True
        )
    ]
    kept = copies(skeleton.source, {name: name for name in rest})
    return Conversion(skeleton.source, (*kept, *pieces), plain, {"to": "dense"})


def _averaged(
    skeleton: Skeleton,
    path: str,
    layer: MPOMoE,
    reads: list[str],
    dense: Skeleton,
    ffn: FFN,
    writes: list[str],
) -> Piece:
    """The piece that makes a dense network of one mixture."""
    dtype = layer.experts.up.weight().dtype
    empty = {name: dense.model.get_parameter(name).to(dtype) for name in writes}

    def named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {skeleton.rename(name): each for name, each in tensors.items()}

    @torch.no_grad()
    def make() -> dict[str, Tensor]:
        numbers = {name: torch.empty_like(each, device="cpu") for name, each in empty.items()}
        with skeleton.filled(reads), held(dense.model, numbers):
            average_into(ffn, layer)
        return named(numbers)

    sources = tuple(map(skeleton.rename, reads))
    return Piece(skeleton.rename(path), sources, _specs(named(empty)), make)


def _to_moe(
    skeleton: Skeleton,
    mixtures: Mapping[str, MPOMoE],
    reads: Iterable[list[str]],
    config: MPOEConfig,
    rest: Iterable[str],
) -> Conversion:
    target = target_of(skeleton.model)
    for layer in mixtures.values():
        target.check(layer)
    entries = target.config(skeleton.model, mixtures, config)
    entries.architectures = [target.name]
    # Each of its modules is of an expert that has numbers in the source.
    moe = model_without_numbers(entries, modules=sys.maxsize)
    pieces = [
        _ordinary(skeleton, path, layer, each, moe, target)
        for (path, layer), each in zip(mixtures.items(), reads, strict=True)
    ]
    names = {stored_name(moe, target.rename(name)): name for name in rest}
    kept = copies(skeleton.source, names)
    settings = {"to": target.name}
    return Conversion(skeleton.source, (*kept, *pieces), entries.to_diff_dict(), settings)


def _ordinary(
    skeleton: Skeleton, path: str, layer: MPOMoE, reads: list[str], moe: Any, target: Target
) -> Piece:
    """The piece that makes an ordinary mixture of one with shared cores."""
    block, dtype = target.rename(path), layer.experts.up.weight().dtype

    def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {f"{block}.{name}": tensor.to(dtype) for name, tensor in tensors.items()}
        return revert_weight_conversion(moe, named)

    @torch.no_grad()
    def make() -> dict[str, Tensor]:
        with skeleton.filled(reads):
            return stored(target.weights(layer))

    sources = tuple(map(skeleton.rename, reads))
    return Piece(block, sources, _specs(stored(moe.get_submodule(block).state_dict())), make)


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    return {name: Spec.of(tensor) for name, tensor in tensors.items()}


def _conversions(ffns: Sequence[FFN], config: MPOEConfig, seed: int) -> list[Callable[[], MPOMoE]]:
    """Return the conversion of every network, with its random numbers drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        starts = [draw_start(ffn, config, "cpu") for ffn in ffns]
    return [
        partial(converted_mixture, ffn, config, router, noise_seed)
        for ffn, (router, noise_seed) in zip(ffns, starts, strict=True)
    ]

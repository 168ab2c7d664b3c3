"""Preparing conversions from folder to folder, which keep a few matrices in memory at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from tnmoe.errors import InputError, check_index, check_one_of
from tnmoe.hf.checks import check_all_described
from tnmoe.hf.config import MPOEConfig, check_config
from tnmoe.hf.export import average_into
from tnmoe.hf.export_targets import Target, target_of
from tnmoe.hf.ffn import FFN, check_formula
from tnmoe.hf.files.checkpoint import Checkpoint
from tnmoe.hf.files.tensors import TensorSpec
from tnmoe.hf.find import ffns_named, mixtures_in
from tnmoe.hf.folders.conversion import Conversion
from tnmoe.hf.folders.pieces import Piece, copy_pieces
from tnmoe.hf.folders.skeleton import Skeleton, tensors_of, with_tensors
from tnmoe.hf.guards import SizeLimits
from tnmoe.hf.layers import (
    converted_mixture,
    draw_start,
    install_new_mixtures,
    install_recorded,
)
from tnmoe.hf.meta import (
    check_unconverted_entries,
    config_from_entries,
    meta_model,
    saved_class,
    stored_name,
)
from tnmoe.hf.ordinary import OrdinaryExperts, compressed_in, ordinary_experts
from tnmoe.hf.record import (
    add_records,
    check_no_linear,
    decode_entries,
    encode_entries,
    record_in_entries,
    with_records,
    without_records,
)
from tnmoe.nn.moe import MPOMoE
from tnmoe.nn.mpo_experts import MPOExperts
from tnmoe.options import EXPORT_FORMATS, SEEDS, ExportFormat
from tnmoe.system.tables import listed


def prepare_upcycle(folder: str | os.PathLike, config: MPOEConfig, seed: int = 0) -> Conversion:
    """Prepare the conversion of a dense checkpoint into an MPOE checkpoint, a layer at a time.

    ``conversion.run(target)`` carries it out. Up to rounding, the result is what ``upcycle`` and
    ``save_pretrained`` make of the loaded model after ``torch.manual_seed(seed)``.

    Parameters
    ----------
    folder : path
        A Hugging Face folder with config.json and safetensors files, of any size.
    config : MPOEConfig
    seed : int
        Seed of routers and noise.

    Returns
    -------
    Conversion
        Only the headers of files have been read so far.

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
    >>> conversion = prepare_upcycle(folder, MPOEConfig(num_experts=4, sites=3))
    >>> [piece.name for piece in conversion.pieces if piece.make]
    ['h.0.mlp']
    >>> [path.name for path in conversion.run(f"{folder}-mpoe")]
    ['model.safetensors']
    """
    check_config(config)
    source = Checkpoint(folder)
    check_unconverted_entries(source.config, source.folder)
    dense, moe = Skeleton(source), Skeleton(source).model
    networks = dense.networks(config)
    dense.set_dtypes(moe)
    ffns = [ffn for ffn, _ in networks]
    names = [ffn.name for ffn in ffns]
    install_new_mixtures(moe, config, names)
    add_records(moe, config, names)
    conversions = _conversions(ffns, config, check_index("seed", seed, SEEDS))
    pieces = [
        _mixture_piece(dense, ffn, parameters, path, layer, convert)
        for (ffn, parameters), (path, layer), convert in zip(
            networks, mixtures_in(moe).items(), conversions, strict=True
        )
    ]
    replaced = {name for piece in pieces for name in piece.reads}
    kept = copy_pieces(source, {name: name for name in source.specs if name not in replaced})
    entries = with_records(source.config, moe.config) | {"architectures": [type(moe).__name__]}
    return Conversion(source, (*kept, *pieces), encode_entries(entries), {"seed": seed})


def prepare_export(folder: str | os.PathLike, to: ExportFormat) -> Conversion:
    """Prepare the conversion of an MPOE checkpoint into one that other software runs.

    Parameters
    ----------
    folder : path
        A Hugging Face folder with an MPOE checkpoint, of any size.
    to : {"moe", "dense"}
        ``moe`` for an ordinary mixture of the family, as :func:`to_moe` makes it; ``dense`` for a
        dense model with the mean of the experts, as :func:`average_experts` makes it. A compressed
        checkpoint becomes what it was, an ordinary mixture, and never dense.

    Returns
    -------
    Conversion
        Only the headers of files have been read so far. It converts a layer at a time.

    Raises
    ------
    InputError
        If the folder holds no sound MPOE checkpoint, or the checkpoint has something that the
        other class cannot express.

    Examples
    --------
    >>> import tempfile
    >>> from tnmoe.hf import upcycle
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=32, **small))
    >>> folder = tempfile.mkdtemp()
    >>> upcycle(model, MPOEConfig(num_experts=4, sites=3)).save_pretrained(folder)
    >>> conversion = prepare_export(folder, to="moe")
    >>> conversion.config["architectures"]
    ['MixtralForCausalLM']
    """
    check_one_of("to", to, EXPORT_FORMATS)
    source = Checkpoint(folder)
    entries = decode_entries(source.config)
    record, plain = record_in_entries(entries, source.folder), without_records(entries)
    hint = "load it, use hf.untensorize and save the model first"
    check_no_linear(record, source.folder, hint)
    saved_class(config_from_entries(plain))
    skeleton = Skeleton(source, plain)
    install_recorded(skeleton.model, record)
    if record.config is None:
        return _to_ordinary(skeleton, plain, to)
    mixtures = _match_mixtures(skeleton)
    kept = _tensors_beside(skeleton, mixtures)
    if to == "dense":
        return _to_dense(skeleton, mixtures, kept, plain, record.networks)
    return _to_moe(skeleton, mixtures, kept, record.config)


def _to_ordinary(skeleton: Skeleton, plain: Mapping[str, Any], to: ExportFormat) -> Conversion:
    """Prepare the way back of a compressed checkpoint to the ordinary mixtures of its class."""
    source = skeleton.source
    if to == "dense":
        raise InputError(
            f"{source.folder} was compressed and not converted: its mixtures replaced no dense "
            "networks; to='moe' makes them ordinary ones"
        )
    ordinary = meta_model(config_from_entries(plain), SizeLimits.for_checkpoint(source).modules)
    experts = compressed_in(skeleton.model)
    names = skeleton.names_of(tensors_of(each) for each in experts.values())
    skeleton.match(chain.from_iterable(names))
    targets = {each.name: each for each in ordinary_experts(ordinary)}
    pieces = [
        _ordinary_experts_piece(skeleton, ordinary, targets[path], each, parameters)
        for (path, each), parameters in zip(experts.items(), names, strict=True)
    ]
    used = {name for piece in pieces for name in piece.reads}
    copied = copy_pieces(source, {name: name for name in source.specs if name not in used})
    return Conversion(source, (*copied, *pieces), plain, {"to": type(ordinary).__name__})


def _ordinary_experts_piece(
    skeleton: Skeleton,
    ordinary: Any,
    target: OrdinaryExperts,
    experts: MPOExperts,
    parameters: list[str],
) -> Piece:
    """Return the piece that writes the matrices of compressed experts whole."""
    dtype = experts.down.weight().dtype

    def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {f"{target.name}.{key}": tensor.to(dtype) for key, tensor in tensors.items()}
        return revert_weight_conversion(ordinary, named)

    @torch.no_grad()
    def make() -> dict[str, Tensor]:
        with skeleton.filled(parameters):
            return stored(target.format.tensors(target.module, experts))

    reads = tuple(map(skeleton.rename, parameters))
    return Piece(target.name, reads, _specs(stored(target.module.state_dict())), make)


class _Mixture(NamedTuple):
    """A mixture of a skeleton: its path, and the names of its tensors in the model."""

    path: str
    layer: MPOMoE
    parameters: list[str]


def _match_mixtures(skeleton: Skeleton) -> list[_Mixture]:
    """Find the mixtures of a skeleton, and their parameters in the checkpoint."""
    layers = mixtures_in(skeleton.model)
    parameters = skeleton.names_of(tensors_of(layer) for layer in layers.values())
    skeleton.match(chain.from_iterable(parameters))
    return [
        _Mixture(path, layer, names)
        for (path, layer), names in zip(layers.items(), parameters, strict=True)
    ]


def _tensors_beside(skeleton: Skeleton, mixtures: Iterable[_Mixture]) -> list[str]:
    """List the tensors of the checkpoint that belong to no mixture.

    Raises
    ------
    InputError
        If the checkpoint lacks tensors of mixtures, or has some of mixtures that its config.json
        does not describe.
    """
    source = skeleton.source
    used = {
        skeleton.rename(f"{path}.{name}")
        for path, layer, _ in mixtures
        for name in layer.state_dict()
    }
    if lost := used - set(source.specs):
        raise InputError(f"{source.folder} lacks {len(lost)} tensors: {listed(lost)}")
    beside = [name for name in source.specs if name not in used]
    routers = [skeleton.rename(f"{path}.router.weight") for path, *_ in mixtures]
    paths = [name.removesuffix(".router.weight") for name in routers]
    check_all_described(beside, paths, source.folder)
    return beside


def _mixture_piece(
    dense: Skeleton,
    ffn: FFN,
    parameters: list[str],
    path: str,
    layer: MPOMoE,
    convert: Callable[[], MPOMoE],
) -> Piece:
    """Return the piece that makes a mixture of a network.

    Parameters
    ----------
    dense : Skeleton
    ffn : FFN
        The network.
    parameters : list of str
        Names of its parameters in the model.
    path : str
        Where the model will have the mixture.
    layer : MPOMoE
        A mixture of the same sizes without numbers.
    convert : callable
        Makes the mixture of the network's numbers.
    """

    def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {dense.rename(f"{path}.{name}"): tensor for name, tensor in tensors.items()}

    @torch.no_grad()
    def make() -> dict[str, Tensor]:
        with dense.filled(parameters):
            check_formula(ffn)
            return stored(convert().state_dict())

    specs = _specs(stored(layer.state_dict()))
    return Piece(dense.rename(path), tuple(map(dense.rename, parameters)), specs, make)


def _to_dense(
    skeleton: Skeleton,
    mixtures: Sequence[_Mixture],
    kept: Iterable[str],
    plain: Mapping[str, Any],
    networks: Sequence[str],
) -> Conversion:
    dense = Skeleton(skeleton.source, plain)
    ffns = ffns_named(dense.model, networks)
    written = dense.names_of(ffn.parameters for ffn in ffns)
    pieces = [
        _dense_piece(skeleton, mixture, dense, ffn, names)
        for mixture, ffn, names in zip(mixtures, ffns, written, strict=True)
    ]
    copied = copy_pieces(skeleton.source, {name: name for name in kept})
    return Conversion(skeleton.source, (*copied, *pieces), plain, {"to": "dense"})


def _dense_piece(
    skeleton: Skeleton, mixture: _Mixture, dense: Skeleton, ffn: FFN, writes: Iterable[str]
) -> Piece:
    """Return the piece that averages a mixture's experts into a dense network."""
    dtype = mixture.layer.experts.down.weight().dtype
    empty = {name: dense.model.get_parameter(name).to(dtype) for name in writes}

    def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {skeleton.rename(name): tensor for name, tensor in tensors.items()}

    @torch.no_grad()
    def make() -> dict[str, Tensor]:
        tensors = {name: torch.empty_like(weight, device="cpu") for name, weight in empty.items()}
        with skeleton.filled(mixture.parameters), with_tensors(dense.model, tensors):
            average_into(ffn, mixture.layer)
        return stored(tensors)

    name, reads = skeleton.rename(mixture.path), tuple(map(skeleton.rename, mixture.parameters))
    return Piece(name, reads, _specs(stored(empty)), make)


def _to_moe(
    skeleton: Skeleton, mixtures: Sequence[_Mixture], kept: Iterable[str], config: MPOEConfig
) -> Conversion:
    target = target_of(skeleton.model)
    layers = {mixture.path: mixture.layer for mixture in mixtures}
    for layer in layers.values():
        target.check(layer)
    target_config = target.config(skeleton.model, layers, config)
    target_config.architectures = [target.name]
    # No limit is needed: every expert that has modules here has tensors in the source.
    moe = meta_model(target_config, max_modules=sys.maxsize)
    pieces = [_ordinary_piece(skeleton, mixture, moe, target) for mixture in mixtures]
    originals = {stored_name(moe, target.rename(name)): name for name in kept}
    copied = copy_pieces(skeleton.source, originals)
    settings = {"to": target.name}
    return Conversion(skeleton.source, (*copied, *pieces), target_config.to_diff_dict(), settings)


def _ordinary_piece(skeleton: Skeleton, mixture: _Mixture, moe: Any, target: Target) -> Piece:
    """Return the piece that turns a mixture with shared cores into an ordinary mixture."""
    name, dtype = target.rename(mixture.path), mixture.layer.experts.down.weight().dtype

    def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {f"{name}.{key}": tensor.to(dtype) for key, tensor in tensors.items()}
        return revert_weight_conversion(moe, named)

    @torch.no_grad()
    def make() -> dict[str, Tensor]:
        with skeleton.filled(mixture.parameters):
            return stored(target.weights(mixture.layer))

    reads = tuple(map(skeleton.rename, mixture.parameters))
    specs = _specs(stored(moe.get_submodule(name).state_dict()))
    return Piece(name, reads, specs, make)


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}


def _conversions(ffns: Sequence[FFN], config: MPOEConfig, seed: int) -> list[Callable[[], MPOMoE]]:
    """Return the conversion of every network, with its random numbers drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        starts = [draw_start(ffn, config, "cpu") for ffn in ffns]
    return [
        partial(converted_mixture, ffn, config, router, noise_seed)
        for ffn, (router, noise_seed) in zip(ffns, starts, strict=True)
    ]

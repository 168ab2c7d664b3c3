"""Where pretrained models keep their feed-forward networks: one small finder per family."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tnmoe.backends import backend_named
from tnmoe.errors import InputError, integer_from_zero, positive_int, shown
from tnmoe.nn.activations import resolve_activation


class FusedHalf(nn.Module):
    """The upper or the lower half of a linear layer that holds gate and up in one matrix.

    Its weight and bias are parts of that layer's: what is written into them is written there.

    Parameters
    ----------
    both : Linear
        The layer of 2 F rows.
    half : {0, 1}
        The upper half or the lower one.
    """

    def __init__(self, both: nn.Linear, half: int) -> None:
        super().__init__()
        self.both = both
        size = both.out_features // 2
        self.rows = slice(half * size, (half + 1) * size)

    @property
    def weight(self) -> Tensor:
        return self.both.weight[self.rows]

    @property
    def bias(self) -> Tensor | None:
        return None if self.both.bias is None else self.both.bias[self.rows]


Matrix = nn.Linear | Conv1D | FusedHalf


@dataclass(frozen=True)
class FFN:
    """One dense feed-forward network found in a model.

    Attributes
    ----------
    up, down : Linear, Conv1D or FusedHalf
        Into and out of the intermediate size.
    gate : Linear, Conv1D, FusedHalf or None
        Second matrix into the intermediate size, activated and multiplied onto ``up``'s output.
    activation : callable
        The model's own activation.
    install : callable
        Puts a module (..., H) → (..., H) in the network's place.
    dropout, output_dropout : float
        The network's own dropout between its matrices, and of its output.
    name, family : str
        Path of the layer that holds it, and the family that found it.
    network : Module, optional
        What computes it, and nothing else, in the model: a conversion tries it on numbers, and
        refuses one that does more than its matrices and its activation.

    Examples
    --------
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
    install: Callable[[nn.Module], None]
    dropout: float = 0.0
    output_dropout: float = 0.0
    name: str = ""
    family: str = ""
    network: nn.Module | None = None

    def __repr__(self) -> str:
        inner, outer = weight_of(self.up).shape
        return (
            f"FFN({self.name!r}, {self.family}, {outer}→{inner}→{outer}, "
            f"matrices={[*self.matrices]}, activation={type(self.activation).__name__})"
        )

    @property
    def matrices(self) -> dict[str, Matrix]:
        """Its matrices by name: up, down, and gate if there is one."""
        found = {"up": self.up, "down": self.down}
        return found if self.gate is None else {**found, "gate": self.gate}

    @property
    def parameters(self) -> set[nn.Parameter]:
        """Whatever was learned of it."""
        parts = [*self.matrices.values(), self.activation]
        modules = [each for each in parts if isinstance(each, nn.Module)]
        return {parameter for each in modules for parameter in each.parameters()}

    @property
    def num_params(self) -> int:
        """Numbers in its matrices, biases and activation."""
        return sum(parameter.numel() for parameter in self.parameters)


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

    Examples
    --------
    For models whose layers have ``layer.ff.inner``, ``layer.ff.outer`` and ``layer.ff.act``:

    >>> finder = register_family("mine")(of_module("ff", "inner", "outer", activation="act"))
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
        Attributes of the network that are its matrices and its activation. Where ``gate`` is the
        same as ``up``, one linear layer holds both, the gate's rows first.
    dropout, output_dropout : str, optional
        Attributes that are its dropout between the matrices, and after the last one: a
        ``torch.nn.Dropout`` or a probability.

    Examples
    --------
    A layer whose network is ``layer.ff``, with ``inner``, ``act`` and ``outer``:

    >>> layer = nn.Module()
    >>> layer.ff = nn.Module()
    >>> layer.ff.inner, layer.ff.act, layer.ff.outer = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)
    >>> of_module("ff", "inner", "outer")(layer).num_params
    76
    """

    def find(layer: Any) -> FFN | None:
        network = getattr(layer, holder, None)
        parts = _parts(network, up, down, gate, activation, dropout)
        output_rate = _rate(network, output_dropout)
        if parts is None or output_rate is None:
            return None
        return FFN(
            **parts,
            install=lambda module: setattr(layer, holder, module),
            output_dropout=output_rate,
            network=network,
        )

    return find


def in_place(
    up: str,
    down: str,
    activation: str = "act",
    dropout: str | None = None,
    beside: str | None = None,
) -> Finder:
    """A finder for networks whose parts are called by something that does more, and so stays.

    ``up`` gives way to the whole network; activation, dropout and ``down`` then do nothing.

    Parameters
    ----------
    up, down, activation : str
        Attributes that are its matrices and its activation.
    dropout : str, optional
        Attribute that is its dropout between the matrices.
    beside : str, optional
        Attribute by which to tell the family, where the others' names are common.

    Examples
    --------
    A layer that itself has the matrices ``fc1`` and ``fc2``:

    >>> layer = nn.Module()
    >>> layer.fc1, layer.act, layer.fc2 = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)
    >>> in_place("fc1", "fc2")(layer).num_params
    76
    """

    def find(layer: Any) -> FFN | None:
        parts = _parts(layer, up, down, None, activation, dropout)
        if parts is None or (beside is not None and not hasattr(layer, beside)):
            return None

        def install(module: nn.Module) -> None:
            setattr(layer, up, module)
            setattr(layer, activation, nn.Identity())
            setattr(layer, down, nn.Identity())
            if dropout is not None:
                is_module = isinstance(getattr(layer, dropout), nn.Module)
                setattr(layer, dropout, nn.Identity() if is_module else 0.0)

        return FFN(**parts, install=install)

    return find


def _parts(
    module: object,
    up: str,
    down: str,
    gate: str | None,
    activation: str,
    dropout: str | None,
) -> dict[str, Any] | None:
    """What of a network these attributes are, if they are all there and fit each other."""
    into, out, gating = (name and _matrix(module, name) for name in (up, down, gate))
    act, rate = getattr(module, activation, None), _rate(module, dropout)
    if not into or not out or (gate and not gating) or act is None or rate is None:
        return None
    if gate == up:
        gating, into = FusedHalf(into, 0), FusedHalf(into, 1)
    shape = weight_of(into).shape
    if weight_of(out).shape != shape[::-1] or (gating and weight_of(gating).shape != shape):
        return None
    return {"up": into, "down": out, "gate": gating, "activation": act, "dropout": rate}


def _matrix(module: object, name: str) -> Any:
    child = getattr(module, name, None)
    return child if isinstance(child, nn.Linear | Conv1D) else None


def _rate(module: object, name: str | None) -> float | None:
    """A dropout's probability: 0 where none is named, None where the named one is missing."""
    dropout = 0.0 if name is None else getattr(module, name, None)
    return getattr(dropout, "p", dropout)


# T5Gemma, GTE: must come before those without dropout.
register_family("gated MLP with dropout")(
    of_module("mlp", "up_proj", "down_proj", "gate_proj", "act_fn", dropout="dropout")
)
# Llama, Mistral, Qwen, Gemma, Cohere, OLMo, StableLM, Granite and many more.
register_family("gated MLP")(of_module("mlp", "up_proj", "down_proj", "gate_proj", "act_fn"))
# Bamba, Falcon-H1, Pixtral, Jamba's dense layers.
register_family("gated feed-forward")(
    of_module("feed_forward", "up_proj", "down_proj", "gate_proj", "act_fn")
)
# Nemotron, Arcee, DINOv3.
register_family("MLP without gate")(of_module("mlp", "up_proj", "down_proj", activation="act_fn"))
# Phi-3, Phi-4, GLM, GLM-4.
register_family("fused gated MLP")(
    of_module("mlp", "gate_up_proj", "down_proj", "gate_up_proj", "activation_fn")
)
register_family("ModernBERT")(of_module("mlp", "Wi", "Wo", "Wi", dropout="drop"))
register_family("GPT-2")(of_module("mlp", "c_fc", "c_proj", output_dropout="dropout"))
register_family("StarCoder2")(of_module("mlp", "c_fc", "c_proj", output_dropout="residual_dropout"))
register_family("GPT-J")(of_module("mlp", "fc_in", "fc_out", output_dropout="dropout"))
# Falcon too.
register_family("GPT-NeoX")(of_module("mlp", "dense_h_to_4h", "dense_4h_to_h"))
# Both add the residual themselves.
register_family("Bloom")(in_place("dense_h_to_4h", "dense_4h_to_h", "gelu_impl"))
register_family("MPT")(in_place("up_proj", "down_proj", beside="hidden_dropout"))
# CLIP, SigLIP and Phi too.
register_family("ViT")(of_module("mlp", "fc1", "fc2", activation="activation_fn"))
# T5, mT5, UMT5, LongT5; Flan-T5 is the gated one.
register_family("T5")(of_module("DenseReluDense", "wi", "wo", dropout="dropout"))
register_family("gated T5")(
    of_module("DenseReluDense", "wi_1", "wo", gate="wi_0", dropout="dropout")
)
# BART, Whisper, Marian, M2M-100, Pegasus.
register_family("BART-like")(
    in_place("fc1", "fc2", "activation_fn", "activation_dropout", beside="self_attn")
)
register_family("OPT")(in_place("fc1", "fc2", "activation_fn", beside="self_attn"))
# One network is used by all layers of a group.
register_family("ALBERT")(in_place("ffn", "ffn_output", "activation"))
register_family("DistilBERT")(
    of_module("ffn", "lin1", "lin2", activation="activation", output_dropout="dropout")
)
# Flaubert and SAM too.
register_family("XLM")(in_place("lin1", "lin2"))
# HuBERT, WavLM, SpeechT5; Conformers have two per layer.
register_family("wav2vec 2.0")(
    in_place("intermediate_dense", "output_dense", "intermediate_act_fn", "intermediate_dropout")
)
register_family("ProphetNet")(
    of_module(
        "feed_forward", "intermediate", "output", activation="activation_fn",
        dropout="activation_dropout", output_dropout="dropout",
    )
)  # fmt: skip


@register_family("BERT-like")
def _bert_like(layer: Any) -> FFN | None:
    """BERT, RoBERTa, MPNet, ELECTRA: ``intermediate.dense``, activation, ``output.dense``.

    ``output`` goes on to dropout, residual and norm, so only its ``dense`` gives way.
    """
    inner: Any = getattr(layer, "intermediate", None)
    up, down = _matrix(inner, "dense"), _matrix(getattr(layer, "output", None), "dense")
    activation = getattr(inner, "intermediate_act_fn", None)
    if up is None or down is None or activation is None:
        return None
    # RoBERTa-PreLayerNorm, for one, has a norm there as well.
    if {name for name, _ in inner.named_children()} - {"dense", "intermediate_act_fn"}:
        return None

    def install(module: nn.Module) -> None:
        layer.intermediate = module
        layer.output.dense = nn.Identity()

    return FFN(up, down, None, activation, install)


def check_formula(ffn: FFN) -> None:
    """Refuse a network that does more than its matrices and its activation.

    Families are told by the names of their parts. A norm between them, a clamp or a scale shows
    only in what comes out.

    Raises
    ------
    InputError
    """
    if ffn.network is not None and not _computes(ffn.network, ffn):
        raise InputError(
            f"the feed-forward network of {ffn.name} does more than its matrices and activation: "
            "leave it out with layers=, or register a finder that does it justice"
        )


@torch.no_grad()
def _computes(network: nn.Module, ffn: FFN) -> bool:
    """Whether a network is the formula and no more, by what it makes of a few rows."""
    if set(network.parameters()) - ffn.parameters:
        return False
    network, matrices, activation = copy.deepcopy((network, ffn.matrices, ffn.activation))
    network.float().eval()

    def product(name: str, rows: Tensor) -> Tensor:
        return F.linear(rows, weight_of(matrices[name]), matrices[name].bias)

    weight = weight_of(ffn.up)
    like = torch.empty(0, dtype=torch.float32, device=weight.device)
    rows = torch.sin(torch.arange(3 * weight.shape[1], device=weight.device).to(like)).view(
        1, 3, -1
    )
    # Of several sizes: small ones pass a clamp unchanged.
    rows = rows * like.new_tensor([1.0, 1e2, 1e4])[:, None]
    with backend_named("torch").full_precision(weight):
        sides = [product(name, rows) for name in ("gate", "up") if name in matrices]
        expected = product("down", resolve_activation(activation, len(sides) == 2)(*sides))
        try:
            difference = (network(rows) - expected).norm(dim=-1)
        except TypeError:  # it takes or gives something else as well
            return False
    return not bool((difference > 1e-3 * expected.norm(dim=-1)).any())


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
        If there is none of a known family, ``layers`` names one that is not there, none is left,
        or the model ties their parameters by name.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2Model
    >>> model = GPT2Model(GPT2Config(vocab_size=32, n_layer=4, n_embd=16, n_head=2))
    >>> [ffn.name for ffn in find_ffns(model, every=2)]
    ['h.1', 'h.3']
    """
    layers, every = check_layers(layers), positive_int("every", every)
    found = all_ffns(model)
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
    _check_untied(model, chosen)
    return chosen


def all_ffns(model: nn.Module) -> list[FFN]:
    """All dense feed-forward networks of known families, in the order of the model's modules."""
    by_matrix: dict[int, FFN] = {}
    for name, module in model.named_modules():
        found_by = ((family, finder(module)) for family, finder in list(_FAMILIES.items()))
        family, ffn = next((each for each in found_by if each[1]), ("", None))
        if ffn is not None:
            key = id(next(ffn.up.parameters()))
            known = by_matrix.get(key)
            ffn = replace(ffn, name=name, family=family)
            by_matrix[key] = ffn if known is None else _at_both(known, ffn)
    return list(by_matrix.values())


def _check_untied(model: nn.Module, ffns: list[FFN]) -> None:
    """Refuse networks that a model ties by name: their experts would have other names."""
    tied = getattr(model, "all_tied_weights_keys", {})
    own = {parameter for ffn in ffns for parameter in ffn.parameters}
    names = {name for name, each in model.named_parameters(remove_duplicate=False) if each in own}
    if named := sorted(names & {*tied, *tied.values()}):
        raise InputError(
            f"{type(model).__name__} ties {named[0]} by name, which a converted network lacks"
        )


def _at_both(ffn: FFN, again: FFN) -> FFN:
    """One network that is found in two places."""

    def install(module: nn.Module) -> None:
        ffn.install(module)
        again.install(module)

    return replace(ffn, install=install)


def check_layers(layers: Iterable[int] | str | None) -> tuple[int, ...] | str | None:
    """Positions of networks in order, each once, or a regular expression; else an InputError."""
    if layers is None:
        return None
    if isinstance(layers, str):
        try:
            re.compile(layers)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"layers={shown(layers)} is no regular expression: {error}") from error
        return layers
    if not isinstance(layers, Iterable):
        raise InputError(f"layers must be integers or a regular expression, got {shown(layers)}")
    name = f"every layer of layers={shown(layers)}"
    return tuple(sorted({integer_from_zero(name, layer) for layer in layers}))


def _chosen(found: list[FFN], layers: tuple[int, ...] | str | None, model: str) -> list[FFN]:
    if layers is None:
        return found
    if isinstance(layers, str):
        return [ffn for ffn in found if re.search(layers, ffn.name)]
    if bad := [layer for layer in layers if layer >= len(found)]:
        raise InputError(f"layers must be from 0 to {len(found) - 1} in {model}, got {bad}")
    return [found[layer] for layer in layers]

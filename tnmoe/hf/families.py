"""Where pretrained models keep their feed-forward networks: one small finder per family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from tnmoe.hf.ffn import FFN, FusedHalf, Place, size_of

# Takes a module of a model. Returns the feed-forward network that the module holds directly, or
# None if the names of the family's parts are not there.
Finder = Callable[[nn.Module], FFN | None]

_FAMILIES: dict[str, Finder] = {}


def register_family(name: str) -> Callable[[Finder], Finder]:
    """Add a finder for a family of feed-forward networks; a decorator.

    Parameters
    ----------
    name : str
        Name of the family. A family of the same name is replaced.

    Examples
    --------
    For models whose layers have ``layer.ff.inner``, ``layer.ff.outer`` and ``layer.ff.act``:

    >>> finder = register_family("mine")(of_module("ff", "inner", "outer", activation="act"))
    """

    def register(finder: Finder) -> Finder:
        _FAMILIES[name] = finder
        return finder

    return register


def family_names() -> list[str]:
    """Return the names of all known families."""
    return list(_FAMILIES)


def network_in(module: nn.Module) -> FFN | None:
    """Return the network that a module holds directly, with its family's name; None without one."""
    for name, finder in list(_FAMILIES.items()):
        if ffn := finder(module):
            return replace(ffn, family=name)
    return None


def of_module(
    holder: str,
    up: str,
    down: str,
    *,
    gate: str | None = None,
    activation: str = "act",
    dropout: str | None = None,
    output_dropout: str | None = None,
) -> Finder:
    """Make a finder for networks that are a module of their own, which is replaced as a whole.

    Parameters
    ----------
    holder : str
        Attribute of a layer that is the network.
    up, down, gate, activation : str
        Attributes of the network that are its matrices and its activation. If ``gate`` is the same
        as ``up``, one linear layer holds both, the gate's rows first.
    dropout, output_dropout : str, optional
        Attributes of the network that are its dropout between the matrices and after the last one.
        Each is a ``torch.nn.Dropout`` or a probability.

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
        parts = _parts(network, up, down, gate=gate, activation=activation, dropout=dropout)
        output_rate = _rate(network, output_dropout)
        if parts is None or output_rate is None:
            return None
        return FFN(
            **parts,
            places=(Place(layer, holder),),
            output_dropout=output_rate,
            network=network,
        )

    return find


def in_place(
    up: str,
    down: str,
    *,
    activation: str = "act",
    dropout: str | None = None,
    beside: str | None = None,
) -> Finder:
    """Make a finder for networks whose parts belong to a layer that does more, and so stays.

    The new network takes the place of ``up``. Activation, dropout and ``down`` become identities.

    Parameters
    ----------
    up, down, activation : str
        Attributes of the layer that are the network's matrices and its activation.
    dropout : str, optional
        Attribute of the layer that is the dropout between the matrices.
    beside : str, optional
        Another attribute that only layers of this family have, where ``up`` and ``down`` are common
        names.

    Examples
    --------
    A layer that itself has the matrices ``fc1`` and ``fc2``:

    >>> layer = nn.Module()
    >>> layer.fc1, layer.act, layer.fc2 = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)
    >>> in_place("fc1", "fc2")(layer).num_params
    76
    """

    def find(layer: Any) -> FFN | None:
        parts = _parts(layer, up, down, activation=activation, dropout=dropout)
        if parts is None or (beside is not None and not hasattr(layer, beside)):
            return None

        others = (activation, down) if dropout is None else (activation, down, dropout)
        return FFN(**parts, places=(Place(layer, up, tuple((layer, name) for name in others)),))

    return find


def _parts(
    module: object,
    up: str,
    down: str,
    *,
    gate: str | None = None,
    activation: str,
    dropout: str | None,
) -> dict[str, Any] | None:
    """Return the fields of an FFN from these attributes; None if one is missing or does not fit."""
    into, out, gating = (name and _matrix(module, name) for name in (up, down, gate))
    act, rate = getattr(module, activation, None), _rate(module, dropout)
    if not into or not out or (gate and not gating) or act is None or rate is None:
        return None
    if gate == up:
        gating, into = FusedHalf(into, 0), FusedHalf(into, 1)
    size = size_of(into)
    if size_of(out) != size[::-1] or (gating and size_of(gating) != size):
        return None
    return {"up": into, "down": out, "gate": gating, "activation": act, "dropout": rate}


def _matrix(module: object, name: str) -> Any:
    child = getattr(module, name, None)
    return child if isinstance(child, nn.Linear | Conv1D) else None


def _rate(module: object, name: str | None) -> float | None:
    """Return a dropout's probability: 0 if no name is given, None if the attribute is missing."""
    dropout = 0.0 if name is None else getattr(module, name, None)
    return getattr(dropout, "p", dropout)


# T5Gemma, GTE. Must come before the family without dropout, whose names it has too.
register_family("gated MLP with dropout")(
    of_module(
        "mlp", "up_proj", "down_proj", gate="gate_proj", activation="act_fn", dropout="dropout"
    )
)
# Llama, Mistral, Qwen, Gemma, Cohere, OLMo, StableLM, Granite and many more.
register_family("gated MLP")(
    of_module("mlp", "up_proj", "down_proj", gate="gate_proj", activation="act_fn")
)
# Bamba, Falcon-H1, Pixtral, Jamba's dense layers.
register_family("gated feed-forward")(
    of_module("feed_forward", "up_proj", "down_proj", gate="gate_proj", activation="act_fn")
)
# Nemotron, Arcee, DINOv3.
register_family("MLP without gate")(of_module("mlp", "up_proj", "down_proj", activation="act_fn"))
# Phi-3, Phi-4, GLM, GLM-4.
register_family("fused gated MLP")(
    of_module("mlp", "gate_up_proj", "down_proj", gate="gate_up_proj", activation="activation_fn")
)
register_family("ModernBERT")(of_module("mlp", "Wi", "Wo", gate="Wi", dropout="drop"))
register_family("GPT-2")(of_module("mlp", "c_fc", "c_proj", output_dropout="dropout"))
register_family("StarCoder2")(of_module("mlp", "c_fc", "c_proj", output_dropout="residual_dropout"))
register_family("GPT-J")(of_module("mlp", "fc_in", "fc_out", output_dropout="dropout"))
# GPT-NeoX, Falcon.
register_family("GPT-NeoX")(of_module("mlp", "dense_h_to_4h", "dense_4h_to_h"))
# The networks of Bloom and MPT add the residual themselves.
register_family("Bloom")(in_place("dense_h_to_4h", "dense_4h_to_h", activation="gelu_impl"))
register_family("MPT")(in_place("up_proj", "down_proj", beside="hidden_dropout"))
# ViT, CLIP, SigLIP, Phi.
register_family("ViT")(of_module("mlp", "fc1", "fc2", activation="activation_fn"))
# T5, mT5, UMT5, LongT5; Flan-T5 is of the gated family below.
register_family("T5")(of_module("DenseReluDense", "wi", "wo", dropout="dropout"))
register_family("gated T5")(
    of_module("DenseReluDense", "wi_1", "wo", gate="wi_0", dropout="dropout")
)
# BART, Whisper, Marian, M2M-100, Pegasus.
register_family("BART-like")(
    in_place(
        "fc1", "fc2", activation="activation_fn", dropout="activation_dropout", beside="self_attn"
    )
)
register_family("OPT")(in_place("fc1", "fc2", activation="activation_fn", beside="self_attn"))
# All layers of a group use one network.
register_family("ALBERT")(in_place("ffn", "ffn_output", activation="activation"))
register_family("DistilBERT")(
    of_module("ffn", "lin1", "lin2", activation="activation", output_dropout="dropout")
)
# XLM, Flaubert, SAM.
register_family("XLM")(in_place("lin1", "lin2"))
# wav2vec 2.0, HuBERT, WavLM, SpeechT5. Conformers have two networks per layer.
register_family("wav2vec 2.0")(
    in_place(
        "intermediate_dense", "output_dense", activation="intermediate_act_fn",
        dropout="intermediate_dropout",
    )
)  # fmt: skip
register_family("ProphetNet")(
    of_module(
        "feed_forward", "intermediate", "output", activation="activation_fn",
        dropout="activation_dropout", output_dropout="dropout",
    )
)  # fmt: skip


@register_family("BERT-like")
def _bert_like(layer: Any) -> FFN | None:
    """Find the networks of BERT, RoBERTa, MPNet and ELECTRA.

    A network is ``intermediate.dense``, an activation, and ``output.dense``. ``output`` also
    computes dropout, residual and norm, so only its ``dense`` is replaced.
    """
    inner: Any = getattr(layer, "intermediate", None)
    up, down = _matrix(inner, "dense"), _matrix(getattr(layer, "output", None), "dense")
    activation = getattr(inner, "intermediate_act_fn", None)
    if up is None or down is None or activation is None:
        return None
    # Some models have more there: RoBERTa-PreLayerNorm has a norm.
    if {name for name, _ in inner.named_children()} - {"dense", "intermediate_act_fn"}:
        return None

    place = Place(layer, "intermediate", ((layer.output, "dense"),))
    return FFN(up=up, down=down, gate=None, activation=activation, places=(place,))

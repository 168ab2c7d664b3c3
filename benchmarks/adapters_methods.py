"""Adapters that the benchmark compares, each with one size that its budget decides.

LoRA, DoRA and X-LoRA are PEFT's. X-LoRA (arXiv:2402.07148) weighs several LoRAs of one model by a
network that reads the last hidden states of a first pass without adapters. Here it trains these
LoRAs as well (``use_trainable_adapters``), since the other methods train everything that they add;
one weight per LoRA and token serves all layers, as by PEFT's default. Its files have no size here:
PEFT 0.21 takes the number of a layer for the name of an adapter, and writes matrices of the base
model into them.

Two controls show what routing adds. Frozen random routers send tokens to the same number of
experts, but do not learn where. LoRA itself has at least the total rank of all experts together,
and every token uses all of it.
"""

from __future__ import annotations

import copy
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from adapters_settings import Setting
from library import Unsupported
from torch import nn

from tnmoe import hf

REFERENCE = "LoRA"
_EXPERTS = 8

# Puts an adapter of a size beside a model, which it changes, and returns PEFT's model.
Attach = Callable[[Any, Setting, int], Any]


@dataclass(frozen=True)
class Method:
    """A kind of adapter.

    Attributes
    ----------
    attach : callable
    unit : {"rank", "bond", "group"}
        What its size is.
    experts : int
    saves : bool
        Whether PEFT saves the adapter's numbers, and no others.
    """

    attach: Attach
    unit: str = "rank"
    experts: int = 1
    saves: bool = True

    def sizes(self, rank: int, intermediate: int) -> Sequence[int]:
        """Return sizes that may fit the budget of LoRA of a rank, smallest first."""
        if self.unit == "group":
            return [size for size in range(2, intermediate + 1) if intermediate % size == 0]
        # With several sites, a tensor train has fewer numbers than LoRA of the same rank.
        return range(1, max(1, 4 * rank // self.experts) + 1)


def lora(model: Any, setting: Setting, rank: int, *, attention: bool = False, **more: Any) -> Any:
    """Add a low-rank product to every matrix, times 1: the learning rate has its say instead."""
    target = setting.linear if attention else setting.ffn
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=target, **more)
    return peft.get_peft_model(model, config)


def one_mpo(model: Any, setting: Setting, bond: int, *, sites: int) -> Any:
    """Add an MPO to every matrix."""
    return experts(model, setting, bond, num_experts=1, top_k=1, sites=sites, learn_routing=False)


def experts(
    model: Any, setting: Setting, size: int, *, learn_routing: bool = True, **more: Any
) -> Any:
    """Add routed experts to every network, by default with routers that learn."""
    if more.get("layout") == "hidden":
        more["group_size"] = size
    else:
        more["bond"] = size
    balance = {} if learn_routing else {"balance_weight": 0.0}
    config = hf.MPOEAdapterConfig(**{"num_experts": _EXPERTS, **more, **balance})
    adapted = peft.get_peft_model(model, config)
    if not learn_routing:
        for name, parameter in adapted.named_parameters():
            if ".router." in name:
                parameter.requires_grad_(False)
    return adapted


def x_lora(model: Any, setting: Setting, rank: int) -> Any:
    """Add LoRAs, each with numbers of its own, and the network that weighs them."""
    if not hasattr(model, "model"):
        raise Unsupported("PEFT 0.21 looks for LoRAs in a module named model, which is not there")
    with tempfile.TemporaryDirectory() as folder:
        adapters = {}
        for number in range(_EXPERTS):
            adapters[str(number)] = f"{folder}/{number}"
            lora(fresh(model, setting), setting, rank).save_pretrained(adapters[str(number)])
        model.config.use_cache = False  # PEFT demands it
        config = peft.XLoraConfig(
            hidden_size=model.config.hidden_size, adapters=adapters, use_trainable_adapters=True
        )
        return peft.get_peft_model(model, config)


def _routed(unit: str, **more: Any) -> Method:
    return Method(partial(experts, **more), unit, _EXPERTS)


METHODS: dict[str, Method] = {
    REFERENCE: Method(lora),
    "DoRA": Method(partial(lora, use_dora=True)),
    "LoRA, attention too": Method(partial(lora, attention=True)),
    "MPO of 2 sites": Method(partial(one_mpo, sites=2), "bond"),
    "MPO of 4 sites": Method(partial(one_mpo, sites=4), "bond"),
    **{
        f"{layout} top-{top_k}": _routed(unit, layout=layout, top_k=top_k)
        for layout, unit, most in (("residual", "bond", 4), ("hidden", "group", 2))
        for top_k in (1, 2, 4)
        if top_k <= most
    },
    **{
        f"residual top-{top_k}, random routing": _routed("bond", top_k=top_k, learn_routing=False)
        for top_k in (1, 2)
    },
    "X-LoRA": Method(x_lora, "rank", _EXPERTS, saves=False),
}


def attach(name: str, model: Any, setting: Setting, size: int, seed: int) -> Any:
    """Put an adapter beside a model; only the adapter and the setting's head are trained."""
    torch.manual_seed(seed)
    adapted = METHODS[name].attach(model, setting, size)
    for parameter in head_parameters(model, setting):
        parameter.requires_grad_(True)
    return adapted


def head_parameters(model: Any, setting: Setting) -> list[nn.Parameter]:
    """Return the parameters that train whatever the adapter is."""
    return [] if setting.head is None else list(getattr(model, setting.head).parameters())


def fresh(base: Any, setting: Setting) -> Any:
    """Copy a model; the copy has the same frozen numbers in memory, and a head of its own."""
    own = {id(each) for each in head_parameters(base, setting)}
    return copy.deepcopy(base, {id(p): p for p in base.parameters() if id(p) not in own})


def trained_parameters(adapted: Any) -> list[nn.Parameter]:
    """Return what training changes."""
    return [each for each in adapted.parameters() if each.requires_grad]


def count(name: str, base: Any, setting: Setting, size: int) -> int:
    """Return the trained parameters of an adapter, without the head."""
    model = fresh(base, setting)
    adapted = attach(name, model, setting, size, 0)
    head = sum(each.numel() for each in head_parameters(model, setting))
    return sum(each.numel() for each in trained_parameters(adapted)) - head


def matched(name: str, base: Any, setting: Setting, rank: int) -> dict[str, Any]:
    """Return the largest size within the budget of LoRA of a rank, or a note why there is none."""
    budget = count(REFERENCE, base, setting, rank)
    try:
        size = largest(name, base, setting, rank, budget)
    except Unsupported as error:
        return {"note": str(error)}
    trained = count(name, base, setting, size)
    return {"size": size, "trained": trained, "bytes": stored_bytes(name, base, setting, size)}


def largest(name: str, base: Any, setting: Setting, rank: int, budget: int) -> int:
    """Return the largest size of a method within a budget; raise Unsupported if none fits."""
    method, counts = METHODS[name], partial(count, name, base, setting)
    sizes = method.sizes(rank, base.config.intermediate_size)
    fitting = bisect_right(sizes, budget, key=counts)
    if not fitting:
        smallest = counts(sizes[0])
        raise Unsupported(f"{method.unit} {sizes[0]} has {smallest:,} parameters, over {budget:,}")
    return sizes[fitting - 1]


def stored_bytes(name: str, base: Any, setting: Setting, size: int) -> int | None:
    """Return the bytes of the files of tensors that an adapter is saved in."""
    if not METHODS[name].saves:
        return None
    adapted = attach(name, fresh(base, setting), setting, size, 0)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder, save_embedding_layers=False)
        return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))

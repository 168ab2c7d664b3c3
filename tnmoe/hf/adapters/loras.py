"""LoRA adapters as the experts of one adapter, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from tnmoe.errors import InputError, check_positive_int
from tnmoe.hf.adapters.config import MPOEAdapterConfig
from tnmoe.hf.adapters.experts import own_parts
from tnmoe.hf.adapters.layer import RoutedNetwork, routed_networks
from tnmoe.hf.ffn import linear_modules
from tnmoe.hf.find import all_ffns
from tnmoe.nn.linear import size_of_linear, weight_of_linear
from tnmoe.nn.mpo_projection import MPOProjection

_PREFIX = "base_model.model."
# Rank of a LoRA in place of a core that mixes hidden units.
_RANK = 16
# Entries of a LoRA's configuration that experts cannot follow, and the values that they allow.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False,), "bias": ("none",), "modules_to_save": (None, []), "lora_bias": (False,),
    "layer_replication": (None,), "target_parameters": (None, []),
    "trainable_token_indices": (None,), "alora_invocation_tokens": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class _Product:
    """A LoRA of one matrix, B·A with its scale.

    Attributes
    ----------
    left : Tensor, shape (out, r)
    right : Tensor, shape (r, in)
    """

    left: Tensor
    right: Tensor


def from_loras(
    model: nn.Module,
    folders: Sequence[str | Path],
    *,
    top_k: int | None = None,
    adapter_name: str = "default",
    **settings: Any,
) -> PeftModel:
    """Make LoRA adapters that were trained apart the experts of one adapter.

    A token of a network then gets a weighted sum of what ``top_k`` of the adapters make of the
    network, chosen by a router. The routers are new and random: train them.

    Parameters
    ----------
    model : PreTrainedModel
        The model that the adapters were trained for. It is changed as by
        ``peft.get_peft_model``.
    folders : sequence of path
        Folders that PEFT saved. The ranks may differ. Matrices that an adapter leaves alone stay
        the model's own in its expert.
    top_k : int, optional
        Experts per token; by default 2, or 1 of a single adapter.
    adapter_name : str
        Name of the new adapter.
    **settings
        Further settings of :class:`MPOEAdapterConfig`, such as ``router`` and ``balance_weight``.

    Returns
    -------
    PeftModel

    Raises
    ------
    InputError
        If a folder holds no LoRA, or one with a setting that experts lack (DoRA, trained biases or
        modules), or adapts a module outside the feed-forward networks. The model is then unchanged.

    Examples
    --------
    >>> import tempfile, transformers
    >>> from tnmoe import hf
    >>> from peft import LoraConfig, get_peft_model
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4,
    ... )
    >>> folders = [tempfile.mkdtemp(), tempfile.mkdtemp()]
    >>> for rank, folder in zip((2, 4), folders):
    ...     lora = LoraConfig(r=rank, target_modules=["up_proj", "down_proj"])
    ...     get_peft_model(transformers.LlamaForCausalLM(config), lora).save_pretrained(folder)
    >>> mixture = hf.from_loras(transformers.LlamaForCausalLM(config), folders)
    >>> mixture.peft_config["default"].num_experts, mixture.peft_config["default"].bond
    (2, 4)
    """
    if not folders:
        raise InputError("from_loras needs at least one folder, got none")
    places = _places(model)
    experts = [_read(Path(folder), places) for folder in folders]
    touched = {places[path][0] for products in experts for path in products}
    config = MPOEAdapterConfig(
        num_experts=len(experts),
        top_k=min(2, len(experts)) if top_k is None else top_k,
        layout="residual",
        bond=max(product.left.shape[1] for products in experts for product in products.values()),
        layers=sorted(touched),
        **settings,
    )
    adapted = peft.get_peft_model(model, config, adapter_name=adapter_name)
    for network, paths in _paths_of_matrices(adapted):
        mixture: Any = network.mpoe_mixtures[adapter_name]
        for name, delta in own_parts(mixture.experts).items():
            _fill(delta, [products.get(paths[name]) for products in experts])
    return adapted


def _places(model: nn.Module) -> dict[str, tuple[int, tuple[int, int]]]:
    """Return the number of its network and its size for every linear module, by path."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = all_ffns(model)
    if not found:
        raise InputError(f"{type(model).__name__} has no feed-forward network of a known family")
    return {
        paths[id(module)]: (number, size_of_linear(module))
        for number, ffn in enumerate(found)
        for module in linear_modules(ffn).values()
    }


def _read(folder: Path, places: Mapping[str, tuple[int, tuple[int, int]]]) -> dict[str, _Product]:
    """Read a LoRA's products by the paths of their modules."""
    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder} holds no adapter: there is no adapter_config.json")
    config: Any = PeftConfig.from_pretrained(str(folder))
    if config.peft_type != "LORA":
        raise InputError(f"{folder} holds a {config.peft_type.value} adapter, expected LORA")
    for entry, allowed in _PLAIN.items():
        value = getattr(config, entry, allowed[0])
        if value not in allowed:
            raise InputError(f"{folder}: experts cannot take over {entry}={value!r} of a LoRA")
    tensors = load_peft_weights(str(folder), device="cpu")
    products = {}
    for key in tensors:
        path, found, _ = key.removeprefix(_PREFIX).partition(".lora_A.")
        if found and path in places:
            products[path] = _product(folder, path, tensors, config, places[path][1])
    known = {f"{_PREFIX}{path}.lora_{side}.weight" for path in products for side in "AB"}
    if others := sorted(set(tensors) - known):
        raise InputError(
            f"{folder} adapts modules outside the model's feed-forward networks, {others[0]} for "
            "one: merge that adapter into the model, or keep it as a LoRA beside the experts"
        )
    if not products:
        raise InputError(f"{folder} holds no tensors of a LoRA")
    return products


def _product(
    folder: Path, path: str, tensors: Mapping[str, Tensor], config: Any, size: tuple[int, int]
) -> _Product:
    right, left = (tensors[f"{_PREFIX}{path}.lora_{side}.weight"] for side in "AB")
    if (left.shape[0], right.shape[1]) != size:
        raise InputError(
            f"{folder}: the LoRA of {path} is for a {left.shape[0]}×{right.shape[1]} matrix, and "
            f"the model's is {size[0]}×{size[1]}"
        )
    rank = right.shape[0]
    alpha = _of_pattern(config.alpha_pattern, path, config.lora_alpha)
    scale = alpha / (rank**0.5 if config.use_rslora else rank)
    return _Product(left * scale, right)


def _of_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    key = peft.utils.other.get_pattern_key(list(patterns), path)
    return patterns.get(key, default)


@torch.no_grad()
def _fill(delta: MPOProjection, products: Sequence[_Product | None]) -> None:
    """Write every expert's product into cores (E, 1, out, 1, r) and (E, r, 1, in, 1)."""
    left, right = delta.core_at(0), delta.core_at(1)
    left.zero_()
    for expert, product in enumerate(products):
        if product is not None:
            rank = product.left.shape[1]
            left[expert, 0, :, 0, :rank] = product.left.to(left)
            right[expert, :rank, 0, :, 0] = product.right.to(right)


def _paths_of_matrices(model: nn.Module) -> Iterable[tuple[RoutedNetwork, dict[str, str]]]:
    """Iterate over adapted networks, with the paths that their matrices have without adapters."""
    paths = {id(module): path for path, module in model.named_modules()}
    for _, network in routed_networks(model):
        yield (
            network,
            {
                name: _without_adapters(paths[id(module)])
                for name, module in network.matrices().items()
            },
        )


def _without_adapters(path: str) -> str:
    parts = path.removeprefix(_PREFIX).split(".")
    return ".".join(part for part in parts if part != "base_layer")


def to_loras(
    model: PeftModel,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    rank: int | None = None,
) -> dict[str, float]:
    """Write every expert of an adapter as an ordinary LoRA adapter.

    Routers are not written: a LoRA acts on all tokens. In the layout ``residual`` with two sites
    the bond is the rank and the LoRAs are exact. Otherwise a truncated singular value decomposition
    makes them.

    Parameters
    ----------
    model : PeftModel
    folder : path
        Gets a folder ``expert-0``, ``expert-1``, … of every expert. It must not exist, or be empty.
    adapter_name : str
    rank : int, optional
        Rank of the LoRAs; by default the bond, or 16 where experts own cores of ``hidden``. A rank
        beyond a matrix's sides is cut to them.

    Returns
    -------
    dict from str to float
        For every folder, the error of the products relative to what the expert adds to the model's
        matrices, in the Frobenius norm over all matrices.

    Raises
    ------
    InputError
        If there is no such adapter of routed experts, the folder has files, or the rank is not
        positive.

    Examples
    --------
    >>> import tempfile, transformers
    >>> from tnmoe import hf
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4,
    ... )
    >>> model = transformers.LlamaForCausalLM(config)
    >>> model = peft.get_peft_model(model, hf.MPOEAdapterConfig(num_experts=2, bond=4))
    >>> hf.to_loras(model, tempfile.mkdtemp())
    {'expert-0': 0.0, 'expert-1': 0.0}
    """
    folder = Path(folder)
    config: Any = model.peft_config.get(adapter_name)
    if not isinstance(config, MPOEAdapterConfig):
        raise InputError(
            f"the model has no adapter of routed experts named {adapter_name!r}: it has "
            f"{', '.join(model.peft_config)}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is no empty folder")
    rank = None if rank is None else check_positive_int("rank", rank)
    networks = list(_paths_of_matrices(model))
    errors = {}
    for expert in range(config.num_experts):
        products: dict[str, _Product] = {}
        squares = torch.zeros(2, dtype=torch.float64)
        for network, paths in networks:
            if adapter_name not in network.mpoe_mixtures:
                continue
            mixture: Any = network.mpoe_mixtures[adapter_name]
            for name, projection in mixture.experts.projections().items():
                product, missed = _lora_of(projection, expert, rank)
                products[paths[name]] = product
                squares += missed
        name = f"expert-{expert}"
        _write(folder / name, products, config)
        errors[name] = float((squares[0] / squares[1].clamp_min(1e-300)).sqrt())
    return errors


@torch.no_grad()
def _lora_of(projection: Any, expert: int, rank: int | None) -> tuple[_Product, Tensor]:
    """Return the best product of a rank, and the squares of what it misses and of the whole."""
    delta = getattr(projection, "delta", None)
    if delta is not None and delta.shape.sites == 2 and rank in (None, *delta.bond_dims):
        left, right = delta.core_at(0)[expert, 0, :, 0], delta.core_at(1)[expert, :, 0, :, 0]
        whole = (left.double() @ right.double()).square().sum()
        return _Product(left, right), torch.stack([torch.zeros_like(whole), whole]).cpu()
    if delta is not None:
        matrix = delta.weight()[expert].double()
        default = max(delta.bond_dims)
    else:
        matrix = (projection.weight()[expert] - weight_of_linear(projection.base)).double()
        default = _RANK
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(rank or default, len(s))
    root = s[:kept].sqrt()
    squares = torch.stack([s[kept:].square().sum(), s.square().sum()]).cpu()
    return _Product(u[:, :kept] * root, root[:, None] * v[:kept]), squares


def _write(folder: Path, products: Mapping[str, _Product], config: MPOEAdapterConfig) -> None:
    ranks = {path: product.left.shape[1] for path, product in products.items()}
    common = max(ranks.values())
    lora = LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=sorted(products),
        rank_pattern={path: rank for path, rank in ranks.items() if rank != common},
        alpha_pattern={path: rank for path, rank in ranks.items() if rank != common},
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    lora.save_pretrained(str(folder))
    tensors = {}
    for path, product in products.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = product.right.float().contiguous().cpu()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = product.left.float().contiguous().cpu()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

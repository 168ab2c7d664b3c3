"""LoRA adapters as the experts of one adapter, and back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tnmoe.errors import InputError, check_positive_int, short_repr
from tnmoe.hf.adapters.config import MPOEAdapterConfig
from tnmoe.hf.adapters.experts import own_parts
from tnmoe.hf.adapters.layer import RoutedNetwork, routed_networks
from tnmoe.hf.ffn import linear_modules
from tnmoe.hf.find import all_ffns
from tnmoe.hf.guards import guard_transformers
from tnmoe.nn.linear import size_of_linear, weight_of_linear
from tnmoe.nn.mpo_projection import MPOProjection
from tnmoe.system.files import read_json

_PREFIX = "base_model.model."
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Rank of a LoRA in place of a core that mixes hidden units.
_RANK = 16
# Entries of a LoRA's configuration that experts cannot follow, and the values that they allow.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False,), "bias": ("none",), "modules_to_save": (None, []), "lora_bias": (False,),
    "layer_replication": (None,), "target_parameters": (None, []),
    "trainable_token_indices": (None,), "alora_invocation_tokens": (None,),
    "use_qalora": (False,), "use_bdlora": (None,), "monteclora_config": (None,),
    "kasa_config": (None,), "arrow_config": (None,),
    # Others begin with changed matrices of the model, beside which their products are meant.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}  # fmt: skip
# Settings that follow from the LoRAs.
_GIVEN = ("num_experts", "layout", "bond", "sites", "group_size", "layers", "every", "base")


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
        If a folder holds no LoRA in a safetensors file, or one with a setting that experts lack
        (DoRA, PiSSA, trained biases or modules), or adapts a module outside the feed-forward
        networks, or has NaN or infinity in it; or if a setting follows from the LoRAs. The model is
        then unchanged.

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
    if isinstance(folders, str | Path) or not folders:
        raise InputError(f"folders must be a sequence of one folder at least, got {folders!r}")
    if fixed := sorted(set(settings) & set(_GIVEN)):
        raise InputError(f"{', '.join(fixed)} of the adapter follow from the LoRAs: leave them out")
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
    for name in (_CONFIG, _TENSORS):
        # PEFT looks elsewhere, on the Hub too, for what is not there, and reads pickled files.
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no adapter of PEFT: there is no {name}")
    kind = read_json(folder / _CONFIG).get("peft_type")
    if kind != "LORA":
        raise InputError(f"{folder} holds an adapter of type {short_repr(kind)}, expected 'LORA'")
    with guard_transformers(f"{_CONFIG} of {folder} does not suit a LoRA"):
        config: Any = PeftConfig.from_pretrained(str(folder))
    for entry, allowed in _PLAIN.items():
        value = getattr(config, entry, allowed[0])
        if value not in allowed:
            raise InputError(f"{folder}: experts cannot take over {entry}={value!r} of a LoRA")
    try:
        tensors = load_file(folder / _TENSORS)
    except SafetensorError as error:
        raise InputError(
            f"{folder / _TENSORS} is damaged or not a safetensors file: {error}"
        ) from error
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
    if not all(bool(torch.isfinite(each).all()) for each in (left, right)):
        raise InputError(f"{folder}: the LoRA of {path} contains NaN or infinity")
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
        If there is no such adapter of routed experts, its numbers contain NaN or infinity, the
        folder has files, or the rank is not positive. Nothing is written then.

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
    configs = getattr(model, "peft_config", {})
    config: Any = configs.get(adapter_name)
    if not isinstance(config, MPOEAdapterConfig):
        raise InputError(
            f"{type(model).__name__} has no adapter of routed experts named {adapter_name!r}: it "
            f"has {', '.join(configs) or 'no adapters'}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is no empty folder")
    rank = None if rank is None else check_positive_int("rank", rank)
    networks: list[tuple[Any, dict[str, str]]] = [
        (network.mpoe_mixtures[adapter_name], paths)
        for network, paths in _paths_of_matrices(model)
        if adapter_name in network.mpoe_mixtures
    ]
    _check_finite(networks)
    # The folder appears when it is whole.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as partial:
        new, errors = Path(partial) / "new", {}
        for expert in range(max(mixture.experts.num_experts for mixture, _ in networks)):
            products, errors[f"expert-{expert}"] = _products_of(networks, expert, rank)
            _write(new / f"expert-{expert}", products, config)
        new.replace(folder)
    return errors


def _check_finite(networks: Sequence[tuple[Any, dict[str, str]]]) -> None:
    for mixture, paths in networks:
        for name, own in own_parts(mixture.experts).items():
            if not all(bool(torch.isfinite(each).all()) for each in own.parameters()):
                raise InputError(f"the experts' cores of {paths[name]} contain NaN or infinity")


def _products_of(
    networks: Sequence[tuple[Any, dict[str, str]]], expert: int, rank: int | None
) -> tuple[dict[str, _Product], float]:
    """Return an expert's products by the paths of their matrices, and their relative error."""
    products: dict[str, _Product] = {}
    squares = torch.zeros(2, dtype=torch.float64)
    for mixture, paths in networks:
        for name, projection in mixture.experts.projections().items():
            products[paths[name]], missed = _lora_of(projection, expert, rank)
            squares += missed
    return products, float((squares[0] / squares[1].clamp_min(1e-300)).sqrt())


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

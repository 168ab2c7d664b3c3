"""How PEFT puts adapters of routed experts into a model, and takes them out."""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedConfig

from tnmoe.errors import InputError
from tnmoe.hf.adapters.experts import settings_of
from tnmoe.hf.adapters.layer import PREFIX, Bypass, RoutedNetwork, mixtures_of, routed_networks
from tnmoe.hf.ffn import FFN, check_formula, linear_modules
from tnmoe.hf.find import all_ffns, choose_ffns, mixtures_in
from tnmoe.hf.router_losses import attach_router_losses, detach_router_losses
from tnmoe.nn.linear import has_matrix, size_of_linear

# Entries of a configuration that do not change what a model computes, up to rounding.
_UNRELATED = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version",
    "quantization_config", "use_cache", "output_router_logits", "return_dict",
    "output_hidden_states", "output_attentions", "_attn_implementation",
}  # fmt: skip


class MPOEAdapterModel(BaseTuner):
    """A model with adapters of routed experts; ``peft.get_peft_model`` makes it."""

    prefix = PREFIX
    tuner_layer_cls = RoutedNetwork
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as in the base class

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config  # _prepare_model finds the networks

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Find the networks that get experts; refuse a model that the adapter is not for."""
        networks = _networks_of(model)
        if not networks and (mixtures := mixtures_in(model)):
            raise InputError(
                f"{next(iter(mixtures))} is a mixture already, and adapters stand beside dense "
                "networks: train what its experts own with tnmoe.nn.train_auxiliary"
            )
        ffns = choose_ffns(networks, model, peft_config.layers, peft_config.every)
        paths = {id(module): path for path, module in model.named_modules()}
        self._chosen: dict[str, FFN] = {}
        for ffn in ffns:
            # All of them are checked before the first one changes.
            _check_network(ffn, peft_config)
            owner = paths[id(ffn.places[0].owner)]
            self._chosen[f"{owner}.{ffn.places[0].name}".removeprefix(".")] = ffn
        found = _sizes_of(self._chosen)
        if peft_config.is_loaded:
            _check_base(peft_config, found, model)
        peft_config.note_base(found, config_digest(model))

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in peft_config.base

    def _create_and_replace(  # noqa: PLR0917 - as PEFT calls it
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        ffn = self._chosen[current_key]
        if not isinstance(target, RoutedNetwork):
            target = RoutedNetwork.install(ffn)
        target.add(adapter_name, peft_config)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: Any, child: nn.Module
    ) -> None:
        if isinstance(child, Bypass):
            child.put_back()
        if not isinstance(new_module, nn.Module):  # an activation may be a function
            delattr(parent, child_name)
        setattr(parent, child_name, new_module)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self._attach_losses()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one, and with it the weights of its routers' losses."""
        super().set_adapter(adapter_name, inference_mode)
        self._attach_losses()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter."""
        super().delete_adapter(adapter_name)
        self._attach_losses()

    def _attach_losses(self) -> None:
        configs: list[Any] = [self.peft_config[name] for name in self.active_adapters]
        model: Any = self.model
        if configs:
            attach_router_losses(model, configs[0])
        else:
            detach_router_losses(model)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Add the one expert of an adapter to the model's matrices, in all networks or in none."""
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_mergeable(adapter_names, safe_merge)
        model: Any = super()._unload_and_optionally_merge(
            merge, progressbar, safe_merge, adapter_names
        )
        detach_router_losses(model)
        return model

    def _check_mergeable(self, adapter_names: list[str] | None, safe: bool) -> None:
        for _, network in routed_networks(self.model):
            network.check_mergeable(adapter_names, safe)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Any],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Any]:
        # Experts may have been added or removed. PEFT stores the configuration afterwards.
        config.num_experts = _num_experts(model, adapter_name) or config.num_experts
        return super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # A new router has no buffer for the numbers of its open experts yet.
        return {_with_name(key, adapter_name): value for key, value in found.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT expects the name next to a tensor's own. Here a whole mixture follows.
        before, found, after = key.partition(f".{PREFIX}mixtures.{adapter_name}.")
        if not found:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        return f"{before}.{PREFIX}mixtures.{after}"


def _check_network(ffn: FFN, config: Any) -> None:
    """Raise an InputError unless a network can get the experts of a configuration."""
    if len(ffn.places) > 1:
        raise InputError(
            f"{ffn.name} is used in {len(ffn.places)} places of the model, and an adapter needs "
            "networks with one place: leave it out with layers="
        )
    matrices = linear_modules(ffn)
    settings_of(matrices, config)
    if not all(map(has_matrix, matrices.values())):
        return
    for name, matrix in matrices.items():
        if not bool(torch.isfinite(matrix.weight).all()):
            raise InputError(f"{ffn.name}: the {name} matrix contains NaN or infinity")
    check_formula(ffn)


def _with_name(key: str, adapter_name: str) -> str:
    """Return the key of a model's tensor, given that of an adapter's file."""
    before, found, after = key.partition(f".{PREFIX}mixtures.")
    if not found or after.startswith(f"{adapter_name}."):
        return key
    return f"{before}{found}{adapter_name}.{after}"


def _num_experts(model: nn.Module, adapter_name: str) -> int | None:
    """Return the number of experts of an adapter, which is the same in all networks."""
    mixtures = mixtures_of(model, adapter_name)
    counts = {path: mixture.experts.num_experts for path, mixture in mixtures.items()}
    if len(set(counts.values())) > 1:
        described = ", ".join(f"{count} in {path}" for path, count in counts.items())
        raise InputError(
            f"adapter {adapter_name!r} has different numbers of experts, which its configuration "
            f"cannot describe: {described}"
        )
    return next(iter(counts.values()), None)


def _networks_of(model: nn.Module) -> list[FFN]:
    """Return all networks of a model in order, with and without adapters."""
    found = [*all_ffns(model), *(each.ffn for _, each in routed_networks(model))]
    order = {path: number for number, (path, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda ffn: order[ffn.name])


def _sizes_of(chosen: dict[str, FFN]) -> dict[str, dict[str, list[int]]]:
    return {
        path: {name: list(size_of_linear(module)) for name, module in linear_modules(ffn).items()}
        for path, ffn in chosen.items()
    }


def _check_base(config: Any, found: dict[str, dict[str, list[int]]], model: nn.Module) -> None:
    """Refuse a model with other networks than those that an adapter was made for."""
    made_for = {path: dict(sizes) for path, sizes in config.base.items()}
    kind = type(model).__name__
    for path in [*made_for, *found]:
        own, other = found.get(path), made_for.get(path)
        if own != other:
            raise InputError(
                f"the adapter is not for this {kind}: it was made for {path} with matrices "
                f"{other or 'none'}, and the model has {own or 'none'} there"
            )
    if config.base_config not in (None, config_digest(model)):
        warnings.warn(
            f"the adapter was made for a model with another configuration than this {kind}; its "
            "networks have the same names and sizes",
            stacklevel=2,
        )


def config_digest(model: nn.Module) -> str | None:
    """Return a hash of what a model's configuration says of its function."""
    config: Any = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return None
    entries = {key: each for key, each in config.to_dict().items() if key not in _UNRELATED}
    text = json.dumps(entries, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""Classes of ordinary mixtures in transformers that converted models can become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tnmoe.errors import InputError
from tnmoe.hf.config import MPOEConfig
from tnmoe.hf.guards import guard_transformers
from tnmoe.nn.moe import MPOMoE
from tnmoe.nn.routing.top_k import TopKRouter

# Entries that identify a configuration: they are not copied to another one.
_IDENTITY = ("architectures", "model_type", "transformers_version")

# Entries that classes read, but whose configurations do not list.
_UNLISTED = ("decoder_start_token_id", "head_dim")

# A router multiplied by this gives its best expert the probability 1: in float32, differences of
# logits become large or stay 0, and no logit overflows.
_SHARPNESS = 2.0**64

# Capacity of Switch's experts: more tokens than a sequence has.
_UNLIMITED_CAPACITY = 2**31 - 1

# Intermediate size of Qwen2-MoE's shared expert, whose matrices are zero. Engines split it over
# devices, and some of them do not accept a size of 0.
_ZERO_EXPERT_SIZE = 64


@dataclass(frozen=True)
class Target:
    """A class of ordinary mixtures, and what makes a converted model one.

    Attributes
    ----------
    name : str
        Name of the class in transformers.
    stacks : tuple of str
        Paths of the model's lists of layers.
    settings : callable
        Returns the entries of the new configuration that only this target has. Takes the model's
        configuration and, for every stack, the set of its layers that have experts. Raises an
        InputError for what the class cannot express.
    weights : callable
        Returns the tensors of a layer's counterpart, by name.
    renamed : (str, str)
        A part of paths in the model, and what replaces it in the class.
    max_top_k : int or inf
        Most experts per token.
    unnormalized, router_bias, gated : bool
        Whether the class supports weights that do not sum to 1, biases of routers, and gates.
    """

    name: str
    stacks: tuple[str, ...]
    settings: Callable[..., dict[str, Any]]
    weights: Callable[[MPOMoE], dict[str, Tensor]]
    renamed: tuple[str, str] = ("", "")
    max_top_k: float = inf
    unnormalized: bool = True
    router_bias: bool = False
    gated: bool = True

    @property
    def model_class(self) -> Any:
        """The class itself, imported when it is needed."""
        return getattr(transformers, self.name)

    def rename(self, path: str) -> str:
        """Return the name in the class of what has this path or name in the model."""
        return path.replace(*self.renamed)

    def check(self, layer: MPOMoE) -> None:
        """Raise an InputError if a layer computes, in evaluation, what the class cannot express."""
        router, experts = layer.router, layer.experts
        if type(router) is not TopKRouter:
            raise InputError(f"{self.name} has top-k routers, the model has {router}")
        # The weight of a single expert is then 1, whatever its score.
        weight_is_one = router.normalize and router.top_k == 1
        unsupported = {
            f"top_k={router.top_k}": router.top_k > self.max_top_k,
            "normalize=False": not (router.normalize or self.unnormalized),
            "score_function='sigmoid'": router.score_function == "sigmoid" and not weight_is_one,
            "bias=True": router.bias is not None and not self.router_bias,
            "load_bias=True": router.load_bias is not None,
            "closed experts": router.open_experts is not None,
            f"num_groups={router.num_groups}": router.top_groups < router.num_groups,
            f"second_expert={router.second_expert!r}": (
                router.second_expert in ("none", "threshold")
            ),
            f"eval_capacity_factor={router.eval_capacity_factor}": (
                router.eval_capacity_factor is not None
            ),
            "biases of experts": bool(experts.biases()),
            "gates": experts.is_gated and not self.gated,
            "a shared expert": layer.shared_expert is not None,
        }
        if found := [feature for feature, present in unsupported.items() if present]:
            raise InputError(f"{self.name} cannot express {', '.join(found)}")

    def config(
        self, model: PreTrainedModel, mixtures: Mapping[str, MPOMoE], config: MPOEConfig
    ) -> Any:
        """Return the configuration of the model that computes the same."""
        config_class = self.model_class.config_class
        defaults, source = config_class(), model.config.to_dict()
        # All routers of a model are made from one configuration.
        router: Any = next(iter(mixtures.values())).router
        common = {
            "num_experts": config.num_experts,
            "num_experts_per_tok": router.top_k,
            "norm_topk_prob": router.normalize,
            "router_bias": router.bias is not None,
            "router_jitter_noise": router.jitter_noise,
            "router_aux_loss_coef": config.balance_weight,
            "router_z_loss_coef": config.z_weight,
        }
        copied = {
            name: value
            for name, value in {**source, **common}.items()
            if name not in _IDENTITY and (name in _UNLISTED or hasattr(defaults, name))
        }
        with guard_transformers(f"{self.name} cannot express the model's settings"):
            own = self.settings(model.config, *self._sparse_layers(model, mixtures))
            return config_class(**copied | own)

    def _sparse_layers(
        self, model: PreTrainedModel, mixtures: Mapping[str, MPOMoE]
    ) -> list[set[int]]:
        """Return, for every stack, the numbers of its layers that have experts."""
        # Paths of all modules around a mixture.
        around = {path[:end] for path in mixtures for end, char in enumerate(path) if char == "."}
        return [
            {
                layer
                for layer in range(len(model.get_submodule(stack)))  # type: ignore[arg-type]
                if f"{stack}.{layer}" in around
            }
            for stack in self.stacks
        ]


def target_of(model: PreTrainedModel) -> Target:
    """Return the class that a converted model becomes.

    Raises
    ------
    InputError
        If tnmoe knows no such class.
    """
    name = type(model).__name__
    if name not in _TARGETS:
        raise InputError(
            f"transformers has no ordinary mixture like {name} that tnmoe knows, only like "
            f"{', '.join(_TARGETS)}"
        )
    return _TARGETS[name]


def _matrices(layer: MPOMoE) -> dict[str, Tensor]:
    """Return all experts' matrices, (E, out, in), by name.

    ``down`` includes the scale of the router's weights, which these classes lack.
    """
    experts, router = layer.experts, layer.router
    assert isinstance(router, TopKRouter)
    matrices = experts.matrices()
    return {**matrices, "down": matrices["down"] * router.scale}


def _mixtral_weights(layer: MPOMoE) -> dict[str, Tensor]:
    """Return the tensors of a block of Mixtral or Qwen3-MoE."""
    matrices = _matrices(layer)
    return {
        "gate.weight": layer.router.weight,
        "experts.gate_up_proj": torch.cat([matrices["gate"], matrices["up"]], dim=1),
        "experts.down_proj": matrices["down"],
    }


def _qwen2_weights(layer: MPOMoE) -> dict[str, Tensor]:
    zeros = layer.router.weight.new_zeros(_ZERO_EXPERT_SIZE, layer.router.hidden_size)
    return _mixtral_weights(layer) | {
        "shared_expert.gate_proj.weight": zeros,
        "shared_expert.up_proj.weight": zeros,
        "shared_expert.down_proj.weight": zeros.T,
        "shared_expert_gate.weight": zeros[:1],
    }


def _switch_weights(layer: MPOMoE) -> dict[str, Tensor]:
    router, matrices = layer.router, _matrices(layer)
    sharpness = _SHARPNESS if router.normalize else 1.0
    weights = {"router.classifier.weight": router.weight * sharpness}
    if router.bias is not None:
        weights["router.classifier.bias"] = router.bias * sharpness
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise InputError(f"Switch cannot express normalize=True in {router.weight.dtype}")
    for expert, (up, down) in enumerate(zip(matrices["up"], matrices["down"], strict=True)):
        weights |= {f"experts.expert_{expert}.wi.weight": up}
        weights |= {f"experts.expert_{expert}.wo.weight": down}
    return weights


def _mixtral_settings(config: Any, sparse: set[int]) -> dict[str, Any]:
    total = config.num_hidden_layers
    if len(sparse) < total:
        raise InputError(f"Mixtral has experts in all {total} layers, the model in {len(sparse)}")
    return {}


def _qwen2_settings(config: Any, sparse: set[int]) -> dict[str, Any]:
    return {
        "mlp_only_layers": sorted(set(range(config.num_hidden_layers)) - sparse),
        "moe_intermediate_size": config.intermediate_size,
        "shared_expert_intermediate_size": _ZERO_EXPERT_SIZE,
    }


def _qwen3_settings(config: Any, sparse: set[int]) -> dict[str, Any]:
    kinds = set(config.layer_types)
    if len(kinds) > 1:
        raise InputError(
            "Qwen3-MoE has sliding windows in all layers or in none, the model in "
            f"{config.layer_types.count('sliding_attention')} of {len(config.layer_types)}"
        )
    return {
        "mlp_only_layers": sorted(set(range(config.num_hidden_layers)) - sparse),
        "moe_intermediate_size": config.intermediate_size,
        "use_sliding_window": kinds == {"sliding_attention"},
    }


def _switch_settings(config: Any, encoder: set[int], decoder: set[int]) -> dict[str, Any]:
    return {
        "expert_capacity": _UNLIMITED_CAPACITY,
        # In Switch this one entry stands for both tying and scaling.
        "tie_word_embeddings": config.scale_decoder_outputs,
        **_switch_steps("encoder", encoder, config.num_layers),
        **_switch_steps("decoder", decoder, config.num_decoder_layers),
    }


def _switch_steps(stack: str, sparse: set[int], total: int) -> dict[str, Any]:
    """Return the entries that say which layers of a stack have experts.

    The step is the distance between such layers: 1 if all layers have experts, 0 if no layer has.
    """
    # A single layer with experts counts as followed by one just beyond the stack.
    first, second = (*sorted(sparse), total)[:2] if sparse else (0, 0)
    step = max(2, second - first)
    for distance, layers in ((0, ()), (1, range(total)), (step, range(1, total, step))):
        if sparse == set(layers):
            return {f"num_sparse_{stack}_layers": len(sparse), f"{stack}_sparse_step": distance}
    raise InputError(
        "Switch has experts in no layer of a stack, in all, or in layers 1, 1 + n, 1 + 2 n, …, "
        f"the model's {stack} in {', '.join(map(str, sorted(sparse)))} of {total}"
    )


_MIXTRAL = Target(
    "MixtralForCausalLM",
    ("model.layers",),
    _mixtral_settings,
    _mixtral_weights,
    unnormalized=False,
)

# Targets by the class of the converted model.
_TARGETS: Mapping[str, Target] = {
    "LlamaForCausalLM": _MIXTRAL,
    "MistralForCausalLM": _MIXTRAL,
    "Qwen2ForCausalLM": Target(
        "Qwen2MoeForCausalLM", ("model.layers",), _qwen2_settings, _qwen2_weights
    ),
    "Qwen3ForCausalLM": Target(
        "Qwen3MoeForCausalLM", ("model.layers",), _qwen3_settings, _mixtral_weights
    ),
    "T5ForConditionalGeneration": Target(
        "SwitchTransformersForConditionalGeneration",
        ("encoder.block", "decoder.block"),
        _switch_settings,
        _switch_weights,
        renamed=("DenseReluDense", "mlp"),
        max_top_k=1,
        router_bias=True,
        gated=False,
    ),
}

"""Small random models with ordinary mixtures, one per family, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from tnmoe import hf

_TOKENS = 64
_SMALL: dict[str, Any] = {
    "vocab_size": _TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK = _SMALL | {
    "num_key_value_heads": 4, "intermediate_size": 48, "moe_intermediate_size": 24,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_shared_experts": 1,
}  # fmt: skip
_FINE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


def _own() -> tf.PreTrainedModel:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**_SMALL, intermediate_size=48))
    config = hf.MPOEConfig(num_experts=4, num_experts_per_tok=2, layout="dense", expert_noise=0.5)
    return hf.upcycle(model, config)


# Name: makes the model.
MIXTURES = {
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(
            **_SMALL, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2
        )
    ),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(
            **_SMALL, **_FINE, intermediate_size=48, shared_expert_intermediate_size=40,
            decoder_sparse_step=2,
        )
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**_SMALL, **_FINE, intermediate_size=48, head_dim=8)
    ),
    "olmoe": lambda: tf.OlmoeForCausalLM(
        tf.OlmoeConfig(**_SMALL, intermediate_size=24, num_experts=4, num_experts_per_tok=2)
    ),
    "granitemoe": lambda: tf.GraniteMoeForCausalLM(
        tf.GraniteMoeConfig(
            **_SMALL, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2,
            logits_scaling=2.0,
        )
    ),
    "deepseek_v2": lambda: tf.DeepseekV2ForCausalLM(
        tf.DeepseekV2Config(**_DEEPSEEK, q_lora_rank=None, topk_method="group_limited_greedy")
    ),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(**_DEEPSEEK, q_lora_rank=16)
    ),
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(
            **_SMALL, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, head_dim=8
        )
    ),
    "switch": lambda: tf.SwitchTransformersForConditionalGeneration(
        tf.SwitchTransformersConfig(
            vocab_size=_TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2,
            num_heads=4, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
            expert_capacity=4, pad_token_id=0, decoder_start_token_id=0, eos_token_id=2,
        )
    ),
    "own": _own,
}  # fmt: skip


@torch.no_grad()
def make(name: str, seed: int = 0) -> Any:
    """Make the model of a family whose numbers, buffers included, are all drawn at random."""
    torch.manual_seed(seed)
    model = MIXTURES[name]().eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    for path, buffer in model.named_buffers():
        if path.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    return model


@torch.no_grad()
def give_common_bases(model: Any, size: int) -> None:
    """Change the experts such that they need a basis of this size, and no larger one.

    Ups and gates have one in common.
    """
    for experts in hf.ordinary.find_ordinary(model):
        matrices = experts.matrices
        made, basis = {}, torch.randn(size, matrices["up"].shape[2])
        for name, stack in matrices.items():
            count, rows, columns = stack.shape
            if name == "down":
                made[name] = torch.randn(rows, size) @ torch.randn(count, size, columns) * 0.05
            else:
                made[name] = torch.randn(count, rows, size) @ basis * 0.05
        biases = {f"{name}_bias": bias for name, bias in experts.biases.items()}
        like = experts.format.experts_class.from_shared(**made, **biases, **experts.settings())
        experts.module.load_state_dict(experts.format.tensors(experts.module, like))


def tokens(count: int = 2, length: int = 9, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, _TOKENS, (count, length), generator=generator)


def call(name: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return tokens as arguments of a model's call, as a compression of a folder makes them."""
    if name != "switch":
        return {"input_ids": ids}
    half = ids.shape[1] // 2
    return {
        "input_ids": ids[:, :half].contiguous(),
        "decoder_input_ids": ids[:, half:].contiguous(),
    }


@torch.no_grad()
def logits(model: Any, name: str) -> torch.Tensor:
    return model.eval()(**call(name, tokens())).logits


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())

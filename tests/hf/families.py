"""Small random models of real transformers classes, one or more per family, and their inputs."""

import torch
import transformers as tf

IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 5:] = 0

_SMALL = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
}
_GROUPED = _SMALL | {"num_key_value_heads": 1, "head_dim": 12}
_T5 = {
    "vocab_size": 50, "d_model": 24, "d_kv": 12, "d_ff": 40, "num_layers": 3, "num_heads": 2,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_GPT2 = {"vocab_size": 50, "n_embd": 24, "n_layer": 3, "n_head": 2}
_BART = {
    "vocab_size": 50, "d_model": 24, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 32,
}  # fmt: skip
_ONE_KEY = _SMALL | {"num_key_value_heads": 1, "pad_token_id": 0}
_VISION = _SMALL | {"image_size": 16, "patch_size": 8, "num_channels": 3}

# Name: the model, and how many feed-forward networks it has.
MODELS = {
    "bert": (lambda: tf.BertModel(tf.BertConfig(**_SMALL)), 3),
    "roberta": (lambda: tf.RobertaModel(tf.RobertaConfig(**_SMALL)), 3),
    "electra": (lambda: tf.ElectraModel(tf.ElectraConfig(**_SMALL)), 3),
    "mpnet": (lambda: tf.MPNetModel(tf.MPNetConfig(**_SMALL)), 3),
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED)), 3),
    "llama with biases": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED, mlp_bias=True)), 3,
    ),
    "mistral": (lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GROUPED)), 3),
    "qwen2": (lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_GROUPED)), 3),
    "qwen3": (lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GROUPED | {"head_dim": 16})), 3),
    "gemma": (lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_GROUPED)), 3),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2)), 3),
    "gptj": (lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**_GPT2, rotary_dim=4)), 3),
    "gpt_neox": (lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SMALL)), 3),
    "falcon": (lambda: tf.FalconForCausalLM(tf.FalconConfig(**_SMALL)), 3),
    "phi": (lambda: tf.PhiForCausalLM(tf.PhiConfig(**_SMALL)), 3),
    "opt": (
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(**_SMALL, ffn_dim=40, word_embed_proj_dim=24, max_position_embeddings=64)
        ),
        3,
    ),
    "phi3": (lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_ONE_KEY)), 3),
    "glm4": (lambda: tf.Glm4ForCausalLM(tf.Glm4Config(**_GROUPED, pad_token_id=0)), 3),
    "nemotron": (
        lambda: tf.NemotronForCausalLM(tf.NemotronConfig(**_GROUPED, mlp_bias=True)), 3,
    ),
    "starcoder2": (lambda: tf.Starcoder2ForCausalLM(tf.Starcoder2Config(**_ONE_KEY)), 3),
    "bloom": (
        lambda: tf.BloomForCausalLM(
            tf.BloomConfig(vocab_size=50, hidden_size=24, n_layer=3, n_head=2, hidden_dropout=0.1)
        ),
        3,
    ),
    "mpt": (
        lambda: tf.MptForCausalLM(tf.MptConfig(vocab_size=50, d_model=24, n_layers=3, n_heads=2)),
        3,
    ),
    "bamba": (
        lambda: tf.BambaForCausalLM(
            tf.BambaConfig(
                **_ONE_KEY, mamba_n_heads=4, mamba_d_head=12, mamba_d_state=8,
                attn_layer_indices=[1],
            )
        ),
        3,
    ),
    "modernbert": (
        lambda: tf.ModernBertModel(
            tf.ModernBertConfig(**_SMALL, mlp_bias=True, mlp_dropout=0.1, pad_token_id=0)
        ),
        3,
    ),
    "distilbert": (
        lambda: tf.DistilBertModel(
            tf.DistilBertConfig(vocab_size=50, dim=24, hidden_dim=40, n_layers=3, n_heads=2)
        ),
        3,
    ),
    # Five layers, two networks.
    "albert": (
        lambda: tf.AlbertModel(
            tf.AlbertConfig(
                **_SMALL | {"num_hidden_layers": 5}, embedding_size=8, num_hidden_groups=2
            )
        ),
        2,
    ),
    "xlm": (
        lambda: tf.XLMModel(tf.XLMConfig(vocab_size=50, emb_dim=24, n_layers=3, n_heads=2)), 3,
    ),
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)), 6),
    "flan-t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        ),
        6,
    ),
    "mt5": (lambda: tf.MT5ForConditionalGeneration(tf.MT5Config(**_T5)), 6),
    "t5gemma": (
        lambda: tf.T5GemmaForConditionalGeneration(
            tf.T5GemmaConfig(encoder=_GROUPED, decoder=_GROUPED, vocab_size=50, dropout_rate=0.1)
        ),
        6,
    ),
    "prophetnet": (
        lambda: tf.ProphetNetForConditionalGeneration(
            tf.ProphetNetConfig(
                vocab_size=50, hidden_size=24, encoder_ffn_dim=40, decoder_ffn_dim=32,
                num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=2,
                num_decoder_attention_heads=2,
            )
        ),
        4,
    ),
    "bart": (lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_BART)), 5),
    "whisper": (
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                **_BART, num_mel_bins=8, max_source_positions=6, max_target_positions=20,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            )
        ),
        5,
    ),
    "wav2vec2": (
        lambda: tf.Wav2Vec2Model(
            tf.Wav2Vec2Config(
                **_SMALL, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(5, 4),
                num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, layerdrop=0.0,
            )
        ),
        3,
    ),
    "vit": (lambda: tf.ViTModel(tf.ViTConfig(**_VISION)), 3),
    "clip vision": (lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**_VISION)), 3),
}  # fmt: skip

# Settings of every layout, for networks of these sizes.
LAYOUTS = {
    "interleaved": {"sites": 3},
    "split": {"layout": "split"},
    "hidden": {"layout": "hidden"},
    "two groups": {"layout": "hidden", "group_size": [2, 4]},
    "two matrices": {"layout": "hidden", "bond_ratio": 2.0},
    "residual": {"layout": "residual"},
    "tensor train": {"layout": "residual", "sites": 4, "max_bond": 3},
    "dense": {"layout": "dense"},
}

ENCODER_DECODERS = ("t5", "flan-t5", "mt5", "t5gemma", "prophetnet", "bart")
GENERATORS = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "gptj", "gpt_neox", "falcon", "phi",
    "opt", "phi3", "glm4", "nemotron", "starcoder2", "bloom", "mpt", "bamba", *ENCODER_DECODERS,
)  # fmt: skip


def make(name: str) -> tf.PreTrainedModel:
    """Make the model, in evaluation mode, without parameters of zeros: they would hide mistakes."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Return a batch; for models that take tokens, with padding on the right."""
    generator = torch.Generator().manual_seed(1)
    if name in ("vit", "clip vision"):
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if name == "wav2vec2":
        return {"input_values": torch.randn(2, 400, generator=generator)}
    if name == "whisper":
        features = torch.randn(2, 8, 12, generator=generator)
        return {"input_features": features, "decoder_input_ids": IDS}
    tokens = {"input_ids": IDS, "attention_mask": MASK}
    return tokens | ({"decoder_input_ids": IDS.flip(1)} if name in ENCODER_DECODERS else {})


@torch.no_grad()
def outputs(model: tf.PreTrainedModel, name: str) -> torch.Tensor:
    """Return logits, or hidden states of a model without a head."""
    return model(**inputs(name))[0]


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())

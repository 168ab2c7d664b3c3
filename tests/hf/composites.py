"""Models that contain models of other classes, and the parts that transformers loads alone."""

import torch
import transformers as tf

from tests.hf.families import IDS

_SMALL = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
_VISION = _SMALL | {"image_size": 16, "patch_size": 8, "num_channels": 3}
_TEXT = _SMALL | {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
_SPEECH_OR_TEXT = {
    "vocab_size": 50, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 32,
}  # fmt: skip

_TOKENS = {"input_ids": IDS}
_PIXELS = {"pixel_values": torch.sin(torch.arange(2.0 * 3 * 16 * 16)).view(2, 3, 16, 16)}
_BOTH_SIDES = _TOKENS | {"decoder_input_ids": IDS.flip(1)}


def _clip() -> tf.CLIPModel:
    config = tf.CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=512)
    return tf.CLIPModel(config)


def _siglip() -> tf.SiglipModel:
    return tf.SiglipModel(tf.SiglipConfig(text_config=_TEXT, vision_config=_VISION))


def _t5() -> tf.T5ForConditionalGeneration:
    sizes = {"d_model": 24, "d_kv": 12, "d_ff": 40, "num_layers": 3, "num_heads": 2}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=50, **sizes))


def _bart() -> tf.BartForConditionalGeneration:
    return tf.BartForConditionalGeneration(tf.BartConfig(**_SPEECH_OR_TEXT))


def _bert() -> tf.BertForMaskedLM:
    return tf.BertForMaskedLM(tf.BertConfig(**_SMALL))


def _pair() -> tf.EncoderDecoderModel:
    sides = tf.BertConfig(**_SMALL), tf.BertConfig(**_SMALL)
    return tf.EncoderDecoderModel(tf.EncoderDecoderConfig.from_encoder_decoder_configs(*sides))


def _captions() -> tf.VisionEncoderDecoderModel:
    sides = tf.ViTConfig(**_VISION), tf.GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=2)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(*sides)
    return tf.VisionEncoderDecoderModel(config)


def _llava() -> tf.LlavaForConditionalGeneration:
    text = tf.LlamaConfig(**_SMALL, num_key_value_heads=1)
    vision = tf.CLIPVisionConfig(**_VISION)
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=49)
    return tf.LlavaForConditionalGeneration(config)


def _gemma3() -> tf.Gemma3ForConditionalGeneration:
    text = _SMALL | {"num_key_value_heads": 1, "head_dim": 12}
    vision = _VISION | {"vision_use_head": False}
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return tf.Gemma3ForConditionalGeneration(config)


# How the whole is made, layers that are converted, the class that is loaded, and what it takes.
PARTS = [
    *(
        (_clip, layers, part, inputs)
        for layers in (None, "text_model", "vision_model")
        for part, inputs in (
            (tf.CLIPModel, _TOKENS | _PIXELS),
            (tf.CLIPTextModel, _TOKENS),
            (tf.CLIPVisionModel, _PIXELS),
            (tf.CLIPTextModelWithProjection, _TOKENS),
        )
    ),
    (_siglip, None, tf.SiglipTextModel, _TOKENS),
    (_siglip, "text_model", tf.SiglipVisionModel, _PIXELS),
    (_siglip, None, tf.AutoModel, _TOKENS | _PIXELS),
    *(
        (_t5, layers, part, inputs)
        for layers in (None, "encoder", "decoder", [1, 4])
        for part, inputs in (
            (tf.T5EncoderModel, _TOKENS),
            (tf.AutoModelForTextEncoding, _TOKENS),
            (tf.T5Model, _BOTH_SIDES),
            (tf.AutoModelForSeq2SeqLM, _BOTH_SIDES),
        )
    ),
    (_bart, "decoder", tf.BartModel, _BOTH_SIDES),
    (_bert, r"bert\.encoder\.layer\.1$", tf.AutoModel, _TOKENS),
    (_bert, [0], tf.BertForMaskedLM, _TOKENS),
    (_pair, "^encoder", tf.EncoderDecoderModel, _BOTH_SIDES),
    (_pair, None, tf.AutoModelForSeq2SeqLM, _BOTH_SIDES),
    (_captions, None, tf.VisionEncoderDecoderModel, _PIXELS | {"decoder_input_ids": IDS}),
    (_llava, "language_model", tf.LlavaForConditionalGeneration, _TOKENS),
    (_llava, None, tf.LlavaModel, _TOKENS),
    (_gemma3, None, tf.AutoModelForImageTextToText, _TOKENS),
]  # fmt: skip

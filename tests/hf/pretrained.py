"""Models with real weights, and inputs for them."""

import torch
import transformers

from experiments import weights


def minilm() -> tuple[transformers.BertModel, dict]:
    """all-MiniLM-L6-v2, and two sentences of different lengths."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights.minilm_folder())
    model = transformers.BertModel.from_pretrained(weights.minilm_folder())
    texts = ["The film is a joy.", "What a long and utterly tedious evening that has been!"]
    return model.eval(), dict(tokenizer(texts, padding=True, return_tensors="pt"))


def smollm2() -> tuple[transformers.LlamaForCausalLM, dict]:
    """SmolLM2-135M-Instruct from GGUF, and the beginning of a story."""
    text = "Once upon a time, in a small village by the sea, there lived"
    inputs = weights.smollm2_tokenizer()([text], return_tensors="pt")
    return weights.smollm2().eval(), dict(inputs)


def flan_t5() -> tuple[transformers.T5ForConditionalGeneration, dict]:
    """A fine-tuned flan-t5-small from quantized ONNX, and something to make a title of."""
    tokenizer = weights.flan_t5_tokenizer()
    ids = tokenizer.encode("Fix the bug where the parser fails on an empty file").ids
    inputs = {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([[0, 37, 3]])}
    return weights.flan_t5().eval(), inputs

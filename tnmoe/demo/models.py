"""The demo's pretrained model in its three forms: dense, ordinary mixture and MPOE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from tnmoe import hf
from tnmoe.errors import InputError
from tnmoe.hf.files.folder import check_folder, check_inside
from tnmoe.hf.trust import no_foreign_code
from tnmoe.truncation.info import TruncationInfo

KINDS = ("dense", "MoE", "MPOE")


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a Hugging Face folder; raise an InputError if there is none."""
    tokenizer = _load(AutoTokenizer.from_pretrained, "tokenizer", folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_dense(folder: Path, label_names: tuple[str, ...], seed: int) -> PreTrainedModel:
    """Load a pretrained classifier in float32; draw the weights that the folder lacks."""
    torch.manual_seed(seed)
    model = _load(
        AutoModelForSequenceClassification.from_pretrained,
        "model",
        folder,
        dtype=torch.float32,
        use_safetensors=True,
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
        ignore_mismatched_sizes=True,
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = model.config.eos_token_id
    return model


def load_form(
    kind: str,
    folder: Path,
    label_names: tuple[str, ...],
    config: hf.MPOEConfig,
    seed: int,
    on_matrix: Callable[[str, TruncationInfo], None] | None = None,
) -> PreTrainedModel:
    """Load one of the three forms; all start from the same weights, with the same classifier."""
    model = load_dense(folder, label_names, seed)
    if kind == "MoE":
        hf.upcycle(model, replace(config, layout="dense"))
    elif kind == "MPOE":
        hf.upcycle(model, config, on_matrix)
    return model


def quiet_transformers() -> None:
    """Silence transformers' progress bars and its warning that a classifier is untrained."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _load(load: Callable[..., Any], what: str, folder: Path, **arguments: Any) -> Any:
    """Call a loader of transformers without network or foreign code, and name its failures."""
    check_folder(folder)
    check_inside(folder)
    quiet_transformers()
    try:
        # transformers would otherwise ask on standard input whether to run the folder's code.
        with no_foreign_code():
            return load(folder, local_files_only=True, trust_remote_code=False, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"cannot load a {what} from {folder}: {first_line}") from error

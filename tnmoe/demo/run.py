"""The demo itself: convert, check, fine-tune three models, compare them, write the results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tnmoe import hf
from tnmoe.demo import DemoOptions, report
from tnmoe.demo.data import Sentences, packaged_model, packaged_reviews, read_sentences, split
from tnmoe.demo.models import KINDS, load_dense, load_form, load_tokenizer
from tnmoe.demo.output import atomic_folder
from tnmoe.demo.training import (
    CHECKED_SENTENCES,
    Job,
    Result,
    fine_tune,
    load_and_predict,
    predict,
    run_in_new_process,
)
from tnmoe.hf.layers import mpo_settings_of
from tnmoe.nn.compute.devices import usable_device
from tnmoe.system.progress import progress_bar
from tnmoe.truncation.info import TruncationInfo

# Largest relative difference between the outputs of the dense and the converted model.
PRESERVATION_LIMIT = 1e-4


def run_demo(options: DemoOptions) -> None:
    """Convert, check, fine-tune three models, compare them, and write the results.

    Raises
    ------
    InputError
        If a file, folder or setting does not fit. The output folder then stays as it was.
    """
    config = hf.MPOEConfig(
        num_experts=options.num_experts,
        num_experts_per_tok=options.top_k,
        layout=options.layout,
        sites=options.sites,
        balance_weight=options.balance_weight,
        z_weight=options.z_weight,
        mask_probability=options.mask_probability,
    )
    device = _chosen_device(options.device)
    folder = options.model or packaged_model()
    with atomic_folder(options.output, options.overwrite) as output:
        train, held_out = split(_sentences(options), options.seed)
        print(f"model {folder}\n{len(train):,} sentences to train on, {len(held_out):,} held out")
        parameters, preservation, spectra = _convert(folder, held_out, config, options.seed)
        job = _job(options, folder, train, held_out, config, device)
        results = [_fine_tune(job, kind, output) for kind in KINDS]
        preservation["reloaded_max_abs"] = _check_reload(output, held_out, results[-1])
        data = report.report_data(options.to_dict(), parameters, preservation, results)
        report.write_report(output, data)
        report.draw_pictures(output, results, spectra)
    print(f"\n{report.result_table(results)}\n\n{report.verdict(results)}")
    print(f"\ncheckpoint, report.json and pictures: {options.output}")


def _sentences(options: DemoOptions) -> Sentences:
    """Read the user's sentences, or by default one source of the packaged reviews."""
    if options.data is not None:
        return read_sentences(options.data)
    return read_sentences(packaged_reviews(), source="rotten_tomatoes")


def _job(
    options: DemoOptions,
    folder: Path,
    train: Sentences,
    held_out: Sentences,
    config: hf.MPOEConfig,
    device: str,
) -> Job:
    """Describe the fine-tuning of the dense model; the other forms differ in their kind only."""
    return Job(
        kind="dense",
        model=folder,
        train=train,
        held_out=held_out,
        config=config,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        device=device,
    )


def _chosen_device(name: str) -> str:
    """Return the name of a torch device; ``auto`` becomes CUDA or the CPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(usable_device(name))


def _convert(
    folder: Path, held_out: Sentences, config: hf.MPOEConfig, seed: int
) -> tuple[dict[str, Any], dict[str, float], dict[str, np.ndarray]]:
    """Build the MPOE model, print its size, and check that it computes what the dense one does."""
    tokenizer = load_tokenizer(folder)
    texts = held_out.texts[:CHECKED_SENTENCES]
    dense = load_dense(folder, held_out.label_names, seed)
    parameters = hf.parameter_report(dense, config)
    expected = predict(dense, tokenizer, texts)
    spectra: dict[str, np.ndarray] = {}
    ffns = hf.find_ffns(dense)
    settings = [each for ffn in ffns for each in mpo_settings_of(ffn, config).values()]
    matrices = sum(not each.keeps_matrix for each in settings)
    with progress_bar(total=matrices, desc="decomposing", unit="matrix") as bar:

        def on_matrix(name: str, info: TruncationInfo) -> None:
            bar.update()
            if name == f"{ffns[0].name}.up":
                for bond, values in enumerate(info.spectra):
                    spectra[f"bond {bond}"] = values.cpu().numpy()

        mpoe = load_form("MPOE", folder, held_out.label_names, config, seed, on_matrix)
    actual = predict(mpoe, tokenizer, texts)
    difference = float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
    print(f"outputs on {len(texts)} held-out sentences: relative difference {difference:.1e}")
    if not difference <= PRESERVATION_LIMIT:
        raise RuntimeError(
            f"the converted model differs from the dense one by {difference:.1e}, "
            f"more than {PRESERVATION_LIMIT:.0e}"
        )
    print(f"\n{parameters}\n")
    return parameters.to_dict(), {"relative_difference": difference}, spectra


def _fine_tune(job: Job, kind: str, output: Path) -> Result:
    """Fine-tune one form of the model in a new process."""
    # Bars are drawn on terminals alone; a log says here what takes minutes.
    print(f"fine-tuning {kind}: {job.steps} steps", flush=True)
    checkpoint = output / "model" if kind == "MPOE" else None
    return run_in_new_process(fine_tune, replace(job, kind=kind, checkpoint=checkpoint))


def _check_reload(output: Path, held_out: Sentences, result: Result) -> float:
    """Load the checkpoint in a new process; return the largest difference of the outputs."""
    assert result.checkpoint_logits is not None
    texts = held_out.texts[: len(result.checkpoint_logits)]
    reloaded = run_in_new_process(load_and_predict, output / "model", texts)
    difference = float(np.abs(reloaded - result.checkpoint_logits).max())
    print(f"checkpoint loaded in a new process: largest difference {difference:.1e}")
    if not difference <= PRESERVATION_LIMIT:
        raise RuntimeError(f"the reloaded checkpoint differs by {difference:.1e}")
    return difference

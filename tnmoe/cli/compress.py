"""``tnmoe compress``: the mixtures of a checkpoint made smaller."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnmoe.cli.arguments import fraction, int_from_two, layers, share, size
from tnmoe.cli.convert import HOW, add_common, as_text, report_of, run
from tnmoe.errors import InputError
from tnmoe.options import CALIBRATED_MOMENTS, COMPRESSED_LAYOUTS

if TYPE_CHECKING:
    from torch import Tensor

# Layers in memory at a time. A layer of a large mixture has gigabytes.
_JOBS = 2

# Characters per token, at most: of a long text, only the beginning is tokenized.
_CHARACTERS = 32


def add(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand to the parser."""
    parser = commands.add_parser(
        "compress",
        help="make the mixtures of a checkpoint smaller",
        description=(
            "Give the experts of a checkpoint with ordinary mixtures (Mixtral, Qwen-MoE, OLMoE, "
            "Granite-MoE, DeepSeek, gpt-oss, Switch and others) low ranks, common bases or a "
            "common matrix. Routers and all other weights stay as they are." + HOW
        ),
    )
    add_common(parser, "Hugging Face folder with config.json and safetensors files", jobs=_JOBS)
    _add_limits(parser)
    _add_settings(parser)
    _add_calibration(parser)
    parser.set_defaults(run=_compress)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the limits, one of which is required."""
    limits = parser.add_mutually_exclusive_group(required=True)
    limits.add_argument(
        "--keep", type=share, help="share of the parameters of experts that stays: 0.7"
    )
    limits.add_argument(
        "--bytes",
        type=size,
        dest="num_bytes",
        metavar="SIZE",
        help="largest size of the whole checkpoint: 6G",
    )
    limits.add_argument("--rtol", type=fraction, help="largest relative error of every matrix: 0.1")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the other settings of a CompressionConfig, whose defaults they keep."""
    parser.add_argument(
        "--layout",
        choices=COMPRESSED_LAYOUTS,
        default=argparse.SUPPRESS,
        help="what experts share: bases (hidden), a matrix, to which each adds one of low rank "
        "(residual), or nothing (low_rank); the default, auto, chooses for every matrix",
    )
    parser.add_argument(
        "--matrices",
        type=lambda text: text.split(","),
        default=argparse.SUPPRESS,
        help="matrices that become smaller, separated by commas (default: up,gate,down)",
    )
    parser.add_argument(
        "--layers",
        type=layers,
        default=argparse.SUPPRESS,
        help="mixtures to make smaller: positions, separated by commas, or a regular expression "
        "(default: all)",
    )
    parser.add_argument(
        "--moments",
        choices=CALIBRATED_MOMENTS,
        default=argparse.SUPPRESS,
        help="whose inputs the calibration looks at: those of every expert (the default), or of "
        "all experts of a layer together, which takes less memory and loses more",
    )
    parser.add_argument(
        "--damping",
        type=fraction,
        default=argparse.SUPPRESS,
        help="share of the identity in the calibration's moments (default: 0.01)",
    )


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add the arguments about the text."""
    text = parser.add_argument_group("calibration")
    text.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text in UTF-8, of the kind that the model will read; errors are then those of "
        "outputs, and the report has the perplexity of a part of the text before and after",
    )
    text.add_argument(
        "--calibration-tokens",
        type=int_from_two,
        default=2**16,
        metavar="N",
        help="tokens of the text to use (default: 65536)",
    )
    text.add_argument(
        "--sequence-length",
        type=int_from_two,
        default=512,
        metavar="N",
        help="tokens of a sequence (default: 512)",
    )


def _compress(options: argparse.Namespace) -> None:
    from tnmoe.hf import CompressionConfig, prepare_compress
    from tnmoe.system.folders import check_target

    known = ("keep", "num_bytes", "rtol", "layout", "matrices", "layers", "moments", "damping")
    values = vars(options)
    config = CompressionConfig(**{name: values[name] for name in known if name in values})
    target = Path(os.path.realpath(options.target))
    survey = target.with_name(f"{target.name}.survey")
    if not target.with_name(f"{target.name}.partial").exists():
        check_target(target, options.overwrite)  # before any work
    with _steps() as on_step:
        conversion = prepare_compress(
            options.source,
            config,
            _tokens(options),
            survey=survey,
            survey_needed=options.part is not None,
            jobs=options.jobs,
            on_step=on_step,
        )
        files = run(options, conversion, "compressing")
        report = conversion.report_on(options.target, on_step) if files else conversion.report
    if files:
        shutil.rmtree(survey)
    if options.json:
        summary = report_of(options, conversion, files) | report.to_dict()
        print(json.dumps(summary, indent=2))
        return
    if options.part is None:
        print(report)
    print(as_text(report_of(options, conversion, files), options.dry_run))
    if options.dry_run:
        print(f"{survey} keeps what was found, and the same command without --dry-run uses it")


def _tokens(options: argparse.Namespace) -> Tensor | None:
    """Return the calibration's text as tokens (N, S)."""
    if options.calibration is None:
        return None
    import torch
    from transformers import AutoTokenizer

    count, length = options.calibration_tokens, options.sequence_length
    with open(options.calibration, encoding="utf-8", errors="replace") as file:
        text = file.read(count * _CHARACTERS)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.source, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{options.source} has no tokenizer that transformers can load, which a calibration "
            f"needs: {error}"
        ) from error
    # The text is cut into sequences, however long it is.
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:count]
    length = min(length, len(tokens))
    if length < 2:
        raise InputError(f"{options.calibration} has {len(tokens)} tokens; give a longer text")
    whole = len(tokens) // length * length
    return torch.tensor(tokens[:whole]).reshape(-1, length)


@contextmanager
def _steps() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that shows the steps of a survey, a bar for each kind."""
    from tnmoe.system.progress import progress_bar

    bars: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = progress_bar(desc=what, unit="layer", total=total)
        bars[what].update(done - bars[what].n)
        if done == total:
            bars.pop(what).close()

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()

"""``tnmoe demo``: conversion, fine-tuning and comparison of a real model."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from tnmoe.cli.arguments import (
    fraction,
    int_from_one,
    int_from_two,
    int_from_zero,
    positive_number,
    seed,
    weight,
)
from tnmoe.demo import DemoOptions
from tnmoe.options import LAYOUTS
from tnmoe.system.extras import require_extra


def add(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand to the parser."""
    parser = commands.add_parser(
        "demo",
        help="turn a real model into an MPOE model, fine-tune it and compare",
        description=(
            "Turn a pretrained model into a mixture of experts that share their central cores, and "
            "check that it still computes the same outputs. Then fine-tune it on sentiment beside "
            "the dense model and an ordinary mixture, and compare the three."
        ),
    )
    defaults = DemoOptions()

    def add(name: str, meaning: str, **details: Any) -> None:
        field = details.setdefault("dest", name.removeprefix("--").replace("-", "_"))
        if (default := getattr(defaults, field)) not in (None, False):
            meaning += f" (default: {default})"
        parser.add_argument(name, help=meaning, default=default, **details)

    add("--output", "folder for the results", type=Path)
    add("--overwrite", "replace files that tnmoe wrote there", action="store_true")
    add("--model", "Hugging Face folder instead of the packaged MiniLM", type=Path)
    add(
        "--data",
        "CSV file with the columns text and label instead of the packaged reviews",
        type=Path,
    )
    add("--steps", "fine-tuning steps of each model", type=int_from_zero)
    add("--batch-size", "sentences per step", type=int_from_one)
    add("--learning-rate", "peak learning rate of all models", type=positive_number)
    add("--experts", "experts per layer", type=int_from_one, dest="num_experts")
    add("--top-k", "experts per token", type=int_from_one)
    add("--layout", "how a matrix is split over the sites of its MPO", choices=LAYOUTS)
    add("--sites", "sites of an interleaved MPO", type=int_from_two)
    add(
        "--mask-probability",
        "fraction of steps that leave the central cores unchanged",
        type=fraction,
    )
    add("--balance-weight", "weight of the load-balancing loss", type=weight)
    add("--z-weight", "weight of the router z-loss", type=weight)
    add("--seed", "seed of the split, the new weights and the batches", type=seed)
    add("--device", "torch device; auto means CUDA if it is available")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    """Run the demo with the options of the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a pipe too shows each result at once
        sys.stdout.reconfigure(line_buffering=True)
    require_extra("tnmoe demo", "demo")
    # Imported late: --help must answer at once, without torch.
    from tnmoe.demo.run import run_demo

    names = DemoOptions.__dataclass_fields__
    run_demo(DemoOptions(**{name: getattr(options, name) for name in names}))

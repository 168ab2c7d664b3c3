"""``tnmoe demo``: conversion, fine-tuning and comparison of a real model."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from tnmoe.cli.arguments import (
    LAYOUT,
    SITES,
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

# The options of the demo: name, help, and settings of argparse.
_OPTIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("--output", "folder for the results", {"type": Path}),
    ("--overwrite", "replace files that tnmoe wrote there", {"action": "store_true"}),
    ("--model", "Hugging Face folder instead of the packaged MiniLM", {"type": Path}),
    (
        "--data",
        "CSV file with the columns text and label instead of the packaged reviews",
        {"type": Path},
    ),
    ("--steps", "fine-tuning steps of each model", {"type": int_from_zero}),
    ("--batch-size", "sentences per step", {"type": int_from_one}),
    ("--learning-rate", "peak learning rate of all models", {"type": positive_number}),
    ("--experts", "experts per layer", {"type": int_from_one, "dest": "num_experts"}),
    ("--top-k", "experts per token", {"type": int_from_one}),
    ("--layout", LAYOUT, {"choices": LAYOUTS}),
    ("--sites", SITES, {"type": int_from_two}),
    (
        "--mask-probability",
        "fraction of training steps that leave shared cores unchanged",
        {"type": fraction},
    ),
    ("--balance-weight", "weight of the load-balancing loss", {"type": weight}),
    ("--z-weight", "weight of the router z-loss", {"type": weight}),
    ("--seed", "seed of the split, the new weights and the batches", {"type": seed}),
    ("--device", "torch device; auto means CUDA if it is available", {}),
)


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
    for name, meaning, settings in _OPTIONS:
        field = settings.get("dest", name.removeprefix("--").replace("-", "_"))
        default = getattr(defaults, field)
        if default not in (None, False):
            meaning += f" (default: {default})"
        parser.add_argument(name, help=meaning, default=default, **settings)
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

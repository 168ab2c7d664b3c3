"""``tnmoe demo``: the whole way on a real model."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from tnmoe.cli.arguments import from_one, from_two, from_zero, positive, seed, share, weight
from tnmoe.demo import DemoOptions
from tnmoe.options import LAYOUTS
from tnmoe.system.extras import require_extra


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "demo",
        help="turn a real model into an MPOE model, fine-tune it and compare",
        description=(
            "Turn a pretrained model into a mixture of experts that share a central tensor, check "
            "that it computes what it did, fine-tune it beside the dense model and an ordinary "
            "mixture on sentiment, and compare the three."
        ),
    )
    defaults = DemoOptions()

    def add(name: str, meaning: str, **details: Any) -> None:
        field = details.setdefault("dest", name.removeprefix("--").replace("-", "_"))
        if (default := getattr(defaults, field)) not in (None, False):
            meaning += f" (default: {default})"
        parser.add_argument(name, help=meaning, default=default, **details)

    add("--output", "folder for the results", type=Path)
    add("--overwrite", "replace what an earlier demo wrote there", action="store_true")
    add("--model", "Hugging Face folder instead of the packaged MiniLM", type=Path)
    add("--data", "CSV file with text,label instead of the packaged reviews", type=Path)
    add("--steps", "fine-tuning steps of each model", type=from_zero)
    add("--batch-size", "sentences per step", type=from_one)
    add("--learning-rate", "peak of the schedule, for all models", type=positive)
    add("--experts", "experts per layer", type=from_one, dest="num_experts")
    add("--top-k", "experts per token", type=from_one)
    add("--layout", "how matrices split over sites", choices=LAYOUTS)
    add("--sites", "sites of an interleaved MPO", type=from_two)
    add("--mask-probability", "share of steps that spare the central tensors", type=share)
    add("--balance-weight", "weight of the load-balancing loss", type=weight)
    add("--z-weight", "weight of the router z-loss", type=weight)
    add("--seed", "seed of split, weights and batches", type=seed)
    add("--device", "torch device; auto takes CUDA where it is there")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # results appear as they come, in a pipe too
        sys.stdout.reconfigure(line_buffering=True)
    require_extra("tnmoe demo", "demo")
    # Imported late: the command must answer --help at once, without torch.
    from tnmoe.demo.run import run_demo

    names = DemoOptions.__dataclass_fields__
    run_demo(DemoOptions(**{name: getattr(options, name) for name in names}))

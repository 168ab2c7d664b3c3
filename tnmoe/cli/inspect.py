"""``tnmoe inspect``: what a conversion would find in a model, and make of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tnmoe.cli.arguments import add_config, config_of, from_one, numbers


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "inspect",
        help="show a model's feed-forward networks, and what they would become",
        description=(
            "Show the feed-forward networks of a model, how their matrices split over the sites of "
            "an MPO, how many parameters a mixture of experts would have, and, where there are "
            "weights, the entropy of the Schmidt values of every bond in nats and what relative "
            "error smaller bonds would make at most. Weights are read a network at a time."
        ),
    )
    parser.add_argument(
        "model", type=Path, help="Hugging Face folder, or a config.json for the counts alone"
    )
    parser.add_argument(
        "--bonds",
        type=numbers,
        help="bond dimensions to predict errors for, between commas "
        "(default: a quarter and half of the largest)",
    )
    parser.add_argument("--no-weights", action="store_true", help="do not read the weights")
    parser.add_argument("--jobs", type=from_one, help="networks at a time (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_config(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from tnmoe.hf import inspect_checkpoint
    from tnmoe.system.progress import progress_callback

    config = config_of(options)
    with progress_callback("reading", " networks") as show:
        found = inspect_checkpoint(
            options.model,
            config,
            options.bonds,
            weights=not options.no_weights,
            jobs=options.jobs,
            on_progress=show,
        )
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)

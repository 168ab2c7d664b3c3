"""``tnmoe inspect``: a preview of the conversion of a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tnmoe.cli.arguments import add_config, bond_dims, config_from_options, int_from_one


def add(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand to the parser."""
    parser = commands.add_parser(
        "inspect",
        help="show a model's feed-forward networks, and what they would become",
        description=(
            "Show the feed-forward networks of a model, how their matrices would be split over the "
            "sites of an MPO, and how many parameters a mixture of experts would have. If the "
            "folder holds weights, also show for every bond the entropy of its Schmidt values in "
            "nats, and an upper bound on the relative error of smaller bonds. The command reads "
            "weights network by network."
        ),
    )
    parser.add_argument(
        "model", type=Path, help="Hugging Face folder, or a config.json for the counts alone"
    )
    parser.add_argument(
        "--bonds",
        type=bond_dims,
        help="bond dimensions whose errors to predict, separated by commas "
        "(default: a quarter and half of the largest)",
    )
    parser.add_argument("--no-weights", action="store_true", help="do not read the weights")
    parser.add_argument(
        "--jobs", type=int_from_one, help="networks to read at a time (default: all cores)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_config(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    """Inspect the model and print what was found."""
    from tnmoe.hf import inspect_checkpoint
    from tnmoe.system.progress import progress_callback

    config = config_from_options(options)
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

"""``tnmoe upcycle`` and ``tnmoe export``: conversions from one folder into another."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnmoe.cli.arguments import (
    add_config,
    config_from_options,
    int_from_one,
    part,
    seed,
    size,
)
from tnmoe.options import EXPORT_FORMATS

if TYPE_CHECKING:
    from tnmoe.hf import Conversion

HOW = (
    " The command reads and writes weights layer by layer, so a checkpoint may be larger than "
    "memory. Run an interrupted command again, and it goes on where it stopped, with the same "
    "result. The command never reads pickled weights and never changes the source."
)


def add(commands: argparse._SubParsersAction) -> None:
    """Add both subcommands to the parser."""
    upcycle = commands.add_parser(
        "upcycle",
        help="turn a dense checkpoint into an MPOE checkpoint",
        description=(
            "Turn the feed-forward networks of a checkpoint into mixtures of experts that share "
            "their central cores, without changing what the model computes." + HOW
        ),
    )
    add_common(upcycle, "Hugging Face folder with config.json and safetensors files")
    add_config(upcycle)
    upcycle.add_argument(
        "--seed", type=seed, default=0, help="seed of routers and noise (default: 0)"
    )
    upcycle.set_defaults(run=_upcycle)
    export = commands.add_parser(
        "export",
        help="turn an MPOE checkpoint into one that other software can run",
        description=(
            "Turn an MPOE checkpoint into an ordinary mixture of its family (Mixtral, Qwen-MoE, "
            "Switch), or into a dense model whose matrices are the means of the experts'." + HOW
        ),
    )
    add_common(export, "Hugging Face folder with an MPOE checkpoint")
    export.add_argument(
        "--to",
        choices=EXPORT_FORMATS,
        default="moe",
        help="moe computes the same function; dense takes the mean of the experts (default: moe)",
    )
    export.set_defaults(run=_export)


def add_common(parser: argparse.ArgumentParser, source: str, jobs: int | None = None) -> None:
    """Add the arguments that all conversions take.

    Parameters
    ----------
    parser : ArgumentParser
    source : str
        What the source is.
    jobs : int, optional
        Default number of layers to convert at a time; the number of cores by default.
    """
    parser.add_argument("source", type=Path, help=source)
    parser.add_argument("target", type=Path, help="folder to create")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that tnmoe wrote there"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what the command would do, and stop"
    )
    parser.add_argument(
        "--jobs",
        type=int_from_one,
        default=jobs,
        help=f"layers to convert at a time (default: {jobs or 'all cores'})",
    )
    parser.add_argument(
        "--shard-size",
        type=size,
        default=5 * 10**9,
        metavar="SIZE",
        help="largest size of a file of weights (default: 5GB)",
    )
    parser.add_argument(
        "--part",
        type=part,
        metavar="I/N",
        help="make only the I-th of N parts; when all are made, by processes at the same time or "
        "one after the other, the command without --part finishes the target",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(interrupted="the same command goes on from there")


def _upcycle(options: argparse.Namespace) -> None:
    from tnmoe.hf import prepare_upcycle

    config = config_from_options(options)
    _convert(options, prepare_upcycle(options.source, config, options.seed))


def _export(options: argparse.Namespace) -> None:
    from tnmoe.hf import prepare_export

    _convert(options, prepare_export(options.source, options.to))


def _convert(options: argparse.Namespace, conversion: Conversion) -> None:
    """Run a prepared conversion unless it is a dry run, and print a report."""
    report = report_of(options, conversion, run(options, conversion, "converting"))
    print(json.dumps(report, indent=2) if options.json else as_text(report, options.dry_run))


def run(options: argparse.Namespace, conversion: Conversion, what: str) -> list[Path]:
    """Run a prepared conversion, and return its files; in a dry run check the target alone.

    Parameters
    ----------
    options : Namespace
        With the arguments of :func:`add_common`.
    conversion : Conversion
    what : str
        What the progress bar says.
    """
    if options.dry_run:
        conversion.check_target(options.target, options.overwrite)
        return []
    from tnmoe.system.progress import progress_callback

    with progress_callback(what, "B") as show:
        return conversion.run(
            options.target,
            overwrite=options.overwrite,
            jobs=options.jobs,
            shard_bytes=options.shard_size,
            on_progress=show,
            part=options.part,
        )


def report_of(
    options: argparse.Namespace, conversion: Conversion, files: list[Path]
) -> dict[str, Any]:
    """Describe a conversion as plain data."""
    part, pieces = options.part, conversion.pieces
    own = pieces if part is None else part.share(pieces)
    left = [] if files else conversion.pieces_left(options.target, shard_bytes=options.shard_size)
    return {
        "source": str(options.source),
        "target": str(options.target),
        "part": None if part is None else str(part),
        "layers": [piece.name for piece in own if piece.make],
        "parameters": {"source": conversion.source.num_params, "target": conversion.num_params},
        "bytes": {"source": conversion.source.num_bytes, "target": conversion.num_bytes},
        "pieces": {"total": len(pieces), "own": len(own)},
        "left": [piece.name for piece in left],
        "files": [path.name for path in files],
    }


def as_text(report: dict[str, Any], dry_run: bool) -> str:
    """Write a report for people."""
    layers, parameters, sizes = report["layers"], report["parameters"], report["bytes"]
    ends = " … ".join(dict.fromkeys((*layers[:1], *layers[-1:])))
    lines = [
        f"layers      {len(layers)}{f': {ends}' if layers else ''}",
        *(
            f"{name:<11} {parameters[name]:,} parameters, {sizes[name] / 1e6:,.1f} MB"
            for name in ("source", "target")
        ),
    ]
    return "\n".join([*lines, *_state_lines(report, dry_run)])


def _state_lines(report: dict[str, Any], dry_run: bool) -> Iterator[str]:
    """Yield what is written, and what is left."""
    from tnmoe.system.tables import listed

    target, part, left = report["target"], report["part"], report["left"]
    own, total = report["pieces"]["own"], report["pieces"]["total"]
    if part is not None:
        yield f"part        {part}: {own} of {total} pieces"
    if report["files"]:
        yield f"written     {target}: {', '.join(report['files'])}"
        return
    is_begun = len(left) < total
    if is_begun:
        yield f"left        {len(left)} of {total} pieces{f': {listed(left)}' if left else ''}"
    if dry_run:
        what = target if part is None else f"part {part} of {target}"
        yield f"{'not finished' if is_begun else 'nothing written'} yet: {what} would be created"
    else:
        yield f"written     part {part}, into {target}.partial"
        when = "once all parts are made, " if left else ""
        yield f"next        {when}the same command without --part finishes {target}"

"""``tnmoe upcycle`` and ``tnmoe export``: from folder to folder, larger than memory if need be."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnmoe.cli.arguments import add_config, config_of, from_one, seed, size
from tnmoe.options import EXPORT_FORMATS

if TYPE_CHECKING:
    from tnmoe.hf import Conversion

_HOW = (
    " Weights are read and written a layer at a time, so that a checkpoint may be larger than "
    "memory. What was interrupted goes on with the same command, and comes out the same. Pickled "
    "weights are never read; the source is not touched."
)


def add(commands: argparse._SubParsersAction) -> None:
    """Add both commands."""
    upcycle = commands.add_parser(
        "upcycle",
        help="turn a dense checkpoint into an MPOE checkpoint",
        description=(
            "Turn the feed-forward networks of a checkpoint into mixtures of experts that share a "
            "central tensor, without changing what the model computes." + _HOW
        ),
    )
    _add_folders(upcycle, "Hugging Face folder with config.json and safetensors files")
    add_config(upcycle)
    upcycle.add_argument("--seed", type=seed, default=0, help="seed of routers and noise")
    upcycle.set_defaults(run=_upcycle)
    export = commands.add_parser(
        "export",
        help="turn an MPOE checkpoint into one that other software runs",
        description=(
            "Turn an MPOE checkpoint into an ordinary mixture of its family (Mixtral, Qwen-MoE, "
            "Switch), or into a dense model with the mean of its experts." + _HOW
        ),
    )
    _add_folders(export, "Hugging Face folder with an MPOE checkpoint")
    export.add_argument(
        "--to",
        choices=EXPORT_FORMATS,
        default="moe",
        help="moe: the same function; dense: the mean of the experts (default: moe)",
    )
    export.set_defaults(run=_export)


def _add_folders(parser: argparse.ArgumentParser, source: str) -> None:
    parser.add_argument("source", type=Path, help=source)
    parser.add_argument("target", type=Path, help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace what tnmoe wrote there")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--jobs", type=from_one, help="layers at a time (default: all cores)")
    parser.add_argument(
        "--shard-size",
        type=size,
        default=5 * 10**9,
        metavar="SIZE",
        help="bytes of a file of weights at most (default: 5GB)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(interrupted="the same command goes on from there")


def _upcycle(options: argparse.Namespace) -> None:
    from tnmoe.hf import prepare_upcycle

    _convert(options, prepare_upcycle(options.source, config_of(options), options.seed))


def _export(options: argparse.Namespace) -> None:
    from tnmoe.hf import prepare_export

    _convert(options, prepare_export(options.source, options.to))


def _convert(options: argparse.Namespace, plan: Conversion) -> None:
    files = []
    if options.dry_run:
        plan.check_target(options.target, options.overwrite)
    else:
        from tnmoe.system.progress import progress_callback

        with progress_callback("converting", "B") as show:
            files = plan.run(
                options.target,
                overwrite=options.overwrite,
                jobs=options.jobs,
                shard_bytes=options.shard_size,
                on_progress=show,
            )
    report = _report(options, plan, files)
    print(json.dumps(report, indent=2) if options.json else _as_text(report))


def _report(options: argparse.Namespace, plan: Conversion, files: list[Path]) -> dict[str, Any]:
    return {
        "source": str(options.source),
        "target": str(options.target),
        "layers": [piece.name for piece in plan.pieces if piece.make],
        "parameters": {"source": plan.source.num_params, "target": plan.num_params},
        "bytes": {"source": plan.source.num_bytes, "target": plan.num_bytes},
        "files": [path.name for path in files],
    }


def _as_text(report: dict[str, Any]) -> str:
    layers, parameters, sizes = report["layers"], report["parameters"], report["bytes"]
    lines = [
        f"layers      {len(layers)}: {' … '.join(dict.fromkeys((layers[0], layers[-1])))}",
        *(
            f"{name:<11} {parameters[name]:,} parameters, {sizes[name] / 1e6:,.1f} MB"
            for name in ("source", "target")
        ),
    ]
    if report["files"]:
        return "\n".join([*lines, f"written     {report['target']}: {', '.join(report['files'])}"])
    return "\n".join([*lines, f"nothing written yet: {report['target']} would be made"])

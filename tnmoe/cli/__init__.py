"""The ``tnmoe`` command."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

from tnmoe import __version__
from tnmoe.demo import DemoOptions
from tnmoe.errors import InputError, MissingExtraError

# Conventional exit codes: 2 for what the user gave, 130 for Ctrl-C.
_BAD_INPUT, _INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the console script exits with what this returns."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (InputError, MissingExtraError, MemoryError) as error:
        print(f"tnmoe: {error}", file=sys.stderr)
        return _BAD_INPUT
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"tnmoe: {where}{error.strerror or error}", file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        print("tnmoe: interrupted; nothing was written", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tnmoe", description="Tensor-network mixtures of experts."
    )
    parser.add_argument("--version", action="version", version=f"tnmoe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_calibrate(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
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
        demo.add_argument(name, help=meaning, default=default, **details)

    add("--output", "folder for the results", type=Path)
    add("--overwrite", "replace the output folder", action="store_true")
    add("--model", "Hugging Face folder instead of the packaged MiniLM", type=Path)
    add("--data", "CSV file with text,label instead of the packaged reviews", type=Path)
    add("--steps", "fine-tuning steps of each model", type=_from_zero)
    add("--batch-size", "sentences per step", type=_from_one)
    add("--learning-rate", "peak of the schedule, for all models", type=_positive)
    add("--experts", "experts per layer", type=_from_one, dest="num_experts")
    add("--top-k", "experts per token", type=_from_one)
    add("--layout", "how matrices split over sites", choices=("interleaved", "split"))
    add("--sites", "sites of an interleaved MPO", type=_from_two)
    add("--mask-probability", "share of steps that spare the central tensors", type=_share)
    add("--balance-weight", "weight of the load-balancing loss", type=_weight)
    add("--z-weight", "weight of the router z-loss", type=_weight)
    add("--seed", "seed of split, weights and batches", type=_from_zero)
    add("--device", "torch device; auto takes CUDA where it is there")
    demo.set_defaults(run=_run_demo)


def _add_calibrate(commands: argparse._SubParsersAction) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="measure this machine, so that the fastest way through experts is planned for it",
        description=(
            "Measure for about a second how fast this machine multiplies and moves matrices, and "
            "store it in the user's cache folder, or in $TNMOE_CACHE. Without it, routes are "
            "planned for a typical machine."
        ),
    )
    calibrate.add_argument("--device", help="torch device (default: cpu)", default="cpu")
    calibrate.set_defaults(run=_run_calibrate)


def _run_calibrate(options: argparse.Namespace) -> None:
    from tnmoe.costs import rates_path
    from tnmoe.nn import calibrate

    rates = calibrate(options.device)
    print(f"large products   {rates.flops / 1e9:.4g} Gflop/s, half of it at depth "
          f"{rates.half_depth:.3g}")  # fmt: skip
    print(f"memory           {rates.bandwidth / 1e9:.3g} GB/s")
    print(f"a launch         {rates.launch * 1e6:.3g} µs")
    print(f"stored in {rates_path()}")


def _run_demo(options: argparse.Namespace) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # results appear as they come, in a pipe too
        sys.stdout.reconfigure(line_buffering=True)
    # Nothing may reach for a network, whatever a model's configuration asks for.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Imported late: the command must answer --help at once, without torch.
    try:
        import tnmoe.hf
        import tnmoe.plot  # noqa: F401 - before any work is done
    except MissingExtraError as error:
        raise MissingExtraError("tnmoe demo", error.package, "demo") from error
    from tnmoe.demo.run import run_demo

    run_demo(DemoOptions(**{k: v for k, v in vars(options).items() if k != "run"}))


def _checked(kind: type, fits: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    """An argparse type that says what it expected."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return value

    return parse


_from_zero = _checked(int, lambda n: n >= 0, "an integer from 0 up")
_from_one = _checked(int, lambda n: n >= 1, "an integer from 1 up")
_from_two = _checked(int, lambda n: n >= 2, "an integer from 2 up")
_positive = _checked(float, lambda x: 0 < x < inf, "a positive number")
_weight = _checked(float, lambda x: 0 <= x < inf, "a number from 0 up")
_share = _checked(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")

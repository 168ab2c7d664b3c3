"""The ``tnmoe`` command."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from tnmoe import __version__
from tnmoe.cli import calibrate, convert, demo, inspect
from tnmoe.errors import InputError, MissingExtraError, as_line, reason
from tnmoe.system.memory import is_memory_error, memory_error_summary

# Conventional exit codes: 2 for what the user gave, 130 for Ctrl-C.
_BAD_INPUT, _INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the console script exits with what this returns."""
    options = _parser().parse_args(arguments)
    # Nothing may reach for a network, whatever a model's configuration asks for.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # What transformers thinks of a configuration that is refused would hide the line that says why.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            options.run(options)
    except BrokenPipeError:
        # Whoever read the output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BAD_INPUT
    except Exception as error:
        if (told := _told(error, options.interrupted)) is None:
            raise
        print(f"tnmoe: {as_line(told)}", file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        print(f"tnmoe: interrupted; {options.interrupted}", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _told(error: Exception, interrupted: str) -> str | None:
    """What to say of an error; nothing of one that is a bug.

    ``interrupted`` is what becomes of the work.
    """
    if isinstance(error, InputError | MissingExtraError):
        return str(error)
    if is_memory_error(error):
        return f"out of memory: {memory_error_summary(error)}; {interrupted}"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{reason(error)}"
    return None


def _show(message: Warning | str, *_: object, **__: object) -> None:
    """Show a warning on a line, without the one of the program that it comes from."""
    print(f"tnmoe: warning: {as_line(message)}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tnmoe", description="Tensor-network mixtures of experts."
    )
    parser.add_argument("--version", action="version", version=f"tnmoe {__version__}")
    parser.set_defaults(interrupted="nothing was written")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo, inspect, convert, calibrate):
        command.add(commands)
    return parser

"""The ``tnmoe`` command."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from tnmoe import __version__
from tnmoe.cli import calibrate, compress, convert, demo, inspect
from tnmoe.errors import InputError, MissingExtraError, reason_of, to_one_line
from tnmoe.system.memory import is_memory_error, memory_error_summary

# Conventional exit codes: 2 for a mistake in the input, 130 for Ctrl-C.
_BAD_INPUT, _INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    # No model's configuration may make transformers use a network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Where tnmoe refuses a configuration, transformers' warnings would hide the line that says why.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            options.run(options)
    except BrokenPipeError:
        # The reader of the output, such as head, has closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BAD_INPUT
    except Exception as error:
        message = _message(error, options.interrupted)
        if message is None:
            raise
        print(f"tnmoe: {to_one_line(message)}", file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        print(f"tnmoe: interrupted; {options.interrupted}", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _message(error: Exception, interrupted: str) -> str | None:
    """Return a user's message for an error; None for a bug, which keeps its traceback.

    ``interrupted`` says what has become of the work.
    """
    if isinstance(error, InputError | MissingExtraError):
        return str(error)
    if is_memory_error(error):
        return f"out of memory: {memory_error_summary(error)}; {interrupted}"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{reason_of(error)}"
    return None


def _print_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning on one line, without the line of code that raised it."""
    print(f"tnmoe: warning: {to_one_line(message)}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    """Build the parser of the command and of its subcommands."""
    parser = argparse.ArgumentParser(
        prog="tnmoe", description="Tensor-network mixtures of experts."
    )
    parser.add_argument("--version", action="version", version=f"tnmoe {__version__}")
    parser.set_defaults(interrupted="nothing was written")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo, inspect, convert, compress, calibrate):
        command.add(commands)
    return parser

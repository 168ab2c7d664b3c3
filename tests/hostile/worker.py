"""Cases of corrupted files, one after another: ``python -m tests.hostile.worker``.

The process prints a line of JSON before and after each case. If it hangs or crashes, its last line
names the case that did it.
"""

import argparse
import faulthandler
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # as in the command line

import torch
import transformers

from tests.hostile.corruption import corrupt_file, corrupt_folder
from tests.hostile.entry_points import ENTRY_POINTS, WrongError, check_refusal
from tests.hostile.intact import copy_with_times, make_intact

# Seconds for a case, and bytes for the process; generous, since machines differ.
_SECONDS, _MEMORY = 30, 6 * 2**30


class TooLong(BaseException):
    """A case took too long."""


def make_case(intact: Path, place: Path, seed: str) -> tuple[str, str, Callable[[], str]]:
    """Corrupt a file; return a description, the entry point's name and a call of that."""
    rng = Random(seed)
    original = rng.choice(sorted(intact.iterdir()))
    kind, *_ = re.split("[-.]", original.name)
    place = place.with_suffix(".partial") if kind == "begun" else place
    copy_with_times(original, place)
    corrupt = corrupt_folder if original.is_dir() else corrupt_file
    description = f"{original.name}: {corrupt(place, rng)}"
    entry_point = rng.choice(ENTRY_POINTS[kind])
    return description, entry_point.__name__, lambda: entry_point(place, intact)


def outcome_of(call: Callable[[], str], output: Path) -> str:
    """Call an entry point and return "done" or "refused"; anything else is a finding."""
    try:
        with _time_limit(), _captured(output):
            outcome = call()
        if outcome == "status 2":
            check_refusal(output.read_text(errors="replace"))
            return "refused"
        return outcome
    except TooLong:
        return f"too long: {traceback.format_exc()[-1500:]}"
    except WrongError as error:
        return f"wrong: {error}"
    except BaseException:
        return f"traceback: {traceback.format_exc()[-3000:]}"


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TooLong in a block that takes too long; end the process if that does not help."""

    def stop(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    # Some calls cannot be interrupted by a signal.
    faulthandler.dump_traceback_later(2 * _SECONDS, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _captured(path: Path) -> Iterator[None]:
    """Send the standard error of a block to a file, and its standard output nowhere."""
    kept = os.dup(1), os.dup(2)
    with open(path, "wb") as file, open(os.devnull, "wb") as nowhere:
        sys.stdout.flush()
        os.dup2(nowhere.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in enumerate(kept, 1):
                os.dup2(old, number)
                os.close(old)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", type=int)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_intact(folder / "intact")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
        for number in range(options.first, options.last):
            place = folder / f"corrupted-{number}"
            seed = f"{options.seed}:{number}"
            description, entry_point, call = make_case(folder / "intact", place, seed)
            print(json.dumps([number, entry_point, description]), flush=True)
            outcome = outcome_of(call, folder / "output")
            print(json.dumps([number, outcome]), flush=True)
            for left in folder.glob("corrupted-*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


if __name__ == "__main__":
    main()

"""Spoilt files, one after another, in a process of its own: ``python -m tests.hostile.worker``.

Prints a line of JSON per case. The last line of a process that hangs or crashes is the case that
made it so.
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

os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # as the command line has it

import torch
import transformers

from tests.hostile.files import spoil_file, spoil_folder
from tests.hostile.sound import copy_of, make_sound
from tests.hostile.ways_in import WAYS, WrongError, check_told

# Seconds for a case, and bytes for all; generous, since machines differ.
_LIMIT, _MEMORY = 30, 6 * 2**30


class TooLong(BaseException):
    """A case took too long."""


def case(sound: Path, place: Path, seed: str) -> tuple[str, str, Callable[[], str]]:
    """What is spoilt and how, the way in, and a call that takes it."""
    rng = Random(seed)
    original = rng.choice(sorted(sound.iterdir()))
    kind, *_ = re.split("[-.]", original.name)
    place = place.with_suffix(".partial") if kind == "begun" else place
    copy_of(original, place)
    told = spoil_folder(place, rng) if original.is_dir() else spoil_file(place, rng)
    way = rng.choice(WAYS[kind])
    return f"{original.name}: {told}", way.__name__, lambda: way(place, sound)


def verdict(call: Callable[[], str], output: Path) -> str:
    """How it went, "done" or "refused"; anything else is a finding."""
    try:
        with _limited(), _captured(output):
            found = call()
        if found == "status 2":
            check_told(output.read_text(errors="replace"))
            return "refused"
        return found
    except TooLong:
        return f"too long: {traceback.format_exc()[-1500:]}"
    except WrongError as error:
        return f"wrong: {error}"
    except BaseException:
        return f"traceback: {traceback.format_exc()[-3000:]}"


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(_LIMIT)
    # For what no signal interrupts.
    faulthandler.dump_traceback_later(2 * _LIMIT, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _captured(path: Path) -> Iterator[None]:
    """A block whose standard error goes to a file, and its standard output nowhere."""
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
        make_sound(folder / "sound")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
        for number in range(options.first, options.last):
            place = folder / f"spoilt-{number}"
            told, way, call = case(folder / "sound", place, f"{options.seed}:{number}")
            print(json.dumps([number, way, told]), flush=True)
            found = verdict(call, folder / "output")
            print(json.dumps([number, found]), flush=True)
            for left in folder.glob("spoilt-*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


if __name__ == "__main__":
    main()

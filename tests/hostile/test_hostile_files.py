"""Whatever a file holds, it is loaded as it is or refused in a line, in bounded time."""

import json
import subprocess
import sys
from collections import Counter

import pytest

# For a whole run, on a busy machine; every case has a limit of its own.
_SECONDS = 900


def run(seed: int, count: int) -> Counter:
    """Count the outcomes of cases in a process of their own; assert that none is a finding."""
    call = [sys.executable, "-m", "tests.hostile.worker", str(seed), "0", str(count)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=_SECONDS)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    cases = [line for line in lines if len(line) == 3]
    outcomes = [line for line in lines if len(line) == 2]
    assert done.returncode == 0, f"after {cases[-1:]}: {done.stderr[-2000:]}"
    found = [
        f"case {number} of seed {seed}, {description}, by {entry_point}: {outcome}"
        for (number, entry_point, description), (_, outcome) in zip(cases, outcomes, strict=True)
        if outcome not in ("done", "refused")
    ]
    assert not found, "\n\n".join(found[:5])
    return Counter(outcome for _, outcome in outcomes)


def test_corrupted_files_are_loaded_as_they_are_or_refused_in_a_line():
    outcomes = run(seed=0, count=300)
    # Some corruptions do not matter, most of them do.
    assert outcomes["done"] > 30
    assert outcomes["refused"] > 150


@pytest.mark.slow
def test_thousands_of_corrupted_files_are_too():
    run(seed=1, count=1700)  # two thousand with those above

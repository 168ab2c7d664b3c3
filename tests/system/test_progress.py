"""Progress bars are for terminals that somebody watches; a log gets none."""

import subprocess
import sys

import pytest

from tests.terminal import errors_on_terminal

BARS = """
from tnmoe.system.progress import progress_bar, progress_callback
for _ in progress_bar(range(3), desc="loop", mininterval=0):
    pass
with progress_callback("call", "B") as show:
    show(0, 10)
    show(10, 10)
"""
COMMAND = [sys.executable, "-c", BARS]


def test_a_terminal_gets_bars():
    shown = errors_on_terminal(COMMAND, TERM="xterm")
    assert b"loop: 100%" in shown
    assert b"call: 100%" in shown


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "xterm", "TQDM_DISABLE": "1"}])
def test_a_terminal_that_cannot_or_should_not_show_bars_gets_none(environment):
    assert errors_on_terminal(COMMAND, **environment) == b""


@pytest.mark.parametrize(
    "details", [{}, {"TERM": "unknown"}, {"TERM": "xterm", "CI": "true"}, {"columns": 0}]
)
def test_a_log_that_is_written_through_a_terminal_gets_none(details):
    assert errors_on_terminal(COMMAND, **details) == b""


def test_a_pipe_gets_none():
    done = subprocess.run(COMMAND, capture_output=True, check=True)
    assert done.stdout + done.stderr == b""


def test_nothing_is_shown_where_standard_error_is_closed():
    closed = ["sh", "-c", '"$@" 2>&-', "sh", *COMMAND]
    subprocess.run(closed, check=True)

"""Progress bars are for terminals; a log gets none."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

SHOWN = """
from tnmoe.system.progress import progress_bar, progress_callback
for _ in progress_bar(range(3), desc="loop", mininterval=0):
    pass
with progress_callback("call", "B") as show:
    show(0, 10)
    show(10, 10)
"""
COMMAND = [sys.executable, "-c", SHOWN]


def on_terminal(**environment):
    """Standard error of the bars on a terminal."""
    terminal, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    shown = b""
    with subprocess.Popen(COMMAND, stderr=side, env=os.environ | environment) as process:
        os.close(side)
        try:
            while part := os.read(terminal, 4096):
                shown += part
        except OSError:  # the other side has closed
            pass
    assert process.returncode == 0
    return shown


def test_a_terminal_gets_bars():
    shown = on_terminal(TERM="xterm")
    assert b"loop: 100%" in shown
    assert b"call: 100%" in shown


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "xterm", "TQDM_DISABLE": "1"}])
def test_a_terminal_that_cannot_or_should_not_show_bars_gets_none(environment):
    assert on_terminal(**environment) == b""


def test_a_pipe_gets_none():
    done = subprocess.run(COMMAND, capture_output=True, check=True)
    assert done.stdout + done.stderr == b""


def test_nothing_is_shown_where_standard_error_is_closed():
    closed = ["sh", "-c", '"$@" 2>&-', "sh", *COMMAND]
    subprocess.run(closed, check=True)

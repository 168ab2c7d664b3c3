"""Commands on a terminal that somebody watches, whatever the tests themselves run in."""

import fcntl
import os
import pty
import struct
import subprocess
import termios

# Variables that decide whether a terminal is taken for a watched one.
DECIDING = ("CI", "TERM", "TQDM_DISABLE")


def errors_on_terminal(command, columns=100, **environment):
    """Standard error of a command that must succeed; of DECIDING, only what is given is set."""
    terminal, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown = b""
    inherited = {name: value for name, value in os.environ.items() if name not in DECIDING}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=side, env=inherited | environment
    ) as process:
        os.close(side)
        try:
            while part := os.read(terminal, 4096):
                shown += part
        except OSError:  # the other side has closed
            pass
    os.close(terminal)
    assert process.returncode == 0
    return shown

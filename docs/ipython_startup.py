"""The command line for the site's notebooks: conf.py puts this file where their kernels look.

A cell that consists of one line and begins with ``tnmoe`` runs the command in the kernel, which has
imported torch already. A new process would spend seconds on that.
"""

import os
import shlex
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from IPython import get_ipython

# Pages show the plans of a typical machine, not of the one that builds them.
os.environ["TNMOE_CACHE"] = os.path.abspath(".cache/tnmoe")


def _run_command(line: str) -> None:
    """Print what a shell would show of a command."""
    from tnmoe.cli import main

    with StringIO() as text, redirect_stdout(text), redirect_stderr(text):
        try:
            status = main(shlex.split(line))
        except SystemExit as stopped:
            status = stopped.code
        # The folder that the page runs in is of no interest to a reader.
        output = text.getvalue().replace(os.getcwd(), "/home/you")
    print(output, end="")
    if status:
        print(f"(exit status {status})")


get_ipython().register_magic_function(_run_command, "line", "tnmoe")

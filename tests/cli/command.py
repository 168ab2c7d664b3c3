"""The command as tests run it."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

from tnmoe.cli import main

TNMOE = str(Path(sys.executable).parent / "tnmoe")


def tnmoe(*arguments, code=0):
    """Run the command in this process: importing torch again takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            returned = main([*map(str, arguments)])
        except SystemExit as stopped:
            returned = stopped.code
    assert returned == code, err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())

"""One library on one large case; isolated.py starts this script in a new process."""

from __future__ import annotations

import json
import signal
import sys
from math import ceil
from pathlib import Path
from typing import Any

from algebra import first_call
from cases import all_cases
from machine import keep_freed_memory, limit_memory, set_threads, timed
from peers import libraries

# Seconds that the check of a result in double precision may add to the first call.
CHECK_S = 60


def main() -> None:
    """Make the first call and the timed calls, and write the row after each of them."""
    request = json.loads(sys.argv[1])
    limit_memory(request["memory"], request["device"])
    keep_freed_memory()
    set_threads()
    cases = all_cases(False, request["dtype"], request["matrix"])
    case = next(case for case in cases if case.name == request["case"])
    library = next(lib for lib in libraries(request["device"]) if lib.name == request["library"])
    inputs = case.make()
    # An alarm without a handler ends the process even in the middle of a LAPACK call.
    signal.alarm(ceil(request["limit"]) + CHECK_S)
    row, call = first_call(case, library, inputs, request["limit"])
    answer = Path(request["answer"])
    _write(answer, row)
    for _ in range(request["repeats"] if call is not None else 0):
        signal.alarm(ceil(request["limit"]))
        row["seconds"].append(timed(call, library)[0])
        _write(answer, row)


def _write(path: Path, row: dict[str, Any]) -> None:
    path.write_text(json.dumps(row))


if __name__ == "__main__":
    main()

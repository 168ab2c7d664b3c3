"""``python -m experiments``: run the settings, then write tables, pictures and JSON."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from experiments.curves import check_tensorboard
from experiments.folder import SettingFolder
from experiments.report import write_report
from experiments.schedule import run_all
from experiments.settings import SCALES, all_settings
from experiments.texts import Text, default_texts
from tnmoe.cli.arguments import int_from_one
from tnmoe.errors import InputError
from tnmoe.nn.compute.devices import usable_device
from tnmoe.system.locks import locked


def main() -> int:
    """Run the command; return the exit status."""
    options = _options()
    texts = [Text(path) for path in options.text] if options.text else default_texts()
    settings = all_settings(options.scale, *texts)
    if unknown := sorted(set(options.settings or ()) - set(settings)):
        names = ", ".join(settings)
        print(f"experiments: no setting {', '.join(unknown)}; there are {names}", file=sys.stderr)
        return 2
    usual = [name for name, setting in settings.items() if not setting.by_name]
    chosen = [settings[name] for name in options.settings or usual]
    if options.seeds is not None:
        chosen = [setting.with_seeds(options.seeds) for setting in chosen]
    output = options.output or Path("reproduce-output") / options.scale
    folders = [SettingFolder(output, setting, options.tensorboard) for setting in chosen]
    try:
        if options.tensorboard:
            check_tensorboard()
        return _run_and_report(folders, output, options)
    except InputError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"experiments: {error.filename or output}: {error.strerror or error}", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("\nexperiments: interrupted; the same command continues from there", file=sys.stderr)
        return 130


def _run_and_report(folders: list[SettingFolder], output: Path, options: argparse.Namespace) -> int:
    device = str(usable_device(options.device))
    failures: list[str] = []
    if not options.report_only:
        with locked(output / ".lock", str(output)):
            failures = run_all(folders, device, options.jobs, options.threads)
    written = write_report(folders, options.report or output / "report", device)
    if not written and not failures:
        names = ", ".join(folder.setting.name for folder in folders)
        raise InputError(f"{output} holds no results of {names}")
    for path in written:
        print(path)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="experiments", description=__doc__)
    add = parser.add_argument
    add("--scale", choices=SCALES, default="full", help="sizes and steps (default: %(default)s)")
    add("--quick", action="store_const", const="quick", dest="scale", help="--scale quick")
    add("--settings", nargs="+", metavar="NAME", help="settings to run (default: all but mpnet)")
    add("--seeds", type=int_from_one, help="number of seeds (default: each setting's own)")
    add(
        "--text",
        nargs=2,
        type=Path,
        metavar="FILE",
        help="text to pretrain on and text of the new domain (default: Python's help topics)",
    )
    add("--output", type=Path, help="(default: reproduce-output/SCALE)")
    add("--report", type=Path, help="folder of tables, pictures, JSON (default: OUTPUT/report)")
    add("--report-only", action="store_true", help="report on existing results; run nothing")
    add("--device", default="cpu", help="torch device (default: %(default)s)")
    add(
        "--jobs",
        type=int_from_one,
        default=os.cpu_count() or 1,
        help="runs at a time (default: cores)",
    )
    add("--threads", type=int_from_one, default=1, help="threads of a run (default: %(default)s)")
    add(
        "--tensorboard",
        action="store_true",
        help="write the loss of every step under OUTPUT for TensorBoard, which must be installed",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

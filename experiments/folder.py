"""The files of a reproduction, each written whole or not at all: data, models, results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from experiments.settings import Setting
from experiments.statistics import best_rate
from tnmoe.errors import InputError
from tnmoe.system.durable import write_atomically


@dataclass(frozen=True)
class SettingFolder:
    """The files of one setting.

    Attributes
    ----------
    root : Path
        Folder of all settings.
    setting : Setting
    has_curves : bool
        Whether runs also write the losses of their steps here.
    """

    root: Path
    setting: Setting
    has_curves: bool = False

    @property
    def path(self) -> Path:
        """Folder of the setting."""
        return self.root / self.setting.name

    def data(self, stage: str) -> Path:
        """Return the folder of a stage's prepared data; stages are ``pretraining`` and ``main``."""
        return self.path / stage

    def pretrained(self, seed: int) -> Path:
        """Return the folder of the dense model of a seed; its results are beside it."""
        return self.path / "pretrained" / f"seed{seed}"

    def is_pretrained(self, seed: int) -> bool:
        """Return whether the dense model of a seed exists or none is needed."""
        done = self.pretrained(seed).with_suffix(".json")
        return self.setting.pretraining is None or done.exists()

    def result(self, method: str, learning_rate: float, seed: int) -> Path:
        """Return the file of a run's results."""
        return self.path / "runs" / method / f"lr{learning_rate:g}-seed{seed}.json"

    def curve(self, method: str, learning_rate: float, seed: int) -> Path | None:
        """Return the folder for the losses of a run's steps; None without ``has_curves``."""
        path = self.path / "curves" / method / f"lr{learning_rate:g}-seed{seed}"
        return path if self.has_curves else None

    def cost(self, method: str) -> Path:
        """Return the file with the cost of a method's step."""
        return self.path / "costs" / f"{method}.json"

    def results(self) -> list[dict[str, Any]]:
        """Read the existing results of all methods whose learning rate is known."""
        ready = {each for each in self.setting.methods if self.best_rate(each) is not None}
        return [read(path) for path in self.run_files() if path.parent.name in ready]

    def run_files(self) -> list[Path]:
        """Return the files of all existing results."""
        runs = self.path / "runs"
        return sorted(path for each in self.setting.methods for path in runs.glob(f"{each}/*.json"))

    def best_rate(self, method: str) -> float | None:
        """Return a method's best learning rate; None until all were tried with the tuning seeds."""
        paths = [
            self.result(method, rate, seed)
            for rate in self.setting.stage.learning_rates
            for seed in range(self.setting.tuning_seeds)
        ]
        return best_rate([read(path) for path in paths]) if all(p.exists() for p in paths) else None

    def prepare(self) -> None:
        """Prepare the data unless they exist.

        Raises
        ------
        InputError
            If the folder holds results of other data, steps or learning rates.
        """
        made_for = self.path / "setting.json"
        setting = self.setting
        now = {"stage": repr(setting.stage), "pretraining": repr(setting.pretraining),
               "mixture": repr(setting.mixture)}  # fmt: skip
        if made_for.exists() and read(made_for) != now:
            raise InputError(
                f"{self.path} holds results of other data, sizes, steps or learning rates; "
                "give another --output, or remove it"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        write(made_for, now)
        stages = {"pretraining": setting.pretraining, "main": setting.stage}
        for name, stage in stages.items():
            description = self.data(name) / "data.json"
            if stage is not None and not description.exists():
                self.data(name).mkdir(exist_ok=True)
                write(description, stage.task.prepare(self.data(name)))

    def describe_data(self) -> dict[str, Any]:
        """Read the description of every stage's data."""
        names = ["main"] if self.setting.pretraining is None else ["pretraining", "main"]
        return {name: read(self.data(name) / "data.json") for name in names}


def read(path: Path) -> Any:
    """Read data from JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, data: Any) -> None:
    """Write data as JSON, the whole file or nothing; numbers that are not finite become null."""
    text = json.dumps(_finite(data), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(each) for key, each in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(each) for each in data]
    return None if isinstance(data, float) and not isfinite(data) else data

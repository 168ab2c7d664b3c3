"""What a reproduction keeps on disk: data, pretrained models, results; all-or-nothing files."""

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
        Of all settings.
    setting : Setting
    has_curves : bool
        Whether runs leave the losses of their steps here, too.
    """

    root: Path
    setting: Setting
    has_curves: bool = False

    @property
    def path(self) -> Path:
        """Where they are."""
        return self.root / self.setting.name

    def data(self, stage: str) -> Path:
        """Prepared data of a stage: ``pretraining`` or ``main``."""
        return self.path / stage

    def pretrained(self, seed: int) -> Path:
        """The dense model that pretraining makes for a seed; its results are beside it."""
        return self.path / "pretrained" / f"seed{seed}"

    def is_pretrained(self, seed: int) -> bool:
        """Whether the dense model of a seed is there, or none is needed."""
        done = self.pretrained(seed).with_suffix(".json")
        return self.setting.pretraining is None or done.exists()

    def result(self, method: str, learning_rate: float, seed: int) -> Path:
        """Results of a run."""
        return self.path / "runs" / method / f"lr{learning_rate:g}-seed{seed}.json"

    def curve(self, method: str, learning_rate: float, seed: int) -> Path | None:
        """Folder for the losses of a run's steps, where they are wanted."""
        path = self.path / "curves" / method / f"lr{learning_rate:g}-seed{seed}"
        return path if self.has_curves else None

    def cost(self, method: str) -> Path:
        """What a step of a method costs."""
        return self.path / "costs" / f"{method}.json"

    def results(self) -> list[dict[str, Any]]:
        """All there are, of those of the setting's methods whose learning rate is known."""
        ready = {each for each in self.setting.methods if self.best_rate(each) is not None}
        return [read(path) for path in self.run_files() if path.parent.name in ready]

    def run_files(self) -> list[Path]:
        """Files of all results there are."""
        runs = self.path / "runs"
        return sorted(path for each in self.setting.methods for path in runs.glob(f"{each}/*.json"))

    def best_rate(self, method: str) -> float | None:
        """The method's learning rate, once all were tried with the seeds that choose it."""
        paths = [
            self.result(method, rate, seed)
            for rate in self.setting.stage.learning_rates
            for seed in range(self.setting.tuning_seeds)
        ]
        return best_rate([read(path) for path in paths]) if all(p.exists() for p in paths) else None

    def prepare(self) -> None:
        """Prepare the data, unless they are there.

        Raises
        ------
        InputError
            If the folder is of other data, steps or learning rates.
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
        """What the stages' data are."""
        names = ["main"] if self.setting.pretraining is None else ["pretraining", "main"]
        return {name: read(self.data(name) / "data.json") for name in names}


def read(path: Path) -> Any:
    """Data from JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, data: Any) -> None:
    """Data as JSON, all or nothing; what is not finite becomes null."""
    text = json.dumps(_finite(data), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(each) for key, each in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(each) for each in data]
    return None if isinstance(data, float) and not isfinite(data) else data

"""Adapters at equal numbers of trained parameters: LoRA, DoRA, X-LoRA, MPOs and routed experts.

    python benchmarks/adapters.py --work FOLDER --text moby_dick.txt        # SmolLM2, many hours
    python benchmarks/adapters.py --work FOLDER --model minilm              # reviews
    python benchmarks/adapters.py --work FOLDER --methods 'residual*' DoRA  # and LoRA
    python benchmarks/adapters.py --work FOLDER --tiny                      # a random model

Every adapter trains on two domains at once, with the same batches and steps. Each method takes the
largest size within one budget of parameters, and the best of a few learning rates: a seed of its
own tries all of them and compares losses on a validation part. The other seeds train at that rate
and measure the loss on a test part. The script keeps results of cases in FOLDER and goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import inf
from pathlib import Path
from typing import Any

from adapters_measures import held_out, step_bytes, step_seconds, train
from adapters_methods import METHODS, REFERENCE, attach, matched
from adapters_settings import SETTINGS, Setting
from adapters_tables import notes, table, title
from machine import environment, hardware_slug, set_threads
from stored import kept, matches, slug

from tnmoe.demo.models import quiet_transformers
from tnmoe.system.tables import format_table

# Its losses choose learning rates, and count for nothing else.
TUNING_SEED = 1000


def main() -> None:
    """Match sizes, time steps, train; write and print the results."""
    options = parse_arguments()
    threads = set_threads()
    quiet_transformers()
    report = {
        "environment": environment(("tnmoe", "transformers", "peft"), "cpu", threads),
        "dtype": "float32",
        **Run.of(options).measure(),
    }
    output = options.output or default_output(options.model)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    parts = ["", title(report), format_table(*table(report)), *notes(report)]
    print("\n\n".join([*parts, f"written to {output}"]))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for texts and results")
    parser.add_argument("--model", choices=SETTINGS, default="smollm2")
    parser.add_argument("--text", type=Path, help="first domain of a language model")
    parser.add_argument("--methods", nargs="*", default=["*"], help="patterns of their names")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, help="by default the model's")
    parser.add_argument("--rates", nargs="*", type=float, help="learning rates to choose from")
    parser.add_argument("--rank", type=int, help="of the LoRA whose parameters are the budget")
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each method")
    parser.add_argument("--tiny", action="store_true", help="--model tiny --seeds 0 1 --turns 1")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    if TUNING_SEED in options.seeds or not options.seeds:
        parser.error(f"--seeds needs seeds other than {TUNING_SEED}, which chooses rates")
    if options.tiny:
        options.model, options.seeds, options.turns = "tiny", [0, 1], 1
    return options


def default_output(model: str) -> Path:
    """Return the result file of this machine."""
    name = f"{model}-{hardware_slug('cpu')}.json"
    return Path(__file__).parent / "results" / "adapters" / name


@dataclass(frozen=True)
class Run:
    """Everything that one call measures.

    Attributes
    ----------
    setting : Setting
    cases : Path
        Folder of the files of cases.
    data : dict
        Descriptions of the domains.
    options : Namespace
    """

    setting: Setting
    cases: Path
    data: dict[str, Any]
    options: argparse.Namespace

    @classmethod
    def of(cls, options: argparse.Namespace) -> Run:
        """Prepare the domains, and refuse a folder with cases of other settings."""
        folder = options.work / options.model
        setting = SETTINGS[options.model](folder, options.text)
        given = {key: getattr(options, key) for key in ("steps", "rates", "rank")}
        setting = replace(setting, **{key: each for key, each in given.items() if each})
        cases = folder / f"rank{setting.rank}-steps{setting.steps}"
        cases.mkdir(parents=True, exist_ok=True)
        text = {"text": str(options.text)}
        if kept(folder / "text.json", lambda: text) != text:
            raise SystemExit(f"{folder} holds results for another text: name another --work")
        return cls(setting, cases, setting.prepare(), options)

    @cached_property
    def names(self) -> list[str]:
        """LoRA, and the methods that were asked for."""
        patterns = [REFERENCE, *self.options.methods]
        return [name for name in METHODS if matches(name, patterns)]

    def measure(self) -> dict[str, Any]:
        """Run all cases; return the report."""
        before = kept(self.cases / "before.json", self.before)
        methods = {name: self.costs(name) for name in self.names}
        fitting = [name for name, about in methods.items() if "note" not in about]
        print(self.estimate([methods[name] for name in fitting], before), flush=True)
        tuning, results = [], []
        for name in fitting:
            trained = partial(self.trained, name, methods[name]["size"])
            tried = [trained(TUNING_SEED, rate, "validation") for rate in self.setting.rates]
            best = min(tried, key=validation_loss)
            chosen = {"validation": best["validation"]}
            tuning += tried
            results += [
                trained(seed, best["learning_rate"], "test") | chosen for seed in self.options.seeds
            ]
        return {
            "model": self.options.model, "data": self.data, "steps": self.setting.steps,
            "rank": self.setting.rank, "rates": self.setting.rates, "seeds": self.options.seeds,
            "budget": methods[REFERENCE]["trained"], "before": before["test"],
            "methods": methods, "tuning": tuning, "results": results,
        }  # fmt: skip

    def base(self, seed: int) -> Any:
        """Make a base model, without those of earlier cases in memory."""
        gc.collect()  # models with adapters refer to themselves
        return self.setting.base(seed)

    def before(self) -> dict[str, Any]:
        """Return the results of the base model. A head is that of the first seed."""
        base = self.base(self.options.seeds[0])
        start = time.perf_counter()
        test, _ = held_out(base, self.setting, "test")
        return {"test": test, "seconds": time.perf_counter() - start}

    def costs(self, name: str) -> dict[str, Any]:
        """Return the size of a method that fits the budget, and what it costs."""
        seed, setting = self.options.seeds[0], self.setting
        found = kept(
            self._file(name, "size"),
            lambda: matched(name, self.base(seed), setting, setting.rank),
        )
        found["unit"] = METHODS[name].unit
        if "note" in found:
            return found
        sizes = {REFERENCE: setting.rank, name: found["size"]}
        seconds = kept(
            self._file(name, "seconds"),
            lambda: step_seconds(name, self.base(seed), setting, sizes, self.options.turns),
        )
        memory = kept(
            self._file(name, "memory"),
            lambda: {"step bytes": step_bytes(name, setting, found["size"])},
        )
        return found | seconds | memory

    def trained(self, name: str, size: int, seed: int, rate: float, split: str) -> dict[str, Any]:
        """Return held-out results of a trained adapter."""
        new = not (file := self._file(name, f"seed{seed}-rate{rate:g}")).exists()
        found = kept(file, partial(self._train, name, size, seed, rate, split))
        if new:
            print(f"{name}, seed {seed}, rate {rate:g}: {found[split]}", flush=True)
        return found

    def _train(self, name: str, size: int, seed: int, rate: float, split: str) -> dict[str, Any]:
        start = time.perf_counter()
        adapted = attach(name, self.base(seed), self.setting, size, seed)
        train(adapted, self.setting, seed, rate, self.setting.steps)
        losses, distance = held_out(adapted, self.setting, split)
        return {
            "method": name, "seed": seed, "learning_rate": rate, split: losses,
            "routing distance": distance, "run seconds": time.perf_counter() - start,
        }  # fmt: skip

    def _file(self, name: str, what: str) -> Path:
        return self.cases / f"{slug(name)}-{what}.json"

    def estimate(self, methods: list[dict[str, Any]], before: dict[str, Any]) -> str:
        """Say how long all training takes, also that which is done."""
        runs = len(self.setting.rates) + len(self.options.seeds)
        steps = self.setting.steps * sum(each["seconds"] for each in methods)
        hours = runs * (steps + before["seconds"] * len(methods)) / 3600
        return f"{runs * len(methods)} runs of {self.setting.steps} steps, about {hours:.1f} hours"


def validation_loss(found: dict[str, Any]) -> float:
    """Return the loss that chooses rates; infinite where training diverged."""
    loss = found["validation"]["loss"]
    return inf if loss is None else loss


if __name__ == "__main__":
    main()

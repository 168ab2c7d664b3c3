"""The settings: data, models, sizes and methods of every experiment, at three scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.task import Task
from experiments.tasks.language import SmallGPT2, SmolLM2
from experiments.tasks.reviews import MiniLM, MPNet
from experiments.tasks.sentiment import Sentiment
from experiments.tasks.spans import SpanCorruption
from experiments.tasks.t5 import FlanT5, SmallT5
from experiments.texts import Text

SCALES = ("quick", "full", "large")


@dataclass(frozen=True)
class Stage:
    """A stage of training.

    Attributes
    ----------
    task : Task
    steps : int
    learning_rates : tuple of float
        Peaks of the schedule. The tuning seeds try all of them; the remaining seeds use the rate
        with the lowest validation loss.
    """

    task: Task
    steps: int
    learning_rates: tuple[float, ...]


@dataclass(frozen=True)
class Setting:
    """An experiment in which every method starts from the same models and sees the same batches.

    Attributes
    ----------
    name, title : str
    stage : Stage
        The training that is compared.
    methods : tuple of str
        Names of the methods in the order of their runs, the most important first.
    seeds, tuning_seeds : int
        Number of seeds, and number of seeds that try all learning rates.
    pretraining : Stage, optional
        Makes the dense model of every seed; without it the task loads real weights.
    metric : str
        The held-out result in tables and pictures. Claims use the loss.
    mixture : mapping
        Settings of :class:`tnmoe.hf.MPOEConfig` for all methods.
    cost_turns : int
        Number of steps whose median time is the cost of a step.
    by_name : bool
        Whether to run only if the command names it, because it needs further packages.
    """

    name: str
    title: str
    stage: Stage
    methods: tuple[str, ...]
    seeds: int
    tuning_seeds: int = 1
    pretraining: Stage | None = None
    metric: str = "loss"
    mixture: Mapping[str, Any] = field(default_factory=dict)
    cost_turns: int = 7
    by_name: bool = False

    def with_seeds(self, seeds: int) -> Setting:
        """Return the setting with another number of seeds."""
        return replace(self, seeds=seeds, tuning_seeds=min(self.tuning_seeds, seeds))


MAIN = ("dense", "dense-wide", "moe", "mpoe", "split-64", "mpoe-mask-0.5", "moe-top2", "mpoe-top2")

# For real weights, where a step takes seconds.
_REAL = ("dense", "moe", "mpoe", "split-64", "mpoe-mask-0.5")

# Every method once, those above first.
GRID = (
    *MAIN, "split-64-top2", "mpoe-owned-0.35", "split-64-owned-0.35", "moe-owned-0.35",
    "mpoe-top2-owned-0.35", "split-64-top2-owned-0.35",
    "split-16", "split-128", "mpoe-half", "separate", "low-rank", "share-rest",
    "mpoe-slow-0.1", "mpoe-frozen", "mpoe-mask-0.25", "mpoe-mask-0.9",
    *(f"{kind}-e{count}" for count in (2, 32) for kind in ("mpoe", "moe")),
    "mpoe-fresh", "moe-fresh", "dense-fresh", "split-64-mask-0.5",
    *(f"{kind}-e{count}" for count in (4, 16) for kind in ("mpoe", "moe")),
    "mpoe-schmidt", "mpoe-scaled", "mpoe-noise", "moe-noise", "split-64-schmidt",
    "mpoe-owned-0.1", "mpoe-owned-4", *(f"split-64-e{count}" for count in (2, 32, 4, 16)),
)  # fmt: skip


def all_settings(scale: str, old: Text, new: Text) -> dict[str, Setting]:
    """Return all settings by name.

    Parameters
    ----------
    scale : str
        One of :data:`SCALES`.
    old, new : Text
        Text of the pretraining, and text of the new domain.
    """
    settings = [
        decoder(scale, old, new), smollm2(scale, new), t5(scale, old, new), flan_t5(scale),
        minilm(scale), mpnet(scale),
    ]  # fmt: skip
    if scale == "quick":
        settings = [replace(setting, cost_turns=3) for setting in settings]
    return {setting.name: setting for setting in settings}


def decoder(scale: str, old: Text, new: Text) -> Setting:
    """Return setting A (i): a small GPT-2, pretrained on one text, continued on another."""
    # Batches are large because an expert sees an eighth of one, and what it learns from fewer
    # tokens is mostly noise. With batches of 8 windows no mixture was better than the dense model.
    sizes: dict[str, Any] = {
        "quick": {"width": 64, "layers": 2, "vocabulary": 512, "window": 64, "windows": 8},
        "full": {"width": 64, "layers": 2, "vocabulary": 512, "windows": 32},
        "large": {"width": 512, "layers": 8, "heads": 8, "vocabulary": 8192, "window": 256,
                  "windows": 64},
    }[scale]  # fmt: skip
    before, steps = {"quick": (60, 30), "full": (1500, 400), "large": (6000, 1500)}[scale]
    shared: dict[str, Any] = {"vocabulary_from": old, **sizes}
    return Setting(
        name="decoder",
        title="Small GPT-2, pretrained on one text, continued on another",
        stage=Stage(SmallGPT2(new, **shared, pretrained="pretrained"), steps, (3e-3, 6e-3, 1.2e-2)),
        methods=MAIN if scale == "quick" else GRID,
        seeds={"quick": 1, "full": 3, "large": 3}[scale],
        pretraining=Stage(SmallGPT2(old, **shared), before, (4e-3,)),
    )


def smollm2(scale: str, new: Text) -> Setting:
    """Return setting A (ii): the real SmolLM2-135M, continued on a text."""
    steps = {"quick": 2, "full": 20, "large": 600}[scale]
    windows = {"quick": 1, "full": 4, "large": 32}[scale]
    task = SmolLM2(new, windows=windows, held_out_tokens=1024 if scale == "quick" else 4096)
    return Setting(
        name="smollm2",
        title="SmolLM2-135M, continued on a text",
        stage=Stage(task, steps, (1e-4, 3e-4)),
        methods=_REAL,
        seeds={"quick": 1, "full": 3, "large": 3}[scale],
        mixture={"every": 3 if scale == "large" else 10},
    )


def t5(scale: str, old: Text, new: Text) -> Setting:
    """Return setting B (i): a small T5, pretrained on spans of one text, continued on another's."""
    sizes: dict[str, Any] = {
        "quick": {"width": 64, "hidden": 128, "layers": 1},
        "full": {},
        "large": {"width": 512, "hidden": 2048, "layers": 6, "heads": 8, "vocabulary": 8192},
    }[scale]
    data: dict[str, Any] = {
        "quick": {"window": 64, "examples": 8, "held_out_examples": 40},
        "full": {"held_out_examples": 400},
        "large": {"window": 256, "examples": 64},
    }[scale]
    before, steps = {"quick": (60, 30), "full": (1800, 300), "large": (20000, 1500)}[scale]
    # T5 sees few targets. In so few steps it learns only which tokens of a small vocabulary are
    # neighbours.
    begin = SmallT5(old, **{"vocabulary": 512, **sizes})
    continued = replace(begin, pretrained="pretrained")
    return Setting(
        name="t5",
        title="Small T5, pretrained on spans of one text, continued on another's",
        stage=Stage(SpanCorruption(model=continued, text=new, **data), steps, (1.5e-3, 3e-3, 6e-3)),
        methods=MAIN,
        seeds={"quick": 1, "full": 3, "large": 3}[scale],
        pretraining=Stage(SpanCorruption(model=begin, text=old, **data), before, (3e-3,)),
    )


def flan_t5(scale: str) -> Setting:
    """Return setting B (ii): the real flan-t5-small, on sentiment of sentences as text."""
    examples, steps = {"quick": (2, 2), "full": (8, 30), "large": (32, 400)}[scale]
    held_out = {"quick": 8, "full": 300, "large": None}[scale]
    task = Sentiment(model=FlanT5(), examples=examples, held_out_examples=held_out)
    return Setting(
        name="flan-t5",
        title="flan-t5-small, fine-tuned on sentiment of reviews as text",
        stage=Stage(task, steps, (1e-4, 3e-4)),
        methods=_REAL,
        seeds={"quick": 1, "full": 3, "large": 3}[scale],
        mixture={"every": 1 if scale == "large" else 4},
    )


_REVIEWS = (*_REAL, "moe-top2", "mpoe-top2", "dense-wide", "mpoe-frozen")


def minilm(scale: str) -> Setting:
    """Return setting C (i): the real MiniLM, fine-tuned on sentiment of sentences."""
    batch_size, length, steps = {
        "quick": (4, 32, 4), "full": (16, 40, 64), "large": (64, 64, 640)
    }[scale]  # fmt: skip
    held_out = 64 if scale == "quick" else None
    task = MiniLM(batch_size=batch_size, length=length, held_out=held_out)
    return Setting(
        name="minilm",
        title="all-MiniLM-L6-v2, fine-tuned on sentiment of reviews",
        stage=Stage(task, steps, (1e-4, 3e-4)),
        methods=_REVIEWS,
        seeds={"quick": 1, "full": 5, "large": 5}[scale],
        # After so few steps the losses of one seed say little about rates.
        tuning_seeds=1 if scale == "quick" else 2,
        metric="accuracy",
        mixture={"every": 2},
    )


def mpnet(scale: str) -> Setting:
    """Return setting C (ii): the real MPNet base, 768 × 3072."""
    batch_size, steps = {"quick": (2, 2), "full": (16, 40), "large": (64, 640)}[scale]
    held_out = {"quick": 16, "full": 200, "large": None}[scale]
    return Setting(
        name="mpnet",
        title="all-mpnet-base-v2, fine-tuned on sentiment of reviews",
        stage=Stage(MPNet(batch_size=batch_size, held_out=held_out), steps, (3e-5, 1e-4)),
        methods=_REVIEWS[:4],
        seeds={"quick": 1, "full": 3, "large": 5}[scale],
        metric="accuracy",
        mixture={"every": 3},
        by_name=True,
    )

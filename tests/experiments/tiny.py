"""A setting that trains in seconds."""

from experiments.settings import Setting, Stage
from experiments.tasks.language import SmallGPT2
from experiments.texts import Text


def write_texts(folder):
    """Two texts of a few words, in different orders."""
    words = [
        "the",
        "whale",
        "and",
        "the",
        "sea",
        "were",
        "white",
        "under",
        "a",
        "dark",
        "sky",
        "of",
        "storm",
    ]
    for name, step in (("old", 5), ("new", 7)):
        line = [words[(index * step + index // 9) % len(words)] for index in range(14_000)]
        rows = (" ".join(line[start : start + 10]) for start in range(0, len(line), 10))
        (folder / f"{name}.txt").write_text("\n".join(rows))
    return Text(folder / "old.txt"), Text(folder / "new.txt")


def setting(old, new, methods=("dense", "mpoe", "mpoe-mask-0.5"), steps=4, rates=(1e-3, 4e-3)):
    """A decoder of one layer."""
    sizes = {"vocabulary_from": old, "vocabulary": 300, "width": 16, "layers": 1, "heads": 2,
             "window": 16, "windows": 2}  # fmt: skip
    return Setting(
        name="tiny",
        title="A tiny decoder",
        stage=Stage(SmallGPT2(new, **sizes, pretrained="pretrained"), steps, rates),
        methods=methods,
        seeds=2,
        pretraining=Stage(SmallGPT2(old, **sizes), 3, (1e-3,)),
        mixture={"num_experts": 4},
    )

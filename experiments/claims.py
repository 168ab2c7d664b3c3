"""What MPOE's papers claim, beside what the results say: one row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from experiments.statistics import Difference, Result, chosen, difference

CONFIRMED = "confirmed"
NOT_CONFIRMED = "not confirmed"
NOT_TESTABLE = "not testable here"


@dataclass(frozen=True)
class Verdict:
    """A claim in a setting.

    Attributes
    ----------
    claim, setting, verdict, figures : str
    """

    claim: str
    setting: str
    verdict: str
    figures: str


@dataclass(frozen=True)
class Comparison:
    """A claim that one method has a lower loss than another.

    Attributes
    ----------
    claim : str
    method, other : str
    or_equal : bool
        Whether it is enough that no difference is seen where one of ``margin`` would be.
    """

    claim: str
    method: str
    other: str

    def judge(self, setting: str, results: list[Result]) -> Verdict:
        """Whether the claim holds in a setting; lower is better."""
        found = difference(results, self.method, self.other, "loss")
        if found is None:
            return Verdict(self.claim, setting, NOT_TESTABLE, "not run")
        return Verdict(self.claim, setting, *_word(found))


def _word(found: Difference) -> tuple[str, str]:
    figures = f"loss {found} nats, {len(found.each)} seeds"
    if found.half_width is None:
        return NOT_TESTABLE, f"{figures}: too few"
    if found.sign == 0:
        return NOT_CONFIRMED, f"{figures}: no clear difference"
    return (CONFIRMED, figures) if found.sign < 0 else (NOT_CONFIRMED, f"{figures}: the opposite")


COMPARISONS = (
    Comparison("MPOE is better than the dense model it starts from", "mpoe", "dense"),
    Comparison("… than a dense model with its parameters", "mpoe", "dense-wide"),
    Comparison("… than an ordinary mixture (Switch) of as many experts", "mpoe", "moe"),
    Comparison("… with two experts per token", "mpoe-top2", "moe-top2"),
    Comparison("… with 2 experts", "mpoe-e2", "moe-e2"),
    Comparison("… with 4 experts", "mpoe-e4", "moe-e4"),
    Comparison("… with 16 experts", "mpoe-e16", "moe-e16"),
    Comparison("… with 32 experts", "mpoe-e32", "moe-e32"),
    Comparison("The split layout is better than an ordinary mixture", "split-64", "moe"),
    Comparison("… with 32 experts", "split-64-e32", "moe-e32"),
    Comparison("The gradient mask helps: p = 0.25", "mpoe-mask-0.25", "mpoe"),
    Comparison("… p = 0.5", "mpoe-mask-0.5", "mpoe"),
    Comparison("… p = 0.9", "mpoe-mask-0.9", "mpoe"),
    Comparison("… p = 0.5, split layout", "split-64-mask-0.5", "split-64"),
    Comparison("Freezing the central core helps", "mpoe-frozen", "mpoe"),
    Comparison("A lower central learning rate helps", "mpoe-slow-0.1", "mpoe"),
    Comparison("Sharing the central core is better than all others", "mpoe", "share-rest"),
    Comparison("… than separate truncated factors of as many parameters", "mpoe", "separate"),
    Comparison("… than shared matrices with low-rank terms", "mpoe", "low-rank"),
    Comparison("Upcycling is better than experts drawn anew", "mpoe", "mpoe-fresh"),
)


def judge(results: Mapping[str, list[Result]]) -> list[Verdict]:
    """All claims in all settings that have both methods.

    Parameters
    ----------
    results : mapping from name of a setting to its results
    """
    found = [
        comparison.judge(setting, some)
        for comparison in COMPARISONS
        for setting, some in results.items()
        if {comparison.method, comparison.other} <= {each["method"] for each in some}
    ]
    ratios = [ratio_at_equal_quality(setting, some) for setting, some in results.items()]
    return [*found, *(each for each in ratios if each is not None)]


def ratio_at_equal_quality(setting: str, results: list[Result]) -> Verdict | None:
    """How many times smaller the smallest MPOE is that is as good as the best ordinary mixture."""
    sizes: dict[str, tuple[int, float]] = {}
    for method in sorted({each["method"] for each in results}):
        if runs := chosen(results, method):
            sizes[method] = (runs[0]["parameters"], fmean(_loss(each) for each in runs))
    ordinary = {name: each for name, each in sizes.items() if name.startswith("moe")}
    ours = {name: each for name, each in sizes.items() if name.startswith(("mpoe", "split"))}
    claim = "As good as the best ordinary mixture with fewer parameters"
    if not ordinary or not ours:
        return None
    best = min(ordinary, key=lambda name: ordinary[name][1])
    as_good = [name for name in ours if ours[name][1] <= ordinary[best][1]]
    if not as_good:
        closest = min(ours, key=lambda name: ours[name][1])
        figures = (
            f"none is as good as {best} ({ordinary[best][1]:.4f}); "
            f"the best is {closest} ({ours[closest][1]:.4f})"
        )
        return Verdict(claim, setting, NOT_CONFIRMED, figures)
    smallest = min(as_good, key=lambda name: ours[name][0])
    ratio = ordinary[best][0] / ours[smallest][0]
    figures = (
        f"{smallest}: {ours[smallest][0]:,} parameters, loss {ours[smallest][1]:.4f}; "
        f"{best}: {ordinary[best][0]:,}, {ordinary[best][1]:.4f}; {ratio:.2f} times fewer"
    )
    return Verdict(claim, setting, CONFIRMED if ratio > 1 else NOT_CONFIRMED, figures)


def _loss(result: Result) -> float:
    loss = result["test"]["loss"]
    return float("inf") if loss is None else loss

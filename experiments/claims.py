"""The claims of MPOE's papers, and verdicts on them from the results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

from transformers import T5Config

from experiments.statistics import Difference, Result, chosen, difference, values
from tnmoe import hf

CONFIRMED = "confirmed"
NOT_CONFIRMED = "not confirmed"
NOT_TESTABLE = "not testable here"

# Losses that differ by no more than this many nats count as equal: 1 % of perplexity.
EQUAL = 0.01
_RATIO = "MPOE is as good as the best ordinary mixture, with fewer parameters"
_PAPER_RATIO = "MPOE has 27.2 times fewer parameters than a mixture as good (arXiv:2203.01104)"


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim in one setting.

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
    """A claim about the losses of two methods.

    Attributes
    ----------
    claim : str
        A sentence.
    method, other : str
    margin : float
        How much higher, in nats, the method's loss may be. The claim is confirmed if the whole
        interval of the difference is below the margin. With 0 the method must be better.
    """

    claim: str
    method: str
    other: str
    margin: float = 0.0

    def judge(self, results: Mapping[str, list[Result]]) -> list[Verdict]:
        """Return a verdict for every setting with both methods; a single one if none has both."""
        found = {name: difference(some, self.method, self.other, "loss")
                 for name, some in results.items()}  # fmt: skip
        verdicts = [
            Verdict(self.claim, setting, *_judged(each, self.margin))
            for setting, each in found.items()
            if each is not None
        ]
        missing = Verdict(self.claim, "–", NOT_TESTABLE, f"{self.method} or {self.other} not run")
        return verdicts or [missing]


def _judged(found: Difference, margin: float) -> tuple[str, str]:
    """Return the verdict and its figures."""
    if found.half_width is None:
        return NOT_TESTABLE, f"loss {found.mean:+.4f} nats with one seed: too few"
    figures = f"loss {found} nats, {len(found.each)} seeds"
    if not isfinite(found.mean):
        return NOT_CONFIRMED, f"{figures}: training diverged"
    if found.high < margin:
        return CONFIRMED, figures
    if found.low > 0:
        return NOT_CONFIRMED, f"{figures}: worse"
    return NOT_CONFIRMED, f"{figures}: no clear difference"


def _sweep(claim: str, pairs: Mapping[str, tuple[str, str]], margin: float) -> list[Comparison]:
    """Return one claim under several conditions."""
    return [Comparison(f"{claim}, {each}", *pair, margin) for each, pair in pairs.items()]


_COUNTS = {2: "-e2", 4: "-e4", 8: "", 16: "-e16", 32: "-e32"}

COMPARISONS = (
    Comparison("MPOE is better than the dense model it starts from", "mpoe", "dense"),
    Comparison("MPOE is better than a dense model of its size", "mpoe", "dense-wide"),
    *_sweep(
        "MPOE is at least as good as an ordinary mixture (Switch)",
        {f"{count} experts": (f"mpoe{end}", f"moe{end}") for count, end in _COUNTS.items()}
        | {"8 experts, two a token": ("mpoe-top2", "moe-top2")},
        EQUAL,
    ),
    *_sweep(
        "Split MPOE is at least as good as an ordinary mixture (Switch)",
        {f"{count} experts": (f"split-64{end}", f"moe{end}") for count, end in _COUNTS.items()}
        | {"8 experts, two a token": ("split-64-top2", "moe-top2")},
        EQUAL,
    ),
    *_sweep(
        "The gradient mask helps",
        {f"p = {p}": (f"mpoe-mask-{p}", "mpoe") for p in ("0.25", "0.5", "0.9")}
        | {"p = 0.5, split": ("split-64-mask-0.5", "split-64")},
        0,
    ),
    Comparison("Freezing the central core helps", "mpoe-frozen", "mpoe"),
    Comparison("A lower learning rate of the central core helps", "mpoe-slow-0.1", "mpoe"),
    *_sweep(
        "A lower learning rate of auxiliary cores helps",
        {
            "top-1": ("mpoe-owned-0.35", "mpoe"),
            "split, top-1": ("split-64-owned-0.35", "split-64"),
            "top-2": ("mpoe-top2-owned-0.35", "mpoe-top2"),
            "split, top-2": ("split-64-top2-owned-0.35", "split-64-top2"),
        },
        0,
    ),
    Comparison("Sharing the central core beats sharing all other cores", "mpoe", "share-rest"),
    Comparison("Sharing it beats separate truncated factors of the same size", "mpoe", "separate"),
    Comparison("Sharing it beats shared matrices with low-rank terms", "mpoe", "low-rank"),
    Comparison("Upcycled experts are better than experts drawn anew", "mpoe", "mpoe-fresh"),
)


def judge(results: Mapping[str, list[Result]]) -> list[Verdict]:
    """Judge all claims.

    Parameters
    ----------
    results : mapping from str to list of dict
        The results of every setting, by the setting's name.
    """
    compared = [each for comparison in COMPARISONS for each in comparison.judge(results)]
    ratios = [ratio_at_equal_quality(setting, some) for setting, some in results.items()]
    return [*compared, *(each for each in ratios if each is not None), ratio_of_the_paper()]


def ratio_at_equal_quality(setting: str, results: list[Result]) -> Verdict | None:
    """Find the smallest MPOE that is as good as the best ordinary mixture; return their ratio.

    None if the results lack ordinary mixtures or MPOE.
    """
    sizes = {
        each["method"]: each["parameters"] for each in results if chosen(results, each["method"])
    }
    losses = {name: fmean(values(results, name, "loss").values()) for name in sizes}
    ordinary = [name for name in sizes if name.startswith("moe")]
    ours = [name for name in sizes if name.startswith(("mpoe", "split"))]
    if not ordinary or not ours:
        return None
    best = min(ordinary, key=losses.__getitem__)
    against = {name: difference(results, name, best, "loss") for name in ours}
    known = {name: each for name, each in against.items() if each and each.half_width is not None}
    best_text = f"{best}: {sizes[best]:,} parameters, loss {losses[best]:.4f}"
    if not known:
        return Verdict(_RATIO, setting, NOT_TESTABLE, f"one seed; {best_text}")
    as_good = [name for name, each in known.items() if each.high < EQUAL]
    if not as_good:
        closest = min(known, key=lambda name: known[name].mean)
        figures = (
            f"none is as good as {best_text}; "
            f"the closest, {closest}, has loss {known[closest]} relative to it"
        )
        return Verdict(_RATIO, setting, NOT_CONFIRMED, figures)
    smallest = min(as_good, key=sizes.__getitem__)
    ratio = sizes[best] / sizes[smallest]
    figures = (
        f"{smallest}: {sizes[smallest]:,} parameters, loss {known[smallest]} relative to "
        f"{best_text}; "
        f"{ratio:.2f} times fewer"
    )
    return Verdict(_RATIO, setting, CONFIRMED if ratio > 1 else NOT_CONFIRMED, figures)


def ratio_of_the_paper() -> Verdict:
    """Count the parameters of T5-base with 128 experts in every second layer, building nothing."""
    base = T5Config(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12,
        architectures=["T5ForConditionalGeneration"],
    )  # fmt: skip
    counts = {
        layout: hf.parameter_report(
            base, hf.MPOEConfig(num_experts=128, every=2, layout=layout)
        ).total
        for layout in ("split", "interleaved")
    }
    by_layout = (
        f"{layout} {count.mpoe / 1e6:,.0f} million, {count.moe / count.mpoe:.1f} times fewer"
        for layout, count in counts.items()
    )
    figures = (
        f"parameters of T5-base with 128 experts in every second layer: ordinary mixture "
        f"{counts['split'].moe / 1e6:,.0f} million; {'; '.join(by_layout)}. No machine here trains "
        "the ordinary one, so whether the quality is equal is open; the rows above with 32 experts "
        "come closest"
    )
    return Verdict(_PAPER_RATIO, "T5-base, counted", NOT_TESTABLE, figures)

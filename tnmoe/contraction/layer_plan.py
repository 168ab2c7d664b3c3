"""Plans of a layer of experts: what it computes once per token, and what once per slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tnmoe.options import ProjectionName
from tnmoe.system.tables import format_table

Per = Literal["token", "slot"]


@dataclass(frozen=True)
class Work:
    """What one part of a product costs.

    Attributes
    ----------
    what : str
        What vectors are multiplied by.
    per : {"token", "slot"}
        What a vector belongs to.
    flops : float
        Operations per vector.
    shared_bytes, owned_bytes : int
        Bytes of the weights that all experts share, and of those of one expert.
    """

    what: str
    per: Per
    flops: float
    shared_bytes: int
    owned_bytes: int


@dataclass(frozen=True)
class LayerStep:
    """One step of a layer: a product of its vectors with what experts share, or own.

    Attributes
    ----------
    matrix : {"gate_up", "gate", "up", "down"}
    what : str
        What the vectors are multiplied by.
    per : {"token", "slot"}
        What a vector of the step belongs to.
    vectors : int
        Number of tokens or of slots.
    flops : int
        Floating-point operations; a multiply-add counts as two.
    weight_bytes : int
        Bytes of the weights that the step reads, those of an expert once. On routes that build
        matrices, the bytes of the cores.

    Examples
    --------
    >>> from tnmoe.nn import MPOExperts
    >>> experts = MPOExperts(8, hidden_size=64, intermediate_size=256, layout="residual")
    >>> step = experts.plan(tokens=1, top_k=8).steps[1]
    >>> step.matrix, step.what, step.per, step.vectors
    ('up', 'cores of experts', 'slot', 8)
    """

    matrix: ProjectionName
    what: str
    per: Per
    vectors: int
    flops: int
    weight_bytes: int


@dataclass(frozen=True)
class LayerPlan:
    """What one call of a layer of experts computes, in the order of computation.

    Attributes
    ----------
    tokens, top_k : int
        Tokens of the call, and experts per token.
    steps : tuple of LayerStep

    Examples
    --------
    >>> from tnmoe.nn import MPOExperts
    >>> experts = MPOExperts(8, hidden_size=64, intermediate_size=256, layout="residual")
    >>> plan = experts.plan(tokens=1, top_k=8)
    >>> [step.per for step in plan.steps]
    ['token', 'slot', 'slot', 'token']
    >>> network = 2 * 2 * 64 * 256  # operations of one network without experts
    >>> plan.flops_per("token") / network, plan.flops_per("slot") / network
    (1.0, 2.5)
    """

    tokens: int
    top_k: int
    steps: tuple[LayerStep, ...]

    @property
    def flops(self) -> int:
        """Operations of all steps."""
        return sum(step.flops for step in self.steps)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that the call reads."""
        return sum(step.weight_bytes for step in self.steps)

    def flops_per(self, kind: Per) -> int:
        """Count the operations of all steps that are computed once per ``kind``.

        Parameters
        ----------
        kind : {"token", "slot"}
        """
        return sum(step.flops for step in self.steps if step.per == kind)

    def __str__(self) -> str:
        rows: list[Sequence[str]] = [
            [
                step.matrix,
                step.what,
                _count(step.vectors, step.per),
                f"{step.flops:.3g}",
                f"{step.weight_bytes:.3g}",
            ]
            for step in self.steps
        ]
        rows.append(["all", "", "", f"{self.flops:.3g}", f"{self.weight_bytes:.3g}"])
        title = f"{_count(self.tokens, 'token')}, {_count(self.top_k, 'expert')} each"
        headers = ["matrix", "times", "vectors", "flops", "weight bytes"]
        return f"{title}\n{format_table(headers, rows)}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def layer_plan(
    tokens: int, top_k: int, num_experts: int, works: Sequence[tuple[ProjectionName, Work]]
) -> LayerPlan:
    """Plan a layer from the parts of its products, in the order of computation.

    Parameters
    ----------
    tokens, top_k, num_experts : int
        Tokens of the call, experts per token, experts in all.
    works : sequence of (matrix, Work)

    Returns
    -------
    LayerPlan
        The bytes count the experts that have tokens on average if all are equally likely.
    """
    active = expected_experts(num_experts, tokens, top_k)
    steps = []
    for matrix, work in works:
        vectors = tokens if work.per == "token" else tokens * top_k
        read = work.shared_bytes + active * work.owned_bytes
        step = LayerStep(
            matrix, work.what, work.per, vectors, round(vectors * work.flops), round(read)
        )
        steps.append(step)
    return LayerPlan(tokens, top_k, tuple(steps))


def expected_experts(num_experts: int, tokens: int, top_k: int) -> float:
    """Return how many experts have tokens, on average, if all are equally likely.

    The ``top_k`` experts of a token are different ones.
    """
    return num_experts * (1 - (1 - min(top_k, num_experts) / num_experts) ** tokens)

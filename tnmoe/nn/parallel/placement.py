"""Where the cores that experts own should lie: on every rank, in parts, or spread by expert."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import comb, inf
from typing import Literal

from torch import Tensor

from tnmoe.errors import (
    InputError,
    check_bool,
    check_int_from_zero,
    check_number_in,
    check_positive_int,
)
from tnmoe.nn.experts import Experts
from tnmoe.nn.projection import Projection
from tnmoe.system.tables import format_table

PlacementKind = Literal["replicated", "gathered", "spread"]
# Bytes sent, rounds, bytes held, operations.
_Costs = tuple[float, int, float, float]

# A parameter, its gradient, and the two moments of Adam.
_TRAINING_COPIES = 4
_INDEX_BYTES = 8
# A backward pass computes the derivatives by inputs and by weights.
_TRAINING_FLOPS = 3


@dataclass(frozen=True)
class Placement:
    """What one placement of owned tensors costs a rank in one step of a layer.

    Attributes
    ----------
    kind : {"replicated", "gathered", "spread"}
        ``replicated``: every rank has all owned tensors, and gradients are summed
        (``DistributedDataParallel``). ``gathered``: every rank keeps a part, and the whole is put
        together for every pass (``fully_shard``). ``spread``: every rank has some experts, and
        tokens travel (:func:`shard_experts`).
    sent_bytes : float
        Bytes that the rank sends.
    rounds : int
        Collectives one after the other.
    held_bytes : float
        Bytes of owned tensors on the rank, with gradients and Adam's moments in training.
    flops : float
        Operations for the rank's tokens, or in ``spread`` for those that it receives: what experts
        share acts there once for every rank that a token visits.
    seconds : float
        ``sent_bytes`` over the bandwidth, plus ``rounds`` times the latency, plus ``flops`` over
        the rate of arithmetic. Nothing overlaps.

    Examples
    --------
    >>> from tnmoe import nn
    >>> experts = nn.MPOExperts(8, 64, 256, layout="residual", device="meta")
    >>> plan = expert_placement(experts, 4, tokens=4096, top_k=2, bandwidth=1e9)
    >>> [placement.kind for placement in plan.placements]
    ['replicated', 'gathered', 'spread']
    """

    kind: PlacementKind
    sent_bytes: float
    rounds: int
    held_bytes: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class PlacementPlan:
    """The placements of a layer's owned tensors, side by side. Print it to see a table.

    Attributes
    ----------
    placements : tuple of Placement
    memory : float
        Bytes that a rank may hold.
    best : Placement
        The fastest one that fits the memory.

    Examples
    --------
    >>> from tnmoe import nn
    >>> experts = nn.DenseExperts(64, 1024, 4096, device="meta")
    >>> plan = expert_placement(experts, 8, tokens=4096, top_k=2, bandwidth=5e10, memory=1e10)
    >>> plan.best.kind
    'spread'
    """

    placements: tuple[Placement, ...]
    memory: float

    @cached_property
    def best(self) -> Placement:
        """The fastest placement that fits the memory, or the smallest one if none fits."""
        fitting = [each for each in self.placements if each.held_bytes <= self.memory]
        if not fitting:
            return min(self.placements, key=lambda each: each.held_bytes)
        return min(fitting, key=lambda each: each.seconds)

    def __str__(self) -> str:
        headers = ["placement", "MB sent", "rounds", "MB held", "Gflop", "ms", ""]
        rows = [
            [
                each.kind, f"{each.sent_bytes / 1e6:.3g}", each.rounds,
                f"{each.held_bytes / 1e6:.3g}", f"{each.flops / 1e9:.3g}",
                f"{1e3 * each.seconds:.3g}", self._remark(each),
            ]
            for each in self.placements
        ]  # fmt: skip
        return format_table(headers, rows)

    def _remark(self, placement: Placement) -> str:
        if placement.held_bytes > self.memory:
            return "too large"
        return "best" if placement is self.best else ""


def expert_placement(
    experts: Experts,
    ranks: int,
    *,
    tokens: int,
    top_k: int,
    bandwidth: float,
    replicas: int = 1,
    latency: float = 0.0,
    rate: float | None = None,
    memory: float | None = None,
    training: bool = True,
) -> PlacementPlan:
    """Compare placements of what experts own over ranks, by bytes, memory and arithmetic.

    Tokens of ``spread`` experts are taken to choose different experts with equal probability. What
    experts share is on every rank, or gathered, in all placements alike, and does not count.

    Parameters
    ----------
    experts : Experts
        One layer; the meta device suffices. Rows have the dtype of its parameters.
    ranks : int
        Ranks over which the owned tensors of ``gathered`` and ``spread`` are divided. They divide
        the number of experts.
    tokens : int
        Tokens of every rank in a step.
    top_k : int
        Experts per token.
    bandwidth : float
        Bytes per second that a rank sends.
    replicas : int
        Groups of this number of ranks. All of them train the same experts, on other tokens.
    latency : float
        Seconds of a collective that sends nothing.
    rate : float, optional
        Operations per second of a rank; by default arithmetic takes no time.
    memory : float, optional
        Bytes that the owned tensors of the layer may take on a rank; by default any number.
    training : bool
        Whether a step has a backward pass and an update.

    Returns
    -------
    PlacementPlan

    Raises
    ------
    InputError
        If a number is out of its range, or the ranks do not divide the number of experts.

    Notes
    -----
    With R ranks in a group, G groups, T tokens, hidden size H, and P bytes of owned tensors, a rank
    sends in training

    - ``replicated``: 2 (1 − 1/RG) P, an all-reduce of gradients in a ring;
    - ``gathered``: 3 (1 − 1/R) P, two all-gathers and a reduce-scatter, and 2 (1 − 1/G) P/R;
    - ``spread``: n (4 H + 2 k) numbers and n k indices, and 2 (1 − 1/G) P/R, where
      n = T (R − 1) (1 − C(E − E/R, k) / C(E, k)) is the expected number of pairs of a token and
      another rank that has one of its k experts.

    Examples
    --------
    >>> from tnmoe import nn
    >>> experts = nn.MPOExperts(64, 1024, 4096, layout="residual", device="meta")
    >>> plan = expert_placement(experts, 8, tokens=8192, top_k=8, bandwidth=5e10)
    >>> print(plan)
    placement   MB sent  rounds  MB held    Gflop    ms
    ----------  -------  ------  -------  -------  ----  ----
    replicated     73.4       1      168      477  1.47  best
    gathered        110       3      105      477   2.2
    spread          643       8       21  2.3e+03  12.9
    """
    numbers = _Numbers(
        experts,
        check_positive_int("ranks", ranks),
        check_positive_int("replicas", replicas),
        check_int_from_zero("tokens", tokens),
        check_positive_int("top_k", top_k),
        check_bool("training", training),
    )
    if experts.num_experts % ranks:
        raise InputError(
            f"{ranks} ranks do not divide the number of experts, {experts.num_experts}"
        )
    if top_k > experts.num_experts:
        raise InputError(f"top_k={top_k} exceeds the number of experts, {experts.num_experts}")
    bandwidth = check_number_in("bandwidth", bandwidth, "(0, inf]")
    latency = check_number_in("latency", latency, "[0, inf)")
    rate = inf if rate is None else check_number_in("rate", rate, "(0, inf]")
    memory = inf if memory is None else check_number_in("memory", memory, "[0, inf]")
    costs: dict[PlacementKind, _Costs] = {
        "replicated": numbers.replicated,
        "gathered": numbers.gathered,
        "spread": numbers.spread,
    }
    placements = []
    for kind, (sent, rounds, held, flops) in costs.items():
        seconds = sent / bandwidth + rounds * latency + flops / rate
        placements.append(Placement(kind, sent, rounds, held, flops, seconds))
    return PlacementPlan(tuple(placements), memory)


@dataclass(frozen=True)
class _Numbers:
    """What placements are computed from, and the costs of each."""

    experts: Experts
    ranks: int
    replicas: int
    tokens: int
    top_k: int
    training: bool

    @cached_property
    def owned(self) -> list[Tensor]:
        """All tensors that experts own in the layer."""
        found = {
            id(tensor): tensor
            for module in self.experts.modules()
            if isinstance(module, Projection)
            for tensor in (getattr(module, name) for name in module.expert_rows(0))
        }
        return list(found.values())

    @property
    def owned_bytes(self) -> int:
        """Bytes of these tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.owned)

    @property
    def replicated(self) -> _Costs:
        everywhere = self.ranks * self.replicas
        if not self.training:
            return 0.0, 0, self.owned_bytes, self._flops(1.0)
        held = _TRAINING_COPIES * self.owned_bytes
        return self._all_reduce(self.owned_bytes, everywhere), 1, held, self._flops(1.0)

    @property
    def gathered(self) -> _Costs:
        part, others = self.owned_bytes / self.ranks, 1 - 1 / self.ranks
        if not self.training:
            return others * self.owned_bytes, 1, part + self.owned_bytes, self._flops(1.0)
        sent = 3 * others * self.owned_bytes + self._all_reduce(part, self.replicas)
        # The whole and its gradient are there during a pass.
        held = _TRAINING_COPIES * part + 2 * self.owned_bytes
        return sent, 3 + (self.replicas > 1), held, self._flops(1.0)

    @property
    def spread(self) -> _Costs:
        part, size = self.owned_bytes / self.ranks, next(self.experts.parameters()).element_size()
        visits = self.visits
        pairs = self.tokens * visits * (1 - 1 / self.ranks)
        numbers = 2 * self.experts.hidden_size + self.top_k
        sent = pairs * (numbers * size + _INDEX_BYTES * self.top_k) + _INDEX_BYTES * (
            self.ranks - 1
        )
        if not self.training:
            return sent, 5, part, self._flops(visits)
        sent += pairs * numbers * size + self._all_reduce(part, self.replicas)
        # Counts, rows, weights, indices and outputs; back come three gradients. Then the replicas
        # sum the gradient of every owned tensor.
        rounds = 8 + (self.replicas > 1) * len(self.owned)
        return sent, rounds, _TRAINING_COPIES * part, self._flops(visits)

    @property
    def visits(self) -> float:
        """Ranks that a token visits, its own rank included, if experts are chosen alike."""
        experts = self.experts.num_experts
        others = comb(experts - experts // self.ranks, self.top_k)
        return self.ranks * (1 - others / comb(experts, self.top_k))

    def _flops(self, visits: float) -> float:
        """Count operations if what acts once per token acts once per visit."""
        plan = self.experts.plan(self.tokens, self.top_k)
        passes = _TRAINING_FLOPS if self.training else 1
        return passes * (visits * plan.flops_per("token") + plan.flops_per("slot"))

    @staticmethod
    def _all_reduce(size: float, ranks: int) -> float:
        return 2 * (1 - 1 / ranks) * size

"""The order in which a chain of cores is contracted, with vectors where there are any.

Orders have opt_einsum's form: pairs of positions in the list of operands (vectors first), both of
which leave the list, while their product is appended to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, repeat
from math import prod
from operator import mul

import opt_einsum
from opt_einsum.paths import ssa_to_linear

Path = tuple[tuple[int, ...], ...]
# Shapes (D, out, in, D') of a chain.
CoreShapes = tuple[tuple[int, ...], ...]
# Neighbouring segments of a chain, from the first to the one that follows the last.
_Run = tuple[int, int]
# The first of some neighbours on a ring, and how many they are.
_Arc = tuple[int, int]

# Beside vectors any subset of the cores may be contracted first, so that finding the best order
# takes a time that is exponential in their number: for as many as this 25 ms at worst.
_EXHAUSTIVE = 8
# A search among neighbours takes the third power: for as many as this 30 ms.
_SEARCHED = 32


@dataclass(frozen=True)
class ChainPath:
    """An order of contractions, and what it costs for any number of vectors.

    Attributes
    ----------
    path : tuple of tuple of int
        In opt_einsum's form.
    fixed_flops, flops_per_vector : int
        Operations: a multiply-add counts as two, a multiplication as one.
    fixed_peak, peak_per_vector : int
        Numbers in the largest products of cores alone, and of vectors.
    """

    path: Path
    fixed_flops: int
    flops_per_vector: int
    fixed_peak: int
    peak_per_vector: int

    def flops(self, batch: int) -> int:
        """Operations for ``batch`` vectors."""
        return self.fixed_flops + batch * self.flops_per_vector

    def peak(self, batch: int) -> int:
        """Numbers in the largest intermediate array for ``batch`` vectors."""
        return max(self.fixed_peak, batch * self.peak_per_vector)


@dataclass(frozen=True)
class Network:
    """Indices of the operands of a chain, the outermost bonds left out: they join nothing.

    Attributes
    ----------
    terms : tuple of str
        Of the vectors, where there are any, and of every core.
    result : str
    sizes : dict of str to int
        Without ``vector``.
    vector : str
        The index that counts vectors; empty where there are none.
    """

    terms: tuple[str, ...]
    result: str
    sizes: dict[str, int]
    vector: str

    @classmethod
    def of(cls, cores: CoreShapes, has_vectors: bool) -> Network:
        sites = len(cores)
        symbols = list(map(opt_einsum.get_symbol, range(3 * sites)))
        outs, ins = symbols[:sites], symbols[sites : 2 * sites]
        bonds = ["", *symbols[2 * sites : -1], ""]
        sizes = dict(zip(outs, (core[1] for core in cores), strict=True))
        sizes |= zip(ins, (core[2] for core in cores), strict=True)
        sizes |= zip(bonds[1:-1], (core[0] for core in cores[1:]), strict=True)
        terms = [bonds[k] + outs[k] + ins[k] + bonds[k + 1] for k in range(sites)]
        if not has_vectors:
            return cls(tuple(terms), "".join(outs + ins), sizes, "")
        vector = symbols[-1]
        return cls(("".join([vector, *ins]), *terms), "".join([vector, *outs]), sizes, vector)

    def without_units(self) -> Network:
        """The same without indices of size 1: arrays have no more axes than they need."""

        def shorter(term: str) -> str:
            return "".join(index for index in term if self.sizes.get(index) != 1)

        return Network(
            tuple(map(shorter, self.terms)), shorter(self.result), self.sizes, self.vector
        )

    def equation(self) -> str:
        """As ``numpy.einsum`` has it."""
        return f"{','.join(self.terms)}->{self.result}"

    def shapes(self, batch: int | None) -> tuple[tuple[int, ...], ...]:
        """Shapes of the operands for a number of vectors."""
        sizes = self.sizes if batch is None else self.sizes | {self.vector: batch}
        return tuple(tuple(sizes[index] for index in term) for term in self.terms)


def building_path(cores: CoreShapes) -> ChainPath:
    """An order in which to contract a chain alone: the best for up to 32 cores."""
    return _path(cores, None)


def applying_path(cores: CoreShapes, batch: int) -> ChainPath:
    """An order in which to contract a chain with vectors: the best at most batches of a few cores.

    The search is for powers of two, which batches of all sizes have in common. Operations grow
    linearly with the batch, so what is the best at the powers below and above it is the best for a
    batch, too; where these differ, the cheaper one is taken.
    """
    below = 1 << (max(1, batch).bit_length() - 1)
    ends = (below,) if batch <= below else (below, 2 * below)
    return min((_path(cores, end) for end in ends), key=lambda found: found.flops(batch))


@lru_cache(maxsize=4096)
def _path(cores: CoreShapes, batch: int | None) -> ChainPath:
    network = Network.of(cores, batch is not None)
    if len(cores) > _EXHAUSTIVE:
        return _counted(network, _searched(cores, batch))
    found, _ = opt_einsum.contract_path(
        network.equation(), *network.shapes(batch), shapes=True, optimize="dp"
    )
    return _counted(network, tuple(map(tuple, found)))


def _counted(network: Network, path: Path) -> ChainPath:
    """A path with its costs, counted as opt_einsum counts them."""
    flops, peaks = {False: 0, True: 0}, {False: 1, True: 0}
    terms = [frozenset(term) for term in network.terms]
    for step in path:
        joined = [terms.pop(position) for position in sorted(step, reverse=True)]
        every = frozenset().union(*joined)
        product = frozenset.symmetric_difference(*joined) if len(joined) == 2 else every
        terms.append(product)
        per_vector = network.vector in every
        size = prod(network.sizes.get(index, 1) for index in every)
        flops[per_vector] += size * (1 if product == every else 2)
        size = prod(network.sizes.get(index, 1) for index in product)
        peaks[per_vector] = max(peaks[per_vector], size)
    return ChainPath(path, flops[False], flops[True], peaks[False], peaks[True])


@dataclass(frozen=True)
class _Segment:
    """Neighbouring cores, or their product: who it is among all operands, and its sizes."""

    operand: int
    left: int
    out: int
    in_: int
    right: int

    @property
    def numbers(self) -> int:
        return self.left * self.out * self.in_ * self.right

    def joined(self, other: _Segment, operand: int) -> _Segment:
        """The product with the segment on its right."""
        out, in_ = self.out * other.out, self.in_ * other.in_
        return _Segment(operand, self.left, out, in_, other.right)


class _Steps:
    """Contractions in the order they are done in; an operand keeps its number, products get new."""

    def __init__(self, operands: int) -> None:
        self._pairs: list[tuple[int, int]] = []
        self._next = operands

    def product(self, first: int, second: int) -> int:
        self._pairs.append((first, second))
        self._next += 1
        return self._next - 1

    def joined(self, left: _Segment, right: _Segment) -> _Segment:
        return left.joined(right, self.product(left.operand, right.operand))

    def path(self) -> Path:
        return tuple(map(tuple, ssa_to_linear(self._pairs)))


def _searched(cores: CoreShapes, batch: int | None) -> Path:
    """A path for a chain of many cores, in a time that is bounded by a power of their number.

    Only neighbours are multiplied with each other. What the vectors have been multiplied with is
    always a run of neighbours, or all but a run.
    """
    first = 0 if batch is None else 1
    steps = _Steps(len(cores) + first)
    segments = [_Segment(first + site, *core) for site, core in enumerate(cores)]
    if len(segments) > _SEARCHED:
        segments = _shrunk(segments, steps)
    if len(segments) > _SEARCHED:
        # Far more numbers than any machine holds: any order will do.
        parts = [segments] if batch is None else [[each] for each in reversed(segments)]
        merged = [_in_order(part, steps) for part in parts]
    else:
        merges = _Merges(segments)
        runs = [(0, len(segments))] if batch is None else _order(segments, merges, batch)
        merged = [merges.done(start, stop, steps) for start, stop in runs]
    vectors = 0
    for segment in merged if batch is not None else ():
        vectors = steps.product(vectors, segment.operand)
    return steps.path()


def _shrunk(segments: Sequence[_Segment], steps: _Steps) -> list[_Segment]:
    """Neighbours merged wherever their product holds no more numbers than they do."""
    kept: list[_Segment] = []
    for segment in segments:
        kept.append(segment)
        while len(kept) > 1:
            left, right = kept[-2:]
            if left.joined(right, 0).numbers > left.numbers + right.numbers:
                break
            kept[-2:] = [steps.joined(left, right)]
    return kept


def _in_order(segments: Sequence[_Segment], steps: _Steps) -> _Segment:
    product = segments[0]
    for segment in segments[1:]:
        product = steps.joined(product, segment)
    return product


class _Merges:
    """The cheapest way to multiply any run of segments: matrix-chain multiplication."""

    def __init__(self, segments: Sequence[_Segment]) -> None:
        self._segments = segments
        count = len(segments)
        legs = list(accumulate((each.out * each.in_ for each in segments), mul, initial=1))
        bonds = [*(each.left for each in segments), segments[-1].right]
        self.flops = {(start, start + 1): 0 for start in range(count)}
        self._cuts: dict[_Run, int] = {}
        for length in range(2, count + 1):
            for start in range(count - length + 1):
                stop = start + length
                # Both ends and all legs are in every last product, whichever bond it is over.
                common = 2 * bonds[start] * bonds[stop] * (legs[stop] // legs[start])
                self.flops[start, stop], self._cuts[start, stop] = min(
                    (self.flops[start, cut] + self.flops[cut, stop] + common * bonds[cut], cut)
                    for cut in range(start + 1, stop)
                )

    def done(self, start: int, stop: int, steps: _Steps) -> _Segment:
        """The product of a run, with the steps to it."""
        if stop == start + 1:
            return self._segments[start]
        cut = self._cuts[start, stop]
        return steps.joined(self.done(start, cut, steps), self.done(cut, stop, steps))


def _order(segments: Sequence[_Segment], merges: _Merges, batch: int) -> list[_Run]:
    """Runs of segments, each to be merged first and then multiplied with the vectors, in order.

    On a ring, where the last segment is the neighbour of the first over a bond of 1, what has been
    multiplied is always one arc (start, length), and what is left is another.
    """
    count = len(segments)
    bonds = [each.left for each in segments]
    # Twice around the ring: every arc is a range of the products.
    outs, ins = (
        list(accumulate(chain(*repeat(sizes, 2)), mul, initial=1))
        for sizes in ([each.out for each in segments], [each.in_ for each in segments])
    )
    flops = {(start, 0): 0 for start in range(count)}
    last: dict[_Arc, tuple[_Arc, _Run]] = {}
    for length in range(1, count + 1):
        for start in range(count):
            stop = start + length
            ends = {start, stop % count}
            # What every last product has in common: all legs but inputs that are contracted, ends.
            common = 2 * batch * (outs[stop] // outs[start]) * (ins[start + count] // ins[stop])
            for end in ends:
                common *= bonds[end]
            flops[start, length], before, run = min(
                (
                    flops[before]
                    + merges.flops[run]
                    + common * (ins[run[1]] // ins[run[0]]) * (1 if cut in ends else bonds[cut]),
                    before,
                    run,
                )
                for before, run, cut in _ways_to(start, length, count)
            )
            last[start, length] = before, run
    arc = min(((start, count) for start in range(count)), key=flops.__getitem__)
    runs = []
    while arc[1]:
        arc, run = last[arc]
        runs.append(run)
    return runs[::-1]


def _ways_to(start: int, length: int, count: int) -> Iterator[tuple[_Arc, _Run, int]]:
    """What an arc may have been, the run that then came at one of its ends, the bond between."""
    for size in range(1, length + 1):
        # No run lies across the joint of the ring.
        if start + size <= count:
            cut = (start + size) % count
            yield (cut, length - size), (start, start + size), cut
        cut = (start + length - size) % count
        if cut + size <= count:
            yield (start, length - size), (cut, cut + size), cut

"""Orders in which a chain of cores is contracted, alone or with vectors.

Orders have opt_einsum's form: pairs of positions in the list of operands, vectors first. Both
operands of a pair leave the list, and their product is appended to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from operator import mul

import opt_einsum
from opt_einsum.paths import ssa_to_linear

from tnmoe.backends import Array

Path = tuple[tuple[int, ...], ...]
# Shapes (D, out, in, D') of a chain. Where E chains share cores, the shape of one that each of them
# owns is (E, D, out, in, D').
CoreShapes = tuple[tuple[int, ...], ...]
# Neighbouring segments of a chain: the first, and the one after the last.
_Subchain = tuple[int, int]
# Neighbouring segments on a ring: the first, and how many they are.
_Arc = tuple[int, int]

# The search among all pairwise contractions takes a time exponential in the number of cores,
# because any subset of them may be contracted before it meets the vectors. With 8 cores it takes
# 25 ms at most.
_MAX_EXHAUSTIVE = 8
# The search among neighbours alone takes a time that grows with the third power: 30 ms for 32.
_MAX_SEARCHED = 32
# Operations that take a CPU as long as writing an entry of a product, and reading it again. Where
# experts share a run of cores, the order of fewest operations writes whole matrices twice: with it
# 16 matrices of 3072×768 with bonds of 64 took one CPU 337 ms, with this number 246 ms.
_OPERATIONS_PER_ENTRY = 256


@dataclass(frozen=True)
class ChainPath:
    """An order of contractions, and its cost for any number of vectors.

    Attributes
    ----------
    path : tuple of tuple of int
        In opt_einsum's form.
    fixed_flops, flops_per_vector : int
        Operations: a multiply-add counts as two, a multiplication as one.
    fixed_peak, peak_per_vector : int
        Entries of the largest product of cores alone, and of the largest one with vectors.
    """

    path: Path
    fixed_flops: int
    flops_per_vector: int
    fixed_peak: int
    peak_per_vector: int

    def flops(self, batch: int) -> int:
        """Count the operations for ``batch`` vectors."""
        return self.fixed_flops + batch * self.flops_per_vector

    def peak(self, batch: int) -> int:
        """Return the entries of the largest intermediate array for ``batch`` vectors."""
        return max(self.fixed_peak, batch * self.peak_per_vector)


@dataclass(frozen=True)
class Network:
    """Indices of the operands of a chain, without the outermost bonds, which join nothing.

    Attributes
    ----------
    terms : tuple of str
        Indices of the vectors, if any, and of every core.
    result : str
    sizes : dict of str to int
        Sizes of all indices but ``vector``.
    vector : str
        Index that counts vectors; empty without vectors.
    """

    terms: tuple[str, ...]
    result: str
    sizes: dict[str, int]
    vector: str

    @classmethod
    def of(cls, cores: CoreShapes, has_vectors: bool) -> Network:
        """Give every leg and bond of a chain an index."""
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
        """Leave out indices of size 1, so that arrays have no more axes than they need."""

        def shorter(term: str) -> str:
            return "".join(index for index in term if self.sizes.get(index) != 1)

        return Network(
            tuple(map(shorter, self.terms)), shorter(self.result), self.sizes, self.vector
        )

    def equation(self) -> str:
        """Write the contraction as ``numpy.einsum`` does."""
        return f"{','.join(self.terms)}->{self.result}"

    def shapes(self, batch: int | None) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the operands for a number of vectors."""
        sizes = self.sizes if batch is None else self.sizes | {self.vector: batch}
        return tuple(tuple(sizes[index] for index in term) for term in self.terms)


def shapes_of(cores: Sequence[Array]) -> CoreShapes:
    """Return the shapes of cores."""
    return tuple(tuple(core.shape) for core in cores)


def building_path(cores: CoreShapes) -> ChainPath:
    """Find an order in which to contract a chain alone: the best one for up to 32 cores."""
    return _find_path(cores, None)


def neighbours_path(cores: CoreShapes) -> Path:
    """Find an order of products of neighbours that builds a chain, or chains that share cores.

    A product is computed once while all chains share its cores, and then once for each chain. The
    order is the quickest one: operations count, and so do the entries that products write.
    """
    return _path_among_neighbours(cores, None, _OPERATIONS_PER_ENTRY)


def applying_path(cores: CoreShapes, batch: int) -> ChainPath:
    """Find an order in which to contract a chain with vectors.

    The search runs for powers of two alone, so that batches of many sizes share its results. The
    operations of an order grow linearly with the batch. An order that is the best at the powers
    of two below and above a batch is therefore the best for the batch, too. Where the two best
    orders differ, the cheaper one is taken.
    """
    below = 1 << (max(1, batch).bit_length() - 1)
    powers = (below,) if batch <= below else (below, 2 * below)
    return min((_find_path(cores, power) for power in powers), key=lambda path: path.flops(batch))


@lru_cache(maxsize=4096)
def _find_path(cores: CoreShapes, batch: int | None) -> ChainPath:
    network = Network.of(cores, batch is not None)
    if len(cores) > _MAX_EXHAUSTIVE:
        return _with_costs(network, _path_among_neighbours(cores, batch))
    path, _ = opt_einsum.contract_path(
        network.equation(), *network.shapes(batch), shapes=True, optimize="dp"
    )
    return _with_costs(network, tuple(map(tuple, path)))


def _with_costs(network: Network, path: Path) -> ChainPath:
    """Count the operations and entries of a path as opt_einsum counts them."""
    # By whether vectors take part.
    flops, peaks = {False: 0, True: 0}, {False: 1, True: 0}
    terms = [frozenset(term) for term in network.terms]
    for step in path:
        operands = [terms.pop(position) for position in sorted(step, reverse=True)]
        indices = frozenset().union(*operands)
        product = frozenset.symmetric_difference(*operands) if len(operands) == 2 else indices
        terms.append(product)
        per_vector = network.vector in indices
        size = prod(network.sizes.get(index, 1) for index in indices)
        flops[per_vector] += size * (1 if product == indices else 2)
        size = prod(network.sizes.get(index, 1) for index in product)
        peaks[per_vector] = max(peaks[per_vector], size)
    return ChainPath(path, flops[False], flops[True], peaks[False], peaks[True])


@dataclass(frozen=True)
class _Segment:
    """A core or the product of neighbouring cores: its number as an operand, and its sizes.

    There are several copies where each of several chains owns a core in it.
    """

    operand: int
    left: int
    out: int
    in_: int
    right: int
    copies: int = 1

    @classmethod
    def of(cls, operand: int, core: tuple[int, ...]) -> _Segment:
        """Return a single core, with an axis of copies or without."""
        return cls(operand, *core[-4:], *core[:-4])

    @property
    def size(self) -> int:
        return self.copies * self.left * self.out * self.in_ * self.right

    def times(self, following: _Segment, operand: int) -> _Segment:
        """Return the product with the segment on the right, which becomes operand ``operand``."""
        out, in_ = self.out * following.out, self.in_ * following.in_
        copies = max(self.copies, following.copies)
        return _Segment(operand, self.left, out, in_, following.right, copies)


class _PathBuilder:
    """Products in the order of their computation, in static single assignment form.

    Operands keep their numbers, and every product gets a new one.
    """

    def __init__(self, operands: int) -> None:
        self._pairs: list[tuple[int, int]] = []
        self._next = operands

    def multiply(self, first: int, second: int) -> int:
        """Add the product of two operands; return its number."""
        self._pairs.append((first, second))
        self._next += 1
        return self._next - 1

    def multiply_segments(self, left: _Segment, right: _Segment) -> _Segment:
        """Add the product of neighbouring segments; return it."""
        return left.times(right, self.multiply(left.operand, right.operand))

    def path(self) -> Path:
        """Return the products in opt_einsum's form."""
        return tuple(map(tuple, ssa_to_linear(self._pairs)))


def _path_among_neighbours(cores: CoreShapes, batch: int | None, per_entry: int = 0) -> Path:
    """Find a path for a chain of many cores, in polynomial time.

    Only neighbours are multiplied with each other. What the vectors have met so far is always one
    subchain, or all cores but one subchain. An entry of a product of cores counts as ``per_entry``
    operations, beside those that compute it.
    """
    first = 0 if batch is None else 1
    builder = _PathBuilder(len(cores) + first)
    segments = [_Segment.of(first + site, core) for site, core in enumerate(cores)]
    if len(segments) > _MAX_SEARCHED:
        segments = _merge_without_growth(segments, builder)
    if len(segments) > _MAX_SEARCHED:
        # The matrix has far more entries than any machine holds: any order will do.
        parts = [segments] if batch is None else [[segment] for segment in reversed(segments)]
        factors = [_multiply_left_to_right(part, builder) for part in parts]
    else:
        order = _MatrixChainOrder(segments, per_entry)
        subchains = (
            [(0, len(segments))] if batch is None else _order_of_subchains(segments, order, batch)
        )
        factors = [order.multiply(start, stop, builder) for start, stop in subchains]
    vectors = 0
    for factor in factors if batch is not None else ():
        vectors = builder.multiply(vectors, factor.operand)
    return builder.path()


def _merge_without_growth(segments: Sequence[_Segment], builder: _PathBuilder) -> list[_Segment]:
    """Multiply neighbours wherever their product has no more entries than they have together."""
    merged: list[_Segment] = []
    for segment in segments:
        merged.append(segment)
        while len(merged) > 1:
            left, right = merged[-2:]
            if left.times(right, 0).size > left.size + right.size:
                break
            merged[-2:] = [builder.multiply_segments(left, right)]
    return merged


def _multiply_left_to_right(segments: Sequence[_Segment], builder: _PathBuilder) -> _Segment:
    product = segments[0]
    for segment in segments[1:]:
        product = builder.multiply_segments(product, segment)
    return product


class _MatrixChainOrder:
    """The cheapest way to multiply the segments of any subchain: matrix-chain multiplication."""

    def __init__(self, segments: Sequence[_Segment], per_entry: int) -> None:
        self._segments = segments
        count = len(segments)
        legs = list(accumulate((seg.out * seg.in_ for seg in segments), mul, initial=1))
        bonds = [*(seg.left for seg in segments), segments[-1].right]
        self.costs: dict[_Subchain, int] = {(start, start + 1): 0 for start in range(count)}
        self._cuts: dict[_Subchain, int] = {}
        for length in range(2, count + 1):
            for start in range(count - length + 1):
                stop = start + length
                # The last product contains both ends and all legs, whichever bond it is over.
                entries = bonds[start] * bonds[stop] * (legs[stop] // legs[start])
                entries *= max(segment.copies for segment in segments[start:stop])
                self.costs[start, stop], self._cuts[start, stop] = min(
                    (
                        self.costs[start, cut]
                        + self.costs[cut, stop]
                        + entries * (2 * bonds[cut] + per_entry),
                        cut,
                    )
                    for cut in range(start + 1, stop)
                )

    def multiply(self, start: int, stop: int, builder: _PathBuilder) -> _Segment:
        """Add the products of a subchain to a path; return the last one."""
        if stop == start + 1:
            return self._segments[start]
        cut = self._cuts[start, stop]
        return builder.multiply_segments(
            self.multiply(start, cut, builder), self.multiply(cut, stop, builder)
        )


def _order_of_subchains(
    segments: Sequence[_Segment], order: _MatrixChainOrder, batch: int
) -> list[_Subchain]:
    """Find the subchains that the vectors are multiplied with, in order, each merged beforehand.

    The chain is seen as a ring, where the last segment is the neighbour of the first over a bond
    of 1. What the vectors have met so far is then always an arc of the ring, and the rest is
    another. This is a dynamic programme over arcs.
    """
    count = len(segments)
    bonds = [segment.left for segment in segments]
    # Twice around the ring, so that every arc is a range of the cumulated products.
    outs = list(accumulate([segment.out for segment in segments] * 2, mul, initial=1))
    ins = list(accumulate([segment.in_ for segment in segments] * 2, mul, initial=1))
    flops: dict[_Arc, int] = {(start, 0): 0 for start in range(count)}
    last_step: dict[_Arc, tuple[_Arc, _Subchain]] = {}
    for length in range(1, count + 1):
        for start in range(count):
            stop = start + length
            ends = {start, stop % count}
            # Every last product contains all outputs of the arc, all other inputs, and its ends.
            common = 2 * batch * (outs[stop] // outs[start]) * (ins[start + count] // ins[stop])
            for end in ends:
                common *= bonds[end]
            flops[start, length], before, subchain = min(
                (
                    flops[before]
                    + order.costs[subchain]
                    + common
                    * (ins[subchain[1]] // ins[subchain[0]])
                    * (1 if cut in ends else bonds[cut]),
                    before,
                    subchain,
                )
                for before, subchain, cut in _predecessors(start, length, count)
            )
            last_step[start, length] = before, subchain
    arc = min(((start, count) for start in range(count)), key=flops.__getitem__)
    subchains = []
    while arc[1]:
        arc, subchain = last_step[arc]
        subchains.append(subchain)
    return subchains[::-1]


def _predecessors(start: int, length: int, count: int) -> Iterator[tuple[_Arc, _Subchain, int]]:
    """Yield the arcs that an arc may come from, the subchain each lacks, and the bond between."""
    for size in range(1, length + 1):
        # A subchain never lies across the joint of the ring.
        if start + size <= count:
            cut = (start + size) % count
            yield (cut, length - size), (start, start + size), cut
        cut = (start + length - size) % count
        if cut + size <= count:
            yield (start, length - size), (cut, cut + size), cut

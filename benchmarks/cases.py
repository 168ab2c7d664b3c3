"""The cases: inputs as NumPy arrays, exact answers, and the least work of each.

The floor of a case is a yardstick and not a proven bound. It is the longer of two times: that of
the dense products that the standard algorithm cannot avoid, at the machine's own rate of matrix
products, and that of reading the inputs and writing the result once. Factorisations count as
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from math import prod
from typing import Any

import numpy as np
from library import Cores, Library

import tnmoe as tn


@dataclass(frozen=True)
class Case:
    """One operation on one input.

    ``make`` builds the arguments (matrices as arrays, operators as tuples of cores) when the case
    runs. ``flops`` counts the products for the bonds of a result; the bonds are None, and unused,
    where the result is not an operator.
    """

    name: str
    operation: str
    make: Callable[[], Sequence[Any]]
    shape: tn.MPOShape
    options: dict[str, Any] = field(default_factory=dict)
    flops: Callable[[tuple[int, ...] | None], int] = lambda bonds: 0
    large: bool = False

    def arguments(self, library: Library, inputs: Sequence[Any]) -> list[Any]:
        """Convert the inputs to the library's own types."""
        return [_convert(library, value) for value in inputs]


@dataclass(frozen=True)
class Outcome:
    """The quality of one result: its error, and the bonds and parameters of an operator."""

    error: float
    bonds: tuple[int, ...] | None = None
    params: int | None = None


def taking_part(case: Case, libraries: Sequence[Library], patterns: Sequence[str]) -> list[Library]:
    """Return libraries that match a pattern and have an algorithm of their own for the case."""
    return [
        library
        for library in libraries
        if any(fnmatch(library.name, pattern) for pattern in patterns)
        and (library.only is None or case.operation in library.only)
    ]


def assess(case: Case, library: Library, inputs: Sequence[Any], result: Any) -> Outcome:
    """Compare one library's result with the dense answer, all in double precision."""
    if case.operation in ("norm", "inner", "apply"):
        array = np.asarray(library.to_numpy(result), np.float64)
        return Outcome(_relative(array, expected(case, inputs)))
    cores = [np.asarray(core, np.float64) for core in library.cores(result, case.shape)]
    bonds = tuple(core.shape[0] for core in cores[1:])
    error = _relative(dense(cores), expected(case, inputs))
    return Outcome(error, bonds, sum(core.size for core in cores))


def expected(case: Case, inputs: Sequence[Any]) -> np.ndarray:
    """Compute the dense answer in double precision, without any tensor-network library."""
    if case.operation == "decompose":
        return inputs[0].astype(np.float64)
    if case.operation == "round_sum":
        return sum(dense(cores) for cores in inputs[0])
    if case.operation == "round_product":
        return dense(inputs[0]) @ dense(inputs[1])
    if case.operation == "apply":
        return inputs[1].astype(np.float64) @ dense(inputs[0]).T
    if case.operation == "norm":
        return np.linalg.norm(dense(inputs[0]))
    return np.vdot(dense(inputs[0]), dense(inputs[1]))


def dense(cores: Cores) -> np.ndarray:
    """Build the matrix of a chain in double precision, site by site with one last permutation."""
    tensor = np.ones((1, 1))
    for core in cores:
        core = np.asarray(core, np.float64)
        tensor = tensor @ core.reshape(core.shape[0], -1)
        tensor = tensor.reshape(-1, core.shape[-1])
    outs, ins = ([core.shape[axis] for core in cores] for axis in (1, 2))
    legs = [leg for pair in zip(outs, ins, strict=True) for leg in pair]
    axes = [*range(0, 2 * len(cores), 2), *range(1, 2 * len(cores), 2)]
    return tensor.reshape(legs).transpose(axes).reshape(prod(outs), prod(ins))


def random_cores(
    shape: tn.MPOShape, bond: int, rng: np.random.Generator, dtype: str, decay: float = 1.0
) -> tuple[np.ndarray, ...]:
    """Draw Gaussian cores in no gauge; successive bond indices are weaker by ``decay``."""
    bonds = (1, *shape.bond_dims(bond), 1)
    cores = []
    for left, right, out, in_ in zip(
        bonds[:-1], bonds[1:], shape.out_dims, shape.in_dims, strict=True
    ):
        core = rng.normal(size=(left, out, in_, right)) / np.sqrt(left)
        cores.append((core * decay ** np.arange(right)).astype(dtype))
    return tuple(cores)


def test_matrix(shape: tn.MPOShape, kind: str, dtype: str) -> np.ndarray:
    """Make a matrix: ``gaussian``, or ``structured`` with bond 48, decay and 0.5 % of noise."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(shape.out_features, shape.in_features))
    if kind == "gaussian":
        return noise.astype(dtype)
    matrix = dense(random_cores(shape, 48, rng, "float64", decay=0.9))
    noise *= 5e-3 * np.linalg.norm(matrix) / np.linalg.norm(noise)
    return (matrix + noise).astype(dtype)


def family(shape: tn.MPOShape, dtype: str) -> list[tuple[np.ndarray, ...]]:
    """Make eight operators of bond 32 with a common part of bond 24; their sum has bond 88."""
    rng = np.random.default_rng(1)
    common = random_cores(shape, 24, rng, dtype, decay=0.8)
    members = []
    for _ in range(8):
        own = random_cores(shape, 8, rng, dtype, decay=0.5)
        weight = np.asarray(0.1, dtype)
        members.append(_direct_sum(common, (own[0] * weight, *own[1:])))
    return members


def all_cases(quick: bool, dtype: str, kind: str) -> Iterator[Case]:
    """Yield every case, or the small ones for ``quick``."""
    sizes = [(768, 768)] if quick else [(768, 768), (3072, 768), (4096, 1024), (14336, 4096)]
    for out, in_ in sizes:
        yield from decompositions(tn.MPOShape.for_matrix(out, in_, sites=5), dtype, kind)
    yield from algebra(tn.MPOShape.for_matrix(*(sizes[0] if quick else sizes[1]), sites=5), dtype)


def decompositions(shape: tn.MPOShape, dtype: str, kind: str) -> Iterator[Case]:
    """Yield the decompositions of a matrix of a shape: exact, by bond and by tolerance."""

    def make() -> list[Any]:
        return [test_matrix(shape, kind, dtype), shape]

    size = f"decompose {shape.out_features}x{shape.in_features}"
    large = shape.out_features * shape.in_features > 2**24
    flops = partial(decompose_flops, shape)
    for label, options in (
        ("exact", {}),
        ("bond 64", {"max_bond": 64}),
        ("rtol 1e-2", {"rtol": 1e-2}),
    ):
        work = flops if options else Case.flops
        yield Case(f"{size} {label}", "decompose", make, shape, options, work, large)


def algebra(shape: tn.MPOShape, dtype: str) -> Iterator[Case]:
    """Yield sums, a product, products with vectors, a norm and an inner product."""
    size = f"{shape.out_features}x{shape.in_features}"
    summed = shape.bond_dims(8 * 32)

    def members() -> list[Any]:
        return [family(shape, dtype)]

    for label, options in (("bond 64", {"max_bond": 64}), ("rtol 1e-6", {"rtol": 1e-6})):
        work = partial(rounding_flops, shape, summed)
        yield Case(f"sum of 8, {size} {label}", "round_sum", members, shape, options, work)

    def factors() -> list[Cores]:
        rng = np.random.default_rng(2)
        square = tn.MPOShape(shape.in_dims, shape.in_dims)
        return [random_cores(legs, 16, rng, dtype, decay=0.8) for legs in (shape, square)]

    work = partial(rounding_flops, shape, shape.bond_dims(16 * 16))
    yield Case(
        f"product {size} bond 16*16 to 64",
        "round_product",
        factors,
        shape,
        {"max_bond": 64},
        work,
    )
    for label, bond in (("bond 64", 64), ("exact", None)):
        for batch in (1, 64, 4096):
            make = partial(_operator_and_vectors, shape, bond, batch, dtype)
            flops = partial(apply_flops, shape, shape.bond_dims(bond), batch)
            yield Case(f"apply {size} {label} to {batch}", "apply", make, shape, {}, flops)
    for operation, count in (("norm", 1), ("inner", 2)):
        make = partial(_operators, shape, count, dtype)
        flops = partial(inner_flops, shape, shape.bond_dims(64))
        yield Case(f"{operation} {size} bond 64", operation, make, shape, {}, flops)


def decompose_flops(shape: tn.MPOShape, bonds: tuple[int, ...] | None) -> int:
    """Count the Gram matrices and projections of both outer unfoldings of the centre.

    With legs L·C·R around the centre and kept bonds l and r: 2·L²·CR and 2·l·L·CR from the left,
    then 2·lC·R² and 2·lC·R·r from the right.
    """
    if bonds is None:
        return 0
    center_site = shape.center_site
    left, right = prod(shape.legs[:center_site]), prod(shape.legs[center_site + 1 :])
    rest = shape.legs[center_site] * right
    kept_left = bonds[center_site - 1] if center_site else 1
    kept_right = bonds[center_site] if center_site < shape.sites - 1 else 1
    rows = kept_left * shape.legs[center_site]
    return 2 * left * rest * (left + kept_left) + 2 * rows * right * (right + kept_right)


def rounding_flops(
    shape: tn.MPOShape, given: tuple[int, ...], bonds: tuple[int, ...] | None
) -> int:
    """Count, per core l·d·r, 2·l·d·r² to orthogonalise it and 2·l·d·r·l' to project it."""
    if bonds is None:
        return 0
    old, new = (1, *given, 1), (1, *bonds, 1)
    return sum(
        2 * old[site] * leg * old[site + 1] * (old[site + 1] + new[site])
        for site, leg in enumerate(shape.legs)
    )


def apply_flops(shape: tn.MPOShape, bonds: tuple[int, ...], batch: int, _: object) -> int:
    """Count the products of the cheaper route: the chain, or the rebuilt matrix."""
    return tn.contraction_plan(shape, bonds, batch=batch).flops


def inner_flops(shape: tn.MPOShape, bonds: tuple[int, ...], _: object) -> int:
    """Count an environment carried through both chains: 2·l·l·d·r + 2·l·d·r·r per site."""
    full = (1, *bonds, 1)
    return sum(
        2 * full[site] * leg * full[site + 1] * (full[site] + full[site + 1])
        for site, leg in enumerate(shape.legs)
    )


def _operators(shape: tn.MPOShape, count: int, dtype: str) -> list[Cores]:
    """Draw one operator, or two whose inner product is far from zero."""
    rng = np.random.default_rng(3)
    first = random_cores(shape, 64, rng, dtype)
    # So close to the first that their inner product is no difference of large numbers.
    second = tuple(core + np.asarray(0.1, dtype) * abs(core) for core in first)
    return [first, second][:count]


def _operator_and_vectors(
    shape: tn.MPOShape, bond: int | None, batch: int, dtype: str
) -> list[Any]:
    """Draw an operator and a batch of vectors."""
    rng = np.random.default_rng(4)
    largest = max(shape.bond_dims()) if bond is None else bond
    cores = random_cores(shape, largest, rng, dtype)
    return [cores, rng.normal(size=(batch, shape.in_features)).astype(dtype)]


def _direct_sum(a: Cores, b: Cores) -> tuple[np.ndarray, ...]:
    """Add two operators: block-diagonal cores, with a row and a column at the ends."""
    cores = [np.concatenate([a[0], b[0]], axis=3)]
    for first, second in zip(a[1:-1], b[1:-1], strict=True):
        left, *legs, right = first.shape
        core = np.zeros((left + second.shape[0], *legs, right + second.shape[3]), first.dtype)
        core[:left, ..., :right] = first
        core[left:, ..., right:] = second
        cores.append(core)
    return (*cores, np.concatenate([a[-1], b[-1]], axis=0))


def _convert(library: Library, value: Any) -> Any:
    """Convert arrays, cores and lists of them to a library's types."""
    if isinstance(value, np.ndarray):
        return library.array(value)
    if isinstance(value, tuple):
        return library.operator(value)
    return [_convert(library, item) for item in value] if isinstance(value, list) else value


def _relative(result: np.ndarray, answer: np.ndarray) -> float:
    """Return the relative error in the Frobenius norm."""
    return float(np.linalg.norm(result - answer) / np.linalg.norm(answer))

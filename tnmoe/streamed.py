"""A matrix that need not fit into memory → MPO, in a few passes over blocks of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any, Literal, overload

import numpy as np

from tnmoe.backends import Array
from tnmoe.backends.protocol import COMPUTE_DTYPE
from tnmoe.chains.canonical import canonicalize
from tnmoe.chains.gram_sketch import GramSketch
from tnmoe.chains.precision import check_range, narrowed, widened
from tnmoe.chains.range_finder import squared_distance
from tnmoe.chains.row_blocks import RowBlocks
from tnmoe.chains.scaling import times_power
from tnmoe.chains.sketch_sizes import SketchSizes
from tnmoe.contraction.build import right_environment
from tnmoe.decompose import check_fits, check_is_shape, decompose
from tnmoe.errors import InputError, check_generator, check_positive_int
from tnmoe.mpo import MPO
from tnmoe.shapes import MPOShape, resolve_center_site
from tnmoe.truncation.info import TruncationInfo
from tnmoe.truncation.limits import Limits

# Squares in double precision show no smaller error reliably.
_LEAST_RTOL = 1e-6
# Part of a squared tolerance that the sketch may miss before a larger one pays.
_MISSED_PART = 0.5


@overload
def decompose_streamed(
    source: Any,
    shape: MPOShape | None = ...,
    *,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    rtol: float | None = ...,
    center_site: int | None = ...,
    memory: int = ...,
    rng: np.random.Generator | int = ...,
    on_progress: Callable[[int, int], None] | None = ...,
    return_info: Literal[False] = ...,
) -> MPO: ...


@overload
def decompose_streamed(
    source: Any,
    shape: MPOShape | None = ...,
    *,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    rtol: float | None = ...,
    center_site: int | None = ...,
    memory: int = ...,
    rng: np.random.Generator | int = ...,
    on_progress: Callable[[int, int], None] | None = ...,
    return_info: Literal[True],
) -> tuple[MPO, TruncationInfo]: ...


def decompose_streamed(
    source: Any,
    shape: MPOShape | None = None,
    *,
    max_bond: int | Sequence[int] | None = None,
    bonds: Sequence[int] | None = None,
    rtol: float | None = None,
    center_site: int | None = None,
    memory: int = 2**30,
    rng: np.random.Generator | int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    return_info: bool = False,
) -> MPO | tuple[MPO, TruncationInfo]:
    """Decompose a matrix that need not fit into memory into a truncated MPO.

    The function reads the matrix in blocks of rows, from the first to the last, a few times.

    Parameters
    ----------
    source : object
        A matrix (out_features, in_features) whose rows ``source[start:stop]`` are NumPy arrays or
        torch tensors, floating-point or complex: a ``numpy.memmap``, a slice of a safetensors file
        (``safe_open(path, framework).get_slice(name)``), a dataset of h5py or zarr, or an object
        of your own with ``shape`` and blocks of rows.
    shape : MPOShape, optional
        Legs of the MPO, at least two sites; by default
        ``MPOShape.for_matrix(out_features, in_features)``.
    max_bond : int or sequence of int, optional
        Largest bond dimension, for all bonds or one per bond.
    bonds : sequence of int, optional
        Exact bond dimensions, one per bond. Zeros fill bonds that the matrix does not need.
    rtol : float, optional
        Guaranteed relative Frobenius error of the whole (up to rounding in the matrix's dtype), at
        least 1e-6. ``max_bond`` wins over it.
    center_site : int, optional
        Site of the orthogonality centre; by default ``shape.center_site``.
    memory : int
        Bytes that the function may take, roughly, besides the source. They decide how large blocks
        are, and where the matrix is cut first.
    rng : numpy Generator or int
        Source of random vectors.
    on_progress : callable, optional
        Called after every block with the rows read so far and the rows to read in all passes. The
        latter number grows if a tolerance needs another pass.
    return_info : bool
        Also return what was cut.

    Returns
    -------
    MPO
        In canonical form around ``center_site``, with the library, the dtype and the device of the
        source's rows.
    TruncationInfo
        Only with ``return_info``. ``error_bound`` is never below the true error, as for
        :func:`decompose`. Schmidt values right of the first cut come from a sketch, and may be too
        small.

    Raises
    ------
    InputError
        If ``memory`` is too little, in which case the message says how much it takes; if there is
        neither a bond nor a tolerance, or an argument is out of range; if a block holds NaN or
        infinity, or has another size than the shape of the source says.
    TypeError
        If the source has no shape or no blocks, or belongs to no supported library.

    See Also
    --------
    decompose : A matrix in memory, also exactly or within a number of parameters.
    cross : A function of row and column.

    Notes
    -----
    A bond divides the sites into a head and a tail, so that the parts need least memory. As an
    unfolding M with the legs of the tail as columns, the matrix is read

    - twice, to multiply k random vectors by the Gram matrix Mᴴ M, and again what comes out. From
      the products follows Nyström's approximation F Fᴴ of the Gram matrix (Tropp, Yurtsever, Udell,
      Cevher, NeurIPS 2017, arXiv:1706.05736, algorithm 3 without its shift). k is the largest bond
      there plus 10. With ``rtol``, k begins with 74, or with what fits into the memory, and a pass
      with twice as many follows as long as the sketch misses too much.
    - once more, to project M onto the cores of the tail, which come from a truncation of F. This
      pass measures the error.

    These are three passes with given bonds, and two or more with ``rtol``. The projected matrix is
    smaller by the ratio of the tail's legs to the bond. It is then decomposed in memory, within
    what is left of the tolerance. All is computed in double precision until then.

    Examples
    --------
    >>> import numpy as np, tempfile, pathlib
    >>> shape = MPOShape((4, 4, 4), (4, 4, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "matrix.npy"
    ...     np.save(path, np.add.outer(np.arange(64.0), np.arange(64.0)))
    ...     source = np.load(path, mmap_mode="r")
    ...     mpo, info = decompose_streamed(source, shape, rtol=1e-3, return_info=True)
    >>> mpo.bond_dims
    (2, 2)
    """
    check_is_shape(shape)
    rows = RowBlocks(source, on_progress)
    shape = check_fits(shape, rows.size)
    limits = Limits(shape, max_bond=max_bond, bonds=bonds, rtol=rtol)
    center_site = resolve_center_site(shape, center_site)
    memory, rng = check_positive_int("memory", memory), check_generator(rng)
    if shape.sites == 1:
        raise InputError(f"{shape} has one site: an MPO of it is as large as the matrix")
    if max_bond is None and bonds is None and rtol is None:
        raise InputError("decompose_streamed needs max_bond, bonds or rtol")
    if limits.rtol is not None and limits.rtol < _LEAST_RTOL:
        raise InputError(f"rtol must be at least {_LEAST_RTOL} in blocks of rows, got {rtol}")
    stream = _Stream(rows, limits, memory, rng)
    with rows.xp.full_precision(rows.like):
        mpo, info = stream.decompose(center_site)
    return (mpo, info) if return_info else mpo


@dataclass
class _Tail:
    """The cores of the tail, which are right isometries.

    Attributes
    ----------
    cores : list of array
        In the dtype of the computation.
    info : TruncationInfo
        Of the truncation of the sketch. Its first bond is the one between head and tail.
    missing : float
        Squared norm of the matrix less that of the sketch.
    allowed : float
        Squared error that the whole decomposition may make.
    exponent : int
        All numbers here are of the matrix divided by two to this power.
    """

    cores: list[Array]
    info: TruncationInfo
    missing: float
    allowed: float
    exponent: int

    def discarded(self, measured: float) -> list[float]:
        """Divide the measured error among the bonds of the tail, as the sketch predicts it."""
        first, *others = self.info.discarded
        predicted = [hypot(first, self.missing**0.5), *others]
        total = hypot(*predicted)
        if total == 0:
            return [measured, *others]
        return [part * (measured / total) for part in predicted]


class _Stream:
    """A streamed decomposition under way; see :func:`decompose_streamed`."""

    def __init__(
        self, rows: RowBlocks, limits: Limits, memory: int, rng: np.random.Generator
    ) -> None:
        self._rows, self._xp, self._rng, self._limits = rows, rows.xp, rng, limits
        self._dtype = COMPUTE_DTYPE.get(rows.dtype, rows.dtype)
        self._like = widened(rows.xp, rows.like)
        self._sizes = SketchSizes(limits, self._dtype, memory)
        self._division = self._sizes.division

    def decompose(self, center_site: int) -> tuple[MPO, TruncationInfo]:
        """Decompose the matrix: its tail from sketches, and its head in memory."""
        xp, dtype, head = self._xp, self._rows.dtype, self._division.head
        tail = self._find_tail()
        projected, missed = self._project(tail)
        left, left_info = self._decompose_head(projected, tail.allowed - missed**2, center_site)
        joined = _joined(left.cores, tail.cores)
        cores = list(canonicalize(xp, joined, min(center_site, head), center_site))
        check_range(xp, cores[center_site], dtype, 2.0**tail.exponent)
        cores[center_site] = times_power(cores[center_site], tail.exponent)
        mpo = MPO(narrowed(xp, cores, dtype), self._limits.shape, center_site)
        return mpo, _joined_info(left_info, tail, missed)

    def _find_tail(self) -> _Tail:
        """Find the cores of the tail from products with the Gram matrix of its legs."""
        limits, division = self._limits, self._division
        factor, missing, squared_norm, exponent = self._sketch()
        vectors, rtol, allowed = factor.shape[0], None, 0.0
        if limits.rtol is not None:
            allowed = limits.rtol**2 * squared_norm
            captured = squared_norm - missing
            spare = max(0.0, self._tail_part() * allowed - missing)
            rtol = (spare / captured) ** 0.5 if captured else 0.0
        mpo, info = decompose(
            factor.reshape(vectors * division.tail_rows, division.tail_columns),
            division.tail_shape(vectors),
            max_bond=limits.caps[division.head - 1 :],
            bonds=limits.bonds and limits.bonds[division.head - 1 :],
            rtol=rtol,
            center_site=0,
            return_info=True,
        )
        cores = [self._xp.astype(core, self._dtype) for core in mpo.cores[1:]]
        return _Tail(cores, info, missing, allowed, exponent)

    def _sketch(self) -> tuple[Array, float, float, int]:
        """Sketch the Gram matrix in as many passes as it takes.

        Returns
        -------
        array, shape (k, tail legs)
            The factor Fᴴ.
        float, float
            The squared norm that it misses, and that of the matrix.
        int
            The power of two that the matrix was divided by.
        """
        rtol, sizes, division = self._limits.rtol, self._sizes, self._division
        size = sizes.first
        basis, refined = self._basis(size), False
        self._rows.rows_to_read = self._rows.size[0]  # for the projection
        while True:
            sizes.check(size)
            sketch = self._pass(basis)
            factor, missing = sketch.factor()
            found = factor, missing, sketch.squared_norm, sketch.exponent
            allowed = 0.0
            if rtol is not None:
                allowed = self._tail_part() * rtol**2 * sketch.squared_norm
                if missing <= _MISSED_PART * allowed:
                    return found
            if size == sizes.largest and (refined or size == division.tail):
                return found
            following = min(2 * size, sizes.largest)
            if missing <= allowed and not sizes.fits(following):
                return found
            size, refined = following, size == sizes.largest
            del factor, found  # the next pass needs the memory
            basis = self._basis(size, sketch.image)

    def _pass(self, basis: Array) -> GramSketch:
        """Read the matrix once, for the products of its Gram matrix with a basis."""
        self._rows.rows_to_read += self._rows.size[0]
        sketch = GramSketch(self._xp, basis)
        for unfolding, name in self._unfoldings(basis.shape[1]):
            sketch.add(unfolding, name)
            del unfolding  # before the next block is read
        return sketch

    def _basis(self, size: int, image: Array | None = None) -> Array:
        """Return orthonormal vectors: those of an image, and random ones."""
        xp, legs = self._xp, self._division.tail
        if size == legs:
            return xp.eye(legs, like=self._like)
        if image is None:
            return xp.qr(xp.normal((legs, size), self._rng, like=self._like))[0]
        missing = size - image.shape[1]
        if missing:
            # Random vectors as large as those of the image: QR takes all for equally important.
            random = xp.normal((legs, missing), self._rng, like=self._like)
            image = xp.concatenate([xp.qr(image)[0], random / legs**0.5], 1)
        return xp.qr(image)[0]

    def _project(self, tail: _Tail) -> tuple[Array, float]:
        """Project the matrix onto the cores of the tail; return it, and the error of that."""
        xp, division = self._xp, self._division
        rights = xp.transpose(right_environment(xp, [widened(xp, core) for core in tail.cores])[0])
        conjugates = xp.conj(rights)
        bond = rights.shape[1]
        parts, squared = [], 0.0
        for unfolding, _ in self._unfoldings(bond):
            unfolding = times_power(unfolding, -tail.exponent)
            part = xp.astype(unfolding @ conjugates, self._dtype)
            squared += float(
                squared_distance(
                    xp, xp.transpose(unfolding), rights, xp.transpose(widened(xp, part))
                )[0]
            )
            parts.append(part)
            del unfolding  # before the next block is read
        projected = xp.concatenate(parts, 0)
        return projected.reshape(division.groups, division.head_columns * bond), squared**0.5

    def _decompose_head(
        self, projected: Array, allowed: float, center_site: int
    ) -> tuple[MPO, TruncationInfo]:
        """Decompose the projected matrix, whose last input leg is the bond to the tail."""
        xp, division = self._xp, self._division
        rtol = None
        if self._limits.rtol is not None:
            norm = float(xp.to_numpy(xp.norm(projected)))
            rtol = max(0.0, allowed) ** 0.5 / norm if norm else 0.0
        return decompose(
            projected,
            division.head_shape(projected.shape[1] // division.head_columns),
            max_bond=self._limits.caps[: division.head],
            bonds=self._limits.bonds and self._limits.bonds[: division.head],
            rtol=rtol,
            center_site=min(center_site, division.head),
            return_info=True,
        )

    def _unfoldings(self, vectors: int) -> Iterator[tuple[Array, str]]:
        """Read the matrix once, in blocks (rows, legs of the tail) in double precision."""
        division = self._division
        for block, name in self._rows.blocks(self._sizes.block_rows(vectors)):
            yield widened(self._xp, division.unfold(self._xp, block)), name
            del block  # before the next one is read

    def _tail_part(self) -> float:
        """Return the part of the squared error that the bonds of the tail may make."""
        bonds = self._limits.shape.sites - 1
        return (bonds + 1 - self._division.head) / bonds


def _joined(left: Sequence[Array], right: Sequence[Array]) -> list[Array]:
    """Join the chains of head and tail: the last core of the head is a matrix between them."""
    *cores, last = left
    first, *others = right
    bond, _, rank, _ = last.shape
    merged = last.reshape(bond, rank) @ first.reshape(rank, -1)
    return [*cores, merged.reshape(bond, *first.shape[1:]), *others]


def _joined_info(left: TruncationInfo, tail: _Tail, missed: float) -> TruncationInfo:
    """Return what was cut in the head, and in the tail."""
    at_bond, *in_tail = tail.discarded(missed)
    *in_head, last = left.discarded
    discarded = (*in_head, hypot(last, at_bond), *in_tail)
    spectra = (*left.spectra, *tail.info.spectra[1:])
    sketched = len(in_tail) + 1
    return TruncationInfo(
        tuple(float(np.ldexp(lost, tail.exponent)) for lost in discarded),
        tuple(times_power(values, tail.exponent) for values in spectra),
        (*left.methods[: len(in_head)], *["randomized"] * sketched),
    )

"""Matrix product operators: immutable chains of cores with a known orthogonality centre."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from math import prod
from numbers import Number
from operator import mul, truediv
from typing import Any, Literal, overload

import numpy as np

from tnmoe.backends import Array, Backend, get_backend
from tnmoe.chains import algebra, indexing
from tnmoe.chains.canonical import canonicalize, schmidt_values, vidal
from tnmoe.chains.checks import check_cores
from tnmoe.chains.precision import computable, narrowed, widened
from tnmoe.chains.rounding import round_chain
from tnmoe.contraction.build import as_numpy, to_padded_matrix
from tnmoe.drawing.chain import Chain
from tnmoe.drawing.notebook import draw_html, draw_svg
from tnmoe.drawing.text import draw_text
from tnmoe.errors import InputError, check_generator, check_index, short_repr
from tnmoe.pytrees import pytree
from tnmoe.shapes import MPOShape, resolve_center_site, resolve_sites
from tnmoe.truncation.info import TruncationInfo
from tnmoe.truncation.limits import Limits
from tnmoe.truncation.spectra import entanglement_entropy

# A squared norm between these lost nothing to over- or underflow.
_SQUARABLE = (1e-200, 1e200)
# A notebook shows the entropies of operators up to this size. They take some 20 ms.
_MAX_PARAMS_WITH_ENTROPIES = 2**16


# A transformation may change the cores, and with them the gauge: then no centre is known.
@pytree(arrays=("cores",), static=("shape",), forgotten=("center_site",))
class MPO:
    """A matrix as a chain of cores: W[o₁…oₙ, i₁…iₙ] = A₁[o₁,i₁]·A₂[o₂,i₂]·…·Aₙ[oₙ,iₙ].

    Numbers multiply and divide it. ``mpo[rows, columns]`` takes entries from it as from a NumPy
    array, without the dense matrix. ``print`` and notebooks draw it.

    Parameters
    ----------
    cores : sequence of array
        Core k has shape (D_k, out_k, in_k, D_{k+1}); the outermost bonds are 1.
    shape : MPOShape, optional
        Legs and matrix size; by default read from the cores, without padding.
    center_site : int, optional
        Site around which the cores are canonical, if that is known. It is not verified.

    Raises
    ------
    InputError
        If the cores do not chain, or do not fit ``shape``.

    Examples
    --------
    >>> import numpy as np
    >>> mpo = MPO([np.ones((1, 2, 2, 3)), np.ones((3, 2, 1, 1))])
    >>> mpo
    MPO(4×2, sites=2, bond_dims=(3,), num_params=18, dtype=float64, center_site=None)
    >>> mpo.apply(np.array([1.0, 2.0]))
    array([9., 9., 9., 9.])
    """

    __slots__ = ("center_site", "cores", "shape")

    cores: tuple[Array, ...]
    shape: MPOShape
    center_site: int | None

    # NumPy scalars and arrays leave ``2.0 * mpo`` to the MPO.
    __array_ufunc__ = None

    def __init__(
        self,
        cores: Sequence[Array],
        shape: MPOShape | None = None,
        center_site: int | None = None,
    ) -> None:
        cores = tuple(cores)
        check_cores(cores)
        dims = tuple((int(core.shape[1]), int(core.shape[2])) for core in cores)
        if shape is None:
            shape = MPOShape([out for out, _ in dims], [in_ for _, in_ in dims])
        if dims != tuple(zip(shape.out_dims, shape.in_dims, strict=True)):
            raise InputError(f"the cores have (out, in) legs {dims}, which do not fit {shape}")
        center_site = (
            None if center_site is None else check_index("center_site", center_site, len(cores))
        )
        for name, value in (
            ("cores", cores),
            ("shape", shape),
            ("center_site", center_site),
        ):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an MPO is immutable: cannot set {name!r}")

    def __reduce__(self) -> tuple:
        return MPO, (self.cores, self.shape, self.center_site)

    @classmethod
    def identity(cls, shape: MPOShape, like: Array | None = None) -> MPO:
        """Return the identity matrix; all bonds are 1, or 2 where the shape is padded.

        Parameters
        ----------
        shape : MPOShape
            Square legs: ``out_dims == in_dims`` and equal sizes.
        like : array, optional
            Gives library, dtype and device; by default NumPy's float64.

        Raises
        ------
        InputError
            If a site's output leg differs from its input leg.

        Examples
        --------
        >>> MPO.identity(MPOShape((2, 2), (2, 2))).to_matrix()
        array([[1., 0., 0., 0.],
               [0., 1., 0., 0.],
               [0., 0., 1., 0.],
               [0., 0., 0., 1.]])
        """
        _check_square(shape, "the identity")
        like = np.zeros(()) if like is None else like
        return cls(algebra.identity(get_backend(like), shape, like), shape)

    @classmethod
    def zeros(cls, shape: MPOShape, like: Array | None = None) -> MPO:
        """Return the zero matrix; all bonds are 1.

        Parameters
        ----------
        shape : MPOShape
            Legs.
        like : array, optional
            Gives library, dtype and device; by default NumPy's float64.

        Examples
        --------
        >>> MPO.zeros(MPOShape((2, 2), (2, 3))).norm().item()
        0.0
        """
        like = np.zeros(()) if like is None else like
        xp = get_backend(like)
        return cls([xp.zeros(core, like) for core in shape.core_shapes(1)], shape)

    @classmethod
    def random(
        cls,
        shape: MPOShape,
        max_bond: int | Sequence[int] | None = None,
        rng: np.random.Generator | int | None = None,
        like: Array | None = None,
    ) -> MPO:
        """Draw independent normal cores, scaled so that every entry has variance 1.

        Parameters
        ----------
        shape : MPOShape
            Legs.
        max_bond : int or sequence of int, optional
            Largest bond dimension; exact bonds by default.
        rng : numpy Generator or int, optional
            Source of random numbers. A seed gives the same numbers in every library.
        like : array, optional
            Gives library, dtype and device; by default NumPy's float64.

        Raises
        ------
        InputError
            If ``max_bond`` or ``rng`` does not fit.
        """
        like = np.zeros(()) if like is None else like
        shapes = shape.core_shapes(max_bond)
        xp, rng = get_backend(like), check_generator(rng)
        with xp.on_device(like):
            return cls(algebra.random(xp, shapes, rng, like), shape)

    @property
    def bond_dims(self) -> tuple[int, ...]:
        """Inner bond dimensions, left to right."""
        return tuple(int(core.shape[-4]) for core in self.cores[1:])

    @property
    def num_params(self) -> int:
        """Number of entries of all cores together."""
        return sum(prod(core.shape) for core in self.cores)

    @property
    def dtype(self) -> object:
        """Dtype of the cores, as their library gives it."""
        return self.cores[0].dtype

    def to_matrix(self) -> Array:
        """Return the dense matrix, shape (out_features, in_features)."""
        with self._full_precision():
            matrix = to_padded_matrix(self._backend, self._computable_cores())
            return self._in_own_dtype(matrix)[: self.shape.out_features, : self.shape.in_features]

    # The rows of an operator may be very many: only an index asks for them.
    __iter__ = None

    def __getitem__(self, index: Any) -> Array:
        """Return entries, rows or columns of the dense matrix, without the matrix.

        The cost grows with what is asked for. Where the whole matrix costs less, it is built.

        Parameters
        ----------
        index : int, slice, integers, mask, or a tuple of two of them
            Rows, and columns if there are two: as for a NumPy array. Listed rows and listed columns
            are pairs, of an entry each; ``numpy.ix_`` makes a block of them.

        Raises
        ------
        InputError
            If a row or column is out of range, or an index is of another kind: an ellipsis,
            ``None``, or a mask of both axes. The error is also an ``IndexError``.

        Examples
        --------
        >>> mpo = MPO.identity(MPOShape((2, 2), (2, 2)))
        >>> mpo[1]
        array([0., 1., 0., 0.])
        >>> mpo[-1, -1].item(), mpo[1:, [0, 3]].shape
        (1.0, (3, 2))
        """
        with self._full_precision():
            taken = indexing.take(self._backend, self.shape, self._computable_cores(), index)
            return self._in_own_dtype(taken)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the dense matrix as NumPy's, from any library and device, without gradients."""
        return as_numpy(self._backend, self.to_matrix(), dtype, copy)

    def apply(self, x: Array) -> Array:
        """Apply to vectors along the last axis: (..., in_features) → (..., out_features).

        The result has the dtype that NumPy gives a product of both, in every library. The vectors
        are contracted with the cores, or with the built matrix where
        :func:`tnmoe.contraction_plan` finds that cheaper for this many vectors.

        Under ``torch.autocast`` and with TF32, these products are as rough as torch's own. All
        other methods of an MPO compute in full precision there, too.

        Parameters
        ----------
        x : array, shape (..., in_features)
            Of the cores' library.

        Raises
        ------
        InputError
            If the last axis is not ``in_features`` long.
        TypeError
            If ``x`` belongs to another library than the cores.
        """
        shape, xp = self.shape, self._backend
        if get_backend(x) is not xp:
            raise TypeError(f"the cores are {xp.name} arrays, x is a {type(x).__qualname__}")
        if x.ndim == 0 or x.shape[-1] != shape.in_features:
            raise InputError(
                f"x must have {shape.in_features} entries along its last axis, "
                f"got shape {tuple(x.shape)}"
            )
        with xp.on_device(x):
            return algebra.apply(xp, shape, self.cores, x)

    def __add__(self, other: MPO) -> MPO:
        if not isinstance(other, MPO):
            return NotImplemented
        check_alike(self, other, "a sum")
        with self._full_precision():
            return MPO(algebra.add(self._backend, [self.cores, other.cores]), self.shape)

    def __radd__(self, other: Any) -> MPO:
        """Return the operator itself for 0 + a, which ``sum([a, b])`` begins with."""
        return self if type(other) is int and other == 0 else NotImplemented

    def __neg__(self) -> MPO:
        return self * -1

    def __sub__(self, other: MPO) -> MPO:
        return self + -other if isinstance(other, MPO) else NotImplemented

    def __mul__(self, factor: Any) -> MPO:
        """Multiply by a number, or by an array without axes that holds one."""
        return self._scaled(mul, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> MPO:
        if isinstance(divisor, Number) and divisor == 0:  # NumPy would warn, and return infinity
            raise ZeroDivisionError("cannot divide an operator by zero")
        return self._scaled(truediv, divisor)

    def _scaled(self, operation: Callable[[Array, Any], Array], value: Any) -> MPO:
        site = resolve_center_site(self.shape, self.center_site)
        factor = algebra.as_factor(self._backend, value, self.cores[site])
        if factor is None:
            return NotImplemented
        cores = list(self.cores)
        with self._backend.on_device(cores[site]):
            cores[site] = operation(cores[site], factor)
        return MPO(cores, self.shape, self.center_site)

    def __matmul__(self, other: Any) -> Any:
        """Compose with an operator, or apply to a vector (in,) or to columns (in, m).

        The bonds of a product multiply; :func:`tnmoe.matmul` keeps them small.
        """
        if isinstance(other, MPO):
            return self._compose(other)
        if getattr(other, "ndim", None) == 1:
            return self.apply(other)
        if getattr(other, "ndim", None) == 2:
            return self._backend.transpose(self.apply(get_backend(other).transpose(other)))
        if hasattr(other, "ndim"):
            raise InputError(
                f"mpo @ x takes a vector or a matrix, got shape {tuple(other.shape)}: "
                "use mpo.apply(x) for vectors along the last axis"
            )
        return NotImplemented

    def _compose(self, other: MPO) -> MPO:
        check_operands(self, other)
        shape, xp = algebra.product_shape(self.shape, other.shape), self._backend
        with self._full_precision():
            factors = algebra.product_factors(xp, self.shape, self.cores, other.cores)
            cores = algebra.compose(xp, *factors)
            return MPO([self._in_own_dtype(core) for core in cores], shape)

    @property
    def T(self) -> MPO:  # noqa: N802
        """The transpose."""
        shape = self.shape
        flipped = MPOShape(shape.in_dims, shape.out_dims, shape.in_features, shape.out_features)
        return MPO(algebra.transpose(self._backend, self.cores), flipped, self.center_site)

    @property
    def H(self) -> MPO:  # noqa: N802
        """The adjoint: conjugate transpose."""
        return self.conj().T

    def conj(self) -> MPO:
        """Return the complex conjugate; a real MPO is its own."""
        cores = [self._backend.conj(core) for core in self.cores]
        return MPO(cores, self.shape, self.center_site)

    def trace(self) -> Array:
        """Return the sum of the diagonal, a scalar of the cores' library.

        Raises
        ------
        InputError
            If a site's output leg differs from its input leg.
        """
        _check_square(self.shape, "a trace")
        cores = self._computable_cores()
        with self._full_precision():
            return self._in_own_dtype(algebra.trace(self._backend, self.shape, cores))

    def inner(self, other: MPO) -> Array:
        """Compute the Frobenius inner product ⟨self, other⟩ = Σ conj(self) · other, a scalar.

        Like :meth:`norm`, it counts the padding of both chains.

        Parameters
        ----------
        other : MPO
            Of the same shape, library and dtype.

        Raises
        ------
        InputError
            If shapes or dtypes differ.
        TypeError
            If ``other`` is not an MPO, or belongs to another library.

        Examples
        --------
        >>> one = MPO.identity(MPOShape((2, 2), (2, 2)))
        >>> one.inner(3 * one).item()
        12.0
        """
        check_alike(self, other, "an inner product")
        bra, ket = self._computable_cores(), other._computable_cores()
        with self._full_precision():
            return self._in_own_dtype(algebra.inner(self._backend, bra, ket))

    def _in_own_dtype(self, array: Array) -> Array:
        return self._backend.astype(array, self._backend.dtype_name(self.cores[0]))

    def norm(self) -> Array:
        """Compute the Frobenius norm, a real scalar of the cores' library.

        It is the norm of the whole chain. If the shape is padded and bonds were truncated, it
        includes what the truncation left in the padding, which ``to_matrix`` cuts off.

        With a known centre it is the norm of one core. Otherwise it is the root of ⟨self, self⟩,
        computed in double precision.
        """
        xp = self._backend
        if self.center_site is not None:
            return xp.norm(self.cores[self.center_site])
        if all(map(xp.has_numbers, self.cores)):
            # This may overflow; a gauge move then finds the norm below.
            with self._full_precision(), np.errstate(over="ignore", invalid="ignore"):
                cores = [widened(xp, core) for core in self.cores]
                squared = algebra.inner(xp, cores, cores).real
                if _SQUARABLE[0] < float(xp.to_numpy(squared)) < _SQUARABLE[1]:
                    return xp.astype(squared**0.5, xp.dtype_name(self.cores[0].real))
        # The squares may over- or underflow. A gauge move works with the numbers themselves.
        center_site = self.shape.center_site
        return xp.norm(self.canonicalize(center_site).cores[center_site])

    def canonicalize(self, center_site: int | None = None) -> MPO:
        """Move the orthogonality centre to a site; the operator stays the same.

        Parameters
        ----------
        center_site : int, optional
            Site to move to; by default that of the central core, ``shape.center_site``.

        Returns
        -------
        MPO
            Cores left of ``center_site`` are isometries when read as (left bond · legs) × right
            bond, and cores right of it when read as left bond × (legs · right bond). A bond larger
            than its neighbours can use shrinks.

        Raises
        ------
        InputError
            If ``center_site`` is not a site.
        """
        center_site = resolve_center_site(self.shape, center_site)
        with self._full_precision():
            cores = canonicalize(
                self._backend, self._computable_cores(), self.center_site, center_site
            )
            name = self._backend.dtype_name(self.cores[0])
            return MPO(narrowed(self._backend, cores, name), self.shape, center_site)

    def vidal(self) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Return the symmetric (Vidal) form: cores Γ and Schmidt values λ of their bonds.

        The operator is the chain Γ₁·diag(λ₁)·Γ₂·diag(λ₂)·…·Γₙ. λΓ is a left isometry at every
        site but the last, and Γλ a right isometry at every site but the first. Schmidt values that
        are rounding noise are dropped, because the form divides by them.

        Returns
        -------
        gammas : tuple of array, shapes (D, out, in, D')
        schmidt_values : tuple of array, shapes (D,)
            One per bond, descending.

        Examples
        --------
        >>> from tnmoe import MPOShape
        >>> gammas, values = MPO.random(MPOShape((2, 2), (2, 2)), max_bond=3, rng=0).vidal()
        >>> [gamma.shape for gamma in gammas], values[0].shape
        ([(1, 2, 2, 3), (3, 2, 2, 1)], (3,))
        """
        exact = self.compress(center_site=0)
        with self._full_precision():
            gammas, values = vidal(self._backend, exact._computable_cores())
            name = self._backend.dtype_name(self.cores[0])
            return tuple(narrowed(self._backend, gammas, name)), tuple(values)

    @overload
    def compress(
        self,
        *,
        max_bond: int | Sequence[int] | None = ...,
        bonds: Sequence[int] | None = ...,
        rtol: float | None = ...,
        max_params: int | None = ...,
        center_site: int | None = ...,
        return_info: Literal[False] = ...,
    ) -> MPO: ...

    @overload
    def compress(
        self,
        *,
        max_bond: int | Sequence[int] | None = ...,
        bonds: Sequence[int] | None = ...,
        rtol: float | None = ...,
        max_params: int | None = ...,
        center_site: int | None = ...,
        return_info: Literal[True],
    ) -> tuple[MPO, TruncationInfo]: ...

    def compress(
        self,
        *,
        max_bond: int | Sequence[int] | None = None,
        bonds: Sequence[int] | None = None,
        rtol: float | None = None,
        max_params: int | None = None,
        center_site: int | None = None,
        return_info: bool = False,
    ) -> MPO | tuple[MPO, TruncationInfo]:
        """Round to smaller bonds.

        Without arguments only rounding noise is lost, so every bond gets its exact rank. No bond
        ever grows.

        Parameters
        ----------
        max_bond : int or sequence of int, optional
            Largest bond dimension, for all bonds or one per bond.
        bonds : sequence of int, optional
            Exact bond dimensions, one per bond.
        rtol : float, optional
            Guaranteed relative Frobenius error of the whole chain, with its padding.
        max_params : int, optional
            Largest number of parameters of all cores together.
        center_site : int, optional
            Site of the orthogonality centre; by default ``shape.center_site``.
        return_info : bool
            Also return what was cut.

        Returns
        -------
        MPO
            In canonical form around ``center_site``.
        TruncationInfo
            Only with ``return_info``; its ``error_bound`` is the Frobenius error of the chain.

        Raises
        ------
        InputError
            If an argument is out of range or contradicts another, if ``bonds`` exceed the present
            bonds, or if ``bonds`` and ``max_bond`` are missing while JAX traces a function.

        Notes
        -----
        TT-rounding (Oseledets, SIAM J. Sci. Comput. 33, 2295 (2011), algorithm 2), which here
        never forms the isometries right of a bond.

        Examples
        --------
        >>> import numpy as np
        >>> mpo = MPO([np.ones((1, 2, 2, 3)), np.ones((3, 2, 1, 1))])
        >>> mpo.compress().bond_dims
        (1,)
        """
        center_site = resolve_center_site(self.shape, center_site)
        limits = Limits(
            self.shape, max_bond=max_bond, bonds=bonds, rtol=rtol, max_params=max_params
        )
        mpo, info = round_mpo(self, limits, center_site)
        return (mpo, info) if return_info else mpo

    def schmidt_values(self, bond: int) -> Array:
        """Return the Schmidt values across a bond, descending.

        They are the singular values of the matrix whose rows are the legs left of the bond and
        whose columns are the legs right of it.

        Parameters
        ----------
        bond : int
            From 0 to sites − 2, left to right.

        Returns
        -------
        array, shape (D,)
            Real, in the precision of the cores; single for half precision.

        Raises
        ------
        InputError
            If there is no such bond.
        """
        if self.shape.sites == 1:
            raise InputError(f"bond must lie between two sites, and there is one: got {bond!r}")
        bond = check_index("bond", bond, self.shape.sites - 1)
        xp, cores = self._backend, self._computable_cores()
        with self._full_precision():
            return schmidt_values(xp, cores, self.center_site, bond)

    def entropy(self, bond: int) -> float:
        """Return the entanglement entropy across a bond, in nats.

        It is −Σ p log p of the normalised squares p of the Schmidt values: 0 for a product of
        operators, and log D where all D values are equal.

        Parameters
        ----------
        bond : int
            From 0 to sites − 2, left to right.

        Raises
        ------
        InputError
            If there is no such bond.
        """
        values = self._backend.to_numpy(self.schmidt_values(bond))
        return entanglement_entropy(values)

    def hadamard(self, other: MPO) -> MPO:
        """Multiply entry by entry with an operator of the same shape.

        The bonds multiply; :func:`tnmoe.hadamard` keeps them small.

        Parameters
        ----------
        other : MPO
            Of the same shape, library and dtype.

        Raises
        ------
        InputError
            If shapes or dtypes differ.
        TypeError
            If ``other`` is not an MPO, or belongs to another library.

        Examples
        --------
        >>> from tnmoe import MPOShape
        >>> one = MPO.identity(MPOShape((2,), (2,)))
        >>> one.hadamard(3 * one).to_matrix()
        array([[3., 0.],
               [0., 3.]])
        """
        check_alike(self, other, "an entrywise product")
        with self._backend.on_device(self.cores[0]):
            return MPO(algebra.entrywise(self.cores, other.cores), self.shape)

    def partial_trace(self, sites: int | Iterable[int]) -> MPO | Array:
        """Sum the diagonals of some sites.

        Parameters
        ----------
        sites : int or iterable of int
            Sites to sum over, in any order. Their output legs must equal their input legs.

        Returns
        -------
        MPO or array
            An operator on the other sites, without padding. If there are none it is a scalar of
            the cores' library. A padded matrix counts with zeros in its padding.

        Raises
        ------
        InputError
            If a site does not exist, is named twice, or has legs that differ.

        Examples
        --------
        >>> from tnmoe import MPOShape
        >>> one = MPO.identity(MPOShape((2, 3), (2, 3)))
        >>> one.partial_trace(1).to_matrix()
        array([[3., 0.],
               [0., 3.]])
        """
        sites, shape = resolve_sites(self.shape, sites, "sites"), self.shape
        if any(shape.out_dims[site] != shape.in_dims[site] for site in sites):
            raise InputError(
                f"a partial trace needs equal output and input legs at the sites {sites}, "
                f"got {shape}"
            )
        with self._full_precision():
            kept, rest = algebra.partial_trace(
                self._backend, shape, self._computable_cores(), sites
            )
            if not kept:
                return self._in_own_dtype(rest.reshape(()))
            return MPO([self._in_own_dtype(core) for core in (*kept[:-1], kept[-1] @ rest)])

    @property
    def _backend(self) -> Backend:
        """Library of the cores; raise an InputError for those of many operators."""
        if self.cores[0].ndim != 4:
            raise InputError(
                "every core needs axes (left bond, out, in, right bond), got "
                f"{[tuple(core.shape) for core in self.cores]}: call methods inside jax.vmap, or "
                "take one operator of many with jax.tree.map"
            )
        return get_backend(self.cores[0])

    def _full_precision(self) -> AbstractContextManager[None]:
        return self._backend.full_precision(self.cores[0])

    def _computable_cores(self) -> tuple[Array, ...]:
        return tuple(computable(self._backend, core) for core in self.cores)

    def __repr__(self) -> str:
        if not hasattr(self.cores[0], "dtype"):  # JAX puts anything in the place of arrays
            return f"MPO(cores={self.cores}, shape={self.shape})"
        return (
            f"MPO({short_repr(self.shape.out_features)}×{short_repr(self.shape.in_features)}, "
            f"sites={self.shape.sites}, "
            f"bond_dims={self.bond_dims}, num_params={self.num_params}, "
            f"dtype={get_backend(self.cores[0]).dtype_name(self.cores[0])}, "
            f"center_site={self.center_site})"
        )

    def __str__(self) -> str:
        if not hasattr(self.cores[0], "dtype"):
            return repr(self)
        return f"{self!r}\n{draw_text(self._chain())}"

    def _repr_svg_(self) -> str:
        return draw_svg(self._chain(), self._entropies_to_show())

    def _repr_html_(self) -> str:
        return draw_html(repr(self), self._chain(), self._entropies_to_show())

    def _chain(self) -> Chain:
        return Chain(self.shape, self.bond_dims, self.center_site)

    def _entropies_to_show(self) -> list[float] | None:
        """Return the entropies of all bonds; None if they take long, or cannot be computed."""
        if self.num_params > _MAX_PARAMS_WITH_ENTROPIES:
            return None
        try:
            _, spectra = self.vidal()
            return [entanglement_entropy(self._backend.to_numpy(values)) for values in spectra]
        except Exception:  # NaN, arrays without numbers: a notebook shows the rest
            return None


def _check_square(shape: MPOShape, what: str) -> None:
    if shape.out_dims != shape.in_dims or shape.out_features != shape.in_features:
        raise InputError(f"{what} needs equal output and input legs at every site, got {shape}")


def check_operands(a: MPO, b: MPO) -> None:
    """Raise unless two operators are of one library and one dtype."""
    if not isinstance(b, MPO):
        raise TypeError(f"expected an MPO, got {type(b).__qualname__}")
    left, right = a._backend, b._backend
    if left is not right:
        raise TypeError(f"both operands need one library, got {left.name} and {right.name}")
    if a.dtype != b.dtype:
        raise InputError(f"both operands need one dtype, got {a.dtype} and {b.dtype}")


def check_alike(a: MPO, b: MPO, purpose: str) -> None:
    """Raise unless two operators are of one library, dtype and shape, as a purpose needs them."""
    check_operands(a, b)
    if a.shape != b.shape:
        raise InputError(f"{purpose} needs operators of one shape, got {a.shape} and {b.shape}")


def round_mpo(
    mpo: MPO, limits: Limits, center_site: int | None = None
) -> tuple[MPO, TruncationInfo]:
    """Round an operator to limits that are checked; see :meth:`MPO.compress`."""
    center_site = resolve_center_site(mpo.shape, center_site)
    xp = mpo._backend
    dtype = xp.dtype_name(mpo.cores[0])
    with xp.full_precision(mpo.cores[0]):
        rounded, info = round_chain(xp, [computable(xp, core) for core in mpo.cores], limits)
        cores = canonicalize(xp, rounded, mpo.shape.sites - 1, center_site)
        return MPO(narrowed(xp, cores, dtype), mpo.shape, center_site), info

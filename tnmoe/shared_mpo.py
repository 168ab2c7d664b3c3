"""Matrices that share cores and a base: the weights of a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod, sqrt
from typing import Any

import numpy as np

from tnmoe.backends import Array, Backend, get_backend
from tnmoe.chains import algebra
from tnmoe.chains.precision import computable
from tnmoe.contraction.build import as_numpy, to_padded_matrix
from tnmoe.decompose import decompose
from tnmoe.drawing.chain import Chain
from tnmoe.drawing.notebook import draw_html, draw_svg
from tnmoe.drawing.text import draw_text
from tnmoe.errors import (
    InputError,
    check_generator,
    check_index,
    check_number_in,
    check_positive_int,
    short_repr,
)
from tnmoe.mpo import MPO, check_operands
from tnmoe.pytrees import pytree
from tnmoe.shapes import MPOShape, SharedSites, resolve_center_site, resolve_shared_sites


@pytree(arrays=("cores", "base"), static=("shape", "center_site"))
class SharedMPO:
    """E matrices of one shape, each a chain of cores, some of which all experts share.

    An expert owns the cores of some sites; those of the other sites are stored once. A *base*, a
    matrix that all experts share, may be added: W_e = base + chain_e.

    Sharing the central core gives MPOE (Gao et al., COLING 2022, arXiv:2203.01104, section 3.2).
    To a base, two owned cores with the legs (out | in) add a matrix of low rank per expert, as in
    LoRA (Hu et al., arXiv:2106.09685, section 4.1). More sites make that matrix a tensor train, as
    in TT-LoRA (Anjum et al., arXiv:2408.01008).

    Parameters
    ----------
    cores : sequence of array, shapes (D, out, in, D') or (E, D, out, in, D')
        Cores of all sites, left to right. Experts own those with an axis of experts, at least one,
        and share the others.
    shape : MPOShape
        Legs and size of the matrices.
    center_site : int, optional
        Site of the central core; by default ``shape.center_site``.
    base : MPO, optional
        Matrix that is added to every expert's, of the same size and any legs.

    Attributes
    ----------
    cores : tuple of array
    shape : MPOShape
    center_site : int
    base : MPO or None

    Raises
    ------
    InputError
        If the cores do not chain, do not fit ``shape`` or are of several libraries or dtypes; if
        all cores are shared; or if the base has another size or dtype.
    TypeError
        If ``shape`` or ``base`` is of another type, or the base of another library.

    Examples
    --------
    >>> import numpy as np
    >>> from tnmoe import MPOShape, SharedMPO, decompose
    >>> matrix = np.arange(48.0).reshape(8, 6)
    >>> shared = SharedMPO.replicate(decompose(matrix, MPOShape((2, 2, 2), (1, 3, 2))), 4)
    >>> shared
    SharedMPO(4 × 8×6, sites=3, bond_dims=(2, 4), num_params=128, center_site=1, shared_sites=[1])
    >>> bool(np.allclose(shared.to_matrices()[3], matrix))
    True
    """

    # NumPy's functions would take the dense matrices, and return dense results.
    __array_ufunc__ = None

    __slots__ = ("base", "center_site", "cores", "shape")

    cores: tuple[Array, ...]
    shape: MPOShape
    center_site: int
    base: MPO | None

    def __init__(
        self,
        cores: Sequence[Array],
        shape: MPOShape,
        center_site: int | None = None,
        base: MPO | None = None,
    ) -> None:
        cores = tuple(cores)
        _check_type("shape", shape, MPOShape)
        center_site = resolve_center_site(shape, center_site)
        _check_owners(cores)
        chain = MPO(_cores_of_expert(cores, 0), shape)  # checks that cores chain and fit the shape
        if base is not None:
            _check_base(base, chain)
        for name, value in (
            ("cores", cores),
            ("shape", shape),
            ("center_site", center_site),
            ("base", base),
        ):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a SharedMPO is immutable: cannot set {name!r}")

    def __reduce__(self) -> tuple:
        return SharedMPO, (self.cores, self.shape, self.center_site, self.base)

    @classmethod
    def replicate(
        cls,
        mpo: MPO,
        num_experts: int,
        shared_sites: SharedSites = "center",
        noise: float = 0.0,
        rng: np.random.Generator | int | None = None,
    ) -> SharedMPO:
        """Start all experts as one MPO: sparse upcycling of a pretrained matrix.

        Parameters
        ----------
        mpo : MPO
            The matrix, in canonical form or not.
        num_experts : int
            Number of experts.
        shared_sites : {"center", "none"} or iterable of int
            Sites whose cores all experts share; not all of them.
        noise : float
            Standard deviation of Gaussian noise on every core that experts own, as a fraction of
            that core's root mean square. At 0 every expert has the function of the MPO.
        rng : numpy Generator or int, optional
            Source of the noise.

        Raises
        ------
        InputError
            If experts would share all sites, a site does not exist, ``num_experts`` is not a
            positive integer or ``noise`` is negative.
        TypeError
            If ``mpo`` is not an MPO.
        """
        _check_type("mpo", mpo, MPO)
        num_experts = check_positive_int("num_experts", num_experts)
        center_site = resolve_center_site(mpo.shape, mpo.center_site)
        shared = resolve_shared_sites(shared_sites, mpo.shape.sites, center_site)
        rng = check_generator(rng)
        cores = [
            core if site in shared else replicate(core, num_experts, noise, rng)
            for site, core in enumerate(mpo.cores)
        ]
        return cls(cores, mpo.shape, center_site)

    @classmethod
    def from_base(
        cls,
        base: MPO,
        num_experts: int,
        shape: MPOShape | None = None,
        max_bond: int | Sequence[int] | None = 16,
        *,
        shared_sites: SharedSites = "none",
        rng: np.random.Generator | int | None = None,
    ) -> SharedMPO:
        """Start all experts as a base, to which each may add a chain of small bond.

        Of the cores that experts own, the left-most is applied last; it is zero. All other cores
        are random isometries, which preserve norms towards it.

        Parameters
        ----------
        base : MPO
            The matrix that all experts start with.
        num_experts : int
            Number of experts.
        shape : MPOShape, optional
            Legs of the chains; by default two sites with the legs (out | in), which make them
            matrices of low rank.
        max_bond : int, sequence of int or None
            Largest bond dimension of the chains; exact bonds if None.
        shared_sites : {"center", "none"} or iterable of int
            Sites of the chains whose cores all experts share; not all of them.
        rng : numpy Generator or int, optional
            Source of random numbers.

        Raises
        ------
        InputError
            If a number, a site or the size of ``shape`` does not fit.
        TypeError
            If ``base`` is not an MPO or ``shape`` not an MPOShape.

        Notes
        -----
        With two sites, this is how LoRA starts: the factor that meets the input is random, the
        other is zero (Hu et al., arXiv:2106.09685, section 4.1).

        Examples
        --------
        >>> from tnmoe import MPO, MPOShape, SharedMPO
        >>> base = MPO.random(MPOShape((48,), (36,)), rng=0)
        >>> shared = SharedMPO.from_base(base, 8, max_bond=4, rng=0)
        >>> shared.shape, shared.num_params == 48 * 36 + 8 * 4 * (48 + 36)
        (MPOShape(out_dims=(48, 1), in_dims=(1, 36)), True)
        >>> bool((shared.to_matrices()[5] == base.to_matrix()).all())
        True
        """
        _check_type("base", base, MPO)
        num_experts = check_positive_int("num_experts", num_experts)
        if shape is None:
            shape = MPOShape((base.shape.out_features, 1), (1, base.shape.in_features))
        _check_type("shape", shape, MPOShape)
        shared = resolve_shared_sites(shared_sites, shape.sites, shape.center_site)
        zero_site = min(set(range(shape.sites)) - shared)
        rng, like = check_generator(rng), base.cores[0]
        xp = get_backend(like)
        cores = []
        for site, core in enumerate(shape.core_shapes(max_bond)):
            size = core if site in shared else (num_experts, *core)
            if site == zero_site:
                cores.append(xp.zeros(size, like))
            else:
                cores.append(_isometry(xp, size, site < zero_site, rng, like))
        return cls(cores, shape, base=base)

    @property
    def center(self) -> Array:
        """The central core as it is stored, shared or owned."""
        return self.cores[self.center_site]

    @property
    def aux(self) -> tuple[Array, ...]:
        """The cores of all other sites as they are stored, left to right."""
        return self.cores[: self.center_site] + self.cores[self.center_site + 1 :]

    @property
    def shared_sites(self) -> frozenset[int]:
        """Sites whose cores all experts share."""
        return frozenset(site for site, core in enumerate(self.cores) if core.ndim == 4)

    @property
    def num_experts(self) -> int:
        """Number of experts E."""
        return next(int(core.shape[0]) for core in self.cores if core.ndim == 5)

    @property
    def bond_dims(self) -> tuple[int, ...]:
        """Inner bond dimensions of the chains, left to right."""
        return tuple(int(core.shape[-4]) for core in self.cores[1:])

    @property
    def num_params(self) -> int:
        """Number of stored parameters: owned cores per expert; shared cores and the base once."""
        base = 0 if self.base is None else self.base.num_params
        return base + sum(prod(core.shape) for core in self.cores)

    def expert(self, index: int) -> MPO:
        """Return one expert's matrix as an MPO.

        Without a base it shares memory with this object. A base with the legs of ``shape`` is
        added exactly: bonds add up. With a base of other legs, the matrix is built and decomposed
        at exact bonds, with its centre at ``center_site``.

        Parameters
        ----------
        index : int
            From 0 to E − 1.

        Raises
        ------
        InputError
            If there is no such expert; if the matrix must be decomposed, and holds NaN or infinity.
        """
        index = check_index("expert", index, self.num_experts)
        cores = _cores_of_expert(self.cores, index)
        if self.base is None:
            return MPO(cores, self.shape)
        if self.base.shape == self.shape:
            return self.base + MPO(cores, self.shape)
        return decompose(self._build(cores), self.shape, center_site=self.center_site)

    def to_matrices(self) -> Array:
        """Return all dense matrices, shape (E, out_features, in_features)."""
        self._check_axes()
        return self._build(self.cores)

    def apply(self, x: Array) -> Array:
        """Apply every expert to vectors of its own: (E, ..., in_features) → (E, ..., out_features).

        The vectors of all experts meet a shared core in one product. For many vectors per expert
        it can be cheaper to build the matrices; :func:`tnmoe.contraction_plan` decides. The result
        has the dtype that NumPy gives a product of both.

        Parameters
        ----------
        x : array, shape (E, ..., in_features) or (1, ..., in_features)
            Of the cores' library. With a first axis of 1, every expert gets the same vectors.

        Raises
        ------
        InputError
            If the first axis is neither E nor 1 long, or the last not ``in_features``.
        TypeError
            If ``x`` belongs to another library than the cores.

        Examples
        --------
        >>> import numpy as np
        >>> from tnmoe import MPO, MPOShape
        >>> shared = SharedMPO.replicate(MPO.identity(MPOShape((2, 3), (2, 3))), 4)
        >>> shared.apply(np.ones((4, 5, 6))).shape, shared.apply(np.ones((1, 5, 6))).shape
        ((4, 5, 6), (4, 5, 6))
        """
        self._check_axes()
        xp, experts, size = get_backend(self.center), self.num_experts, self.shape.in_features
        if get_backend(x) is not xp:
            raise TypeError(f"the cores are {xp.name} arrays, x is a {type(x).__qualname__}")
        if x.ndim < 2 or x.shape[0] not in (1, experts) or x.shape[-1] != size:
            raise InputError(
                f"x must have shape ({experts}, ..., {size}) or (1, ..., {size}), "
                f"got {tuple(x.shape)}"
            )
        result = algebra.apply_shared(xp, self.shape, self.cores, x)
        if self.base is None:
            return result
        return result + algebra.apply(xp, self.base.shape, self.base.cores, x)

    def _check_axes(self) -> None:
        """Raise an InputError for the cores of many operators, as ``jax.vmap`` returns them."""
        if any(core.ndim > 5 for core in self.cores):
            raise InputError(
                "every core needs axes ([experts,] left bond, out, in, right bond), got "
                f"{[tuple(core.shape) for core in self.cores]}: call methods inside jax.vmap, or "
                "take one operator of many with jax.tree.map"
            )

    def _build(self, cores: Sequence[Array]) -> Array:
        """Build the matrices of cores, of all experts or of one, and add the base."""
        xp = get_backend(cores[0])
        with xp.full_precision(cores[0]):
            matrices = _dense(xp, cores, self.shape)
            if self.base is not None:
                matrices = matrices + _dense(xp, self.base.cores, self.base.shape)
            return xp.astype(matrices, xp.dtype_name(cores[0]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the dense matrices as NumPy's, from any library and device, without gradients."""
        return as_numpy(get_backend(self.center), self.to_matrices(), dtype, copy)

    def __repr__(self) -> str:
        base = "" if self.base is None else f", base={self.base!r}"
        return (
            f"SharedMPO({self.num_experts} × "
            f"{short_repr(self.shape.out_features)}×{short_repr(self.shape.in_features)}, "
            f"sites={self.shape.sites}, bond_dims={self.bond_dims}, "
            f"num_params={self.num_params}, center_site={self.center_site}, "
            f"shared_sites={sorted(self.shared_sites)}{base})"
        )

    def __str__(self) -> str:
        return f"{self!r}\n{draw_text(self._chain())}"

    def _repr_svg_(self) -> str:
        return draw_svg(self._chain())

    def _repr_html_(self) -> str:
        return draw_html(repr(self), self._chain())

    def _chain(self) -> Chain:
        owned = frozenset(range(self.shape.sites)) - self.shared_sites
        return Chain(self.shape, self.bond_dims, self.center_site, owned)


def _check_owners(cores: Sequence[Array]) -> None:
    """Raise unless all cores are arrays and E experts own some of them."""
    for core in cores:
        get_backend(core)
    shapes = [tuple(core.shape) for core in cores]
    if any(len(shape) not in (4, 5) for shape in shapes):
        raise InputError(
            "a core needs axes (left bond, out, in, right bond) if experts share it, and an axis "
            f"of experts before them if they own it; got {shapes}"
        )
    experts = [shape[0] for shape in shapes if len(shape) == 5]
    if not experts:
        raise InputError(
            "experts must own a core, whose shape is (experts, left bond, out, in, right bond): "
            f"got {shapes}"
        )
    if len(set(experts)) > 1 or experts[0] < 1:
        raise InputError(f"every owned core needs a core per expert, got {experts} experts")


def _check_type(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be an {kind.__name__}, got {type(value).__qualname__}")


def _check_base(base: Any, chain: MPO) -> None:
    """Raise unless a base can be added to an expert's chain."""
    _check_type("base", base, MPO)
    check_operands(chain, base)
    found, expected = ((mpo.shape.out_features, mpo.shape.in_features) for mpo in (base, chain))
    if found != expected:
        raise InputError(f"the base must be a {expected} matrix, as its experts are, got {found}")


def _cores_of_expert(cores: Iterable[Array], index: int) -> list[Array]:
    """Return the cores of one expert, (D, out, in, D'), without copies."""
    return [core[index] if core.ndim == 5 else core for core in cores]


def _dense(xp: Backend, cores: Iterable[Array], shape: MPOShape) -> Array:
    """Build the matrices (..., out_features, in_features), in single precision at least."""
    matrices = to_padded_matrix(xp, [computable(xp, core) for core in cores])
    return matrices[..., : shape.out_features, : shape.in_features]


def _isometry(
    xp: Backend, size: tuple[int, ...], from_left: bool, rng: np.random.Generator, like: Array
) -> Array:
    """Draw cores (..., D, out, in, D') that preserve norms from their left, or from their right."""
    like_computed = computable(xp, like)
    *owners, left, out, in_, right = size
    rows, columns = (left * out * in_, right) if from_left else (out * in_ * right, left)
    with xp.full_precision(like_computed):
        isometry, _ = xp.qr(xp.normal((*owners, rows, columns), rng, like_computed))
    isometry = isometry if from_left else xp.transpose(isometry)
    return xp.astype(isometry.reshape(size), xp.dtype_name(like))


def replicate(array: Array, num_experts: int, noise: float, rng: np.random.Generator) -> Array:
    """Copy an array to (E, …), with Gaussian noise relative to its root mean square."""
    noise = check_number_in("noise", noise, "[0, inf)")
    xp = get_backend(array)
    with xp.full_precision(array):
        stacked = xp.stack([array] * num_experts)
        if not noise:
            return stacked
        rms = float(xp.to_numpy(xp.norm(array))) / sqrt(prod(array.shape))
        return stacked + (noise * rms) * xp.normal(stacked.shape, rng, like=array)

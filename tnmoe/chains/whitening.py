"""Whitening: the change of input legs that turns a weighted error into a plain one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from tnmoe.backends import Array, Backend
from tnmoe.backends.protocol import EPSILON
from tnmoe.chains.moments import number_of
from tnmoe.chains.precision import widened
from tnmoe.shapes import MPOShape


@dataclass(frozen=True)
class Whitening:
    """Matrices R of the input legs, one per site, which make moments the identity or nearly so.

    If S = R Rᴴ, then ‖(W − chain) S^½‖ = ‖W R − chain R‖. If R is a Kronecker product over the
    sites, chain R has the bonds of the chain, and R⁻¹ leads back core by core. This is exact where
    all input legs stand at one site, or where S itself is a Kronecker product. Elsewhere R comes
    from the marginals of S, and the moments that remain are nearer to the identity than S.

    Attributes
    ----------
    xp : Backend
        Library of the moments.
    shape : MPOShape
        Legs of the chains.
    root : array, shape (1, padded_in, padded_in) or (E, padded_in, padded_in)
        The matrix R.
    inverses : list of array, shapes (1, in, in) or (E, in, in)
        R⁻¹, site by site.
    rest : array, shape (1, padded_in, padded_in) or (E, padded_in, padded_in), or None
        The moments of whitened inputs, R⁻¹ S R⁻ᴴ; None where they are the identity.
    """

    xp: Backend
    shape: MPOShape
    root: Array
    inverses: list[Array]
    rest: Array | None

    @classmethod
    def of(cls, xp: Backend, moments: Array, shape: MPOShape, owned: Iterable[int]) -> Whitening:
        """Find the roots of moments, (1, in, in) or (E, in, in), with mean eigenvalue 1.

        Sites that experts own may have a root for every expert.
        """
        padded = _padded(xp, moments, shape.padded_in)
        wide = [site for site, size in enumerate(shape.in_dims) if size > 1]
        if len(wide) <= 1 and (moments.shape[0] == 1 or set(wide) <= set(owned)):
            root, inverse = _root(xp, padded)
            one = xp.eye(1, like=root)[None]
            inverses = [inverse if [site] == wide else one for site in range(shape.sites)]
            return cls(xp, shape, root, inverses, None)
        pairs = [_root(xp, marginal) for marginal in _marginals(xp, padded, shape.in_dims)]
        root, inverse = (_kronecker([pair[side] for pair in pairs]) for side in (0, 1))
        rest = inverse @ padded @ xp.adjoint(inverse)
        off = xp.max_abs(rest - xp.eye(shape.padded_in, like=rest)[None])
        if off <= EPSILON[xp.dtype_name(rest)] ** 0.5:
            return cls(xp, shape, root, [pair[1] for pair in pairs], None)
        if shape.padded_in > shape.in_features:  # padding may take any values
            without = xp.pad(moments, shape.padded_in, shape.padded_in)
            rest = inverse @ without @ xp.adjoint(inverse)
        return cls(xp, shape, root, [pair[1] for pair in pairs], rest)

    @property
    def whole(self) -> MPOShape:
        """The shape of whitened matrices, whose inputs are padded."""
        return MPOShape(self.shape.out_dims, self.shape.in_dims, self.shape.out_features)

    def apply(self, matrices: Array) -> Array:
        """Whiten matrices, (e, out, in) → (e, out, padded in)."""
        return self.xp.pad(matrices, self.shape.out_features, self.shape.padded_in) @ self.root

    def undo(self, cores: Sequence[Array]) -> list[Array]:
        """Lead the cores of whitened matrices, (e, D, out, in, D'), back."""
        found = []
        for core, inverse in zip(cores, self.inverses, strict=True):
            columns = self.xp.permute(core, (0, 1, 2, 4, 3))
            _, *legs, size = columns.shape
            # Experts whose cores are in common have the moments in common, too.
            columns = columns.reshape(columns.shape[0], prod(legs), size) @ inverse
            columns = columns.reshape(columns.shape[0], *legs, size)
            found.append(self.xp.permute(columns, (0, 1, 2, 4, 3)))
        return found

    @property
    def largest(self) -> float:
        """The largest moment that remains: a bound on weighted errors over whitened ones."""
        if self.rest is None:
            return 1.0
        return max(number_of(self.xp, self.xp.eigvalsh(each)[0]) for each in self.rest)


def _padded(xp: Backend, moments: Array, size: int) -> Array:
    """Pad moments with the identity."""
    features = moments.shape[-1]
    if features == size:
        return moments
    identity = xp.eye(size, like=moments) - xp.pad(xp.eye(features, like=moments), size, size)
    return xp.pad(moments, size, size) + identity[None]


def _root(xp: Backend, moments: Array) -> tuple[Array, Array]:
    """Return R with S = R Rᴴ, and its inverse, (e, in, in); the identity for in = 1.

    Eigenvalues below rounding are raised to it: their inputs stay in the matrix.
    """
    dtype, size = xp.dtype_name(moments), moments.shape[-1]
    values, vectors = xp.eigh(widened(xp, moments))
    largest = values[..., :1]
    factors = ((values / largest).clip(size * EPSILON[dtype]) * largest) ** 0.5
    root = vectors * factors[..., None, :]
    inverse = xp.adjoint(vectors) / factors[..., None]
    return xp.astype(root, dtype), xp.astype(inverse, dtype)


def _marginals(xp: Backend, moments: Array, in_dims: Sequence[int]) -> list[Array]:
    """Return the moments of every site's leg, (1, in, in), as means over experts and other legs."""
    ones = xp.zeros((1, moments.shape[0]), like=moments) + 1.0 / moments.shape[0]
    size = moments.shape[-1]
    mean = (ones @ moments.reshape(-1, size * size)).reshape(size, size)
    found, before = [], 1
    for leg in in_dims:
        after = size // before // leg
        tensor = mean.reshape(before, leg, after, before, leg, after)
        marginal = xp.trace(xp.trace(tensor, 0, 3), 1, 3)[None]
        total = number_of(xp, xp.trace(marginal[0], 0, 1).real)
        found.append(marginal * (leg / total))
        before *= leg
    return found


def _kronecker(matrices: Sequence[Array]) -> Array:
    """Return the Kronecker product of matrices, (1, n, n) each."""
    product = matrices[0]
    for matrix in matrices[1:]:
        rows, size = product.shape[-1], matrix.shape[-1]
        pairs = product.reshape(rows, 1, rows, 1) * matrix.reshape(1, size, 1, size)
        product = pairs.reshape(1, rows * size, rows * size)
    return product

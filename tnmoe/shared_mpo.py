"""Matrices that share one central core: the weights of a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any

import numpy as np

from tnmoe.backends import Array, get_backend
from tnmoe.chains.precision import computable
from tnmoe.contraction.build import as_numpy, stacked_to_padded_matrices
from tnmoe.errors import (
    InputError,
    check_generator,
    check_index,
    check_number_in,
    check_positive_int,
    short_repr,
)
from tnmoe.mpo import MPO
from tnmoe.shapes import MPOShape, resolve_center_site


class SharedMPO:
    """E matrices of one shape, every one an MPO, that share the central core.

    The central core has nearly all the parameters and is stored once. An expert owns only its
    auxiliary cores (MPOE: Gao et al., COLING 2022, arXiv:2203.01104, section 3.2).

    Parameters
    ----------
    center : array, shape (D, out, in, D')
        Core of site ``center_site``.
    aux : sequence of array, shapes (E, D, out, in, D')
        Stacked cores of every other site, left to right.
    shape : MPOShape
        Legs and size of the matrices; at least two sites.
    center_site : int, optional
        Site of the shared core; by default ``shape.center_site``.

    Raises
    ------
    InputError
        If the cores do not chain or do not fit ``shape``.

    Examples
    --------
    >>> import numpy as np
    >>> from tnmoe import MPOShape, SharedMPO, decompose
    >>> matrix = np.arange(48.0).reshape(8, 6)
    >>> shared = SharedMPO.replicate(decompose(matrix, MPOShape((2, 2, 2), (1, 3, 2))), 4)
    >>> shared
    SharedMPO(4 × 8×6, sites=3, bond_dims=(2, 4), num_params=128, center_site=1)
    >>> bool(np.allclose(shared.to_matrices()[3], matrix))
    True
    """

    __slots__ = ("aux", "center", "center_site", "shape")

    center: Array
    aux: tuple[Array, ...]
    shape: MPOShape
    center_site: int

    def __init__(
        self,
        center: Array,
        aux: Sequence[Array],
        shape: MPOShape,
        center_site: int | None = None,
    ) -> None:
        aux = tuple(aux)
        center_site = resolve_center_site(shape, center_site)
        if not aux or any(core.ndim != 5 for core in aux):
            shapes = [tuple(core.shape) for core in aux]
            raise InputError(
                "auxiliary cores must be stacked as (experts, left bond, out, in, right bond), "
                f"one array for each of {shape.sites - 1} sites and at least one; got {shapes}"
            )
        if len({core.shape[0] for core in aux}) > 1 or aux[0].shape[0] < 1:
            counts = [core.shape[0] for core in aux]
            raise InputError(f"every auxiliary site needs a core per expert, got {counts} experts")
        for name, value in (
            ("center", center),
            ("aux", aux),
            ("shape", shape),
            ("center_site", center_site),
        ):
            object.__setattr__(self, name, value)
        self.expert(0)  # an expert checks that its cores chain and fit the shape

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a SharedMPO is immutable: cannot set {name!r}")

    def __reduce__(self) -> tuple:
        return SharedMPO, (self.center, self.aux, self.shape, self.center_site)

    @classmethod
    def replicate(
        cls,
        mpo: MPO,
        num_experts: int,
        noise: float = 0.0,
        rng: np.random.Generator | int | None = None,
    ) -> SharedMPO:
        """Start all experts as one MPO: sparse upcycling of a pretrained matrix.

        Parameters
        ----------
        mpo : MPO
            The matrix, in canonical form or not; at least two sites.
        num_experts : int
            Number of experts.
        noise : float
            Standard deviation of Gaussian noise on every auxiliary core, as a fraction of that
            core's root mean square. At 0 every expert has the function of the MPO.
        rng : numpy Generator or int, optional
            Source of the noise.

        Raises
        ------
        InputError
            If the MPO has one site only, ``num_experts`` is not a positive integer or ``noise``
            is negative.
        """
        num_experts = check_positive_int("num_experts", num_experts)
        center_site = resolve_center_site(mpo.shape, mpo.center_site)
        rng = check_generator(rng)
        aux = [
            replicate(core, num_experts, noise, rng)
            for site, core in enumerate(mpo.cores)
            if site != center_site
        ]
        return cls(mpo.cores[center_site], aux, mpo.shape, center_site)

    @property
    def num_experts(self) -> int:
        """Number of experts E."""
        return int(self.aux[0].shape[0])

    @property
    def bond_dims(self) -> tuple[int, ...]:
        """Inner bond dimensions, left to right."""
        return self.expert(0).bond_dims

    @property
    def num_params(self) -> int:
        """Number of stored parameters: the central core once, auxiliary cores per expert."""
        return prod(self.center.shape) + sum(prod(core.shape) for core in self.aux)

    def expert(self, index: int) -> MPO:
        """Return one expert as an MPO that shares memory with this object.

        Parameters
        ----------
        index : int
            From 0 to E − 1.

        Raises
        ------
        InputError
            If there is no such expert.
        """
        index = check_index("expert", index, self.num_experts)
        cores = [core[index] for core in self.aux]
        cores.insert(self.center_site, self.center)
        return MPO(cores, self.shape)

    def to_matrices(self) -> Array:
        """Return all dense matrices, shape (E, out_features, in_features)."""
        xp = get_backend(self.center)
        center, *aux = (computable(xp, core) for core in (self.center, *self.aux))
        left, right = aux[: self.center_site], aux[self.center_site :]
        with xp.full_precision(center):
            matrices = stacked_to_padded_matrices(xp, center, left, right)
            matrices = xp.astype(matrices, xp.dtype_name(self.center))
        return matrices[:, : self.shape.out_features, : self.shape.in_features]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the dense matrices as NumPy's, from any library and device, without gradients."""
        return as_numpy(get_backend(self.center), self.to_matrices(), dtype, copy)

    def __repr__(self) -> str:
        return (
            f"SharedMPO({self.num_experts} × "
            f"{short_repr(self.shape.out_features)}×{short_repr(self.shape.in_features)}, "
            f"sites={self.shape.sites}, bond_dims={self.bond_dims}, "
            f"num_params={self.num_params}, center_site={self.center_site})"
        )


def replicate(array: Array, num_experts: int, noise: float, rng: np.random.Generator) -> Array:
    """Copy an array to (E, …), with Gaussian noise relative to its root mean square."""
    noise = check_number_in("noise", noise, "[0, inf)")
    xp = get_backend(array)
    with xp.full_precision(array):
        stacked = xp.stack([array] * num_experts)
        if not noise:
            return stacked
        rms = float(xp.norm(array)) / sqrt(prod(array.shape))
    return stacked + (noise * rms) * xp.normal(stacked.shape, rng, like=array)

"""Shapes, matrices of every kind, and array libraries for the property tests."""

from __future__ import annotations

import os
from importlib import import_module
from math import prod
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tnmoe import MPOShape
from tnmoe.backends import backend_named, get_backend
from tnmoe.backends.protocol import EPSILON

KINDS = ("gaussian", "low rank", "zero", "identity", "badly scaled", "zero rows")
DTYPES = ("float32", "float64", "complex64", "complex128")

# The library of which property tests have examples beside those of NumPy and torch: the toy, or a
# library whose backend is in the module that the environment variable names.
OTHER = import_module(os.environ.get("TNMOE_TEST_BACKEND", "tests.backend_toy")).backend.name
# JAX compiles for every new shape: tests/conftest.py marks most of its tests as slow.
LIBRARIES = tuple(dict.fromkeys(("numpy", "torch", "jax", OTHER)))


@st.composite
def shapes(draw: st.DrawFn, max_sites: int = 6, max_size: int = 4096) -> MPOShape:
    """1 to 6 sites with legs of 1 to 6, padded or not, small enough to check densely."""
    sites = draw(st.integers(1, max_sites))
    out_dims, in_dims = [], []
    for _ in range(sites):
        left = max_size // (prod(out_dims) * prod(in_dims))
        out_dims.append(draw(st.integers(1, min(6, max(1, left)))))
        in_dims.append(draw(st.integers(1, min(6, max(1, left // out_dims[-1])))))
    out_features = draw(st.integers(1, prod(out_dims))) if draw(st.booleans()) else None
    in_features = draw(st.integers(1, prod(in_dims))) if draw(st.booleans()) else None
    return MPOShape(out_dims, in_dims, out_features, in_features)


def make_matrix(kind: str, rows: int, columns: int, dtype: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)

    def gaussian(*size: int) -> np.ndarray:
        numbers = rng.standard_normal(size)
        if dtype.startswith("complex"):
            numbers = numbers + 1j * rng.standard_normal(size)
        return numbers

    if kind == "gaussian":
        matrix = gaussian(rows, columns)
    elif kind == "low rank":
        rank = rng.integers(1, 3)
        matrix = gaussian(rows, rank) @ gaussian(rank, columns)
    elif kind == "zero":
        matrix = np.zeros((rows, columns))
    elif kind == "identity":
        matrix = np.eye(rows, columns)
    elif kind == "badly scaled":
        matrix = gaussian(rows, columns) * 10.0 ** rng.uniform(-6, 6, (1, columns))
        matrix = matrix * 10.0 ** rng.choice([-30, 0, 30])
    elif kind == "zero rows":
        matrix = gaussian(rows, columns)
        matrix[rng.random(rows) < 0.7] = 0
    return matrix.astype(dtype)


def to_library(array: np.ndarray, library: str) -> Any:
    return backend_named(library).from_numpy(array.copy())


def to_numpy(array: Any) -> np.ndarray:
    return get_backend(array).to_numpy(array)


def dense_norm(matrix: np.ndarray) -> float:
    """Frobenius norm, safe against overflow of squares."""
    wide = np.complex128 if np.iscomplexobj(matrix) else np.float64
    return float(np.linalg.norm(matrix.astype(wide)))


def rounding(matrix: np.ndarray) -> float:
    """The error that rounding may add: a modest multiple of the unit in the last place."""
    return 60 * EPSILON[matrix.dtype.name] * dense_norm(matrix)


matrices = st.builds(
    lambda shape, kind, dtype, seed: (
        shape,
        make_matrix(kind, shape.out_features, shape.in_features, dtype, seed),
    ),
    shapes(),
    st.sampled_from(KINDS),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32 - 1),
)
# The toy gets one example in five: a backend's mistakes show in any example. A backend that the
# environment names gets all of them.
libraries = st.sampled_from(
    (OTHER,) if "TNMOE_TEST_BACKEND" in os.environ else ("numpy", "torch", "numpy", "torch", OTHER)
)
methods = st.sampled_from(("auto", "svd", "randomized"))

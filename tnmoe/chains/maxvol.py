"""Rows of a tall matrix that interpolate all others: a square submatrix of large volume."""

from __future__ import annotations

import numpy as np

# An exchange of rows must multiply the volume by more than this.
_GROWTH = 1.05
_MAX_EXCHANGES = 200


def maxvol(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose as many rows as there are columns, whose submatrix has nearly the largest volume.

    Goreinov et al., in Matrix Methods: Theory, Algorithms and Applications (2010), p. 247.

    Parameters
    ----------
    matrix : array, shape (m, r)
        Of full rank r ≤ m.

    Returns
    -------
    array of int, shape (r,)
        The chosen rows.
    array, shape (m, r)
        Coefficients C with matrix = C @ matrix[rows], all of about 1 at most.
    """
    from scipy.linalg import qr

    rank = matrix.shape[1]
    rows = qr(matrix.conj().T, mode="r", pivoting=True)[1][:rank]
    coefficients = _solve(matrix, rows)
    for _ in range(_MAX_EXCHANGES):
        row, column = np.unravel_index(np.abs(coefficients).argmax(), coefficients.shape)
        pivot = coefficients[row, column]
        if abs(pivot) <= _GROWTH:
            break
        change = coefficients[row] / pivot
        change[column] -= 1 / pivot
        coefficients = coefficients - np.outer(coefficients[:, column], change)
        rows[column] = row
    return rows, _solve(matrix, rows)


def _solve(matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.linalg.solve(matrix[rows].T, matrix.T).T

"""Schmidt spectra: the error of cutting their tails, and their entropy."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def squared_tails(spectra: np.ndarray) -> np.ndarray:
    """Return the squared error of keeping r = 0, 1, … of descending values along the last axis."""
    with np.errstate(under="ignore"):
        squares = np.asarray(spectra, dtype=np.float64) ** 2
    tails = np.cumsum(squares[..., ::-1], axis=-1)[..., ::-1]
    return np.concatenate([tails, np.zeros_like(tails[..., :1])], axis=-1)


def squared_loss(tails: Iterable[np.ndarray], ranks: Iterable[int]) -> float:
    """Return the squared error of keeping one rank per bond, given the tails of every bond.

    A rank above the number of Schmidt values loses nothing.
    """
    return sum(
        float(tail[min(rank, len(tail) - 1)]) for tail, rank in zip(tails, ranks, strict=True)
    )


def entanglement_entropy(values: np.ndarray) -> float:
    """Return the entropy −Σ p log p, in nats, of the normalised squares p of Schmidt values.

    It runs from 0 (a product operator, or the zero operator) to the logarithm of the bond
    dimension (all values equal).
    """
    largest = values.max(initial=0.0)
    if largest == 0:
        return 0.0
    with np.errstate(under="ignore"):
        squares = (values / largest).astype(np.float64) ** 2
        probabilities = squares[squares > 0] / squares.sum()
    return abs(float(-(probabilities * np.log(probabilities)).sum()))

"""The chain nearest to a mean of chains, some of whose cores are given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from tnmoe.combine import add
from tnmoe.mpo import MPO
from tnmoe.shapes import MPOShape

# A sweep that lowers the error by a smaller share of the mean's norm is the last one.
_PROGRESS = 1e-5
_SWEEPS = 20


def mean_chain(
    chains: Sequence[Sequence[Tensor]],
    shares: Sequence[float],
    owned: Sequence[int],
    shape: MPOShape,
) -> tuple[list[Tensor], float]:
    """Fit one chain to the weighted mean of several, which differ in the owned sites only.

    Parameters
    ----------
    chains : sequence of sequence of Tensor, shapes (D, out, in, D')
        In a precision that is enough for the fit.
    shares : sequence of float
        Weights, whose sum is 1.
    owned : sequence of int
        Sites whose cores may change. The others are the same in all chains.
    shape : MPOShape

    Returns
    -------
    list of Tensor
        Cores of the same shapes.
    float
        Frobenius norm of the error, relative to the mean's.
    """
    pairs = list(zip(shares, chains, strict=True))
    target = torch.stack([share * _contract(chain) for share, chain in pairs]).sum(0)
    norm = float(torch.linalg.vector_norm(target))
    if len(owned) == len(chains[0]):
        cores = _rounded_sum(pairs, shape)
    else:
        cores = list(chains[0])
        for site in owned:
            cores[site] = torch.stack([share * chain[site] for share, chain in pairs]).sum(0)
    best, error = list(cores), _distance(cores, target)
    for _ in range(_SWEEPS):
        for site in owned:
            cores[site] = cores[site] + _correction(cores, site, target)
        found = _distance(cores, target)
        if found >= error:  # at the limit of rounding
            break
        progress, best, error = error - found, list(cores), found
        if progress <= _PROGRESS * norm:
            break
    return best, error / norm if norm else 0.0


def _contract(cores: Sequence[Tensor]) -> Tensor:
    """Return the product of neighbouring cores, (D, out · in, …, out · in, D'), flat inside."""
    parts = [core.flatten(1, 2) for core in cores]
    product = reduce(lambda left, right: torch.tensordot(left, right, 1), parts)
    return product.reshape(parts[0].shape[0], -1, parts[-1].shape[-1])


def _distance(cores: Sequence[Tensor], target: Tensor) -> float:
    return float(torch.linalg.vector_norm(_contract(cores) - target))


def _correction(cores: Sequence[Tensor], site: int, target: Tensor) -> Tensor:
    """Return the smallest change of a core that brings the chain nearest to the target.

    Directions of the core that do not count stay as they are. A least-squares solution for the core
    itself would set them to zero.
    """
    core = cores[site].flatten(1, 2)
    left = _contract(cores[:site])[0] if site else core.new_ones(1, 1)
    right = _contract(cores[site + 1 :])[..., 0] if site + 1 < len(cores) else core.new_ones(1, 1)
    # The normal equations: both sides of a core are far longer than its bonds.
    of_left, of_right = left.T @ left, right @ right.T
    projected = (target.reshape(-1, right.shape[1]) @ right.T).reshape(len(left), -1)
    projected = (left.T @ projected).reshape(core.shape)
    rest = projected - _between(of_left, core, of_right)
    inverses = (torch.linalg.pinv(gram, hermitian=True) for gram in (of_left, of_right))
    return _between(next(inverses), rest, next(inverses)).reshape(cores[site].shape)


def _between(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """Multiply the bonds of a core, (D, out · in, D'), by matrices."""
    return torch.tensordot(torch.tensordot(left, core, 1), right, 1)


def _rounded_sum(pairs: Sequence[tuple[float, Sequence[Tensor]]], shape: MPOShape) -> list[Tensor]:
    """Return the cores of a weighted sum of chains, rounded to the bonds of the chains."""
    terms = [MPO([share * chain[0], *chain[1:]], shape) for share, chain in pairs]
    first = pairs[0][1]
    bonds = [core.shape[-4] for core in first[1:]]
    largest = shape.bond_dims(None)
    limits = [min(one, most) for one, most in zip(bonds, largest, strict=True)]
    found = list(add(terms, max_bond=limits).cores)
    return [_padded(core, like) for core, like in zip(found, first, strict=True)]


def _padded(core: Tensor, like: Tensor) -> Tensor:
    """Enlarge the bonds of a core with numbers of another one that do not count in the chain.

    The units that a bond gains receive zeros from the core on their left. Those on the right get
    numbers, so that training can use them.
    """
    left, *_, right = core.shape
    padded = like.clone()
    padded[..., right:] = 0
    padded[:left, ..., :right] = core
    return padded

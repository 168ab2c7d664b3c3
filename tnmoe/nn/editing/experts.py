"""Experts added to a layer, removed from it, and put into another order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tnmoe.errors import (
    InputError,
    check_generator,
    check_index,
    check_number_in,
    check_positive_int,
    short_repr,
)
from tnmoe.nn.editing.rearrange import are_open, rearrange
from tnmoe.nn.moe import MPOMoE
from tnmoe.nn.owned_rows import OwnedRows, check_experts
from tnmoe.nn.residual_projection import ResidualProjection, scaling_site
from tnmoe.shared_mpo import replicate


def add_experts(
    moe: MPOMoE,
    count: int = 1,
    *,
    like: int | Sequence[int] | None = None,
    noise: float = 0.0,
    rng: np.random.Generator | int | None = None,
    optimizer: Any = None,
) -> list[int]:
    """Add experts to a layer, which are closed at first.

    Until :func:`open_experts` opens them, the router works bit for bit as before, in training and
    in evaluation, with noise as well.

    Parameters
    ----------
    moe : MPOMoE
        A layer with any projections and any router.
    count : int
        How many experts to add. They get the numbers from E on.
    like : int or sequence of int, optional
        The expert that the new ones copy, or one for each of them; with their rows in the router.
        By default the new experts copy the old ones in turn. If all matrices of the layer are
        residual (:class:`ResidualProjection`), the copies start with M_e = 0 and biases of zero:
        they compute what the layer's base does.
    noise : float
        Noise on matrices and cores of the new experts and on their rows in the router, relative to
        the root mean square of what they copy. Without it, copies that see the same tokens stay
        the same.
    rng : numpy Generator or int, optional
        Source of the noise.
    optimizer : torch.optim.Optimizer, or a wrapper of one, optional
        An optimiser that holds parameters of the layer. Its state follows; for new experts it
        starts at zero. Without its state an optimiser cannot make another step.

    Returns
    -------
    list of int
        Numbers of the new experts.

    Raises
    ------
    InputError
        If a number is out of range, the router's groups do not divide the new number of experts,
        the layer is sharded, offloaded or wrapped, ``DistributedDataParallel`` wraps its model,
        another layer is tied to what its experts own, or the optimiser's state cannot follow.
        Nothing has changed then.

    Notes
    -----
    Parameters stay the same objects with more rows, so groups of parameters, hooks and gradient
    masks keep working.

    A layer with more experts may plan another route for its matrices, whose result differs by
    rounding. Where outputs must keep every bit, set ``route`` of its projections.

    With Adam, the first steps of new experts are larger than usual: their moments start at zero,
    but the count of steps, from which Adam corrects that, is the parameter's.

    Examples
    --------
    >>> from tnmoe.nn import MPOExperts, TopKRouter, open_experts
    >>> layer = MPOMoE(TopKRouter(8, 4), MPOExperts(4, 8, 16, layout="residual"))
    >>> x = torch.randn(5, 8)
    >>> before = layer(x)
    >>> add_experts(layer, 2)
    [4, 5]
    >>> torch.equal(layer(x), before), layer.experts.up.weight().shape
    (True, torch.Size([6, 16, 8]))
    >>> open_experts(layer, [4, 5])
    """
    count = check_positive_int("count", count)
    noise, generator = check_number_in("noise", noise, "[0, inf)"), check_generator(rng)
    is_open = are_open(moe)
    first = len(is_open)
    sources = _sources(like, count, first)
    zeroed = _starting_rows(moe) if like is None else set()

    def new_rows(owned: OwnedRows, place: int, rows: Tensor) -> Tensor:
        if id(owned.tensor) in zeroed:
            return torch.zeros_like(rows)
        is_noisy = isinstance(owned.tensor, nn.Parameter) and owned.attribute != "bias"
        if not (noise and is_noisy and rows.numel()):
            return rows
        return replicate(rows, 1, noise, generator)[0]

    new = list(range(first, first + count))
    rearrange(
        moe,
        [*range(first), *sources],
        fresh=new,
        is_open=[*is_open, *(False for _ in new)],
        new_rows=new_rows,
        optimizer=optimizer,
    )
    return new


def remove_experts(
    moe: MPOMoE, experts: int | Iterable[int], *, optimizer: Any = None
) -> list[int]:
    """Remove experts from a layer; the remaining ones move up.

    Parameters
    ----------
    moe : MPOMoE
        A layer with any projections and any router.
    experts : int or iterable of int
        Numbers of the experts to remove.
    optimizer : torch.optim.Optimizer, or a wrapper of one, optional
        As for :func:`add_experts`.

    Returns
    -------
    list of int
        The old number of every remaining expert.

    Raises
    ------
    InputError
        If an expert does not exist or is given twice, the router cannot choose among the remaining
        ones or the remaining open ones (too few for ``top_k``, or no groups of one size), or the
        layer or the optimiser cannot be changed, as for :func:`add_experts`. Nothing has changed
        then.

    Notes
    -----
    With a :class:`TopKRouter` a token keeps its output, to rounding, if it chose none of the
    removed experts. That holds where a token's weights are divided by their sum, or are sigmoids.
    With ``normalize=False`` and a softmax, the weights of all remaining experts grow. A capacity is
    shared by fewer experts, groups consist of other experts, and an :class:`ExpertChoiceRouter`
    takes more tokens per expert: these change other tokens, too.

    Examples
    --------
    >>> from tnmoe.nn import MPOExperts, TopKRouter
    >>> layer = MPOMoE(TopKRouter(8, 4), MPOExperts(4, 8, 16, sites=2))
    >>> remove_experts(layer, [1])
    [0, 2, 3]
    >>> layer.router.weight.shape, layer.experts.num_experts
    (torch.Size([3, 8]), 3)
    """
    removed = check_experts(moe, experts)
    remaining = [expert for expert in range(moe.experts.num_experts) if expert not in removed]
    if not remaining:
        raise InputError(f"a layer needs an expert: all {len(removed)} were to be removed")
    is_open = are_open(moe)
    rearrange(
        moe, remaining, is_open=[is_open[expert] for expert in remaining], optimizer=optimizer
    )
    return remaining


def reorder_experts(moe: MPOMoE, order: Iterable[int], *, optimizer: Any = None) -> None:
    """Give the experts of a layer other numbers.

    The layer computes the same, to rounding: a softmax adds its terms in another order, and so does
    the sum of a token's experts. Two things depend on the numbers themselves. Experts with equal
    scores are chosen by number, and the groups of a router are experts with consecutive numbers.

    Parameters
    ----------
    moe : MPOMoE
        A layer with any projections and any router.
    order : iterable of int
        All numbers from 0 to E − 1: expert ``order[i]`` gets the number i.
    optimizer : torch.optim.Optimizer, or a wrapper of one, optional
        As for :func:`add_experts`.

    Raises
    ------
    InputError
        If ``order`` does not have every number once, or the layer or the optimiser cannot be
        changed, as for :func:`add_experts`. Nothing has changed then.

    Examples
    --------
    >>> from tnmoe.nn import MPOExperts, TopKRouter
    >>> layer = MPOMoE(TopKRouter(8, 3), MPOExperts(3, 8, 16, sites=2))
    >>> last = layer.router.weight[2].clone()
    >>> reorder_experts(layer, [2, 0, 1])
    >>> torch.equal(layer.router.weight[0], last)
    True
    """
    numbers = check_experts(moe, order)
    is_open = are_open(moe)
    if len(numbers) != len(is_open):
        raise InputError(
            f"order must have every number from 0 to {len(is_open) - 1} once, got "
            f"{short_repr(numbers)}"
        )
    rearrange(moe, numbers, is_open=[is_open[expert] for expert in numbers], optimizer=optimizer)


def _sources(like: int | Sequence[int] | None, count: int, experts: int) -> list[int]:
    """Return which old expert every new one copies."""
    if like is None:
        return [number % experts for number in range(count)]
    if not isinstance(like, Iterable) or isinstance(like, str):
        return [check_index("like", like, experts)] * count
    sources = [check_index("every number in like", expert, experts) for expert in like]
    if len(sources) != count:
        raise InputError(
            f"like must be one expert, or one for each of the {count} new ones, got "
            f"{short_repr(sources)}"
        )
    return sources


def _starting_rows(moe: MPOMoE) -> set[int]:
    """Return the ids of the tensors whose rows are zero for an expert that is the base alone."""
    zeroed: set[int] = set()
    for projection in moe.experts.projections().values():
        if not isinstance(projection, ResidualProjection):
            return set()
        zeroed.add(id(projection.delta.core_at(scaling_site(projection.delta))))
        if projection.bias is not None:
            zeroed.add(id(projection.bias))
    return zeroed

"""Experts that a router may choose, and experts that it may not."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tnmoe.nn.editing.rearrange import are_open
from tnmoe.nn.moe import MPOMoE
from tnmoe.nn.owned_rows import check_experts


def open_experts(moe: MPOMoE, experts: int | Iterable[int] | None = None) -> None:
    """Let the router of a layer choose experts that were closed.

    Parameters
    ----------
    moe : MPOMoE
    experts : int or iterable of int, optional
        By default all experts. Those that are open already stay open.

    Raises
    ------
    InputError
        If an expert does not exist or is given twice, or the open experts make no groups of one
        size, which the router needs. Nothing has changed then.

    Notes
    -----
    An open expert takes over the tokens that its scores attract. With ``normalize=False`` and a
    softmax, the weights of all experts become smaller.

    Examples
    --------
    >>> from tnmoe.nn import MPOExperts, TopKRouter
    >>> layer = MPOMoE(TopKRouter(8, 4, top_k=2), MPOExperts(4, 8, 16, sites=2))
    >>> close_experts(layer, [1, 3])
    >>> layer.router.open_experts
    tensor([0, 2])
    >>> open_experts(layer)
    >>> layer.router.open_experts is None
    True
    """
    _set_open(moe, experts, True)


def close_experts(moe: MPOMoE, experts: int | Iterable[int]) -> None:
    """Forbid the router of a layer to choose some experts.

    The router then works bit for bit as if the layer did not have them: scores, capacities, noise,
    load biases, losses and statistics are those of the open experts alone. The closed experts keep
    their parameters. An optimiser with weight decay or momentum may still move these.

    Parameters
    ----------
    moe : MPOMoE
    experts : int or iterable of int
        Those that are closed already stay closed.

    Raises
    ------
    InputError
        If an expert does not exist or is given twice, or the router cannot choose among the
        remaining ones: they are fewer than ``top_k``, or make no groups of one size. Nothing has
        changed then.

    Examples
    --------
    >>> import torch
    >>> from tnmoe.nn import MPOExperts, TopKRouter
    >>> layer = MPOMoE(TopKRouter(8, 4, top_k=2), MPOExperts(4, 8, 16, sites=2))
    >>> close_experts(layer, 0)
    >>> _, _, index = layer.router(torch.randn(100, 8))
    >>> torch.bincount(index.flatten(), minlength=4)[0]
    tensor(0)
    """
    _set_open(moe, experts, False)


def _set_open(moe: MPOMoE, experts: int | Iterable[int] | None, value: bool) -> None:
    is_open = are_open(moe)
    numbers = range(len(is_open)) if experts is None else check_experts(moe, experts)
    for expert in numbers:
        is_open[expert] = value
    moe.router.check_experts(sum(is_open))
    places = [place for place, one in enumerate(is_open) if one]
    # A new tensor: a recorded call may still hold the old one.
    device = moe.router.weight.device
    moe.router.open_experts = None if all(is_open) else torch.tensor(places, device=device)

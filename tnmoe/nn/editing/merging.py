"""Experts merged into one, whose matrices are their weighted means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnmoe.errors import InputError, check_number_in, short_repr
from tnmoe.joint.low_rank import low_rank
from tnmoe.nn.editing.chain_fit import mean_chain
from tnmoe.nn.editing.rearrange import are_open, rearrange
from tnmoe.nn.low_rank_projection import LowRankProjection
from tnmoe.nn.moe import MPOMoE
from tnmoe.nn.mpo_projection import MPOProjection
from tnmoe.nn.owned_rows import OwnedRows, check_experts, owned_rows
from tnmoe.nn.projection import Projection, StackedProjection
from tnmoe.nn.residual_projection import ResidualProjection
from tnmoe.nn.training.frozen_experts import frozen_experts_of

# Rows by the name of the tensor in its module.
_Rows = Mapping[str, Tensor]


@dataclass(frozen=True)
class MergedExpert:
    """The outcome of a merger of experts.

    Attributes
    ----------
    expert : int
        Number of the merged expert in the layer as it is now.
    errors : dict from str to float
        By the name of the projection: the Frobenius norm of the difference between the matrix of
        the merged expert and the mean of the matrices that it replaces, relative to that mean. In
        the layout ``residual`` the matrices are those that are added to the base.

    Examples
    --------
    >>> from tnmoe.nn import MPOExperts, MPOMoE, TopKRouter
    >>> layer = MPOMoE(TopKRouter(8, 4), MPOExperts(4, 8, 16, sites=3))
    >>> merged = merge_experts(layer, [2, 0])
    >>> merged.expert, list(merged.errors)
    (1, ['up', 'down'])
    """

    expert: int
    errors: dict[str, float]


def merge_experts(
    moe: MPOMoE,
    experts: Iterable[int],
    weights: Sequence[float] | None = None,
    *,
    optimizer: Any = None,
) -> MergedExpert:
    """Replace experts by one whose matrices are the means of theirs.

    Parameters
    ----------
    moe : MPOMoE
        A layer with any projections of tnmoe and any router.
    experts : iterable of int
        Numbers of two experts at least. The merged expert takes the place of the first one.
    weights : sequence of float, optional
        Weights of the experts in the means, their loads for instance; of any sum. Equal by default.
    optimizer : torch.optim.Optimizer, or a wrapper of one, optional
        As for :func:`add_experts`. The state of the merged expert starts at zero.

    Returns
    -------
    MergedExpert
        Its number and the errors of its matrices.

    Raises
    ------
    InputError
        If an expert does not exist or is given twice, there are fewer than two, the weights do not
        fit or are negative, one of the experts is frozen, projections of the layer have cores in
        common or are of a class of their own, the router cannot choose among the remaining experts,
        or the layer or the optimiser cannot be changed, as for :func:`add_experts`. Nothing has
        changed then.

    Notes
    -----
    Networks are not linear: the mean of their matrices computes something near the mean of their
    outputs only if the experts resemble each other, as those do that were upcycled from one
    network. :func:`remove_experts` is the alternative for others.

    Stacked matrices have exact means, and so have chains of which experts own one core. Where
    experts own all cores of a chain, as in ``residual``, the sum of the operators is rounded to the
    chain's bonds (:func:`tnmoe.add`). With one bond that is the best approximation. Other chains
    start with the means of their cores, and every core in turn is then fitted to the mean of the
    matrices by least squares (alternating least squares; Holtz et al., SIAM J. Sci. Comput. 34,
    2012). A matrix of low rank gets the rank of the first expert's. Biases are averaged.

    In the router, rows of weights, biases and load biases are averaged too. The merged expert then
    has the mean of the logits, so tokens that preferred one of the experts strongly may go
    elsewhere. It is open if one of the experts was.

    Examples
    --------
    >>> from tnmoe.nn import DenseExperts, MPOMoE, TopKRouter
    >>> layer = MPOMoE(TopKRouter(8, 4), DenseExperts(4, 8, 16))
    >>> mean = layer.experts.up.weight()[[1, 3]].mean(0)
    >>> merged = merge_experts(layer, [1, 3])
    >>> merged.expert, layer.experts.num_experts
    (1, 3)
    >>> torch.allclose(layer.experts.up.weight()[1], mean)
    True
    """
    numbers = check_experts(moe, experts)
    shares = _shares(numbers, weights)
    for frozen in frozen_experts_of(moe):
        if set(numbers) & set(frozen.experts):
            raise InputError(f"frozen experts do not merge: remove {frozen!r} first")
    owned = owned_rows(moe)
    _check_apart(moe, owned)
    rows, errors = _merged_matrices(moe, numbers, shares)
    is_open, kept = are_open(moe), numbers[0]
    remaining = [each for each in range(len(is_open)) if each == kept or each not in numbers]
    place = remaining.index(kept)

    def new_rows(each: OwnedRows, _: int, old: Tensor) -> Tensor:
        own = rows.get(id(each.module), {}).get(each.attribute)
        if own is not None:
            return own.reshape(old.shape)
        return _mean([each.tensor[each.rows[expert]] for expert in numbers], shares)

    opened = [is_open[each] for each in remaining]
    opened[place] = any(is_open[each] for each in numbers)
    rearrange(moe, remaining, fresh=[place], is_open=opened, new_rows=new_rows, optimizer=optimizer)
    return MergedExpert(place, errors)


def _shares(experts: list[int], weights: Sequence[float] | None) -> list[float]:
    """Return the weights of experts, divided by their sum."""
    if len(experts) < 2:
        raise InputError(f"merging needs two experts at least, got {short_repr(experts)}")
    given = [1.0] * len(experts) if weights is None else list(weights)
    if len(given) != len(experts):
        raise InputError(
            f"weights must be one per expert: got {len(given)} for {len(experts)} experts"
        )
    numbers = [check_number_in("every weight", weight, "[0, inf)") for weight in given]
    if not sum(numbers):
        raise InputError(f"weights must not all be 0, got {short_repr(weights)}")
    return [number / sum(numbers) for number in numbers]


def _check_apart(moe: MPOMoE, owned: list[OwnedRows]) -> None:
    """Raise an InputError if two projections have a tensor of experts in common."""
    held = sum(
        len(module.expert_rows(0))
        for module in moe.experts.modules()
        if isinstance(module, Projection)
    )
    if held > sum(isinstance(each.module, Projection) for each in owned):
        raise InputError(
            "projections of the layer have cores in common that experts own, and a mean of one "
            "matrix would change the other: use remove_experts"
        )


def _mean(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return the weighted mean of rows, in double precision where the device has it."""
    first = parts[0]
    if not first.is_floating_point():
        return first
    return sum(share * _wide(part) for share, part in zip(shares, parts, strict=True))  # type: ignore[return-value]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


@torch.no_grad()
def _merged_matrices(
    moe: MPOMoE, experts: list[int], shares: list[float]
) -> tuple[dict[int, _Rows], dict[str, float]]:
    """Return new rows by the ids of the modules that hold them, and the error of every matrix."""
    rows: dict[int, _Rows] = {}
    errors: dict[str, float] = {}
    for name, projection in moe.experts.projections().items():
        holder = projection.delta if isinstance(projection, ResidualProjection) else projection
        if isinstance(holder, MPOProjection):
            rows[id(holder)], errors[name] = _merged_chain(holder, experts, shares)
        elif isinstance(holder, LowRankProjection):
            rows[id(holder)], errors[name] = _merged_low_rank(holder, experts, shares)
        elif isinstance(holder, StackedProjection):
            errors[name] = 0.0  # the default, a mean of rows
        else:
            raise InputError(
                f"tnmoe cannot merge the matrices of a {type(holder).__name__}: use remove_experts"
            )
    return rows, errors


def _merged_chain(
    chains: MPOProjection, experts: list[int], shares: list[float]
) -> tuple[_Rows, float]:
    owned = sorted(set(range(chains.shape.sites)) - chains.shared_sites)
    cores = [[_wide(core) for core in chains.expert(expert).cores] for expert in experts]
    found, error = mean_chain(cores, shares, owned, chains.shape)
    names = {id(core): name for name, core in chains.named_parameters(recurse=False)}
    return {names[id(chains.core_at(site))]: found[site] for site in owned}, error


def _merged_low_rank(
    matrices: LowRankProjection, experts: list[int], shares: list[float]
) -> tuple[_Rows, float]:
    whole = _wide(matrices.weight())
    mean = sum(share * whole[expert] for share, expert in zip(shares, experts, strict=True))
    array = np.asarray(mean.cpu(), dtype=np.float64)[None]  # type: ignore[union-attr]
    (found,) = low_rank(array).decompose(array, [matrices.ranks[experts[0]]])
    norm = float(np.linalg.norm(array))
    error = float(np.linalg.norm(array[0] - found.matrix())) / norm if norm else 0.0
    device = matrices.outer.device
    rows = {
        "outer": torch.as_tensor(found.outer.T.copy(), device=device),
        "inner": torch.as_tensor(found.inner.ravel(), device=device),
        "columns": torch.as_tensor(found.columns, device=device),
    }
    return rows, error

"""Rows of one expert after the other times its own chain of cores: the route ``per_expert``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tnmoe.backends import backend_named
from tnmoe.contraction.apply import apply_cores, state_width
from tnmoe.contraction.pieces import rows_per_piece
from tnmoe.nn.compute.cores import ExpertCores
from tnmoe.nn.compute.half_precision import cast_for_reuse
from tnmoe.nn.compute.pieces import apply_in_pieces
from tnmoe.nn.compute.rebuilt import rebuilt_linear
from tnmoe.nn.compute.slots import Groups

_TORCH = backend_named("torch")


def per_expert_linear(rows: Tensor, cores: ExpertCores, groups: Groups) -> Tensor:
    """Contract the padded rows of each expert with its cores, in the cheapest order.

    Parameters and result are those of :func:`tnmoe.nn.compute.routes.expert_linear`.
    """
    if not groups.blocks:
        # The gradients of the cores must be zeros here, and not None.
        return rebuilt_linear(rows, cores, groups)
    shape = cores.shape

    def expert_by_expert(rows: Tensor, sites: list[Tensor], groups: Groups) -> Sequence[Tensor]:
        getters = [_core_getter(core) for core in sites]
        products = [
            apply_cores(_TORCH, shape, [core_of(expert) for core_of in getters], rows[block])
            for expert, block in groups.blocks
        ]
        return (torch.cat(products),)

    most = max(block.stop - block.start for _, block in groups.blocks)
    width = state_width(shape, cores.bond_dims, most)
    step = rows_per_piece(width, max(shape.padded_in, shape.padded_out))
    return apply_in_pieces(expert_by_expert, rows, cores.sites(), groups, step)[0]


def _core_getter(core: Tensor) -> Callable[[int], Tensor]:
    """Return a function from an expert to its core, (D, out, in, D'), at one site."""
    if core.ndim == 5:
        return core.unbind().__getitem__
    use = cast_for_reuse(core, core.dtype)
    return lambda expert: use()

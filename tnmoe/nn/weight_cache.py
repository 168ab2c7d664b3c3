"""Experts' matrices kept between forward passes, where no gradient is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tnmoe.nn.projection import SharedProjection


class WeightCache:
    """Built matrices of projections, dropped as soon as a core changes.

    Parameters
    ----------
    limit : int
        Bytes that all matrices may take together. A projection that does not fit is built anew.
    """

    def __init__(self, limit: int = 2**31) -> None:
        self._entries: WeakKeyDictionary[SharedProjection, tuple[tuple, Tensor]] = (
            WeakKeyDictionary()
        )
        self._enabled = True
        self.limit = limit

    @property
    def enabled(self) -> bool:
        """Whether matrices are kept; setting it to False lets those go that were."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = value
        if not value:
            self.clear()

    @property
    def used(self) -> int:
        """Bytes taken at present."""
        return sum(matrices.nbytes for _, matrices in self._entries.values())

    def clear(self) -> None:
        """Let all matrices go."""
        self._entries.clear()

    def has_room(self, projection: SharedProjection) -> bool:
        """Whether a projection's matrices are here, or would fit."""
        # Tensors made in inference mode do not tell when they change.
        if not self._enabled or projection.center.is_inference():
            return False
        if projection in self._entries:
            return True
        numbers = projection.num_experts * projection.out_features * projection.in_features
        return self.used + numbers * projection.center.element_size() <= self.limit

    def get(self, projection: SharedProjection, dtype: torch.dtype) -> Tensor:
        """The matrices (E, out, in) of a projection, built if they are not here as they are now."""
        state = (dtype, *((core.data_ptr(), core._version) for core in projection.parameters()))
        entry = self._entries.get(projection)
        if entry is not None and entry[0] == state:
            return entry[1]
        # The old ones first, so that there are never two.
        self._entries.pop(projection, None)
        matrices = projection.weight().detach().to(dtype).contiguous()
        self._entries[projection] = (state, matrices)
        return matrices


weight_cache = WeightCache()

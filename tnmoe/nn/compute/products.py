"""The products of one call of a layer, and what of them acts on tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tnmoe.contraction.layer_plan import Work
from tnmoe.nn.compute.once_per_token import (
    FirstCall,
    FirstProduct,
    Known,
    LastCall,
    LastProduct,
    Tensors,
)
from tnmoe.options import Matrix


@dataclass(frozen=True)
class Products:
    """The products of one call of a layer.

    Attributes
    ----------
    firsts : sequence of FirstProduct
        Of gate and up, or of up alone.
    last : LastProduct
        Of down.
    """

    firsts: Sequence[FirstProduct]
    last: LastProduct

    @property
    def weights(self) -> list[Tensor]:
        """What the parts for slots multiply by, of all products."""
        return [weight for product in self._all for weight in product.weights]

    @property
    def are_calls(self) -> bool:
        """Whether nothing acts once per token."""
        return all(map(_is_call, self._all))

    @property
    def have_calls(self) -> bool:
        """Whether a product acts on slots as a whole."""
        return any(map(_is_call, self._all))

    @property
    def _all(self) -> list[FirstProduct | LastProduct]:
        return [*self.firsts, self.last]

    def work(self) -> list[tuple[Matrix, Work]]:
        """Count what the parts of all products cost, in the order of computation."""
        names: tuple[Matrix, ...] = ("gate", "up") if len(self.firsts) == 2 else ("up",)
        of_firsts = [
            (name, work)
            for name, first in zip(names, self.firsts, strict=True)
            for work in first.work()
        ]
        # What acts on tokens comes before they are dispatched, for all first products.
        of_firsts.sort(key=lambda pair: pair[1].per == "slot")
        return [*of_firsts, *(("down", work) for work in self.last.work())]

    def split(self, weights: Tensors) -> list[Tensors]:
        """Return the weights of every product, from those of all."""
        parts, start = [], 0
        for product in self._all:
            stop = start + len(product.weights)
            parts.append(weights[start:stop])
            start = stop
        return parts

    def states_of(self, tokens: Tensor) -> tuple[list[Tensor], list[list[int]]]:
        """Compute what acts on tokens before they are dispatched, each part once.

        Returns
        -------
        states : list of Tensor
            T rows each.
        positions : list of list of int
            For every first product the positions of its states in ``states``.
        """
        states: list[Tensor] = []
        known: Known = {}
        positions = [
            [_position(state, states) for state in first.of_tokens(tokens, known)]
            for first in self.firsts
        ]
        return states, positions


def _position(state: Tensor, states: list[Tensor]) -> int:
    """Return the position of a tensor in a list, to which it is added if it is not there."""
    for number, known in enumerate(states):
        if known is state:
            return number
    states.append(state)
    return len(states) - 1


def _is_call(product: FirstProduct | LastProduct) -> bool:
    return isinstance(product, FirstCall | LastCall)

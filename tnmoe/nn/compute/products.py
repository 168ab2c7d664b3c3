"""The products of one call of a layer, and what of them acts on tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tnmoe.contraction.layer_plan import Work
from tnmoe.nn.compute.once_per_token import (
    FirstCall,
    FirstProduct,
    Key,
    Known,
    LastCall,
    LastProduct,
    Tensors,
)
from tnmoe.options import ProjectionName


class Products:
    """The products of one call of a layer.

    Parameters
    ----------
    firsts : mapping from str to FirstProduct
        Of all projections but down, by name, in the order of computation.
    last : LastProduct
        Of down.

    Attributes
    ----------
    weights : list of Tensor
        What the parts for slots multiply by, of all products.
    are_calls : bool
        Whether nothing acts once per token.
    have_calls : bool
        Whether a product acts on slots as a whole.
    """

    def __init__(self, firsts: Mapping[ProjectionName, FirstProduct], last: LastProduct) -> None:
        self.firsts, self.last = tuple(firsts.values()), last
        self._names = tuple(firsts)
        weights: list[Tensor] = []
        # Where the weights of every product lie among those of all.
        self._parts: list[slice] = []
        products: list[FirstProduct | LastProduct] = [*self.firsts, last]
        for product in products:
            start = len(weights)
            weights += product.weights
            self._parts.append(slice(start, len(weights)))
        self.weights = weights
        calls = [isinstance(product, FirstCall | LastCall) for product in products]
        self.are_calls, self.have_calls = all(calls), any(calls)

    def work(self) -> list[tuple[ProjectionName, Work]]:
        """Count what the parts of all products cost, in the order of computation."""
        counted: set[Key] = set()
        of_firsts = [
            (name, work)
            for name, first in zip(self._names, self.firsts, strict=True)
            for work in first.work(counted)
        ]
        # What acts on tokens comes before they are dispatched, for all first products.
        of_firsts.sort(key=lambda pair: pair[1].per == "slot")
        return [*of_firsts, *(("down", work) for work in self.last.work())]

    def split(self, weights: Tensors) -> list[Tensors]:
        """Return the weights of every product, from those of all."""
        return [weights[part] for part in self._parts]

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

"""Products with experts' matrices in two parts: one per token, one per slot.

A layer computes y = Σₑ pₑ · downₑ(act(upₑ x)). The cores of a chain act from the right. Cores at
the right end of ``up`` that all experts share therefore act first, on tokens, before the layer
dispatches these to slots. Cores at the left end of ``down`` that all experts share act last, on the
weighted sums over the slots of every token. Either part is computed once per token, however many
experts the token visits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

from torch import Tensor

from tnmoe.nn.compute.cores import ExpertCores
from tnmoe.nn.compute.grouped import per_row
from tnmoe.nn.compute.joint import State
from tnmoe.nn.compute.slots import Groups
from tnmoe.nn.transforms import autocast_dtype

Tensors = Sequence[Tensor]

# A product that acts once per token: of a shared core, or of the linear module that holds it.
TokenProduct = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Load:
    """What one call of a layer has to compute.

    Attributes
    ----------
    tokens, slots : int
        Numbers T and N.
    training : bool
        Whether a backward pass follows.
    is_known : bool
        Whether the numbers may be read. Code that is compiled, or that computes no numbers, must
        suit any.
    """

    tokens: int
    slots: int
    training: bool
    is_known: bool


class FirstProduct(Protocol):
    """A product whose first part acts on tokens, and whose second part acts on slots."""

    @property
    def weights(self) -> Tensors:
        """What the second part multiplies by; see :func:`is_owned`."""

    @property
    def token_key(self) -> tuple:
        """A key that is equal for products whose first parts are the same."""

    def of_tokens(self, tokens: Tensor) -> Tensors:
        """Compute the first part: (T, in) → tensors of T rows."""

    def of_slots(self, states: Tensors, weights: Tensors, groups: Groups) -> Tensor:
        """Compute the second part: N rows of every state → (N, out)."""


class LastProduct(Protocol):
    """A product whose first part acts on slots, and whose second part acts on their sums."""

    @property
    def weights(self) -> Tensors:
        """What the first part multiplies by; see :func:`is_owned`."""

    def of_slots(self, rows: Tensor, weights: Tensors, groups: Groups) -> Tensors:
        """Compute the first part: (N, in) → tensors of N rows."""

    def of_tokens(self, sums: Tensors) -> Tensor:
        """Compute the second part: T weighted sums of every tensor → (T, out)."""


def is_owned(weight: Tensor, num_experts: int) -> bool:
    """Return whether a weight of a product has a part for every expert.

    These are stacks of cores, (E, D, out, in, D'), and biases, (E, out).
    """
    return weight.ndim in (2, 5) and len(weight) == num_experts


@dataclass(frozen=True)
class FirstCall:
    """A product all of which acts on slots: a call of a projection."""

    projection: Callable[..., Tensor]
    weights: Tensors = ()
    token_key: tuple = ()

    def of_tokens(self, tokens: Tensor) -> Tensors:
        return (tokens,)

    def of_slots(self, states: Tensors, weights: Tensors, groups: Groups) -> Tensor:
        return self.projection(*states, groups)


@dataclass(frozen=True)
class LastCall:
    """A product all of which acts on slots: a call of a projection."""

    projection: Callable[..., Tensor]
    weights: Tensors = ()

    def of_slots(self, rows: Tensor, weights: Tensors, groups: Groups) -> Tensors:
        return (self.projection(rows, groups),)

    def of_tokens(self, sums: Tensors) -> Tensor:
        return sums[0]


@dataclass(frozen=True)
class FirstChain:
    """A chain of cores, of which those from site ``stop`` on act on tokens.

    Attributes
    ----------
    cores : ExpertCores
    stop : int
        Number of the first site after all that experts own.
    module : callable, optional
        Multiplies tokens in place of the last core, which must have all input legs.
    """

    cores: ExpertCores
    stop: int
    module: TokenProduct | None = None

    @property
    def weights(self) -> Tensors:
        return self.cores.sites()[: self.stop]

    @property
    def token_key(self) -> tuple:
        if self.stop == self.cores.shape.sites:
            return ()
        shared = self.cores.stored[self.stop :]
        parts = shared if self.module is None else (*shared[:-1], self.module)
        return (*map(id, parts), self.cores.shape)

    def of_tokens(self, tokens: Tensor) -> Tensors:
        sites = self.cores.shape.sites
        if self.stop == sites:
            return (tokens,)
        if self.module is None:
            state = self.cores.pad(tokens)
        else:
            sites, state = sites - 1, through_module(self.module, tokens)
        shared = self.cores.sites()[self.stop : sites]
        return (_through(shared, state, self.cores, sites, None),)

    def of_slots(self, states: Tensors, weights: Tensors, groups: Groups) -> Tensor:
        (state,) = states
        if self.stop == self.cores.shape.sites:
            state = self.cores.pad(state)
        result = _through(weights, state, self.cores, self.stop, groups)
        return result[:, : self.cores.shape.out_features]


@dataclass(frozen=True)
class LastChain:
    """A chain of cores, of which those before site ``start`` act on sums over slots.

    Attributes
    ----------
    cores : ExpertCores
    start : int
        Number of the first site that experts own.
    module : callable, optional
        Multiplies sums in place of the first core, which must have all output legs.
    bias : Tensor of shape (out,), optional
        What the module adds to its product.
    """

    cores: ExpertCores
    start: int
    module: TokenProduct | None = None
    bias: Tensor | None = None

    @property
    def weights(self) -> Tensors:
        return self.cores.sites()[self.start :]

    def of_slots(self, rows: Tensor, weights: Tensors, groups: Groups) -> Tensors:
        state = _through(weights, self.cores.pad(rows), self.cores, self.cores.shape.sites, groups)
        return (state,) if self.bias is None else (state, state.new_ones(len(state), 1))

    def of_tokens(self, sums: Tensors) -> Tensor:
        skipped = 0 if self.module is None else 1
        shared = self.cores.sites()[skipped : self.start]
        state = _through(shared, sums[0], self.cores, self.start, None)
        if self.module is not None:
            product = through_module(self.module, state)
            return weighted_bias(product, self.bias, sums[1:])
        return state[:, : self.cores.shape.out_features]


@dataclass(frozen=True)
class FirstSum:
    """A shared matrix, which acts on tokens, plus a matrix of every expert."""

    base: TokenProduct
    delta: FirstProduct

    @property
    def weights(self) -> Tensors:
        return self.delta.weights

    @property
    def token_key(self) -> tuple:
        return id(self.base), *self.delta.token_key

    def of_tokens(self, tokens: Tensor) -> Tensors:
        return (through_module(self.base, tokens), *self.delta.of_tokens(tokens))

    def of_slots(self, states: Tensors, weights: Tensors, groups: Groups) -> Tensor:
        product, *rest = states
        return product + self.delta.of_slots(rest, weights, groups)


@dataclass(frozen=True)
class LastSum:
    """A shared matrix, which acts on sums over slots, plus a matrix of every expert.

    ``bias`` is what the module ``base`` adds to its product, if anything.
    """

    base: TokenProduct
    bias: Tensor | None
    delta: LastProduct

    @property
    def weights(self) -> Tensors:
        return self.delta.weights

    def of_slots(self, rows: Tensor, weights: Tensors, groups: Groups) -> Tensors:
        ones = () if self.bias is None else (rows.new_ones(len(rows), 1),)
        return (rows, *ones, *self.delta.of_slots(rows, weights, groups))

    def of_tokens(self, sums: Tensors) -> Tensor:
        count = 1 if self.bias is None else 2
        product = through_module(self.base, sums[0])
        result = weighted_bias(product, self.bias, sums[1:count])
        return result + self.delta.of_tokens(sums[count:])


@dataclass(frozen=True)
class FirstBias:
    """Another product plus a bias of every expert, (E, out), or a common one, (1, out)."""

    product: FirstProduct
    bias: Tensor
    num_experts: int

    @property
    def weights(self) -> Tensors:
        return (*self.product.weights, self.bias)

    @property
    def token_key(self) -> tuple:
        return self.product.token_key

    def of_tokens(self, tokens: Tensor) -> Tensors:
        return self.product.of_tokens(tokens)

    def of_slots(self, states: Tensors, weights: Tensors, groups: Groups) -> Tensor:
        *rest, bias = weights
        result = self.product.of_slots(states, rest, groups)
        bias = bias.to(result.dtype)
        return result + (bias if len(bias) == 1 else per_row(bias, groups))


@dataclass(frozen=True)
class LastBias:
    """Another product plus a bias of every expert, (E, out), or a common one, (1, out)."""

    product: LastProduct
    bias: Tensor
    num_experts: int

    @property
    def weights(self) -> Tensors:
        own = () if self._is_common else (self.bias,)
        return (*self.product.weights, *own)

    @property
    def _is_common(self) -> bool:
        return len(self.bias) < self.num_experts

    def of_slots(self, rows: Tensor, weights: Tensors, groups: Groups) -> Tensors:
        if self._is_common:
            return (*self.product.of_slots(rows, weights, groups), rows.new_ones(len(rows), 1))
        *rest, bias = weights
        biases = per_row(bias.to(rows.dtype), groups)
        return (*self.product.of_slots(rows, rest, groups), biases)

    def of_tokens(self, sums: Tensors) -> Tensor:
        *rest, last = sums
        result = self.product.of_tokens(rest)
        return result + (last * self.bias.to(last.dtype) if self._is_common else last)


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
        by_key: dict[tuple, list[int]] = {}
        for first in self.firsts:
            if first.token_key not in by_key:
                by_key[first.token_key] = [
                    _position(state, states) for state in first.of_tokens(tokens)
                ]
        return states, [by_key[first.token_key] for first in self.firsts]


def _position(state: Tensor, states: list[Tensor]) -> int:
    """Return the position of a tensor in a list, to which it is added if it is not there."""
    for number, known in enumerate(states):
        if known is state:
            return number
    states.append(state)
    return len(states) - 1


def _is_call(product: FirstProduct | LastProduct) -> bool:
    return isinstance(product, FirstCall | LastCall)


def through_module(module: TokenProduct, rows: Tensor) -> Tensor:
    """Call a linear module, which may compute in another dtype than its surroundings."""
    weight = getattr(module, "weight", None)
    if (
        not isinstance(weight, Tensor)
        or not weight.is_floating_point()  # quantised modules cast by themselves
        or weight.dtype == rows.dtype
        or autocast_dtype(rows) is not None
    ):
        return module(rows)
    return module(rows.to(weight.dtype)).to(rows.dtype)


def weighted_bias(result: Tensor, bias: Tensor | None, totals: Tensors) -> Tensor:
    """Weight the bias that a module added once per token by the sum of the token's weights.

    Parameters
    ----------
    result : Tensor, shape (T, out)
        What the module returned.
    bias : Tensor of shape (out,) or None
    totals : sequence of Tensor
        The sums, (T, 1), if there is a bias.
    """
    if bias is None:
        return result
    return result + (totals[0] - 1) * bias.to(result.dtype)


def _through(
    weights: Tensors, state: Tensor, cores: ExpertCores, stop: int, groups: Groups | None
) -> Tensor:
    """Take rows through neighbouring cores, the last of which stands before site ``stop``."""
    inputs, outputs = prod(cores.shape.in_dims[:stop]), prod(cores.shape.out_dims[stop:])
    chain = [core.to(state.dtype) for core in weights]
    return State(state, inputs, outputs).through(chain, groups).tensor

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
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tnmoe.contraction.core_by_core import core_by_core_steps
from tnmoe.contraction.layer_plan import Per, Work
from tnmoe.nn.compute.cores import ExpertCores
from tnmoe.nn.compute.grouped import per_row
from tnmoe.nn.compute.joint import State
from tnmoe.nn.compute.slots import SlotOrder, add_to_slots
from tnmoe.nn.linear import bias_of_linear, call_linear, size_of_linear
from tnmoe.nn.stored_cores import is_gathered
from tnmoe.nn.transforms import cast
from tnmoe.shapes import MPOShape, chain_shapes

Tensors = Sequence[Tensor]

# The cores and modules that acted on tokens, one after the other.
Key = tuple[int, ...]

# What the products of a layer made of its tokens so far. Cores that several products have in common
# then act once.
Known = dict[Key, Tensor]


class Load(NamedTuple):
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

    def of_tokens(self, tokens: Tensor, known: Known) -> Tensors:
        """Compute the first part: (T, in) → tensors of T rows."""

    def of_slots(self, states: Tensors, weights: Tensors, groups: SlotOrder) -> Tensor:
        """Compute the second part: N rows of every state → (N, out).

        Slots that are not sorted take states of T rows.
        """

    def work(self, counted: set[Key]) -> list[Work]:
        """Count what the parts cost, in the order of computation.

        What is in ``counted`` has acted on the tokens already. The method adds to it.
        """


class LastProduct(Protocol):
    """A product whose first part acts on slots, and whose second part acts on their sums."""

    @property
    def weights(self) -> Tensors:
        """What the first part multiplies by; see :func:`is_owned`."""

    def of_slots(self, rows: Tensor, weights: Tensors, groups: SlotOrder) -> Tensors:
        """Compute the first part: (N, in) → tensors of N rows."""

    def of_tokens(self, sums: Tensors) -> Tensor:
        """Compute the second part: T weighted sums of every tensor → (T, out)."""

    def work(self) -> list[Work]:
        """Count what the parts cost, in the order of computation."""


def is_owned(weight: Tensor, num_experts: int) -> bool:
    """Return whether a weight of a product has a part for every expert.

    These are stacks of cores, (E, D, out, in, D'), and biases, (E, out).
    """
    return weight.ndim in (2, 5) and len(weight) == num_experts


@dataclass(frozen=True)
class FirstCall:
    """A product all of which acts on slots: a call of a projection."""

    projection: Callable[..., Tensor]
    work_of_call: Callable[[], Work]
    weights: Tensors = ()

    def of_tokens(self, tokens: Tensor, known: Known) -> Tensors:
        return (tokens,)

    def of_slots(self, states: Tensors, weights: Tensors, groups: SlotOrder) -> Tensor:
        return self.projection(*states, groups)

    def work(self, counted: set[Key]) -> list[Work]:
        return [self.work_of_call()]


@dataclass(frozen=True)
class LastCall:
    """A product all of which acts on slots: a call of a projection."""

    projection: Callable[..., Tensor]
    work_of_call: Callable[[], Work]
    weights: Tensors = ()

    def of_slots(self, rows: Tensor, weights: Tensors, groups: SlotOrder) -> Tensors:
        return (self.projection(rows, groups),)

    def of_tokens(self, sums: Tensors) -> Tensor:
        return sums[0]

    def work(self) -> list[Work]:
        return [self.work_of_call()]


class FirstChain:
    """A chain of cores, of which those from site ``stop`` on act on tokens.

    Parameters
    ----------
    cores : ExpertCores
    stop : int
        Number of the first site after all that experts own.
    module : Module, optional
        Linear module that multiplies tokens in place of the last core, which must have all input
        legs.
    """

    def __init__(self, cores: ExpertCores, stop: int, module: nn.Module | None = None) -> None:
        self.cores, self.stop, self.module = cores, stop, module
        self.weights: Tensors = cores.stored[:stop]
        self._part = _Part.of(cores.shape, stop)
        self._acts_first = stop == cores.shape.sites
        self._steps = self._steps_of_tokens()
        self._is_padded = cores.shape.padded_out > cores.shape.out_features

    def _steps_of_tokens(self) -> list[tuple[int, nn.Module | None, Key]]:
        """Return the sites that act on tokens, the modules in place of their cores, and keys."""
        sites = self.cores.shape.sites
        key: Key = (self.cores.shape.padded_in,)
        steps: list[tuple[int, nn.Module | None, Key]] = []
        for site in reversed(range(self.stop, sites)):
            module = self.module if site == sites - 1 else None
            key = (*key, id(module or self.cores.stored[site]))
            steps.append((site, module, key))
        return steps

    def of_tokens(self, tokens: Tensor, known: Known) -> Tensors:
        state = tokens
        for site, module, key in self._steps:
            if key not in known:
                known[key] = self._through(site, module, state)
            state = known[key]
        return (state,)

    def _through(self, site: int, module: nn.Module | None, state: Tensor) -> Tensor:
        if module is not None:
            return call_linear(module, state)
        if site == self.cores.shape.sites - 1:
            state = self.cores.pad(state)
        part = _Part.of(self.cores.shape, site + 1)
        return part.through([self.cores.stored[site]], state, None)

    def of_slots(self, states: Tensors, weights: Tensors, groups: SlotOrder) -> Tensor:
        (state,) = states
        if self._acts_first:
            state = self.cores.pad(state)
        result = self._part.through(weights, state, groups)
        return result[:, : self.cores.shape.out_features] if self._is_padded else result

    def work(self, counted: set[Key]) -> list[Work]:
        per_slot = _chain_work(self.cores, range(self.stop), "slot")
        sites = [site for site, _, key in self._steps if key not in counted]
        counted.update(key for _, _, key in self._steps)
        if not sites:
            return [per_slot]
        return [_chain_work(self.cores, sites, "token", self.module), per_slot]


class LastChain:
    """A chain of cores, of which those before site ``start`` act on sums over slots.

    Parameters
    ----------
    cores : ExpertCores
    start : int
        Number of the first site that experts own.
    module : Module, optional
        Linear module that multiplies sums in place of the first core, which must have all output
        legs.
    """

    def __init__(self, cores: ExpertCores, start: int, module: nn.Module | None = None) -> None:
        self.cores, self.start, self.module = cores, start, module
        self.weights: Tensors = cores.stored[start:]
        self._shared: Tensors = cores.stored[0 if module is None else 1 : start]
        self._part = _Part.of(cores.shape, cores.shape.sites)
        self._rest = _Part.of(cores.shape, start)

    def of_slots(self, rows: Tensor, weights: Tensors, groups: SlotOrder) -> Tensors:
        state = self._part.through(weights, self.cores.pad(rows), groups)
        bias = None if self.module is None else bias_of_linear(self.module)
        return (state,) if bias is None else (state, state.new_ones(len(state), 1))

    def of_tokens(self, sums: Tensors) -> Tensor:
        state = self._rest.through(self._shared, sums[0], None)
        if self.module is not None:
            return _weighted(self.module, state, sums[1:])
        return state[:, : self.cores.shape.out_features]

    def work(self) -> list[Work]:
        per_slot = _chain_work(self.cores, range(self.start, self.cores.shape.sites), "slot")
        if self.start == 0:
            return [per_slot]
        return [per_slot, _chain_work(self.cores, range(self.start), "token", self.module)]


@dataclass(frozen=True)
class FirstSum:
    """A shared matrix, which acts on tokens, plus a matrix of every expert."""

    base: nn.Module
    delta: FirstProduct

    @property
    def weights(self) -> Tensors:
        return self.delta.weights

    def of_tokens(self, tokens: Tensor, known: Known) -> Tensors:
        key = (id(self.base),)
        if key not in known:
            known[key] = call_linear(self.base, tokens)
        return (known[key], *self.delta.of_tokens(tokens, known))

    def of_slots(self, states: Tensors, weights: Tensors, groups: SlotOrder) -> Tensor:
        product, *rest = states
        return add_to_slots(product, self.delta.of_slots(rest, weights, groups))

    def work(self, counted: set[Key]) -> list[Work]:
        key = (id(self.base),)
        shared = [] if key in counted else [work_of_module(self.base)]
        counted.add(key)
        return [*shared, *self.delta.work(counted)]


@dataclass(frozen=True)
class LastSum:
    """A shared matrix, which acts on sums over slots, plus a matrix of every expert."""

    base: nn.Module
    delta: LastProduct

    @property
    def weights(self) -> Tensors:
        return self.delta.weights

    def of_slots(self, rows: Tensor, weights: Tensors, groups: SlotOrder) -> Tensors:
        ones = () if self._bias is None else (rows.new_ones(len(rows), 1),)
        return (rows, *ones, *self.delta.of_slots(rows, weights, groups))

    def of_tokens(self, sums: Tensors) -> Tensor:
        count = 1 if self._bias is None else 2
        result = _weighted(self.base, sums[0], sums[1:count])
        return result + self.delta.of_tokens(sums[count:])

    def work(self) -> list[Work]:
        return [*self.delta.work(), work_of_module(self.base)]

    @property
    def _bias(self) -> Tensor | None:
        return bias_of_linear(self.base)


@dataclass(frozen=True)
class FirstBias:
    """Another product plus a bias of every expert, (E, out), or a common one, (1, out)."""

    product: FirstProduct
    bias: Tensor
    num_experts: int

    @property
    def weights(self) -> Tensors:
        return (*self.product.weights, self.bias)

    def of_tokens(self, tokens: Tensor, known: Known) -> Tensors:
        return self.product.of_tokens(tokens, known)

    def of_slots(self, states: Tensors, weights: Tensors, groups: SlotOrder) -> Tensor:
        *rest, bias = weights
        result = self.product.of_slots(states, rest, groups)
        bias = bias.to(result.dtype)
        return result + (bias if len(bias) == 1 else per_row(bias, groups))

    def work(self, counted: set[Key]) -> list[Work]:
        return self.product.work(counted)


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

    def of_slots(self, rows: Tensor, weights: Tensors, groups: SlotOrder) -> Tensors:
        if self._is_common:
            return (*self.product.of_slots(rows, weights, groups), rows.new_ones(len(rows), 1))
        *rest, bias = weights
        biases = per_row(bias.to(rows.dtype), groups)
        return (*self.product.of_slots(rows, rest, groups), biases)

    def of_tokens(self, sums: Tensors) -> Tensor:
        *rest, last = sums
        result = self.product.of_tokens(rest)
        return result + (last * self.bias.to(last.dtype) if self._is_common else last)

    def work(self) -> list[Work]:
        return self.product.work()


def _weighted(module: nn.Module, sums: Tensor, totals: Tensors) -> Tensor:
    """Apply a linear module to weighted sums, and weight its bias by the totals of the weights.

    Parameters
    ----------
    module : Module
    sums : Tensor, shape (T, in)
    totals : sequence of Tensor
        The sums of the weights, (T, 1), if the module has a bias.
    """
    bias = bias_of_linear(module)
    if bias is None:
        return call_linear(module, sums)
    if any(map(is_gathered, module.modules())):
        # Only a call of the module brings its bias, which is what it makes of zeros.
        result = call_linear(module, torch.cat([sums, sums.new_zeros(1, sums.shape[1])]))
        result, bias = result[:-1], result[-1]
    else:
        result = call_linear(module, sums)
    return result + (totals[0] - 1) * bias.to(result.dtype)


def work_of_module(module: nn.Module) -> Work:
    """Count what a linear module costs that acts once per token."""
    rows, columns = size_of_linear(module)
    stored = [*module.parameters(), *module.buffers()]
    read = sum(tensor.numel() * tensor.element_size() for tensor in stored)
    return Work("shared module", "token", 2 * rows * columns, read, 0)


def _chain_work(
    cores: ExpertCores, sites: Sequence[int], per: Per, module: nn.Module | None = None
) -> Work:
    """Count what some cores of a chain cost."""
    if module is not None and len(sites) == 1:
        return work_of_module(module)
    sizes = chain_shapes(cores.shape, cores.bond_dims)
    steps = list(core_by_core_steps(sizes, 1))[::-1]
    flops = sum(2 * prod(steps[site]) for site in sites)
    read = [prod(sizes[site]) * cores.stored[site].element_size() for site in sites]
    shared = sum(size for size, site in zip(read, sites, strict=True) if site in cores.shared_sites)
    what = "shared cores" if per == "token" else "cores of experts"
    return Work(what, per, flops, shared, sum(read) - shared)


@dataclass(frozen=True)
class _Part:
    """Neighbouring cores of a chain.

    Attributes
    ----------
    inputs, outputs : int
        Per row, the inputs that the cores up to the last one of the part take, and the outputs of
        the cores that acted before.
    """

    inputs: int
    outputs: int

    @classmethod
    def of(cls, shape: MPOShape, stop: int) -> _Part:
        """Describe cores the last of which stands before site ``stop``."""
        return cls(prod(shape.in_dims[:stop]), prod(shape.out_dims[stop:]))

    def through(self, cores: Tensors, state: Tensor, groups: SlotOrder | None) -> Tensor:
        """Take rows through the cores; without groups, all of these are shared."""
        if not cores:
            return state
        chain = [cast(core, state.dtype) for core in cores]
        return State(state, self.inputs, self.outputs).through(chain, groups).tensor

"""Ranks and bits together: every matrix of every expert gets those that the loss needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain

from compression_calibration import Layer
from compression_families import Stack, owned_family, stack
from compression_forms import Experts, Leaf, Together, experts_of
from compression_rounding import form_moments, round_form
from torch import nn

from tnmoe import distribute_budget

NAMES = ("up", "gate", "down")
# Bits of whole matrices and of factors, and the factors' numbers as shares of the matrix.
_BITS, _FACTOR_BITS, _SHARES = (8, 4, 3, 2), (8, 4, 3), (0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)


def ranks_and_bits(
    layers: Sequence[Layer], share: float, *, ranks: bool = True, calibrated: bool = False
) -> list[Experts]:
    """Choose bits, and ranks unless told otherwise, within a share of the bytes.

    Every option is built and rounded. Its error is the predicted change of the loss, and
    ``tnmoe.distribute_budget`` chooses among them.
    """
    stacks = [
        one for layer in layers for name in NAMES for one in stack(layer, (name,), "both").apart()
    ]
    forms = [list(_options(one, ranks, calibrated)) for one in stacks]
    costs = [[_bytes(form) for form in each] for each in forms]
    losses = [[_loss(one, form) for form in each] for one, each in zip(stacks, forms, strict=True)]
    scale = max(chain(*losses)) or 1.0
    options = [
        [(cost, loss / scale) for cost, loss in zip(*pair, strict=True)]
        for pair in zip(costs, losses, strict=True)
    ]
    budget = int(2 * share * sum(layer.numbers for layer in layers))
    least = sum(map(min, costs))
    choices = distribute_budget(options, max(budget, least))
    chosen = iter([each[choice] for each, choice in zip(forms, choices, strict=True)])
    return [
        experts_of({name: Together([next(chosen) for _ in layer.up]) for name in NAMES})
        for layer in layers
    ]


def _options(given: Stack, ranks: bool, calibrated: bool) -> Iterator[nn.Module]:
    """Yield rounded forms of a single matrix."""
    family = owned_family(given, gauge=True)
    makers: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [(given.whole, _BITS)]
    for share in _SHARES if ranks else ():
        makers.append((partial(family.largest, share), _FACTOR_BITS))  # noqa: PERF401
    for make, bits in makers:
        for number in bits:
            # A leaf cannot be replaced without a form around it.
            form = Together([make()])
            moments = form_moments(form, given.inputs) if calibrated else {}
            yield round_form(form, number, moments)


def _bytes(form: nn.Module) -> int:
    return -(-sum(leaf.bits for leaf in form.modules() if isinstance(leaf, Leaf)) // 8)


def _loss(given: Stack, form: nn.Module) -> float:
    missed = given.matrices - form().detach().double()
    return max(0.0, float(((given.outputs @ missed @ given.inputs) * missed).sum()))

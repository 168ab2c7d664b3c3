"""Contracting chains of cores: paths from opt_einsum, a cost model, and the product for experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import opt_einsum

from tnmoe.backends import Array, Backend
from tnmoe.errors import InputError
from tnmoe.shapes import MPOShape

# Going through the cores in order needs no permutations of large arrays, which makes up for this
# many times the operations of the best order.
_IN_ORDER = 1.5

Path = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ContractionPlan:
    """How to apply an MPO to a batch of vectors, and what it costs.

    Attributes
    ----------
    route : {"chain", "dense"}
        ``chain`` contracts the vectors with the cores; ``dense`` builds the matrix first.
    flops : int
        Floating-point operations (a multiply-add counts as two).
    peak_elements : int
        Numbers in the largest intermediate array.
    path : tuple of tuple of int
        Pairwise contractions in opt_einsum's form: of (vectors, cores…) on the chain route, of
        (cores…) on the dense one.
    """

    route: str
    flops: int
    peak_elements: int
    path: Path

    def __str__(self) -> str:
        steps = " ".join("·".join(map(str, step)) for step in self.path)
        return (
            f"route {self.route}: {self.flops:.3g} flops, "
            f"largest intermediate {self.peak_elements:.3g} numbers, path {steps or 'none'}"
        )


@lru_cache(maxsize=4096)
def contraction_plan(
    shape: MPOShape, bond_dims: tuple[int, ...] | None = None, batch: int = 1
) -> ContractionPlan:
    """Cheapest way to apply an MPO to ``batch`` vectors, by number of operations.

    Parameters
    ----------
    shape : MPOShape
        Legs of the MPO.
    bond_dims : tuple of int, optional
        Inner bond dimensions; exact ones by default.
    batch : int
        Number of vectors.

    Returns
    -------
    ContractionPlan
        Paths are optimal among pairwise contractions without outer products (opt_einsum's
        dynamic programming; Pfeifer, Haegeman, Verstraete, Phys. Rev. E 90, 033315 (2014)).

    Examples
    --------
    >>> shape = MPOShape((4, 4, 8, 6, 4), (3, 4, 4, 4, 4))
    >>> contraction_plan(shape, (4, 4, 4, 4), batch=1).route
    'chain'
    >>> contraction_plan(shape, batch=64).route
    'dense'
    """
    bonds = shape.bond_dims() if bond_dims is None else tuple(bond_dims)
    if len(bonds) != shape.sites - 1:
        raise InputError(
            f"bond_dims needs one value per bond: got {bonds} for {shape.sites - 1} bonds"
        )
    padded = (1, *bonds, 1)
    cores = tuple(zip(padded[:-1], shape.out_dims, shape.in_dims, padded[1:], strict=True))
    chain = _plan("chain", _contraction(cores, batch)[1])
    build = _plan("dense", _contraction(cores, None)[1])
    product = 2 * batch * shape.padded_out * shape.padded_in
    dense = ContractionPlan("dense", build.flops + product, build.peak_elements, build.path)
    # The best chain path may itself build the matrix first; then it is called what it is.
    return min(dense, chain, key=lambda plan: plan.flops)


def to_padded_matrix(cores: Sequence[Array]) -> Array:
    """Product of all cores as a (padded out, padded in) matrix."""
    contract, _ = _contraction(_shapes(cores), None)
    rows = prod(core.shape[1] for core in cores)
    return contract(*cores).reshape(rows, -1)


def apply_cores(shape: MPOShape, cores: Sequence[Array], vectors: Array) -> Array:
    """Apply a chain of cores to vectors (batch, padded in) → (batch, padded out)."""
    batch = vectors.shape[0]
    plan = contraction_plan(shape, tuple(core.shape[0] for core in cores[1:]), batch)
    if plan.route == "dense":
        return vectors @ to_padded_matrix(cores).T
    if _in_order_flops(_shapes(cores), batch) <= _IN_ORDER * plan.flops:
        return _apply_in_order(cores, vectors)
    contract, _ = _contraction(_shapes(cores), batch)
    return contract(vectors.reshape(batch, *shape.in_dims), *cores).reshape(batch, shape.padded_out)


def _apply_in_order(cores: Sequence[Array], vectors: Array) -> Array:
    """Contract vectors (batch, padded in) with one core after the other, right to left.

    The state is (batch · earlier inputs, next input · bond, outputs so far) and a core is the
    matrix (left bond · output, input · right bond): every product leaves the state in the layout
    of the next one, and nothing is ever permuted.
    """
    batch, rest = vectors.shape
    state, outs = vectors, 1
    for core in reversed(cores):
        bond, out, in_, following = core.shape
        rest //= in_
        matrix = core.reshape(bond * out, in_ * following)
        if outs == 1:
            state = state.reshape(batch * rest, in_ * following) @ matrix.T
        else:
            state = matrix @ state.reshape(batch * rest, in_ * following, outs)
        outs *= out
    return state.reshape(batch, outs)


@lru_cache(maxsize=4096)
def _in_order_flops(cores: tuple[tuple[int, ...], ...], batch: int) -> int:
    """Operations of :func:`_apply_in_order`."""
    states, outs, flops = batch * prod(core[2] for core in cores), 1, 0
    for bond, out, in_, following in reversed(cores):
        states //= in_
        flops += 2 * states * bond * out * in_ * following * outs
        outs *= out
    return flops


def stacked_to_padded_matrices(
    xp: Backend, center_core: Array, left: Sequence[Array], right: Sequence[Array]
) -> Array:
    """Matrices of E experts that share a central core.

    Parameters
    ----------
    xp : Backend
        Library of the arrays.
    center_core : array, shape (D, out, in, D')
        Shared central core.
    left, right : sequence of array, shapes (E, D, out, in, D')
        Stacked cores left and right of it, at least one in all.

    Returns
    -------
    array, shape (E, padded out, padded in)
        One product with the central core for all experts together, then one batched product.
    """
    experts = (*left, *right)[0].shape[0]
    bond_l, out_c, in_c, bond_r = center_core.shape
    env_l, out_l, in_l = _left_environment(xp, left)
    env_r, out_r, in_r = _right_environment(xp, right)
    # A side without auxiliary cores has the environment 1, the same for all experts.
    product = center_core.reshape(1, -1, bond_r)
    if env_l is not None:
        product = env_l.reshape(-1, bond_l) @ center_core.reshape(bond_l, -1)
        product = product.reshape(experts, -1, bond_r)
    if env_r is not None:
        product = product @ env_r
    # (E, Ol, Il, Oc, Ic, Or, Ir) -> (E, Ol, Oc, Or, Il, Ic, Ir)
    legs = product.reshape(experts, out_l, in_l, out_c, in_c, out_r, in_r)
    return xp.permute(legs, (0, 1, 3, 5, 2, 4, 6)).reshape(
        experts, out_l * out_c * out_r, in_l * in_c * in_r
    )


def _left_environment(xp: Backend, cores: Sequence[Array]) -> tuple[Array | None, int, int]:
    """Product of stacked cores left of the centre, (E, out·in, D), and its legs."""
    if not cores:
        return None, 1, 1
    experts, _, out, in_, bond = cores[0].shape
    env = cores[0].reshape(experts, out * in_, bond)
    for core in cores[1:]:
        _, _, o, i, following = core.shape
        env = env @ core.reshape(experts, bond, o * i * following)
        env = xp.permute(env.reshape(experts, out, in_, o, i, following), (0, 1, 3, 2, 4, 5))
        out, in_, bond = out * o, in_ * i, following
        env = env.reshape(experts, out * in_, bond)
    return env, out, in_


def _right_environment(xp: Backend, cores: Sequence[Array]) -> tuple[Array | None, int, int]:
    """Product of stacked cores right of the centre, (E, D, out·in), and its legs."""
    if not cores:
        return None, 1, 1
    experts, bond, out, in_, _ = cores[-1].shape
    env = cores[-1].reshape(experts, bond, out * in_)
    for core in reversed(cores[:-1]):
        _, preceding, o, i, _ = core.shape
        env = core.reshape(experts, preceding * o * i, bond) @ env
        env = xp.permute(env.reshape(experts, preceding, o, i, out, in_), (0, 1, 2, 4, 3, 5))
        out, in_, bond = o * out, i * in_, preceding
        env = env.reshape(experts, bond, out * in_)
    return env, out, in_


def _shapes(cores: Sequence[Array]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(core.shape) for core in cores)


@lru_cache(maxsize=4096)
def _contraction(cores: tuple[tuple[int, ...], ...], batch: int | None) -> tuple[Any, Any]:
    """Compiled contraction of cores (after vectors, where there is a batch), and its path info."""
    symbol = opt_einsum.get_symbol
    sites = len(cores)
    bonds = [symbol(k) for k in range(sites + 1)]
    outs = [symbol(sites + 1 + k) for k in range(sites)]
    ins = [symbol(2 * sites + 1 + k) for k in range(sites)]
    terms = [bonds[k] + outs[k] + ins[k] + bonds[k + 1] for k in range(sites)]
    shapes = list(cores)
    if batch is None:
        result = "".join(outs + ins)
    else:
        vector = symbol(3 * sites + 1)
        terms.insert(0, "".join([vector, *ins]))
        shapes.insert(0, (batch, *(core[2] for core in cores)))
        result = "".join([vector, *outs])
    equation = f"{','.join(terms)}->{result}"
    path, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="dp")
    return opt_einsum.contract_expression(equation, *shapes, optimize=path), info


def _plan(route: str, info: Any) -> ContractionPlan:
    return ContractionPlan(
        route, int(info.opt_cost), int(info.largest_intermediate), tuple(map(tuple, info.path))
    )

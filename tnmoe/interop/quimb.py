"""An MPO as quimb's ``MatrixProductOperator``, and chains of quimb as an MPO."""

from __future__ import annotations

from math import prod
from typing import Any

from tnmoe.backends import Array, get_backend
from tnmoe.errors import InputError
from tnmoe.interop.checks import in_common_dtype
from tnmoe.interop.cores import to_cores
from tnmoe.mpo import MPO
from tnmoe.system.extras import require_extra


def to_quimb(mpo: MPO) -> Any:
    """Turn an MPO into a ``quimb.tensor.MatrixProductOperator``.

    The upper indices (rows of ``to_dense``) are the output legs, the lower indices the input legs.

    Parameters
    ----------
    mpo : MPO
        An operator without padding.

    Returns
    -------
    MatrixProductOperator

    Raises
    ------
    InputError
        If the shape is padded, which quimb cannot express.
    TypeError
        If ``mpo`` is not an MPO.
    MissingExtraError
        If quimb is not installed.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> mpo = MPO.random(MPOShape((2, 3), (3, 2)), max_bond=2, rng=0)
    >>> to_quimb(mpo).to_dense().shape
    (6, 6)
    """
    require_extra("to_quimb", "interop", "quimb")
    from quimb.tensor import MatrixProductOperator

    # quimb's first and last tensors lack the outermost bonds, which have dimension 1.
    return MatrixProductOperator(to_cores(mpo, "lroi", outermost_bonds=False), shape="lrud")


def from_quimb(operator: Any) -> MPO:
    """Turn an operator of quimb into an MPO; no gauge is assumed.

    The sites keep the order of ``operator.sites``. Names of indices and tags, and the order of
    axes, do not matter. Of a sub-system, only the sites that it holds are converted.

    All tensors of a site are contracted into one core. A tensor that belongs to no site is
    contracted into the core of a site that it has a bond to. Neighbours without a bond get a bond
    of dimension 1; several bonds between two neighbours become one. The scale that quimb keeps as
    ``exponent`` goes into the cores.

    Parameters
    ----------
    operator : quimb.tensor.MatrixProductOperator
        An operator with open ends, or another operator of quimb whose tensors form a chain. Its
        arrays are of any supported library. Tensors of different dtypes are converted to one dtype
        that holds all of their numbers.

    Raises
    ------
    InputError
        If ``operator`` is not an operator of quimb; a ``MatrixProductState``, for example, has one
        leg per site. Also if a bond joins two sites that are not neighbours, as in a cyclic
        operator, if one tensor has the legs of several sites, or if an index is left open.
    TypeError
        If the arrays belong to no supported library.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> mpo = MPO.random(MPOShape((2, 3), (3, 2)), max_bond=2, rng=0)
    >>> from_quimb(to_quimb(mpo)).bond_dims
    (2,)
    """
    if not all(hasattr(operator, name) for name in ("upper_ind", "lower_ind", "tensor_map")):
        raise InputError(
            "expected a MatrixProductOperator of quimb, with an upper and a lower index per site, "
            f"got a {type(operator).__name__}"
        )
    legs = _leg_names(operator)
    if not legs:
        raise InputError(f"the {type(operator).__name__} has no index of any site")
    sites = _site_of_tensors(operator, legs)
    bonds = _bond_names(operator, legs, sites)
    tensors: list[list[Any]] = [[] for _ in legs]
    for tid, site in sites.items():
        tensors[site].append(operator.tensor_map[tid])
    cores = [
        _contract_site(*site)
        for site in zip(tensors, [[], *bonds], legs, [*bonds, []], strict=True)
    ]
    exponent = float(getattr(operator, "exponent", 0.0))
    if exponent:
        # Every core gets a share: the whole scale may be more than one number can hold.
        cores = [core * 10.0 ** (exponent / len(cores)) for core in cores]
    return MPO(in_common_dtype(cores))


# Names of a site's upper and lower index; None where the operator lacks the index.
_LegNames = tuple[str | None, str | None]


def _leg_names(operator: Any) -> list[_LegNames]:
    """Return the legs of every site that the operator holds, in the order of its sites."""
    pairs = ((operator.upper_ind(site), operator.lower_ind(site)) for site in operator.sites)
    present = [tuple(ind if ind in operator.ind_map else None for ind in pair) for pair in pairs]
    return [legs for legs in present if any(legs)]  # type: ignore[misc]


def _site_of_tensors(operator: Any, legs: list[_LegNames]) -> dict[Any, int]:
    """Assign every tensor, by its key in quimb (``tid``), to the number of a site."""
    sites: dict[Any, int] = {}
    for site, pair in enumerate(legs):
        for ind in filter(None, pair):
            for tid in operator.ind_map[ind]:
                if sites.setdefault(tid, site) != site:
                    raise InputError(
                        f"a tensor of the operator has legs of several sites, {ind} among them: "
                        "split it into one tensor per site first"
                    )
    # Tensors without legs join a neighbour, layer by layer from the sites outwards.
    rest = [tid for tid in operator.tensor_map if tid not in sites]
    while rest:
        neighbors = {tid: _neighboring_site(operator, tid, sites) for tid in rest}
        found = {tid: site for tid, site in neighbors.items() if site is not None}
        # Tensors without a bond to any site are factors of the whole: the first site takes them.
        sites |= found or dict.fromkeys(rest, 0)
        rest = [tid for tid in rest if tid not in sites]
    return sites


def _neighboring_site(operator: Any, tid: Any, sites: dict[Any, int]) -> int | None:
    """Return the first site that a tensor has a bond to; None if it has a bond to no site."""
    inds = operator.tensor_map[tid].inds
    joined = {neighbor for ind in inds for neighbor in operator.ind_map[ind]}
    return min((sites[neighbor] for neighbor in joined if neighbor in sites), default=None)


def _bond_names(operator: Any, legs: list[_LegNames], sites: dict[Any, int]) -> list[list[str]]:
    """Return the indices between each two neighbours; raise an InputError for any other bond."""
    bonds: list[list[str]] = [[] for _ in legs[1:]]
    physical = {ind for pair in legs for ind in pair}
    for ind, tids in operator.ind_map.items():
        first, *further = sorted({sites[tid] for tid in tids})
        ends = sum(operator.tensor_map[tid].inds.count(ind) for tid in tids)
        if ind in physical:
            if len(tids) > 1:
                raise InputError(f"the index {ind} of a site belongs to several tensors")
        elif operator.ind_size(ind) == 1 or (not further and ends > 1):
            continue  # it carries nothing, or both of its ends are at one site
        elif not further:
            raise InputError(
                f"the index {ind} of the operator is left open, and is not a site's leg"
            )
        elif further != [first + 1]:
            raise InputError(
                f"the bond {ind} joins sites {[first, *further]}: an MPO has bonds between "
                "neighbours only, and is not cyclic"
            )
        else:
            bonds[first].append(ind)
    return bonds


def _contract_site(tensors: list[Any], left: list[str], legs: _LegNames, right: list[str]) -> Array:
    """Contract the tensors of one site into a core (D, out, in, D')."""
    from quimb.tensor import tensor_contract

    xp = get_backend(tensors[0].data)
    order = (*left, *filter(None, legs), *right)
    with xp.full_precision(tensors[0].data):
        tensor = tensor_contract(*tensors, output_inds=order, preserve_tensor=True)
    sizes = dict(zip(tensor.inds, tensor.shape, strict=True))
    out, in_ = (1 if leg is None else sizes[leg] for leg in legs)
    before, after = (prod(sizes[ind] for ind in inds) for inds in (left, right))
    return tensor.transpose(*order).data.reshape(before, out, in_, after)

"""Operators to and from tensorly (``TTMatrix``) and quimb (``MatrixProductOperator``)."""

from __future__ import annotations

from math import prod
from typing import Any

from tnmoe.backends import Array, get_backend
from tnmoe.chains.precision import in_one_dtype
from tnmoe.errors import InputError
from tnmoe.mpo import MPO
from tnmoe.system.extras import require_extra

__all__ = ["from_quimb", "from_tensorly", "to_quimb", "to_tensorly"]


def __dir__() -> list[str]:
    return list(__all__)


def to_tensorly(mpo: MPO) -> Any:
    """The operator as a ``tensorly.tt_matrix.TTMatrix``, whose cores are laid out as ours.

    Parameters
    ----------
    mpo : MPO
        A shape without padding; tensorly's backend must be the library of its cores.

    Returns
    -------
    TTMatrix

    Raises
    ------
    InputError
        If the shape is padded, which tensorly cannot express.
    TypeError
        If it is no MPO.
    MissingExtraError
        If tensorly is not installed.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> mpo = MPO.random(MPOShape((2, 3), (3, 2)), max_bond=2, rng=0)
    >>> [core.shape for core in to_tensorly(mpo)]
    [(1, 2, 3, 2), (2, 3, 2, 1)]
    """
    require_extra("to_tensorly", "interop", "tensorly")
    from tensorly.tt_matrix import TTMatrix

    _check(mpo)
    return TTMatrix(list(mpo.cores))


def from_tensorly(operator: Any) -> MPO:
    """An operator of tensorly as an MPO; no gauge is assumed.

    Parameters
    ----------
    operator : tensorly.tt_matrix.TTMatrix, or list or tuple of array
        Cores of shapes (D, out, in, D'), arrays of any supported library. Those of several dtypes
        get one that holds them all.

    Raises
    ------
    InputError
        If it is none of these: a ``TTTensor``, say, whose cores have one leg each. Also if the
        outermost bonds are not 1, or the numbers are integers.
    TypeError
        If its arrays belong to no supported library.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> mpo = MPO.random(MPOShape((2, 3), (3, 2)), max_bond=2, rng=0)
    >>> from_tensorly(to_tensorly(mpo)).bond_dims
    (2,)
    """
    is_operator = isinstance(operator, list | tuple) or type(operator).__name__ == "TTMatrix"
    cores = list(operator) if is_operator else []
    axes = [len(getattr(core, "shape", ())) for core in cores]
    if not is_operator or set(axes) - {4}:
        what = type(operator).__name__ + (f" of arrays with {axes} axes" if is_operator else "")
        raise InputError(f"expected a TTMatrix, or its cores (D, out, in, D'), got a {what}")
    return MPO(_in_common_dtype(cores) if cores else cores)


def to_quimb(mpo: MPO) -> Any:
    """The operator as a ``quimb.tensor.MatrixProductOperator``.

    Its upper indices (rows of ``to_dense``) are the output legs, the lower ones the input legs.

    Parameters
    ----------
    mpo : MPO
        A shape without padding.

    Returns
    -------
    MatrixProductOperator

    Raises
    ------
    InputError
        If the shape is padded, which quimb cannot express.
    TypeError
        If it is no MPO.
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

    _check(mpo)
    xp = get_backend(mpo.cores[0])
    arrays = [xp.permute(core, (0, 3, 1, 2)) for core in mpo.cores]
    # quimb leaves out the outermost bonds.
    arrays[0] = arrays[0][0]
    arrays[-1] = arrays[-1][0] if mpo.shape.sites == 1 else arrays[-1][:, 0]
    return MatrixProductOperator(arrays, shape="lrud")


def from_quimb(operator: Any) -> MPO:
    """An operator of quimb as an MPO; no gauge is assumed.

    Its sites become ours in the order of ``operator.sites``, whatever its indices and tags are
    called and however its axes lie. Of a sub-system, only the sites that are there count. All
    tensors of a site are contracted, and others are with the site beside them. No bond between two
    neighbours is a bond of 1, several are one of all their values together. The scale that quimb
    keeps as ``exponent`` goes into the cores.

    Parameters
    ----------
    operator : quimb.tensor.MatrixProductOperator
        With open ends; or another operator of quimb whose tensors form a chain. Its arrays are of
        any supported library; those of several dtypes get one that holds them all.

    Raises
    ------
    InputError
        If it is no operator of quimb: a ``MatrixProductState``, say, which has one leg per site.
        Also if a bond joins other sites than neighbours, as in a cyclic operator, if one tensor
        has the legs of several sites, or an index is left open.
    TypeError
        If its arrays belong to no supported library.

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
    legs = _legs(operator)
    if not legs:
        raise InputError(f"the {type(operator).__name__} has no index of any site")
    owners = _owners(operator, legs)
    bonds = _bonds(operator, legs, owners)
    groups: list[list[Any]] = [[] for _ in legs]
    for tid, position in owners.items():
        groups[position].append(operator.tensor_map[tid])
    cores = [
        _core(group, left, site_legs, right)
        for group, left, site_legs, right in zip(
            groups, [[], *bonds], legs, [*bonds, []], strict=True
        )
    ]
    exponent = float(getattr(operator, "exponent", 0.0))
    if exponent:
        # A part to every core: the whole may be more than a number can hold.
        cores = [core * 10.0 ** (exponent / len(cores)) for core in cores]
    return MPO(_in_common_dtype(cores))


# Names of a site's upper and lower index; None where the operator lacks it.
_Legs = tuple[str | None, str | None]


def _legs(operator: Any) -> list[_Legs]:
    """The indices of every site that is there."""
    pairs = ((operator.upper_ind(site), operator.lower_ind(site)) for site in operator.sites)
    there = [tuple(ind if ind in operator.ind_map else None for ind in pair) for pair in pairs]
    return [legs for legs in there if any(legs)]  # type: ignore[misc]


def _owners(operator: Any, legs: list[_Legs]) -> dict[Any, int]:
    """The position of the site that each tensor belongs to, by the tensor's key in quimb."""
    owners: dict[Any, int] = {}
    for position, pair in enumerate(legs):
        for ind in filter(None, pair):
            for tid in operator.ind_map[ind]:
                if owners.setdefault(tid, position) != position:
                    raise InputError(
                        f"a tensor of the operator has legs of several sites, {ind} of one of "
                        "them: split it into a tensor per site first"
                    )
    others = [tid for tid in operator.tensor_map if tid not in owners]
    while others:
        beside = {tid: _beside(operator, tid, owners) for tid in others}
        # What is joined to nothing is a factor of the whole.
        found = {tid: at for tid, at in beside.items() if at is not None} or dict.fromkeys(
            others, 0
        )
        owners |= found
        others = [tid for tid in others if tid not in owners]
    return owners


def _beside(operator: Any, tid: Any, owners: dict[Any, int]) -> int | None:
    """The first position that a tensor has a bond to, if any."""
    inds = operator.tensor_map[tid].inds
    joined = {other for ind in inds for other in operator.ind_map[ind]}
    return min((owners[other] for other in joined if other in owners), default=None)


def _bonds(operator: Any, legs: list[_Legs], owners: dict[Any, int]) -> list[list[str]]:
    """The indices between neighbours; an InputError if there are others that matter."""
    bonds: list[list[str]] = [[] for _ in legs[1:]]
    physical = {ind for pair in legs for ind in pair}
    for ind, tids in operator.ind_map.items():
        first, *others = sorted({owners[tid] for tid in tids})
        if operator.ind_size(ind) == 1 and ind not in physical:
            continue
        if ind in physical or (not others and len(tids) > 1):
            if others or (ind in physical and len(tids) > 1):
                raise InputError(f"the index {ind} of a site belongs to several tensors")
            continue
        if not others:
            raise InputError(f"the index {ind} of the operator is left open, and no site's")
        if others != [first + 1]:
            raise InputError(
                f"the bond {ind} joins sites {[first, *others]}, which an MPO with open ends "
                "cannot: it has bonds between two neighbours only, and is not cyclic"
            )
        bonds[first].append(ind)
    return bonds


def _core(tensors: list[Any], left: list[str], legs: _Legs, right: list[str]) -> Array:
    """One site's tensors contracted, (D, out, in, D')."""
    from quimb.tensor import tensor_contract

    xp = get_backend(tensors[0].data)
    order = (*left, *filter(None, legs), *right)
    with xp.full_precision(tensors[0].data):
        tensor = tensor_contract(*tensors, output_inds=order, preserve_tensor=True)
    sizes = dict(zip(tensor.inds, tensor.shape, strict=True))
    out, in_ = (1 if leg is None else sizes[leg] for leg in legs)
    before, after = (prod(sizes[ind] for ind in inds) for inds in (left, right))
    return tensor.transpose(*order).data.reshape(before, out, in_, after)


def _in_common_dtype(cores: list[Array]) -> list[Array]:
    """Cores of several dtypes in one that holds them all."""
    xp = get_backend(cores[0])
    alike = all(get_backend(core) is xp for core in cores)
    if not alike or len({xp.dtype_name(core) for core in cores}) == 1:
        return cores  # where they cannot be helped, MPO says so
    return in_one_dtype(xp, cores)


def _check(mpo: MPO) -> None:
    """Raise unless it is an MPO that other libraries can express."""
    if not isinstance(mpo, MPO):
        raise TypeError(f"expected an MPO, got {type(mpo).__qualname__}")
    shape = mpo.shape
    if (shape.padded_out, shape.padded_in) != (shape.out_features, shape.in_features):
        raise InputError(f"only tnmoe knows padded shapes: {shape}")

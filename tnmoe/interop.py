"""Operators to and from tensorly (``TTMatrix``) and quimb (``MatrixProductOperator``)."""

from __future__ import annotations

from typing import Any

from tnmoe.backends import get_backend
from tnmoe.errors import InputError, MissingExtraError
from tnmoe.mpo import MPO

__all__ = ["from_quimb", "from_tensorly", "to_quimb", "to_tensorly"]


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
    MissingExtraError
        If tensorly is not installed.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> mpo = MPO.random(MPOShape((2, 3), (3, 2)), max_bond=2, rng=0)
    >>> [core.shape for core in to_tensorly(mpo)]
    [(1, 2, 3, 2), (2, 3, 2, 1)]
    """
    try:
        from tensorly.tt_matrix import TTMatrix
    except ImportError as error:
        raise MissingExtraError("to_tensorly", "tensorly", "interop") from error
    _refuse_padding(mpo)
    return TTMatrix(list(mpo.cores))


def from_tensorly(operator: Any) -> MPO:
    """An operator of tensorly as an MPO; no gauge is assumed.

    Parameters
    ----------
    operator : tensorly.tt_matrix.TTMatrix
        Of arrays of any supported library.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> mpo = MPO.random(MPOShape((2, 3), (3, 2)), max_bond=2, rng=0)
    >>> from_tensorly(to_tensorly(mpo)).bond_dims
    (2,)
    """
    return MPO(list(operator))


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
    MissingExtraError
        If quimb is not installed.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> mpo = MPO.random(MPOShape((2, 3), (3, 2)), max_bond=2, rng=0)
    >>> to_quimb(mpo).to_dense().shape
    (6, 6)
    """
    try:
        from quimb.tensor import MatrixProductOperator
    except ImportError as error:
        raise MissingExtraError("to_quimb", "quimb", "interop") from error
    _refuse_padding(mpo)
    xp = get_backend(mpo.cores[0])
    arrays = [xp.permute(core, (0, 3, 1, 2)) for core in mpo.cores]
    # quimb leaves out the outermost bonds.
    arrays[0] = arrays[0][0]
    arrays[-1] = arrays[-1][0] if mpo.shape.sites == 1 else arrays[-1][:, 0]
    return MatrixProductOperator(arrays, shape="lrud")


def from_quimb(operator: Any) -> MPO:
    """An operator of quimb as an MPO; no gauge is assumed.

    Parameters
    ----------
    operator : quimb.tensor.MatrixProductOperator
        With open ends.

    Raises
    ------
    InputError
        If the operator is cyclic.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> mpo = MPO.random(MPOShape((2, 3), (3, 2)), max_bond=2, rng=0)
    >>> from_quimb(to_quimb(mpo)).bond_dims
    (2,)
    """
    if operator.cyclic:
        raise InputError("a cyclic MatrixProductOperator has no MPO with outermost bonds of 1")
    sites = list(operator.gen_sites_present())
    cores = []
    for position, site in enumerate(sites):
        legs = [operator.upper_ind(site), operator.lower_ind(site)]
        left = [operator.bond(sites[position - 1], site)] if position else []
        right = [operator.bond(site, sites[position + 1])] if site != sites[-1] else []
        array = operator[site].transpose(*left, *legs, *right).data
        sizes = list(array.shape)
        cores.append(
            array.reshape(
                *(sizes[:1] if left else [1]),
                *sizes[len(left) : len(left) + 2],
                *(sizes[-1:] if right else [1]),
            )
        )
    return MPO(cores)


def _refuse_padding(mpo: MPO) -> None:
    shape = mpo.shape
    if (shape.padded_out, shape.padded_in) != (shape.out_features, shape.in_features):
        raise InputError(f"only tnmoe knows padded shapes: {shape}")

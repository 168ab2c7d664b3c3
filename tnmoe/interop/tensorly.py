"""An MPO as tensorly's ``TTMatrix``, and back."""

from __future__ import annotations

from typing import Any

from tnmoe.errors import InputError
from tnmoe.interop.cores import from_cores, to_cores
from tnmoe.mpo import MPO
from tnmoe.system.extras import require_extra


def to_tensorly(mpo: MPO) -> Any:
    """Turn an MPO into a ``tensorly.tt_matrix.TTMatrix``, whose cores have the same layout.

    Parameters
    ----------
    mpo : MPO
        An operator without padding. tensorly computes with the result if its backend
        (``tensorly.set_backend``) is the library of the cores.

    Returns
    -------
    TTMatrix

    Raises
    ------
    InputError
        If the shape is padded, which tensorly cannot express.
    TypeError
        If ``mpo`` is not an MPO.
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

    return TTMatrix(to_cores(mpo))


def from_tensorly(operator: Any) -> MPO:
    """Turn an operator of tensorly into an MPO; no gauge is assumed.

    Parameters
    ----------
    operator : tensorly.tt_matrix.TTMatrix, or list or tuple of array
        Cores of shapes (D, out, in, D'), arrays of any supported library. Cores of different dtypes
        are converted to one dtype that holds all of their numbers.

    Raises
    ------
    InputError
        If ``operator`` is something else, such as a ``TTTensor``, whose cores have one leg each.
        Also if the outermost bonds are not 1, or the numbers are integers.
    TypeError
        If the arrays belong to no supported library.

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
    return from_cores(cores)

"""An MPO as SciPy's ``LinearOperator``."""

from __future__ import annotations

from typing import Any

from tnmoe.backends import get_backend
from tnmoe.chains.precision import computable
from tnmoe.interop.checks import check_mpo
from tnmoe.mpo import MPO


def to_scipy(mpo: MPO) -> Any:
    """Turn an MPO into a ``scipy.sparse.linalg.LinearOperator``, for SciPy's iterative methods.

    It multiplies by the operator and by its adjoint, vectors or several columns at once, and never
    keeps the dense matrix. ``scipy.sparse.linalg.aslinearoperator`` does not take an MPO itself: it
    expects a ``shape`` of two numbers, and that of an MPO also has its legs.

    Parameters
    ----------
    mpo : MPO
        An operator, padded or not. If its cores are not NumPy's, the result has copies without
        gradients, which are. Half precision becomes single.

    Returns
    -------
    LinearOperator
        Of shape (out_features, in_features) and the dtype of the cores.

    Raises
    ------
    TypeError
        If ``mpo`` is not an MPO.

    Examples
    --------
    >>> from scipy.sparse.linalg import svds
    >>> from tnmoe import MPOShape
    >>> mpo = 3 * MPO.identity(MPOShape((2, 3), (2, 3)))
    >>> svds(to_scipy(mpo), k=2, return_singular_vectors=False).round(6).tolist()
    [3.0, 3.0]
    """
    from scipy.sparse.linalg import LinearOperator

    check_mpo(mpo)
    xp = get_backend(mpo.cores[0])
    cores = [xp.to_numpy(computable(xp, core)) for core in mpo.cores]
    forward = MPO(cores, mpo.shape, mpo.center_site)
    adjoint = forward.H
    return LinearOperator(
        shape=(mpo.shape.out_features, mpo.shape.in_features),
        dtype=forward.dtype,
        matvec=lambda x: forward @ x.reshape(-1),
        rmatvec=lambda x: adjoint @ x.reshape(-1),
        matmat=lambda columns: forward @ columns,
        rmatmat=lambda columns: adjoint @ columns,
    )

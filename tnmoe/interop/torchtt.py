"""An MPO as torchTT's ``TT``, and back."""

from __future__ import annotations

from typing import Any

from tnmoe.backends import backend_named, get_backend
from tnmoe.errors import InputError
from tnmoe.interop.cores import from_cores, to_cores
from tnmoe.mpo import MPO


def to_torchtt(mpo: MPO) -> Any:
    """Turn an MPO into a ``torchtt.TT``, a TT-matrix whose cores have the same layout.

    Parameters
    ----------
    mpo : MPO
        An operator without padding. The result holds the same tensors. If the cores are not
        torch's, it has copies on the CPU, without gradients.

    Returns
    -------
    TT
        Its ``M`` are the output legs, its ``N`` the input legs.

    Raises
    ------
    InputError
        If the shape is padded, which torchTT cannot express.
    TypeError
        If ``mpo`` is not an MPO.
    ImportError
        If torchTT is not installed. No extra of tnmoe brings it, because pip has to build it with
        the torch that is installed.
    MissingExtraError
        If torch is not installed.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> mpo = MPO.random(MPOShape((2, 3), (3, 2)), max_bond=2, rng=0)
    >>> to_torchtt(mpo).M  # doctest: +SKIP
    [2, 3]
    """
    make = _import_torchtt().TT
    cores = to_cores(mpo)
    xp, torch = get_backend(cores[0]), backend_named("torch")
    if xp is not torch:
        cores = [torch.from_numpy(xp.to_numpy(core).copy()) for core in cores]
    return make(cores)


def from_torchtt(operator: Any) -> MPO:
    """Turn a TT-matrix of torchTT into an MPO; no gauge is assumed.

    Parameters
    ----------
    operator : torchtt.TT
        A TT-matrix, whose cores have shapes (D, M, N, D'). The MPO holds the same tensors. Cores of
        different dtypes are converted to one dtype that holds all of their numbers.

    Raises
    ------
    InputError
        If ``operator`` is something else, such as a ``TT`` of a tensor, whose cores have one leg
        each. Also if the numbers are integers.

    Examples
    --------
    >>> from tnmoe import MPOShape
    >>> mpo = MPO.random(MPOShape((2, 3), (3, 2)), max_bond=2, rng=0)
    >>> from_torchtt(to_torchtt(mpo)).bond_dims  # doctest: +SKIP
    (2,)
    """
    is_matrix = getattr(operator, "is_ttm", None)
    if is_matrix is not True:
        kind = " of a tensor, which has one leg per site" if is_matrix is False else ""
        raise InputError(f"expected a TT-matrix of torchTT, got a {type(operator).__name__}{kind}")
    return from_cores(operator.cores)


def _import_torchtt() -> Any:
    """Return the module ``torchtt``, or say how to install it."""
    try:
        import torchtt
    except ModuleNotFoundError as error:
        if error.name != "torchtt":
            raise
        raise ModuleNotFoundError(
            "to_torchtt needs torchTT, which is not installed: "
            "pip install --no-build-isolation torchTT",
            name="torchtt",
        ) from None
    return torchtt

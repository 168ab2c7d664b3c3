"""Operators to and from other libraries, one module per library, and as plain lists of cores."""

from tnmoe.interop.cores import from_cores, to_cores
from tnmoe.interop.quimb import from_quimb, to_quimb
from tnmoe.interop.scipy import to_scipy
from tnmoe.interop.tensorly import from_tensorly, to_tensorly
from tnmoe.interop.torchtt import from_torchtt, to_torchtt

__all__ = [
    "from_cores",
    "from_quimb",
    "from_tensorly",
    "from_torchtt",
    "to_cores",
    "to_quimb",
    "to_scipy",
    "to_tensorly",
    "to_torchtt",
]


def __dir__() -> list[str]:
    return list(__all__)

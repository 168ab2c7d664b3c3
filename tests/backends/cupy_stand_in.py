"""A stand-in for CuPy, built on NumPy: what tnmoe uses of CuPy, and what CuPy refuses.

It has the names, arguments, errors and results of CuPy 14 that ``tnmoe.backends.cupy`` relies on,
and nothing else. ``test_cupy.py`` compares it with CuPy where CuPy is installed. What it refuses:

- conversion to NumPy without ``get``, and NumPy's functions and arrays as operands,
- kernels on any other device than the current one (it has two),
- half precision in linear algebra.

As CuPy does, it returns what a failed decomposition leaves behind, unless ``cupyx.errstate`` asks
for an error, and rounds products to TF32 where the process allows it.
"""

from __future__ import annotations

import functools
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import EllipsisType
from typing import Any

import numpy as np
import scipy.linalg

DEVICES = 2
# Bits of a float32 that TF32 keeps.
_TF32 = np.uint32(0xFFFFE000)
_PRODUCTS = {"COMPUTE_TYPE_TBD": 0, "COMPUTE_TYPE_DEFAULT": 1, "COMPUTE_TYPE_TF32": 7}
_compute_types = {"f": 1, "d": 1}


class _Thread(threading.local):
    device = 0
    linalg = "ignore"


_thread = _Thread()


class Device:
    """A device, current in a block: ``cupy.cuda.Device``."""

    def __init__(self, device: int | None = None) -> None:
        self.id = _thread.device if device is None else device
        self._before: list[int] = []
        if not 0 <= self.id < DEVICES:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def __enter__(self) -> Device:
        self._before.append(_thread.device)
        _thread.device = self.id
        return self

    def __exit__(self, *_: object) -> None:
        _thread.device = self._before.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"


class ndarray:
    """An array in the memory of a device: ``cupy.ndarray``."""

    __module__ = "cupy"
    __slots__ = ("_device", "_numbers")

    # With this attribute, NumPy's ufuncs and operators refuse the array.
    __array_ufunc__ = None

    def __init__(self, numbers: Any, device: int | None = None) -> None:
        self._numbers = np.asarray(numbers)
        self._device = _thread.device if device is None else device

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_function__(self, function: Callable, *_: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} was given an array of CuPy")

    shape = property(lambda self: self._numbers.shape)
    ndim = property(lambda self: self._numbers.ndim)
    size = property(lambda self: self._numbers.size)
    dtype = property(lambda self: self._numbers.dtype)
    device = property(lambda self: Device(self._device))

    # Views need no kernel.

    def _view(self, numbers: np.ndarray) -> ndarray:
        return ndarray(numbers, self._device)

    def transpose(self, *axes: Any) -> ndarray:
        return self._view(self._numbers.transpose(*axes))

    def swapaxes(self, axis1: int, axis2: int) -> ndarray:
        return self._view(self._numbers.swapaxes(axis1, axis2))

    def __getitem__(self, index: Any) -> ndarray:
        for part in index if isinstance(index, tuple) else (index,):
            if not (part is None or isinstance(part, int | np.integer | slice | EllipsisType)):
                raise IndexError(f"tnmoe indexes by no {type(part).__qualname__}")
        return self._view(self._numbers[index])

    def __iter__(self) -> Iterator[ndarray]:
        return map(self.__getitem__, range(len(self)))

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def real(self) -> ndarray:
        return self._view(self._numbers.real)

    @property
    def imag(self) -> ndarray:
        if self._numbers.dtype.kind == "c":
            return self._view(self._numbers.imag)
        return ndarray(np.zeros_like(_read(self)))

    def reshape(self, *shape: Any, order: str = "C") -> ndarray:
        reshaped = self._numbers.reshape(*shape, order=order)
        if np.may_share_memory(reshaped, self._numbers):
            return self._view(reshaped)
        return ndarray(_read(self).reshape(*shape, order=order))

    def ravel(self, order: str = "C") -> ndarray:
        return self.reshape(-1, order=order)

    # Kernels.

    def astype(
        self, dtype: Any, order: str = "K", casting: Any = None, subok: Any = None,
        copy: bool = True,
    ) -> ndarray:  # fmt: skip
        if not copy and self.dtype == dtype:
            return self
        return ndarray(_read(self).astype(dtype))

    def conj(self) -> ndarray:
        return ndarray(_read(self).conj())

    def clip(self, min: Any = None, max: Any = None, out: Any = None) -> ndarray:
        return ndarray(_read(self).clip(min, max))

    def trace(
        self, offset: int = 0, axis1: int = 0, axis2: int = 1, dtype: Any = None, out: Any = None
    ) -> ndarray:
        return ndarray(_read(self).trace(offset, axis1, axis2))

    def max(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> ndarray:
        return ndarray(_read(self).max(axis))

    def min(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> ndarray:
        return ndarray(_read(self).min(axis))

    def all(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> ndarray:
        return ndarray(_read(self).all(axis))

    def __setitem__(self, index: Any, value: Any) -> None:
        _read(self)[index] = _operand(value)

    # Into NumPy.

    def get(
        self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True
    ) -> np.ndarray:
        return np.array(self._numbers, order=order)

    def __float__(self) -> float:
        return float(self._numbers)

    def __complex__(self) -> complex:
        return complex(self._numbers)

    def __bool__(self) -> bool:
        return bool(self._numbers)

    def __repr__(self) -> str:
        return repr(self._numbers)

    # Operators.

    def __neg__(self) -> ndarray:
        return ndarray(-_read(self))

    def __matmul__(self, other: Any) -> ndarray:
        factors = [_read(self), _operand(other)]
        if _compute_types["f"] == _PRODUCTS["COMPUTE_TYPE_TF32"]:
            factors = list(map(_rounded_to_tf32, factors))
        return ndarray(factors[0] @ factors[1])


def _elementwise(operation: Callable, swapped: bool) -> Callable[[ndarray, Any], ndarray]:
    def method(self: ndarray, other: Any) -> ndarray:
        operands = _read(self), _operand(other)
        return ndarray(operation(*(operands[::-1] if swapped else operands)))

    return method


for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(ndarray, f"__{_name}__", _elementwise(getattr(operator, _name), False))
    setattr(ndarray, f"__r{_name}__", _elementwise(getattr(operator, _name), True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(ndarray, f"__{_name}__", _elementwise(getattr(operator, _name), False))
ndarray.__hash__ = None  # type: ignore[assignment]


def _read(array: ndarray) -> np.ndarray:
    """Return the numbers for a kernel, which runs on the current device."""
    if array._device != _thread.device:
        raise ValueError(
            f"The device where the array resides ({array._device}) is different from the current "
            f"device ({_thread.device})."
        )
    return array._numbers


def _operand(value: Any) -> Any:
    if isinstance(value, ndarray):
        return _read(value)
    if isinstance(value, bool | int | float | complex | np.number):
        return value
    raise TypeError(f"Unsupported type {type(value)}")


def _rounded_to_tf32(factor: np.ndarray) -> np.ndarray:
    if factor.dtype.name not in ("float32", "complex64"):
        return factor
    bits = np.ascontiguousarray(factor).view(np.uint32) & _TF32
    return bits.view(factor.dtype).reshape(factor.shape)


# cupy


def asarray(a: Any, dtype: Any = None, order: Any = None, *, blocking: bool = False) -> ndarray:
    return a.astype(dtype, copy=False) if isinstance(a, ndarray) else ndarray(np.array(a, dtype))


def zeros(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(np.zeros(shape, dtype))


def eye(N: int, M: int | None = None, k: int = 0, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(np.eye(N, M, k, dtype))


def stack(
    tup: Any, axis: int = 0, out: Any = None, *, dtype: Any = None, casting: str = "same_kind"
) -> ndarray:
    return ndarray(np.stack([_operand(each) for each in tup], axis))


def concatenate(
    tup: Any, axis: int = 0, out: Any = None, *, dtype: Any = None, casting: str = "same_kind"
) -> ndarray:
    return ndarray(np.concatenate([_operand(each) for each in tup], axis))


def transpose(a: ndarray, axes: Any = None) -> ndarray:  # quimb calls it
    return a.transpose(axes)


def isfinite(x: ndarray) -> ndarray:
    return ndarray(np.isfinite(_operand(x)))


# cupy.linalg


def norm(x: ndarray, ord: Any = None, axis: Any = None, keepdims: bool = False) -> ndarray:
    return ndarray(np.linalg.norm(_read(x), ord, axis))


def _solver(function: Callable) -> Callable:
    """Refuse what cuSOLVER refuses, and treat a failure as ``cupyx.errstate`` says."""

    @functools.wraps(function)
    def solver(a: ndarray, *arguments: Any, **named: Any) -> Any:
        if not isinstance(a, ndarray):
            raise np.linalg.LinAlgError("cupy.linalg only supports cupy.ndarray")
        if a.dtype == np.float16:
            raise TypeError("float16 is unsupported in linalg")
        try:
            found = function(_read(a), *arguments, **named)
        except np.linalg.LinAlgError:
            if _thread.linalg == "raise":
                raise
            if function.__name__ == "cholesky":  # cuSOLVER stops in the middle of the matrix
                return ndarray(np.tril(a._numbers))
            nothing = ndarray(np.full_like(a._numbers, np.nan))
            return {"svd": (nothing,) * 3, "eigh": (nothing,) * 2}.get(function.__name__, nothing)
        return tuple(map(ndarray, found)) if isinstance(found, tuple) else ndarray(found)

    return solver


@_solver
def qr(a: np.ndarray, mode: str = "reduced") -> Any:
    found = np.linalg.qr(a, mode)
    return tuple(found) if mode == "reduced" else found


@_solver
def svd(a: np.ndarray, full_matrices: bool = True, compute_uv: bool = True) -> Any:
    return tuple(np.linalg.svd(a, full_matrices, compute_uv))


@_solver
def eigh(a: np.ndarray, UPLO: str = "L") -> Any:
    return tuple(np.linalg.eigh(a, UPLO))


@_solver
def eigvalsh(a: np.ndarray, UPLO: str = "L") -> Any:
    return np.linalg.eigvalsh(a, UPLO)


@_solver
def cholesky(a: np.ndarray) -> Any:
    return np.linalg.cholesky(a)


# cupyx


@contextmanager
def errstate(
    *, divide: Any = None, over: Any = None, under: Any = None, invalid: Any = None,
    linalg: Any = None,
) -> Iterator[None]:  # fmt: skip
    if linalg not in ("ignore", "raise") or {divide, over, under, invalid} != {None}:
        raise NotImplementedError
    before, _thread.linalg = _thread.linalg, linalg
    try:
        yield
    finally:
        _thread.linalg = before


def geterr() -> dict[str, Any]:
    return dict.fromkeys(("divide", "over", "under", "invalid")) | {"linalg": _thread.linalg}


def solve_triangular(
    a: ndarray, b: ndarray, trans: Any = 0, lower: bool = False, unit_diagonal: bool = False,
    overwrite_b: bool = False, check_finite: bool = False,
) -> ndarray:  # fmt: skip
    # cuBLAS divides by a zero and goes on.
    if not _read(a).diagonal().all():
        return ndarray(np.full_like(_read(b), np.nan))
    found = scipy.linalg.solve_triangular(_read(a), _read(b), trans, lower, check_finite=False)
    return ndarray(found)


# cupy._core


def get_compute_type(dtype: Any) -> int:
    return _compute_types[np.dtype(dtype).char.lower()]


def set_compute_type(dtype: Any, compute_type: int) -> None:
    _compute_types[np.dtype(dtype).char.lower()] = compute_type


MODULES: dict[str, dict[str, Any]] = {
    "cupy": {
        each.__name__: each
        for each in (
            ndarray,
            asarray,
            zeros,
            eye,
            stack,
            concatenate,
            isfinite,
            transpose,
        )
    },
    "cupy.linalg": {each.__name__: each for each in (norm, qr, svd, eigh, eigvalsh, cholesky)},
    "cupy.cuda": {"Device": Device},
    "cupy.cuda.runtime": {"getDeviceCount": lambda: DEVICES},
    "cupy._core": {},
    "cupy._core._routines_linalg": {
        "get_compute_type": get_compute_type,
        "set_compute_type": set_compute_type,
        **_PRODUCTS,
    },
    "cupyx": {"errstate": errstate, "geterr": geterr},
    "cupyx.scipy": {},
    "cupyx.scipy.linalg": {"solve_triangular": solve_triangular},
}


def install() -> None:
    """Make this process import the stand-in in place of CuPy."""
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("cupy", "cupyx", "cupy_backends"):
            del sys.modules[name]
    for name, contents in MODULES.items():
        module = module_from_spec(ModuleSpec(name, None, is_package=True))
        vars(module).update(contents)
        sys.modules[name] = module
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)

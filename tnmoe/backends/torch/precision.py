"""Blocks in which products of torch have the full precision of their dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any

import numpy as np
import torch

# Settings that can lower the precision of float32 products: TF32 on a GPU, bfloat16 in oneDNN.
# Before torch 2.9 there is only one setting for all devices.
_SETTINGS: tuple[Any, ...] = tuple(
    owner
    for owner in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    if hasattr(owner, "fp32_precision")
)


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Turn off autocast on a type of device, and float32 products of lower precision."""
    with without_autocast(device_type), _reduced_precision.disabled(), np.errstate(under="ignore"):
        yield


def without_autocast(device_type: str) -> AbstractContextManager:
    """Turn off autocast on a type of device for a block."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class _ReducedPrecision:
    """The settings that let torch compute float32 products in a lower precision.

    They belong to the process and not to a thread. The first block that needs full precision turns
    them off, and the last block to end restores them.
    """

    def __init__(self) -> None:
        self._lock, self._blocks = Lock(), 0
        self._common: str | None = None
        self._per_device: list[str] = []

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Give float32 products the precision of float32 in a block."""
        if not self._disable():
            yield
            return
        try:
            yield
        finally:
            self._restore()

    def _disable(self) -> bool:
        """Count a block in; return False, and count nothing, if no setting needs changing."""
        with self._lock:
            if not self._blocks:
                self._common = _common_precision()
                self._per_device = [owner.fp32_precision for owner in _SETTINGS]
                if self._common in (None, "highest") and {*self._per_device} <= {"none", "ieee"}:
                    return False
                if self._common is not None:
                    torch.set_float32_matmul_precision("highest")
                for owner in _SETTINGS:
                    owner.fp32_precision = "ieee"
            self._blocks += 1
            return True

    def _restore(self) -> None:
        """Count a block out; after the last block, restore what the first one found."""
        with self._lock:
            self._blocks -= 1
            if self._blocks:
                return
            if self._common is not None:
                torch.set_float32_matmul_precision(self._common)
            for owner, before in zip(_SETTINGS, self._per_device, strict=True):
                # "none" means: as the setting above this one says, which may already be ``before``.
                for precision in ("none", before):
                    if owner.fp32_precision != before:
                        owner.fp32_precision = precision


def _common_precision() -> str | None:
    """Return the setting for all devices, or None where the devices' own settings differ."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


_reduced_precision = _ReducedPrecision()

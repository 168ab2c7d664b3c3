"""Blocks in which products of torch have the full precision of their dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from tnmoe.backends.process_setting import ProcessSetting

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
    with without_autocast(device_type), _full_float32.changed(), np.errstate(under="ignore"):
        yield


def without_autocast(device_type: str) -> AbstractContextManager:
    """Turn off autocast on a type of device for a block."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _use_full_float32() -> Callable[[], None] | None:
    """Turn off what lowers the precision of float32 products, and return how to restore it."""
    common, per_device = _common_precision(), [owner.fp32_precision for owner in _SETTINGS]
    if common in (None, "highest") and {*per_device} <= {"none", "ieee"}:
        return None
    if common is not None:
        torch.set_float32_matmul_precision("highest")
    for owner in _SETTINGS:
        owner.fp32_precision = "ieee"

    def restore() -> None:
        if common is not None:
            torch.set_float32_matmul_precision(common)
        for owner, before in zip(_SETTINGS, per_device, strict=True):
            # "none" means: as the setting above this one says, which may already be ``before``.
            for precision in ("none", before):
                if owner.fp32_precision != before:
                    owner.fp32_precision = precision

    return restore


def _common_precision() -> str | None:
    """Return the setting for all devices, or None where the devices' own settings differ."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


_full_float32 = ProcessSetting(_use_full_float32)

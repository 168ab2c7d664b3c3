"""The devices that torch can compute on here."""

from __future__ import annotations

import torch
from torch import Tensor

from tnmoe.errors import InputError


def usable_device(device: torch.device | str) -> torch.device:
    """Return the device, with its index if it has one; raise an InputError if torch lacks it."""
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"torch has no device {str(device)!r} here: {reason}") from error
    if found.type == "meta":
        raise InputError("torch computes nothing on device 'meta': give another")
    return found


def wait_for(tensor: Tensor) -> None:
    """Wait until the device of a tensor has finished all queued work."""
    kind = tensor.device.type
    if kind == "cuda":
        torch.cuda.synchronize(tensor.device)
    elif kind != "cpu":
        getattr(torch, kind).synchronize()

"""A short measurement of a device, from which contraction plans take their rates."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from tnmoe.contraction.rates import Rates, set_rates
from tnmoe.nn.compute.devices import usable_device, wait_for

# Calls of a product; the fastest one counts.
_REPEATS = 15


@torch.no_grad()
def calibrate(device: torch.device | str = "cpu", store: bool = True) -> Rates:
    """Measure the rates of a device, and plan with them from now on.

    This takes about a second. It times a large and a narrow matrix product, one that reads much
    more than it computes, and a tiny one: in single precision on a CPU, in bfloat16 elsewhere.

    Parameters
    ----------
    device : torch.device or str
        Device to measure; the rates are used for all devices of its type.
    store : bool
        Whether later processes plan with the rates, too. They are stored in the folder that
        ``TNMOE_CACHE`` names, or in the user's cache folder.

    Returns
    -------
    Rates

    Raises
    ------
    InputError
        If torch has no such device here.

    Examples
    --------
    >>> calibrate("cpu", store=False).flops > 0
    True
    """
    device = usable_device(device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    size, narrow, long = (2048, 32, 4096) if device.type == "cpu" else (8192, 128, 16384)

    def product(rows: int, depth: int, columns: int) -> float:
        left, right = (
            torch.ones(shape, device=device, dtype=dtype)
            for shape in ((rows, depth), (columns, depth))
        )
        return _seconds(lambda: left @ right.T, left)

    launch = product(8, 8, 8)
    flops = 2 * size**3 / product(size, size, size)
    narrow_flops = 2 * size * narrow * size / product(size, narrow, size)
    bytes_read = long**2 * dtype.itemsize
    rates = Rates(
        flops=flops,
        half_depth=max(0.0, narrow * (flops / narrow_flops - 1)),
        bandwidth=bytes_read / product(2, long, long),
        launch=launch,
    )
    set_rates(device.type, rates, store)
    return rates


def _seconds(call: Callable[[], Tensor], operand: Tensor) -> float:
    """Return the seconds of the fastest call; other work of the machine slows the rest."""
    seconds = []
    for _ in range(_REPEATS):
        wait_for(operand)
        start = time.perf_counter()
        call()
        wait_for(operand)
        seconds.append(time.perf_counter() - start)
    return min(seconds)

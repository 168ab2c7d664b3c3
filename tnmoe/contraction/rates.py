"""Rates of a device: a model of four numbers, which a measurement sets and stores."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tnmoe.errors import check_number_in
from tnmoe.system.durable import write_atomically
from tnmoe.system.files import read_json

# Rates in use, by kind of device.
_RATES: dict[str, Rates] = {}


@dataclass(frozen=True)
class Rates:
    """Speed of a device.

    Attributes
    ----------
    flops : float
        Floating-point operations per second of a large matrix product.
    half_depth : float
        Inner dimension at which a product runs at half that rate.
    bandwidth : float
        Bytes per second, read or written, of arrays that are in no cache.
    launch : float
        Least seconds that an operation takes.

    Raises
    ------
    InputError
        If a rate is not positive; ``half_depth`` may be 0.

    Examples
    --------
    >>> rates = Rates(flops=1e12, half_depth=8, bandwidth=1e10, launch=1e-6)
    >>> f"{rates.product(1024, 1024, 1024, itemsize=4):.1e} s"
    '3.4e-03 s'
    """

    flops: float
    half_depth: float
    bandwidth: float
    launch: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_number_in(name, value, "[0, inf)" if name == "half_depth" else "(0, inf)")

    def product(self, rows: float, depth: float, columns: float, itemsize: int) -> float:
        """Predict the seconds of a product (``rows``, ``depth``) · (``depth``, ``columns``).

        ``itemsize`` is the bytes of a number.
        """
        if not rows * depth * columns:
            return 0.0
        moved = (rows * depth + depth * columns + rows * columns) * itemsize / self.bandwidth
        compute = 2 * rows * depth * columns * (1 + self.half_depth / depth) / self.flops
        # Libraries pack matrices before they multiply them, so the two do not overlap.
        return compute + moved + self.launch

    def move(self, numbers: float, itemsize: int) -> float:
        """Predict the seconds to read ``numbers`` once and write them in another order.

        ``itemsize`` is the bytes of a number.
        """
        return 2 * numbers * itemsize / self.bandwidth + self.launch


# Of the order of a present-day machine. Routes differ by factors, so this does for a start.
_TYPICAL = {
    "cpu": Rates(flops=2e11, half_depth=8, bandwidth=1e10, launch=3e-6),
    "cuda": Rates(flops=3e14, half_depth=128, bandwidth=2e12, launch=8e-6),
}


def get_rates(device: str) -> Rates:
    """Return the rates of a kind of device: set ones, else stored ones, else typical ones."""
    if device not in _RATES:
        # Another thread may have set them meanwhile.
        _RATES.setdefault(device, _stored(device) or _TYPICAL.get(device, _TYPICAL["cuda"]))
    return _RATES[device]


def set_rates(device: str, rates: Rates, store: bool = False) -> None:
    """Use these rates for plans from now on; with ``store``, in later processes, too."""
    _RATES[device] = rates
    if store:
        path = rates_path(device)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(rates), indent=1).encode())


def rates_path(device: str) -> Path:
    """Return the file that stores the rates of a kind of device.

    It lies in the folder ``$TNMOE_CACHE``, or else in the user's cache folder. Every kind has a
    file of its own, so that two measurements at the same time do not undo each other.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TNMOE_CACHE") or Path(cache) / "tnmoe") / f"rates-{device}.json"


def _stored(device: str) -> Rates | None:
    # A missing or broken file counts as no measurement.
    with suppress(OSError, ValueError, TypeError):
        return Rates(**read_json(rates_path(device)))
    return None

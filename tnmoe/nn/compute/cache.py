"""Experts' matrices kept between forward passes, where no gradient is asked for.

Torch counts the changes of a tensor, but not all: writing to ``core.data`` in place, as some
optimisers and averages of weights do, and kernels of other libraries leave no trace. So matrices
also go when an optimiser that holds a core has made a step, when a projection changes between
training and evaluation, and, on a CPU, when one of a few numbers that are looked at has changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from tnmoe.nn.compute.grouped import grouped_linear
from tnmoe.nn.compute.rebuilt import Legs, build, common_dtype, environments, experts_of
from tnmoe.nn.transforms import without_autocast

# Numbers of a core that are looked at for changes that nothing tells of.
_LOOKED_AT = 16


@dataclass(frozen=True)
class _Entry:
    """Matrices, and what tells that their cores are still as they were."""

    matrices: Tensor
    state: tuple
    # Some numbers of every core, where they lie and as they were.
    numbers: list[tuple[Tensor, Tensor]]
    # What watches over the cores' lives.
    watches: tuple[weakref.ref, ...]

    def is_of(self, state: tuple) -> bool:
        return self.state == state and all(now.equal(then) for now, then in self.numbers)


@dataclass(eq=False)
class _Building:
    """Matrices in the making: others that want them wait for their turn."""

    turn: RLock = field(default_factory=RLock)
    # Whether a core may have changed since they were begun.
    spoilt: bool = False


class WeightCache:
    """Built matrices of projections, dropped as soon as a core changes or is gone.

    Threads may use it at the same time. Those that want the same matrices wait until one has built
    them; those that want others do not wait.

    Call :meth:`clear` after writing to ``core.data`` in place in the middle of an evaluation:
    nothing tells of it on an accelerator, and on a CPU only if it meets one of the few numbers
    that are looked at, which a change of some numbers only, by pruning for instance, may not.

    Parameters
    ----------
    limit : int
        Bytes that all matrices may take together. What does not fit is built anew every time.

    Examples
    --------
    >>> weight_cache.enabled = False  # build anew, keep nothing
    >>> weight_cache.enabled, weight_cache.limit = True, 8 * 2**30
    """

    def __init__(self, limit: int = 2**31) -> None:
        # By the identities of all cores: projections may have any of them in common.
        self._entries: dict[tuple[int, ...], _Entry] = {}
        # What is being built. No lock is held for longer than a few look-ups, but turns; so nobody
        # who holds one waits for another.
        self._buildings: weakref.WeakValueDictionary[tuple[int, ...], _Building]
        self._buildings = weakref.WeakValueDictionary()
        # Reentrant: a garbage collection in the midst of a look-up may let matrices go.
        self._lock = RLock()
        self._enabled = True
        self.limit = limit

    def __repr__(self) -> str:
        return f"WeightCache(limit={self.limit}, used={self.used}, enabled={self.enabled})"

    @property
    def enabled(self) -> bool:
        """Whether matrices are kept; setting it to False lets those go that were."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        with self._lock:
            self._enabled = value
            if not value:
                self.clear()

    @property
    def used(self) -> int:
        """Bytes taken at present."""
        return sum(entry.matrices.nbytes for entry in list(self._entries.values()))

    def clear(self) -> None:
        """Let all matrices go."""
        self._drop(lambda key: True)

    def forget(self, cores: Iterable[Tensor]) -> None:
        """Let matrices go that were built from any of ``cores``."""
        if not self._entries and not self._buildings:
            return
        gone = {id(core) for core in cores}
        self._drop(lambda key: not gone.isdisjoint(key))

    def _drop(self, is_meant: Callable[[tuple[int, ...]], bool]) -> None:
        with self._lock:
            for key in filter(is_meant, list(self._entries)):
                self._entries.pop(key, None)
            for key, building in list(self._buildings.items()):
                building.spoilt |= is_meant(key)

    def has_room(self, cores: Sequence[Tensor], size: int) -> bool:
        """Whether matrices of ``size`` bytes, built from ``cores``, are here or would fit."""
        # Tensors made in inference mode do not tell when they change.
        if not self._enabled or any(core.is_inference() for core in cores):
            return False
        return _identity(cores) in self._entries or self.used + size <= self.limit

    def get(
        self,
        center: Tensor,
        aux: Sequence[Tensor],
        site: int,
        legs: Legs,
        size: tuple[int, int],
        dtype: torch.dtype,
    ) -> Tensor:
        """Matrices (E, out, in) of all experts, built if they are not here as they are now.

        Parameters
        ----------
        center : Tensor, shape (D, out, in, D') or (E, D, out, in, D')
            Central core, shared or every expert's own.
        aux : sequence of Tensor, shapes (E, D, out, in, D') or (1, D, out, in, D')
            The other sites, every expert's own or shared.
        site : int
            How many of them lie left of the centre.
        legs : Legs
            Legs of the sites on either side of the centre.
        size : tuple of int
            Rows and columns that the matrices are cut to.
        dtype : torch.dtype
            Of the result.
        """
        cores = (center, *aux)

        def built() -> Tensor:
            return _built(center, aux, site, legs, size).to(dtype).contiguous()

        needed = experts_of(center, aux) * size[0] * size[1] * dtype.itemsize
        if not self.has_room(cores, needed):
            return built()
        key = _identity(cores)
        state = (dtype, *((core.data_ptr(), core._version) for core in cores))
        entry = self._entries.get(key)
        if entry is not None and entry.is_of(state):
            return entry.matrices
        del entry  # so that the old matrices are gone before there are new ones
        with self._lock:
            building = self._buildings.setdefault(key, _Building())
        with building.turn:
            entry = self._entries.get(key)
            if entry is not None and entry.is_of(state):
                return entry.matrices  # another thread built them meanwhile
            del entry
            self._entries.pop(key, None)
            building.spoilt = False
            matrices = built()
            self._keep(key, cores, building, matrices, state)
        return matrices

    def _keep(
        self,
        key: tuple[int, ...],
        cores: Sequence[Tensor],
        building: _Building,
        matrices: Tensor,
        state: tuple,
    ) -> None:
        """Keep matrices, unless there is no room for them or a core has changed meanwhile."""
        entries = self._entries
        watches = tuple(weakref.ref(core, lambda _: entries.pop(key, None)) for core in cores)
        entry = _Entry(matrices, state, _numbers_of(cores), watches)
        with self._lock:
            if not building.spoilt and self.has_room(cores, matrices.nbytes):
                entries[key] = entry


def _built(
    center: Tensor, aux: Sequence[Tensor], site: int, legs: Legs, size: tuple[int, int]
) -> Tensor:
    """Matrices in the precision of their cores."""
    cores = (center, *aux)
    with without_autocast(center.device):
        dtype = common_dtype(cores)
        center, *aux = (core.to(dtype) for core in cores)
        left, right = environments(aux[:site], aux[site:], experts_of(center, aux))
        return build(center, left, right, legs)[:, : size[0], : size[1]]


def _numbers_of(cores: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Some numbers of every core, where they lie and copied; an accelerator is not waited for."""
    if cores[0].device.type != "cpu":
        return []
    flat = (
        core.detach().view(-1)[:: max(1, core.numel() // _LOOKED_AT)]
        if core.is_contiguous()
        else core.detach()
        for core in cores
    )
    return [(numbers, numbers.clone()) for numbers in flat]


def _identity(cores: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(map(id, cores))


weight_cache = WeightCache()


def _after_any_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    weight_cache.forget(core for group in optimizer.param_groups for core in group["params"])


register_optimizer_step_post_hook(_after_any_step)


def cached_linear(
    rows: Tensor,
    offsets: Tensor,
    center: Tensor,
    aux: Sequence[Tensor],
    site: int,
    legs: Legs,
    size: tuple[int, int],
) -> Tensor:
    """``grouped_linear`` with the matrices that the cache has, or that it gets now.

    One operator to ``torch.compile``: a compiled model, too, finds the matrices as they are when
    it runs. There is no gradient.
    """
    if torch.compiler.is_compiling():
        numbers = [*legs.out, *legs.in_, *size, site]
        return torch.ops.tnmoe.cached_linear(rows, offsets, center, list(aux), numbers)
    matrices = weight_cache.get(center, aux, site, legs, size, rows.dtype)
    return grouped_linear(rows, matrices, offsets)


@torch.library.custom_op("tnmoe::cached_linear", mutates_args=())
def _cached_linear(
    rows: Tensor, offsets: Tensor, center: Tensor, aux: Sequence[Tensor], numbers: Sequence[int]
) -> Tensor:
    out, in_, (rows_out, columns, site) = numbers[:3], numbers[3:6], numbers[6:]
    legs = Legs(tuple(out), tuple(in_))  # type: ignore[arg-type]
    return cached_linear(rows, offsets, center, aux, site, legs, (rows_out, columns))


@_cached_linear.register_fake
def _(rows, offsets, center, aux, numbers):  # type: ignore[no-untyped-def]
    return rows.new_empty(rows.shape[0], numbers[6])

"""Experts' matrices that are kept between forward passes, for the route ``cached``.

Torch counts the changes of a tensor, but not all of them. Writing to ``core.data`` in place, as
some optimisers and averages of weights do, leaves no trace; nor do the kernels of other libraries.
So the cache also drops matrices when an optimiser that holds one of their cores has made a step,
when a projection changes between training and evaluation, and, on a CPU, when one of a few sampled
numbers has changed.
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

from tnmoe.nn.compute.cores import ExpertCores
from tnmoe.nn.compute.grouped import grouped_linear
from tnmoe.nn.compute.matrices import build_matrices
from tnmoe.nn.compute.slots import Groups

# Numbers of a core that are compared to find changes that torch does not count.
_SAMPLES = 16


@dataclass(frozen=True)
class _Entry:
    """Matrices, and what shows that their cores have not changed since.

    Attributes
    ----------
    matrices : Tensor, shape (E, out, in)
    state : tuple
        Dtype of the matrices; address and version of every core.
    samples : list of (Tensor, Tensor)
        Some numbers of every core: a view of them, and a copy.
    references : tuple of weakref.ref
        To the cores; they drop the entry when a core is deleted.
    """

    matrices: Tensor
    state: tuple
    samples: list[tuple[Tensor, Tensor]]
    references: tuple[weakref.ref, ...]

    def is_current(self, state: tuple) -> bool:
        return self.state == state and all(view.equal(copy) for view, copy in self.samples)


@dataclass(eq=False)
class _Building:
    """Matrices that one thread builds, while threads that need the same ones wait for the lock."""

    lock: RLock = field(default_factory=RLock)
    # Whether a core may have changed since the building began.
    stale: bool = False


class WeightCache:
    """Built matrices of projections, dropped as soon as a core changes or is deleted.

    Threads may use it at the same time. Threads that need the same matrices wait until one of them
    has built these. Threads that need different matrices do not wait for each other.

    Call :meth:`clear` after writing to ``core.data`` in place in the middle of an evaluation. On an
    accelerator the cache cannot notice such a change. On a CPU it notices the change only if one
    of a few sampled numbers has changed; pruning, for instance, may miss all of these.

    Parameters
    ----------
    limit : int
        Bytes that all matrices may take together. Matrices that do not fit are built for every
        forward pass.

    Examples
    --------
    >>> weight_cache.enabled = False  # build for every forward pass, keep nothing
    >>> weight_cache.enabled, weight_cache.limit = True, 8 * 2**30
    """

    def __init__(self, limit: int = 2**31) -> None:
        # Keys are the identities of all cores: projections may share any of their cores.
        self._entries: dict[tuple[int, ...], _Entry] = {}
        # A thread holds the lock of the cache for a few look-ups only. It holds the lock of a
        # building longer, but waits for no other building meanwhile: nothing can deadlock.
        self._buildings: weakref.WeakValueDictionary[tuple[int, ...], _Building]
        self._buildings = weakref.WeakValueDictionary()
        # Reentrant: a garbage collection in the middle of a look-up may drop matrices.
        self._lock = RLock()
        self._enabled = True
        self.limit = limit

    def __repr__(self) -> str:
        return f"WeightCache(limit={self.limit}, used={self.used}, enabled={self.enabled})"

    @property
    def enabled(self) -> bool:
        """Whether matrices are kept. Setting it to False drops all of them."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        with self._lock:
            self._enabled = value
            if not value:
                self.clear()

    @property
    def used(self) -> int:
        """Bytes that the kept matrices take."""
        return sum(entry.matrices.nbytes for entry in list(self._entries.values()))

    def clear(self) -> None:
        """Drop all matrices."""
        self._drop(lambda key: True)

    def forget(self, cores: Iterable[Tensor]) -> None:
        """Drop all matrices built from any of the given ``cores``."""
        if not self._entries and not self._buildings:
            return
        changed = {id(core) for core in cores}
        self._drop(lambda key: not changed.isdisjoint(key))

    def _drop(self, applies_to: Callable[[tuple[int, ...]], bool]) -> None:
        with self._lock:
            for key in filter(applies_to, list(self._entries)):
                self._entries.pop(key, None)
            for key, building in list(self._buildings.items()):
                building.stale |= applies_to(key)

    def can_keep(self, cores: ExpertCores, itemsize: int) -> bool:
        """Return whether the matrices of ``cores`` are kept already, or would fit.

        ``itemsize`` is the number of bytes per entry.
        """
        # Tensors made in inference mode do not count their changes.
        if not self._enabled or any(core.is_inference() for core in cores.stored):
            return False
        if _key_of(cores) in self._entries:
            return True
        shape = cores.shape
        numbers = cores.num_experts * shape.out_features * shape.in_features
        return self.used + numbers * itemsize <= self.limit

    def get(self, cores: ExpertCores, dtype: torch.dtype) -> Tensor:
        """Return the matrices (E, out, in) of all experts, built now unless they are current.

        Parameters
        ----------
        cores : ExpertCores
            In any dtype.
        dtype : torch.dtype
            Dtype of the result.
        """
        if not self.can_keep(cores, dtype.itemsize):
            return _build_as(cores, dtype)
        key = _key_of(cores)
        state = (dtype, *((core.data_ptr(), core._version) for core in cores.stored))
        entry = self._entries.get(key)
        if entry is not None and entry.is_current(state):
            return entry.matrices
        del entry  # frees the old matrices before new ones are built
        with self._lock:
            building = self._buildings.setdefault(key, _Building())
        with building.lock:
            entry = self._entries.get(key)
            if entry is not None and entry.is_current(state):
                return entry.matrices  # another thread has built them meanwhile
            del entry
            self._entries.pop(key, None)
            building.stale = False
            matrices = _build_as(cores, dtype)
            self._keep(cores, building, matrices, state)
        return matrices

    def _keep(
        self, cores: ExpertCores, building: _Building, matrices: Tensor, state: tuple
    ) -> None:
        """Keep matrices, unless they no longer fit or a core has changed meanwhile."""
        entries, key = self._entries, _key_of(cores)
        references = tuple(
            weakref.ref(core, lambda _: entries.pop(key, None)) for core in cores.stored
        )
        entry = _Entry(matrices, state, _samples_of(cores.stored), references)
        with self._lock:
            if not building.stale and self.can_keep(cores, matrices.itemsize):
                entries[key] = entry


def _build_as(cores: ExpertCores, dtype: torch.dtype) -> Tensor:
    return build_matrices(cores).to(dtype).contiguous()


def _samples_of(cores: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return views and copies of some numbers of every core; nothing on an accelerator.

    A comparison would synchronise with the accelerator.
    """
    if cores[0].device.type != "cpu":
        return []
    views = (
        core.detach().view(-1)[:: max(1, core.numel() // _SAMPLES)]
        if core.is_contiguous()
        else core.detach()
        for core in cores
    )
    return [(view, view.clone()) for view in views]


def _key_of(cores: ExpertCores) -> tuple[int, ...]:
    return tuple(map(id, cores.stored))


weight_cache = WeightCache()


def _forget_stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    weight_cache.forget(core for group in optimizer.param_groups for core in group["params"])


register_optimizer_step_post_hook(_forget_stepped)


def cached_linear(rows: Tensor, cores: ExpertCores, groups: Groups) -> Tensor:
    """Multiply rows by their experts' matrices from the cache, without gradients.

    Parameters and result are those of :func:`tnmoe.nn.compute.routes.expert_linear`.
    ``torch.compile`` sees one operator, so a compiled model also takes the matrices that are
    current when it runs.
    """
    if torch.compiler.is_compiling():
        numbers = [cores.center_site, cores.shape.out_features, cores.shape.in_features]
        return torch.ops.tnmoe.cached_linear(rows, list(cores.stored), groups.offsets, numbers)
    return grouped_linear(rows, weight_cache.get(cores, rows.dtype), groups.offsets)


@torch.library.custom_op("tnmoe::cached_linear", mutates_args=())
def _cached_linear(
    rows: Tensor, stored: Sequence[Tensor], offsets: Tensor, numbers: Sequence[int]
) -> Tensor:
    """Multiply rows by the matrices of stored cores.

    ``numbers`` are the site of the centre, and the rows and columns of the matrices.
    """
    center_site, *size = numbers
    cores = ExpertCores.of(stored, center_site, (size[0], size[1]))
    return grouped_linear(rows, weight_cache.get(cores, rows.dtype), offsets)


@_cached_linear.register_fake
def _(rows, stored, offsets, numbers):  # type: ignore[no-untyped-def]
    return rows.new_empty(rows.shape[0], numbers[1])

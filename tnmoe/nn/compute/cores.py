"""The cores of all experts' matrices in one projection, as a value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from tnmoe.nn.compute.slots import DenseDispatch, Groups
from tnmoe.shapes import MPOShape


@dataclass(frozen=True)
class Legs:
    """Output and input legs left of the centre, of the centre, and right of it."""

    out: tuple[int, int, int]
    in_: tuple[int, int, int]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> Legs:
        """Take six numbers, which torch's operators can pass on: outputs, then inputs."""
        out_left, out_center, out_right, in_left, in_center, in_right = numbers
        return cls((out_left, out_center, out_right), (in_left, in_center, in_right))

    @property
    def numbers(self) -> list[int]:
        """All legs: outputs, then inputs."""
        return [*self.out, *self.in_]

    @property
    def out_features(self) -> int:
        return self.out[0] * self.out[1] * self.out[2]

    @property
    def in_features(self) -> int:
        return self.in_[0] * self.in_[1] * self.in_[2]


@dataclass(frozen=True)
class ExpertCores:
    """The cores of E experts' matrices, site by site.

    Attributes
    ----------
    stored : tuple of Tensor
        One tensor per site, left to right. Cores that experts own: (E, D, out, in, D'). A core
        that they share: (D, out, in, D') at the centre, (1, D, out, in, D') at any other site.
    shape : MPOShape
        Legs and size of every matrix.
    center_site : int
        Site of the central core.
    num_experts : int
        Number of experts E.
    bond_dims : tuple of int
        Inner bond dimensions, left to right.
    transient : bool
        Whether the tensors exist for one call only, as those that FSDP or accelerate gathers.
        Nothing that is built from them can be kept.
    """

    stored: tuple[Tensor, ...]
    shape: MPOShape
    center_site: int
    num_experts: int
    bond_dims: tuple[int, ...]
    transient: bool = False

    @classmethod
    def of(cls, stored: Iterable[Tensor], center_site: int, size: tuple[int, int]) -> ExpertCores:
        """Read legs, bonds and the number of experts from the tensors.

        Parameters
        ----------
        stored, center_site
            As for the class.
        size : tuple of int
            Rows and columns of every matrix.
        """
        stored = tuple(stored)
        out_dims, in_dims = (tuple(core.shape[axis] for core in stored) for axis in (-3, -2))
        return cls(
            stored,
            _shape(out_dims, in_dims, *size),
            center_site,
            max(len(core) for core in stored if core.ndim == 5),
            tuple(core.shape[-4] for core in stored[1:]),
        )

    @property
    def center(self) -> Tensor:
        """The central core, (D, out, in, D') if shared or (E, D, out, in, D')."""
        return self.stored[self.center_site]

    @property
    def left(self) -> tuple[Tensor, ...]:
        """Cores left of the centre, with an expert axis."""
        return self.stored[: self.center_site]

    @property
    def right(self) -> tuple[Tensor, ...]:
        """Cores right of the centre, with an expert axis."""
        return self.stored[self.center_site + 1 :]

    @property
    def owns_center(self) -> bool:
        """Whether every expert owns its central core."""
        return self.center.ndim == 5

    @property
    def shared_sites(self) -> frozenset[int]:
        """Sites whose cores all experts share."""
        return frozenset(
            site for site, core in enumerate(self.stored) if core.ndim == 4 or self._is_single(core)
        )

    def _is_single(self, core: Tensor) -> bool:
        """Return whether a stack holds one core for several experts."""
        return len(core) == 1 < self.num_experts

    @property
    def legs(self) -> Legs:
        """The legs around the centre."""
        return Legs(*self.shape.legs_around(self.center_site))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype for products of the cores: frozen and trained ones may differ in dtype."""
        return reduce(torch.promote_types, (core.dtype for core in self.stored))

    def sites(self) -> list[Tensor]:
        """Return the cores of all sites, with an expert axis only where experts own them."""
        return [core[0] if core.ndim == 5 and len(core) == 1 else core for core in self.stored]

    def stacked(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the cores left and right of the centre; views repeat shared cores E times."""

        def repeat(core: Tensor) -> Tensor:
            return core.expand(self.num_experts, -1, -1, -1, -1)

        return list(map(repeat, self.left)), list(map(repeat, self.right))

    def to(self, dtype: torch.dtype) -> ExpertCores:
        """Cast all cores."""
        return replace(self, stored=tuple(core.to(dtype) for core in self.stored))

    def mask_unused(self, groups: Groups | DenseDispatch) -> ExpertCores:
        """Replace the cores of experts without rows by zeros, where gradients are recorded.

        Otherwise 0 times the numbers in these cores, which is NaN for NaN, would enter the
        gradients of the shared cores.
        """
        if not torch.is_grad_enabled():
            return self
        unused = groups.used.logical_not().view(-1, 1, 1, 1, 1)
        masked = (
            core.masked_fill(unused, 0) if core.ndim == 5 and len(core) == len(unused) else core
            for core in self.stored
        )
        return replace(self, stored=tuple(masked))

    def pad(self, rows: Tensor) -> Tensor:
        """Add zeros to rows, (N, in), up to the product of the input legs."""
        missing = self.shape.padded_in - self.shape.in_features
        return F.pad(rows, (0, missing)) if missing else rows

    def needs_gradients(self, rows: Tensor) -> bool:
        """Return whether a product of ``rows`` with these cores takes part in a backward pass."""
        return torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (rows, *self.stored)
        )


@lru_cache(maxsize=256)
def _shape(
    out_dims: tuple[int, ...], in_dims: tuple[int, ...], out_features: int, in_features: int
) -> MPOShape:
    return MPOShape(out_dims, in_dims, out_features, in_features)

"""Pieces of a conversion: tensors of the target that are made, or copied, together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from tnmoe.hf.files.checkpoint import Checkpoint
from tnmoe.hf.files.tensors import TensorSpec, total_bytes
from tnmoe.system.memory import explain_memory_error, in_gigabytes

# Bytes of copied tensors that make a piece.
_COPY_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Piece:
    """Tensors of the target that are made together.

    Attributes
    ----------
    name : str
    reads : tuple of str
        Tensors of the source that the piece needs.
    specs : mapping from str to TensorSpec
        Tensors of the target that the piece makes.
    make : callable, optional
        Computes the tensors. Without it, they are copies of ``reads``, in the same order.
    """

    name: str
    reads: tuple[str, ...]
    specs: Mapping[str, TensorSpec]
    make: Callable[[], Mapping[str, Tensor]] | None = None

    def bytes_read(self, source: Checkpoint) -> int:
        """Count the bytes of the source that the piece needs."""
        return total_bytes(source.specs[name] for name in self.reads)

    def compute(self, jobs: int) -> Mapping[str, Tensor] | None:
        """Compute the tensors of the piece; return None if they are copies.

        Parameters
        ----------
        jobs : int
            Number of pieces that are computed at the same time, for the note on lack of memory.
        """
        if self.make is None:
            return None
        purpose = f"{self.name} becomes {in_gigabytes(total_bytes(self.specs.values()))}"
        if jobs > 1:
            purpose += f", up to {jobs} layers at a time: fewer jobs (--jobs) take less"
        with explain_memory_error(purpose):
            return self.make()

    def copy_from(self, source: Checkpoint) -> dict[str, Iterable[bytes]]:
        """Return the bytes of each tensor of a piece that is copied."""
        return {
            name: source.chunks(original)
            for name, original in zip(self.specs, self.reads, strict=True)
        }


def copy_pieces(source: Checkpoint, originals: Mapping[str, str]) -> Iterator[Piece]:
    """Split tensors that are copied unchanged into pieces of some megabytes.

    Parameters
    ----------
    source : Checkpoint
    originals : mapping from str to str
        From names in the target to names in the source.
    """
    group: dict[str, str] = {}
    size = 0
    for name, original in originals.items():
        group[name] = original
        size += source.specs[original].num_bytes
        if size >= _COPY_BYTES:
            yield _copy_piece(source, group)
            group, size = {}, 0
    if group:
        yield _copy_piece(source, group)


def _copy_piece(source: Checkpoint, originals: Mapping[str, str]) -> Piece:
    specs = {name: source.specs[original] for name, original in originals.items()}
    return Piece(next(iter(originals)), tuple(originals.values()), specs)

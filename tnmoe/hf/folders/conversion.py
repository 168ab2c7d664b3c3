"""Conversions from one folder of weights to another, a piece at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tnmoe import __version__
from tnmoe.errors import InputError, check_positive_int
from tnmoe.hf.files.checkpoint import Checkpoint
from tnmoe.hf.files.shards import ShardWriter
from tnmoe.hf.files.tensors import TensorSpec, total_bytes, total_params
from tnmoe.hf.folders.parallel import resolve_jobs
from tnmoe.hf.folders.pieces import Piece
from tnmoe.hf.folders.purpose import purpose_line
from tnmoe.hf.folders.run import (
    ConversionRun,
    Progress,
    disk_errors_as_input_errors,
    steps_of,
)
from tnmoe.system.folders import check_target
from tnmoe.system.parts import Part, check_part
from tnmoe.system.unfinished import UnfinishedFolder


@dataclass(frozen=True)
class Conversion:
    """A prepared conversion of a checkpoint, which :meth:`run` carries out.

    Attributes
    ----------
    source : Checkpoint
    pieces : tuple of Piece
        Everything that the target will hold, in order.
    config : dict
        The target's config.json.
    settings : dict
        Other values that the target's numbers depend on, as plain data.

    Examples
    --------
    >>> import tempfile
    >>> from tnmoe.hf import MPOEConfig, prepare_upcycle
    >>> from transformers import GPT2Config, GPT2Model
    >>> folder = tempfile.mkdtemp()
    >>> GPT2Model(GPT2Config(n_layer=1, n_embd=16, n_head=2)).save_pretrained(folder)
    >>> conversion = prepare_upcycle(folder, MPOEConfig(num_experts=4, sites=3))
    >>> conversion.num_params > conversion.source.num_params
    True
    >>> [path.name for path in conversion.run(f"{folder}-mpoe")]
    ['model.safetensors']
    """

    source: Checkpoint
    pieces: tuple[Piece, ...]
    config: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Conversion({str(self.source.folder)!r}, pieces={len(self.pieces)}, "
            f"num_params={self.num_params}, num_bytes={self.num_bytes})"
        )

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """All tensors of the target."""
        return {name: spec for piece in self.pieces for name, spec in piece.specs.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of the target."""
        return total_bytes(self.specs.values())

    @property
    def num_params(self) -> int:
        """Number of elements of all tensors of the target."""
        return total_params(self.specs.values())

    def run(
        self,
        target: str | os.PathLike,
        *,
        overwrite: bool = False,
        jobs: int | None = None,
        shard_bytes: int = 5 * 10**9,
        on_progress: Progress | None = None,
        part: tuple[int, int] | None = None,
    ) -> list[Path]:
        """Make the target folder, or resume making it.

        The new folder grows in ``TARGET.partial`` and moves to the target once it is whole. After
        a crash or a power cut, the same call resumes, and makes the same files.

        Several processes, on machines that share the folders, can make a part each, at the same
        time or in any order. Then a call without ``part`` makes the pieces that are left, if any,
        and finishes the target, with the bytes that one process writes.

        Parameters
        ----------
        target : path
            Folder to make.
        overwrite : bool
            Replace files that tnmoe wrote there, and discard an unfinished conversion with other
            settings. Files that tnmoe did not write there, or that changed since, are never
            removed.
        jobs : int, optional
            Number of pieces that are computed at the same time, each on one thread; the number of
            CPUs by default. The result does not depend on it.
        shard_bytes : int
            Largest size of a file of weights, in bytes. The default is that of transformers'
            ``save_pretrained``.
        on_progress : callable, optional
            Called with the bytes of the source that are done, and with all of them.
        part : (int, int), optional
            ``(i, n)`` makes the i-th of n parts of the pieces, counted from 1, and leaves them in
            ``TARGET.partial``. Which these are depends only on the conversion. The settings of all
            calls must be the same; ``jobs`` may differ.

        Returns
        -------
        list of Path
            The files of weights; none after a part.

        Raises
        ------
        InputError
            If the target cannot be made or holds files that must be kept; if another process is
            making it, the same part of it or a part of another number of parts; if an unfinished
            conversion with other settings is there; if the source changes during the run.
        MemoryError, RuntimeError
            If memory runs out, as NumPy and torch raise them. Notes on the error name what the
            memory was for. The same call resumes.
        """
        shard_bytes = check_positive_int("shard_bytes", shard_bytes)
        purpose = self._purpose(shard_bytes)
        own = None if part is None else self._checked(part)
        jobs = resolve_jobs(jobs)
        unfinished = self._unfinished_folder(target)
        self.source.check_unchanged()
        writer = ShardWriter(unfinished.new, self.specs, shard_bytes)
        run = ConversionRun(
            source=self.source,
            pieces=self.pieces,
            config=self.config,
            unfinished=unfinished,
            writer=writer,
            jobs=jobs,
            on_progress=on_progress,
            part=own,
        )
        with disk_errors_as_input_errors(unfinished.partial):
            if own is not None:
                run.make_part(own, purpose, overwrite)
                return []
            run.make_target(purpose, overwrite)
        return [Path(target).absolute() / file.name for file in writer.files]

    def check_target(self, target: str | os.PathLike, overwrite: bool = False) -> None:
        """Raise an InputError if :meth:`run` would refuse a target as it is now.

        Parameters
        ----------
        target : path
        overwrite : bool
            Whether files that tnmoe wrote there may be replaced.
        """
        check_target(self._unfinished_folder(target).target, overwrite)

    def pieces_left(
        self, target: str | os.PathLike, *, shard_bytes: int = 5 * 10**9
    ) -> list[Piece]:
        """Return the pieces that :meth:`run` has not made yet for a target that is not there.

        Parameters
        ----------
        target : path
        shard_bytes : int
            That of the run.

        Returns
        -------
        list of Piece
            In order. All of them, unless an unfinished run with the same settings is there.
        """
        done = self._unfinished_folder(target).steps(self._purpose(shard_bytes))
        return [piece for step, piece in steps_of(self.pieces).items() if step not in done]

    def _checked(self, part: tuple[int, int]) -> Part:
        """Return a part that a process may make alone; raise an InputError for any other."""
        return check_part(part)

    def _unfinished_folder(self, target: str | os.PathLike) -> UnfinishedFolder:
        """Return the unfinished folder of a target; raise if the source overlaps with it."""
        unfinished = UnfinishedFolder(target)
        for folder in (unfinished.target, unfinished.partial):
            check_apart(folder, self.source.folder)
        return unfinished

    def _purpose(self, shard_bytes: int) -> str:
        """Return everything that the target's bytes depend on."""
        specs = {name: [spec.dtype, spec.shape] for name, spec in self.specs.items()}
        content = {
            "versions": {"tnmoe": __version__, "torch": torch.__version__},
            "source": self.source.fingerprint,
            "settings": self.settings,
            "config": self.config,
            "shard_bytes": shard_bytes,
            "specs": hashlib.sha256(purpose_line(specs).encode()).hexdigest(),
        }
        return purpose_line(content)


def check_apart(folder: Path, source: Path) -> None:
    """Raise an InputError if a folder that is to be written is the source, in it or around it."""
    folder, source = folder.resolve(), source.resolve()
    if folder.is_relative_to(source) or source.is_relative_to(folder):
        raise InputError(f"{folder} overlaps with the source {source}: choose a folder outside it")

"""From one folder of weights to another, a piece at a time: resumable, parallel, whole or not.

What is being made lies in a folder beside the target, ``TARGET.partial``; its files have their full
size from the start, and a journal says which pieces are done. After a crash or a power cut, the
same call goes on where the journal ends, and the files come out the same. The last step moves the
folder into place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnmoe import __version__
from tnmoe.errors import InputError, positive_int, reason
from tnmoe.hf.folders.checkpoint import (
    CONFIG,
    INDEX,
    Checkpoint,
    ShardWriter,
    Spec,
    changed,
    inside,
    states_of,
    write_json,
)
from tnmoe.hf.folders.parallel import results_of
from tnmoe.system.folders import check_target, files_in, remove_files
from tnmoe.system.memory import explain_memory_error, in_gigabytes
from tnmoe.system.unfinished import UnfinishedFolder

# Small files that belong to a model beside its weights: tokenizers, generation settings, licences.
_COMPANIONS = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_LICENCES = ("LICENSE", "LICENCE", "NOTICE")
_LARGEST_COMPANION = 10**9

# The journal's line once the files have their size.
_LAID_OUT = "laid out"

# Bytes of copied tensors that make a piece.
_COPIED = 64 * 2**20

# Done bytes of the source, and all of them.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Piece:
    """Tensors of the target that are made together.

    Attributes
    ----------
    name : str
    reads : tuple of str
        Tensors of the source that it takes.
    specs : mapping from str to Spec
        Tensors of the target that it makes.
    make : callable, optional
        Makes them; without it they are copies, in the same order.
    """

    name: str
    reads: tuple[str, ...]
    specs: Mapping[str, Spec]
    make: Callable[[], Mapping[str, Tensor]] | None = None


def copies(source: Checkpoint, names: Mapping[str, str]) -> Iterator[Piece]:
    """Tensors taken over as they are, some megabytes to a piece.

    Parameters
    ----------
    source : Checkpoint
    names : mapping from str to str
        From names in the target to names in the source.
    """
    group: dict[str, str] = {}
    size = 0
    for name, original in names.items():
        group[name] = original
        size += source.specs[original].num_bytes
        if size >= _COPIED:
            yield _copy(source, group)
            group, size = {}, 0
    if group:
        yield _copy(source, group)


def _copy(source: Checkpoint, names: Mapping[str, str]) -> Piece:
    specs = {name: source.specs[original] for name, original in names.items()}
    return Piece(next(iter(names)), tuple(names.values()), specs)


@dataclass(frozen=True)
class Conversion:
    """What is to be made of a checkpoint.

    Attributes
    ----------
    source : Checkpoint
    pieces : tuple of Piece
        All that the target holds, in order.
    config : dict
        Its config.json.
    settings : dict
        What the numbers depend on besides, as plain data.

    Examples
    --------
    >>> import tempfile
    >>> from tnmoe.hf import MPOEConfig, prepare_upcycle
    >>> from transformers import GPT2Config, GPT2Model
    >>> folder = tempfile.mkdtemp()
    >>> GPT2Model(GPT2Config(n_layer=1, n_embd=16, n_head=2)).save_pretrained(folder)
    >>> plan = prepare_upcycle(folder, MPOEConfig(num_experts=4, sites=3))
    >>> plan.num_params > plan.source.num_params
    True
    >>> [path.name for path in plan.run(f"{folder}-mpoe")]
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
    def specs(self) -> dict[str, Spec]:
        """All tensors of the target."""
        return {name: spec for piece in self.pieces for name, spec in piece.specs.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of the target."""
        return sum(spec.num_bytes for spec in self.specs.values())

    @property
    def num_params(self) -> int:
        """Numbers in all tensors of the target."""
        return sum(spec.num_params for spec in self.specs.values())

    def run(
        self,
        target: str | os.PathLike,
        *,
        overwrite: bool = False,
        jobs: int | None = None,
        shard_bytes: int = 5 * 10**9,
        on_progress: Progress | None = None,
    ) -> list[Path]:
        """Make the target, or go on making it.

        Parameters
        ----------
        target : path
            Folder to make.
        overwrite : bool
            Replace what tnmoe wrote there, and start anew what was begun with other settings.
            What tnmoe did not write there, or what changed since, is never removed.
        jobs : int, optional
            Pieces at a time, each on one thread; as many as there are cores by default. The
            result does not depend on it.
        shard_bytes : int
            Size of a file of weights at most.
        on_progress : callable, optional
            Called with the bytes of the source that are dealt with, and with all of them.

        Returns
        -------
        list of Path
            The files of weights.

        Raises
        ------
        InputError
            If the target cannot be made or holds something to keep, another process is making
            it, or begun work there is of something else; if the source changes meanwhile.
        MemoryError, RuntimeError
            If memory does not suffice, as NumPy and torch raise them; notes name what it was for,
            and the same call goes on from there.
        """
        identity = self._identity(positive_int("shard_bytes", shard_bytes))
        jobs = positive_int("jobs", os.cpu_count() or 1 if jobs is None else jobs)
        self._check_apart(unfinished := UnfinishedFolder(target))
        self.source.check_unchanged()
        writer = ShardWriter(unfinished.new, self.specs, shard_bytes)
        with _going_on_later(unfinished.partial), unfinished.lock() as in_place:
            if in_place != identity:
                check_target(unfinished.target, overwrite)
                companions = states_of(_companions(self.source.folder))
                done = self._begin(unfinished, overwrite, identity)
                if not unfinished.is_whole:
                    self._make(unfinished, writer, done, jobs, on_progress)
                    self._finish(unfinished, writer, companions)
                unfinished.move_to_target(overwrite)
        return [Path(target).absolute() / file.name for file in writer.files]

    def check_target(self, target: str | os.PathLike, overwrite: bool = False) -> None:
        """Raise an InputError if :meth:`run` would refuse a target for what is there now.

        Parameters
        ----------
        target : path
        overwrite : bool
            Whether what tnmoe wrote there may be replaced.
        """
        self._check_apart(unfinished := UnfinishedFolder(target))
        check_target(unfinished.target, overwrite)

    def _check_apart(self, unfinished: UnfinishedFolder) -> None:
        source = self.source.folder.resolve()
        for folder in (unfinished.target, unfinished.partial):
            if folder.is_relative_to(source) or source.is_relative_to(folder):
                raise InputError(f"{folder} is, holds or lies in the source {source}")

    def _identity(self, shard_bytes: int) -> str:
        """A number that changes with whatever the target's bytes depend on."""
        content = {
            "versions": [__version__, torch.__version__],
            "source": self.source.fingerprint,
            "settings": self.settings,
            "config": self.config,
            "shard_bytes": shard_bytes,
            "specs": {name: [spec.dtype, spec.shape] for name, spec in self.specs.items()},
        }
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _begin(self, unfinished: UnfinishedFolder, overwrite: bool, identity: str) -> set[str]:
        """What is done: nothing if the work begins now, else the layout and pieces by name."""
        begun = unfinished.journal()
        same = begun[:1] == [identity]
        if same and unfinished.new.is_dir():
            unfinished.resume()
            return set(begun[1:])
        if begun and not same and not overwrite:
            raise InputError(
                f"{unfinished.partial} is unfinished work of another conversion: remove it, or pass "
                "overwrite=True (--overwrite)"
            )
        unfinished.discard()
        self._check_space(unfinished.partial)
        unfinished.begin(identity)
        return set()

    def _check_space(self, folder: Path) -> None:
        free = shutil.disk_usage(folder).free
        if self.num_bytes > free:
            raise InputError(
                f"{folder.parent} has room for {free / 1e9:.3g} GB, "
                f"the result needs {self.num_bytes / 1e9:.3g} GB"
            )

    def _make(
        self,
        unfinished: UnfinishedFolder,
        writer: ShardWriter,
        done: set[str],
        jobs: int,
        on_progress: Progress | None,
    ) -> None:
        """Write the pieces that are not done yet."""
        if not done:
            writer.create()
            unfinished.mark_done(_LAID_OUT)
        total = sum(map(self._bytes_read, self.pieces))
        todo = {
            line: piece
            for number, piece in enumerate(self.pieces)
            if (line := _journal_line(number, piece)) not in done
        }
        dealt = total - sum(map(self._bytes_read, todo.values()))
        if on_progress is not None:
            on_progress(dealt, total)
        # No name is given to the generator: it has to end with the loop, however that ends.
        for (line, piece), tensors in zip(
            todo.items(), self._made(unfinished, list(todo.values()), jobs), strict=True
        ):
            with self._sound_source(unfinished):
                writer.write(self._copied(piece) if tensors is None else tensors)
            unfinished.mark_done(line)
            dealt += self._bytes_read(piece)
            if on_progress is not None:
                on_progress(dealt, total)

    def _bytes_read(self, piece: Piece) -> int:
        return sum(self.source.specs[name].num_bytes for name in piece.reads)

    def _made(
        self, unfinished: UnfinishedFolder, pieces: Sequence[Piece], jobs: int
    ) -> Iterator[Mapping[str, Tensor] | None]:
        """What pieces hold, in order, a few of them ahead."""
        with self._sound_source(unfinished):
            yield from results_of([partial(_tensors_of, piece, jobs) for piece in pieces], jobs)

    @contextmanager
    def _sound_source(self, unfinished: UnfinishedFolder) -> Iterator[None]:
        """Discard the work if the source is at fault: it is of no use once that is mended."""
        try:
            try:
                yield
            except OSError:
                self.source.check_unchanged()
                raise
        except InputError:
            unfinished.discard()
            raise

    def _copied(self, piece: Piece) -> dict[str, Iterable[bytes]]:
        return {
            name: self.source.chunks(original)
            for name, original in zip(piece.specs, piece.reads, strict=True)
        }

    def _finish(
        self,
        unfinished: UnfinishedFolder,
        writer: ShardWriter,
        companions: Mapping[Path, tuple[int, ...]],
    ) -> None:
        """Write all but the weights, and remove what a run that was killed may have left.

        All comes from the source as it was when the run began, or nothing is said to be whole.
        """
        writer.write_index()
        names = {Path(CONFIG), Path(INDEX), *(Path(path.name) for path in writer.files)}
        for path in companions:
            name = path.relative_to(self.source.folder)
            copied = unfinished.new / name
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
            names.add(name)
        write_json(unfinished.new / CONFIG, self.config)
        remove_files(
            unfinished.new, [path for path in files_in(unfinished.new) if path not in names]
        )
        if other := changed(companions):
            raise InputError(
                f"{other} has changed since the run began; the same call goes on from there"
            )
        with self._sound_source(unfinished):
            self.source.check_unchanged()


@contextmanager
def _going_on_later(part: Path) -> Iterator[None]:
    """Tell of a full disk and the like; what was done stays."""
    try:
        yield
    except OSError as error:
        where = error.filename2 or error.filename or part  # where to, before where from
        raise InputError(f"{where}: {reason(error)}; the same call goes on from there") from error


def _journal_line(number: int, piece: Piece) -> str:
    """The journal's line for a piece; no name of a tensor makes it another line."""
    return f"{number} {json.dumps(piece.name)}"


def _tensors_of(piece: Piece, jobs: int) -> Mapping[str, Tensor] | None:
    """What a piece makes; nothing where tensors are copied."""
    if piece.make is None:
        return None
    size = sum(spec.num_bytes for spec in piece.specs.values())
    what = f"{piece.name} becomes {in_gigabytes(size)}"
    others = f", up to {jobs} such at a time: fewer jobs (--jobs) take less" if jobs > 1 else ""
    with explain_memory_error(what + others):
        return piece.make()


def _companions(folder: Path) -> Iterator[Path]:
    """Files of a folder to take along; an InputError for one that is huge or leads out of it."""
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        belongs = path.suffix in _COMPANIONS or path.stem.upper() in _LICENCES
        weights = path.name.endswith(".index.json") or path == folder / CONFIG
        if path.is_file() and belongs and not weights:
            if (size := path.stat().st_size) > _LARGEST_COMPANION:
                raise InputError(
                    f"{path} would be copied, and has {size / 1e9:.3g} GB: move it away"
                )
            yield inside(folder, str(path.relative_to(folder)))

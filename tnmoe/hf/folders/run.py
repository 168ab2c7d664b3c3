"""One run of a conversion: pieces computed on several threads, and written with a journal.

The files of the target have their full size from the start, and the journal lists the pieces that
are done. After a crash or a power cut, the next run resumes where the journal ends. It makes the
same files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tnmoe.errors import InputError, reason_of
from tnmoe.hf.files.checkpoint import Checkpoint
from tnmoe.hf.files.folder import CONFIG, INDEX, companion_files
from tnmoe.hf.files.shards import ShardWriter
from tnmoe.hf.folders.parallel import ordered_results
from tnmoe.hf.folders.pieces import Piece
from tnmoe.system.changes import FileState, file_states, first_changed
from tnmoe.system.durable import write_json
from tnmoe.system.folders import files_in, remove_files
from tnmoe.system.unfinished import UnfinishedFolder

# The journal's step once the files have their full size.
_LAID_OUT = "laid out"

# Called with the bytes of the source that are done, and with all of them.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ConversionRun:
    """The making of a converted folder in ``TARGET.partial``.

    Attributes
    ----------
    source : Checkpoint
    pieces : sequence of Piece
        Everything that the target holds, in order.
    config : mapping
        The target's config.json.
    unfinished : UnfinishedFolder
    writer : ShardWriter
        Writes into the new folder.
    jobs : int
        Number of pieces that are computed at the same time.
    on_progress : callable, optional
    """

    source: Checkpoint
    pieces: Sequence[Piece]
    config: Mapping[str, Any]
    unfinished: UnfinishedFolder
    writer: ShardWriter
    jobs: int
    on_progress: Progress | None

    def fill(self, purpose: str, overwrite: bool) -> None:
        """Fill the new folder, or resume filling it.

        Parameters
        ----------
        purpose : str
            First line of the journal: an unfinished folder is resumed only if it has the same.
        overwrite : bool
            Discard an unfinished folder of another purpose.
        """
        companions = file_states(companion_files(self.source.folder))
        done = self._begin_or_resume(purpose, overwrite)
        if not self.unfinished.is_whole:
            self._write_pieces(done)
            self._write_other_files(companions)

    def _begin_or_resume(self, purpose: str, overwrite: bool) -> set[str]:
        """Prepare the unfinished folder, and return the steps that its journal lists."""
        journal = self.unfinished.journal()
        is_same = journal[:1] == [purpose]
        if is_same and self.unfinished.new.is_dir():
            self.unfinished.resume()
            return set(journal[1:])
        if journal and not is_same and not overwrite:
            raise InputError(
                f"{self.unfinished.partial} is unfinished work of another conversion: remove it, "
                "or pass overwrite=True (--overwrite)"
            )
        self.unfinished.discard()
        self._check_disk_space()
        self.unfinished.begin(purpose)
        return set()

    def _check_disk_space(self) -> None:
        folder, needed = self.unfinished.partial, self.writer.num_bytes
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"{folder.parent} has room for {free / 1e9:.3g} GB, "
                f"the result needs {needed / 1e9:.3g} GB"
            )

    def _write_pieces(self, done: set[str]) -> None:
        """Compute and write the pieces that are not done yet."""
        if not done:
            self.writer.create()
            self.unfinished.mark_done(_LAID_OUT)
        steps = {_step(number, piece): piece for number, piece in enumerate(self.pieces)}
        remaining = {step: piece for step, piece in steps.items() if step not in done}
        sizes = {step: piece.bytes_read(self.source) for step, piece in steps.items()}
        total = sum(sizes.values())
        bytes_done = total - sum(sizes[step] for step in remaining)
        self._report_progress(bytes_done, total)
        # No variable refers to the generator: it has to end when the loop does, even by an error.
        for (step, piece), tensors in zip(
            remaining.items(), self._computed(list(remaining.values())), strict=True
        ):
            with self._discarding_if_source_is_bad():
                self.writer.write(piece.copy_from(self.source) if tensors is None else tensors)
            self.unfinished.mark_done(step)
            bytes_done += sizes[step]
            self._report_progress(bytes_done, total)

    def _computed(self, pieces: Sequence[Piece]) -> Iterator[Mapping[str, Tensor] | None]:
        """Yield the tensors of each piece, in order; None for a piece that is copied."""
        with self._discarding_if_source_is_bad():
            tasks = [partial(piece.compute, self.jobs) for piece in pieces]
            yield from ordered_results(tasks, self.jobs)

    def _report_progress(self, bytes_done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(bytes_done, total)

    def _write_other_files(self, companions: Mapping[Path, FileState | None]) -> None:
        """Write all files but the weights, and remove what a killed run may have left.

        Raises
        ------
        InputError
            If the source is not what it was when the run began.
        """
        new = self.unfinished.new
        self.writer.write_index()
        names = {Path(CONFIG), Path(INDEX), *(Path(path.name) for path in self.writer.files)}
        for path in companions:
            name = path.relative_to(self.source.folder)
            copied = new / name
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
            names.add(name)
        write_json(new / CONFIG, self.config)
        remove_files(new, [path for path in files_in(new) if path not in names])
        if changed := first_changed(companions):
            raise InputError(
                f"{changed} has changed since the run began; the same call goes on from there"
            )
        with self._discarding_if_source_is_bad():
            self.source.check_unchanged()

    @contextmanager
    def _discarding_if_source_is_bad(self) -> Iterator[None]:
        """Discard the unfinished folder if the source is at fault: once mended, it differs."""
        try:
            try:
                yield
            except OSError:
                self.source.check_unchanged()
                raise
        except InputError:
            self.unfinished.discard()
            raise


@contextmanager
def disk_errors_as_input_errors(partial_folder: Path) -> Iterator[None]:
    """Turn an OSError, a full disk for one, into an InputError; what is done stays on the disk.

    Parameters
    ----------
    partial_folder : Path
        Named in the message if the error names no file.
    """
    try:
        yield
    except OSError as error:
        # If an error names two files, the second is the file that was to be written.
        path = error.filename2 or error.filename or partial_folder
        raise InputError(f"{path}: {reason_of(error)}; the same call goes on from there") from error


def _step(number: int, piece: Piece) -> str:
    """Return the journal's line for a piece; JSON escapes line breaks in the piece's name."""
    return f"{number} {json.dumps(piece.name)}"

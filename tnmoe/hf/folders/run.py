"""One run of a conversion: pieces computed on several threads, and written with a journal.

The files of the target have their full size from the start, and the journal lists the pieces that
are done. After a crash or a power cut, the next run resumes where the journal ends. It makes the
same files. For the same reason several processes can make parts of the pieces at the same time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from tnmoe.hf.folders.purpose import difference
from tnmoe.system.changes import FileState, file_states, first_changed
from tnmoe.system.durable import write_json
from tnmoe.system.folders import check_target, files_in, remove_files
from tnmoe.system.parts import Part
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
    part : Part, optional
        Which of the pieces the run makes; all by default.
    """

    source: Checkpoint
    pieces: Sequence[Piece]
    config: Mapping[str, Any]
    unfinished: UnfinishedFolder
    writer: ShardWriter
    jobs: int
    on_progress: Progress | None
    part: Part | None = None

    def make_target(self, purpose: str, overwrite: bool) -> None:
        """Fill the new folder, or resume filling it, and move it to the target.

        Parameters
        ----------
        purpose : str
            First line of the journal: an unfinished folder is resumed only if it has the same.
        overwrite : bool
            Replace files that tnmoe wrote at the target, and discard an unfinished folder of
            another purpose.
        """
        with self.unfinished.lock() as moved:
            if moved == purpose:
                return
            check_target(self.unfinished.target, overwrite)
            companions = file_states(companion_files(self.source.folder))
            done = self._begin_or_resume(purpose, overwrite)
            if not self.unfinished.is_whole:
                self._write_pieces(done)
                self._write_other_files(companions)
            self.unfinished.move_to_target(overwrite)

    def make_part(self, part: Part, purpose: str, overwrite: bool) -> None:
        """Fill a part of the new folder, or resume filling it.

        Parameters
        ----------
        part : Part
            That of the run.
        purpose, overwrite
            As for :meth:`make_target`.
        """
        with ExitStack() as at_work:
            with self.unfinished.lock(part) as moved:
                if moved == purpose:
                    return
                check_target(self.unfinished.target, overwrite)
                done = self._begin_or_resume(purpose, overwrite)
                if self.unfinished.is_whole:
                    return
                at_work.enter_context(self.unfinished.lock_part(part))
                self.unfinished.resume(part)
            self._write_pieces(done)
            self.source.check_unchanged()

    def _begin_or_resume(self, purpose: str, overwrite: bool) -> set[str]:
        """Prepare the unfinished folder, and return the steps that its journals list."""
        there = self.unfinished.journal()[:1]
        is_same = there == [purpose]
        if is_same and self.unfinished.new.is_dir():
            self.unfinished.resume()
        else:
            if there and not is_same and not overwrite:
                raise self._is_of_another(there[0], purpose)
            self.unfinished.discard()
            self._check_disk_space()
            self.unfinished.begin(purpose)
        done = self.unfinished.steps(purpose)
        if not done:
            self.writer.create()
            self.unfinished.mark_done(_LAID_OUT)
        return done

    def _is_of_another(self, there: str, purpose: str) -> InputError:
        what = difference(there, purpose)
        return InputError(
            f"{self.unfinished.partial} is unfinished work of another conversion"
            f"{f' ({what})' if what else ''}: remove it, or pass overwrite=True (--overwrite)"
        )

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
        steps = steps_of(self.pieces, self.part)
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
            self.unfinished.mark_done(step, self.part)
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
        """Discard the unfinished folder if the source is at fault: once mended, it differs.

        A part leaves the folder to the other parts. No run goes on from it with another source.
        """
        try:
            try:
                yield
            except OSError:
                self.source.check_unchanged()
                raise
        except InputError:
            if self.part is None:
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


def steps_of(pieces: Sequence[Piece], part: Part | None = None) -> dict[str, Piece]:
    """Return the pieces of a conversion, or of a part of it, by their lines in the journal."""
    # JSON escapes line breaks in a piece's name.
    steps = [(f"{number} {json.dumps(piece.name)}", piece) for number, piece in enumerate(pieces)]
    return dict(steps if part is None else part.share(steps))

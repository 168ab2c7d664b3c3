"""Folders that tnmoe makes: which of their files it wrote, and what may be replaced."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from tnmoe.errors import InputError
from tnmoe.system.durable import sync, write_atomically
from tnmoe.system.files import read_json
from tnmoe.system.tables import listed

# The manifest lies in every folder that tnmoe makes. It lists the files that tnmoe wrote there,
# with their sizes. Manifest and files have the same modification time, to the nanosecond.
MANIFEST = ".tnmoe-files"


def files_in(folder: Path) -> Iterator[Path]:
    """List files, links and empty folders below a folder, as paths relative to it."""

    def fail(error: OSError) -> None:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from error

    for here, folders, files in os.walk(folder, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(here, name))]
        for name in (*files, *links):
            yield Path(here, name).relative_to(folder)
        if not folders and not files and Path(here) != folder:
            yield Path(here).relative_to(folder)


def remove_files(folder: Path, paths: Collection[Path]) -> None:
    """Remove files, links and empty folders, and each subfolder that this leaves empty.

    Parameters
    ----------
    folder : Path
    paths : collection of Path
        Relative to ``folder``.
    """
    for path in paths:
        absolute = folder / path
        if absolute.is_symlink() or not absolute.is_dir():
            absolute.unlink()
    touched = {each for path in paths for each in (path, *path.parents)} - {Path()}
    for absolute in sorted((folder / each for each in touched), reverse=True):  # deepest first
        if absolute.is_dir() and not any(absolute.iterdir()):
            absolute.rmdir()


def write_manifest(folder: Path) -> None:
    """Claim all files of a folder as written by tnmoe, and wait until they are on the disk."""
    paths = sorted(path for path in files_in(folder) if path != Path(MANIFEST))
    sizes = {path.as_posix(): (folder / path).stat().st_size for path in paths}
    write_atomically(folder / MANIFEST, f"{json.dumps(sizes, indent=1)}\n".encode())
    now = time.time_ns()
    for path in (*paths, Path(MANIFEST)):
        os.utime(folder / path, ns=(now, now))
        sync(folder / path)
    for subfolder in {parent for path in paths for parent in path.parents} | {Path()}:
        sync(folder / subfolder)


def foreign_files(folder: Path) -> list[Path]:
    """List what tnmoe did not write in a folder, and what changed since tnmoe wrote it.

    Returns
    -------
    list of Path
        Relative to the folder. Without a manifest, everything in the folder is foreign.
    """
    sizes = _read_manifest(folder)
    # A subfolder may remain after its files are gone.
    own = {each for path in sizes for each in (path, *path.parents)}

    def is_own(path: Path) -> bool:
        absolute = folder / path
        if absolute.is_symlink() or not absolute.is_file():
            return path in own and absolute.is_dir() and not absolute.is_symlink()
        return path == Path(MANIFEST) or _is_unchanged(absolute, sizes.get(path), folder / MANIFEST)

    return sorted(path for path in files_in(folder) if not is_own(path))


def remove_own_files(folder: Path) -> None:
    """Remove what tnmoe wrote in a folder, and the folder itself if nothing else is in it."""
    foreign = set(foreign_files(folder))
    kept = {*foreign, Path(MANIFEST)}
    remove_files(folder, [path for path in files_in(folder) if path not in kept])
    if not foreign:
        # The manifest goes last: a process that is stopped before that can start again.
        sync(folder)
        (folder / MANIFEST).unlink(missing_ok=True)
        folder.rmdir()


def check_target(target: Path, overwrite: bool) -> None:
    """Raise an InputError if a folder cannot be made there, or if that would lose files.

    Parameters
    ----------
    target : Path
        Absolute, with links resolved.
    overwrite : bool
        Whether files that tnmoe wrote may be replaced.
    """
    if target.is_symlink():
        raise InputError(f"{target} is a link that leads to itself")
    if not target.is_dir():
        if target.exists():
            raise InputError(f"{target} is a file, not a folder")
        return
    if _is_mount_point(target):
        raise InputError(
            f"{target} is a mount point, which cannot be replaced: name a folder in it"
        )
    if Path.cwd().is_relative_to(target):
        raise InputError(
            f"{target} is or holds the working directory, which cannot be replaced: "
            "choose another folder, or another working directory"
        )
    if not os.access(target, os.W_OK):
        raise InputError(f"cannot write to {target}: Permission denied")
    if any(target.iterdir()) and not overwrite:
        raise InputError(
            f"{target} is not empty: choose another folder, or pass overwrite=True (--overwrite)"
        )
    check_no_foreign_files(target)


def check_no_foreign_files(target: Path, folder: Path | None = None) -> None:
    """Raise an InputError if a folder holds anything that tnmoe did not write there.

    Parameters
    ----------
    target : Path
        The folder's name in the message.
    folder : Path, optional
        Where the folder lies now, if it was moved away from ``target``.
    """
    if paths := foreign_files(folder or target):
        raise InputError(
            f"{target} holds what tnmoe did not write there, or what changed since: "
            f"{listed(paths)}; move it, or choose another folder"
        )


def _is_mount_point(folder: Path) -> bool:
    if os.path.ismount(folder):
        return True
    # Linux can also mount a folder of the same disk. Only this list shows that.
    mounts = Path("/proc/self/mountinfo")
    lines = mounts.read_text(errors="replace").splitlines() if mounts.exists() else []
    return str(folder).replace(" ", r"\040") in {line.split()[4] for line in lines}


def _read_manifest(folder: Path) -> dict[Path, int]:
    """Return the size of each file that tnmoe wrote in a folder; empty without a sound manifest."""
    try:
        return {Path(name): size for name, size in read_json(folder / MANIFEST).items()}
    except (OSError, InputError):
        return {}


def _is_unchanged(path: Path, size: object, manifest: Path) -> bool:
    """Check that a file has its listed size and the manifest's time: a replacement has another."""
    status = path.stat()
    return status.st_size == size and status.st_mtime_ns == manifest.stat().st_mtime_ns

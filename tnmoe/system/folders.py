"""Files that appear whole or not at all, and folders that remember which files tnmoe wrote."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from uuid import uuid4

from tnmoe.errors import InputError
from tnmoe.system.files import read_json

# Lies in every folder that tnmoe makes, and lists the files that it wrote there, with their sizes.
# It is as old as each of them, to the instant.
RECORD = ".tnmoe-files"

# What systems answer that cannot sync a folder: Windows, or some network's file system.
_NO_SYNC = {errno.EACCES, errno.EPERM, errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk.

    A folder is left alone where it cannot be synced.

    Raises
    ------
    OSError
        If the disk fails.
    """
    is_folder = path.is_dir()
    try:
        # Windows syncs what it may write to, and nothing else.
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in _NO_SYNC):
            raise


def write_whole(path: Path, contents: bytes) -> None:
    """Write a file through a sibling that takes its place, durably; on failure nothing is left.

    A link is followed, and stays.

    Raises
    ------
    OSError
        If the file cannot be written.
    InputError
        If a device, a pipe or the like has that name.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is no ordinary file")
    sibling = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with open(sibling, "xb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        sibling.replace(path)
        sync(path.parent)
    except BaseException as error:
        sibling.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk's error names none
        raise


def files_in(folder: Path) -> Iterator[Path]:
    """Files, links and empty folders in a folder and its subfolders, as paths relative to it."""

    def fail(error: OSError) -> None:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from error

    for here, folders, files in os.walk(folder, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(here, name))]
        for name in (*files, *links):
            yield Path(here, name).relative_to(folder)
        if not folders and not files and Path(here) != folder:
            yield Path(here).relative_to(folder)


def write_record(folder: Path) -> None:
    """List the files of a folder in its record: tnmoe wrote them all, and now.

    All of them are on the disk then, however they were written.
    """
    paths = sorted(path for path in files_in(folder) if path != Path(RECORD))
    sizes = {path.as_posix(): (folder / path).stat().st_size for path in paths}
    write_whole(folder / RECORD, f"{json.dumps(sizes, indent=1)}\n".encode())
    now = time.time_ns()
    for path in (*paths, Path(RECORD)):
        os.utime(folder / path, ns=(now, now))
        sync(folder / path)
    for subfolder in {parent for path in paths for parent in path.parents} | {Path()}:
        sync(folder / subfolder)


def unrecorded(folder: Path) -> list[Path]:
    """What lies in a folder that tnmoe did not write there, or that changed since.

    Returns
    -------
    list of Path
        Relative to the folder. Where there is no record, all that there is.
    """
    sizes = _recorded(folder)
    # Of a folder whose files are gone by now, itself may be left.
    places = {each for path in sizes for each in (path, *path.parents)}

    def is_ours(path: Path) -> bool:
        where = folder / path
        if where.is_symlink() or not where.is_file():
            return path in places and where.is_dir() and not where.is_symlink()
        return path == Path(RECORD) or _is_as_written(where, sizes.get(path), folder / RECORD)

    return sorted(path for path in files_in(folder) if not is_ours(path))


def remove(folder: Path, paths: Collection[Path]) -> None:
    """Remove files, links and empty folders of a folder, and the subfolders that they leave empty.

    Paths are relative to it.
    """
    for path in paths:
        where = folder / path
        if where.is_symlink() or not where.is_dir():
            where.unlink()
    touched = {each for path in paths for each in (path, *path.parents)} - {Path()}
    for where in sorted((folder / each for each in touched), reverse=True):  # deepest first
        if where.is_dir() and not any(where.iterdir()):
            where.rmdir()


def remove_recorded(folder: Path) -> None:
    """Remove what tnmoe wrote in a folder, and the folder if nothing else is in it."""
    foreign = set(unrecorded(folder))
    remove(folder, [path for path in files_in(folder) if path not in {*foreign, Path(RECORD)}])
    if not foreign:
        # Last, so that whoever is stopped on the way can go on.
        sync(folder)
        (folder / RECORD).unlink(missing_ok=True)
        folder.rmdir()


def check_target(target: Path, overwrite: bool) -> None:
    """Raise an InputError if a folder cannot be made there, or something to keep would be lost.

    Parameters
    ----------
    target : Path
        Absolute, without links.
    overwrite : bool
        Whether what tnmoe wrote may be replaced.
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
    check_recorded(target)


def check_recorded(target: Path, folder: Path | None = None) -> None:
    """Raise an InputError if a folder holds anything that tnmoe did not write there.

    ``folder`` is where the target is for the moment, if not in its place.
    """
    if names := unrecorded(folder or target):
        listed = ", ".join(map(str, names[:4])) + (f" and {len(names) - 4} more" * (len(names) > 4))
        raise InputError(
            f"{target} holds what tnmoe did not write there, or what changed since: {listed}; "
            "move it, or choose another folder"
        )


def _is_mount_point(folder: Path) -> bool:
    if os.path.ismount(folder):
        return True
    # Linux also mounts folders of the same disk, which only this list shows.
    mounts = Path("/proc/self/mountinfo")
    lines = mounts.read_text(errors="replace").splitlines() if mounts.exists() else []
    return str(folder).replace(" ", r"\040") in {line.split()[4] for line in lines}


def _recorded(folder: Path) -> dict[Path, int]:
    """Files that tnmoe wrote in a folder, with their sizes."""
    try:
        return {Path(name): size for name, size in read_json(folder / RECORD).items()}
    except (OSError, InputError):
        return {}


def _is_as_written(path: Path, size: object, record: Path) -> bool:
    """Whether a file is the one that was recorded: one put in its place is of another time."""
    status = path.stat()
    return status.st_size == size and status.st_mtime_ns == record.stat().st_mtime_ns

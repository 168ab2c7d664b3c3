"""Files are written durably, whole or not at all, and only in the place of files."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

import tnmoe as tn
from tests.disk import Disk, all_left
from tnmoe.errors import InputError
from tnmoe.system.durable import sync, write_atomically


def test_a_link_to_a_file_is_followed_and_stays(tmp_path):
    file, link = tmp_path / "disk" / "file", tmp_path / "link"
    file.parent.mkdir()
    for old in (None, b"old"):
        if old is not None:
            file.write_bytes(old)
        link.unlink(missing_ok=True)
        link.symlink_to(file)
        write_atomically(link, b"new")
        assert link.is_symlink()
        assert file.read_bytes() == b"new"
    assert os.listdir(file.parent) == ["file"]


def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is not a regular file"):
        write_atomically(tmp_path / "pipe", b"new")
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_that_cannot_take_its_place_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")

    def refuse(self, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def save(path, number):
    tn.save(path, tn.MPO([np.full((1, 2, 2, 1), number)]))


def saved(path):
    return tn.load(path).cores[0].max()


def write(path, number):
    write_atomically(path, bytes([int(number)]) * 50)


def written(path):
    return float(max(path.read_bytes()))


@pytest.mark.parametrize(("write", "read"), [(write, written), (save, saved)])
def test_after_a_power_cut_a_file_is_the_old_or_the_new_one(write, read, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for old in (None, 1.0):
        if old is not None:
            write(root / "file", old)
        disk = Disk(root)
        with disk.watched():
            write(root / "file", 2.0)
            done = disk.states()
        assert all("file" in dict(state) for state in done)
        found = set()
        for left in all_left(disk, tmp_path / str(old)):
            exists = (left / "file").exists()
            found.add(read(left / "file") if exists else None)
        assert found == {old, 2.0}
        (root / "file").unlink()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_folder_that_cannot_be_synced_is_left_alone(code, tmp_path, monkeypatch):
    (tmp_path / "file").touch()

    def fail(file):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    sync(tmp_path)
    with pytest.raises(OSError, match=os.strerror(code)):
        sync(tmp_path / "file")


def test_a_failing_disk_raises(tmp_path, monkeypatch):
    def fail(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        sync(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_the_error_of_a_full_disk_names_the_file(code, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")

    def fail(file):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=rf"{os.strerror(code)}: '.*/file'"):
        save(tmp_path / "file", 2.0)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]

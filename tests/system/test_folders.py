"""A folder remembers which files tnmoe wrote there, also after a power cut."""

import os

from tests.disk import Disk, all_left
from tnmoe.system.durable import sync
from tnmoe.system.folders import foreign_files, write_manifest


def test_a_manifest_is_on_the_disk_with_all_files_that_it_lists(tmp_path):
    root = tmp_path / "root"
    (root / "folder" / "sub").mkdir(parents=True)
    disk = Disk(root)
    with disk.watched():
        for name in ("one", "sub/two"):
            (root / "folder" / name).write_text(name)
        (root / "folder" / "empty").mkdir()
        write_manifest(root / "folder")
        sync(root)
        disk.left.clear()
    names = [set(os.listdir(left / "folder")) for left in all_left(disk, tmp_path / "left")]
    assert names == [{"one", "sub", "empty", ".tnmoe-files"}]
    for left in all_left(disk, tmp_path / "again"):
        assert foreign_files(left / "folder") == []
        assert (left / "folder" / "sub" / "two").read_text() == "sub/two"

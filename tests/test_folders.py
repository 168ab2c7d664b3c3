"""What was in the place of a new folder is never lost."""

from pathlib import Path

import pytest

from tnmoe.errors import InputError
from tnmoe.folders import move_into_place


@pytest.fixture
def folders(tmp_path):
    """A new folder, and one with something precious in its place."""
    new, target = tmp_path / "new", tmp_path / "target"
    new.mkdir()
    target.mkdir()
    (new / "made").write_text("made")
    (target / "precious").write_text("precious")
    return new, target


def contents(folder):
    return {path.name: path.read_text() for path in folder.rglob("*") if path.is_file()}


def failing(monkeypatch, *times):
    """Renaming fails at these times, counted from 0."""
    rename, calls = Path.rename, iter(range(10))

    def may_fail(self, target):
        if next(calls) in times:
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", may_fail)


def test_a_new_folder_takes_the_place_of_another(folders, tmp_path):
    move_into_place(*folders)
    assert contents(tmp_path) == {"made": "made"}
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("time", [0, 1])
def test_a_failure_leaves_both_folders_as_they_were(time, folders, tmp_path, monkeypatch):
    failing(monkeypatch, time)
    with pytest.raises(PermissionError):
        move_into_place(*folders)
    assert contents(folders[0]) == {"made": "made"}
    assert contents(folders[1]) == {"precious": "precious"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "target"]


def test_what_cannot_be_put_back_is_kept_and_named(folders, tmp_path, monkeypatch):
    failing(monkeypatch, 1, 2)
    with pytest.raises(
        InputError, match=r"target could not be replaced.*it is now .*old"
    ) as caught:
        move_into_place(*folders)
    kept = Path(str(caught.value).split("it is now ")[1])
    assert contents(kept) == {"precious": "precious"}
    assert contents(folders[0]) == {"made": "made"}

"""The output folder appears whole or not at all, and replaces only what tnmoe wrote."""

import os
from pathlib import Path

import pytest

import tnmoe as tn
from tnmoe.demo.output import atomic_folder


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_new_and_the_old_untouched(tmp_path, error):
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        (folder / "old").write_text("kept")

    def fail():
        with atomic_folder(target, overwrite=True) as folder:
            (folder / "new").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(target)) == [".tnmoe-files", "old"]


def test_overwriting_replaces_what_was_written_and_nothing_else(tmp_path):
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        (folder / "old").write_text("")
    with pytest.raises(tn.InputError, match="is not empty"), atomic_folder(target):
        pass
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("")
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(target)) == [".tnmoe-files", "new"]
    (target / "thesis.txt").write_text("years of work")
    message = r"out holds what tnmoe did not write there.*: thesis.txt;"
    with pytest.raises(tn.InputError, match=message), atomic_folder(target, overwrite=True):
        raise AssertionError("before any work")
    assert (target / "thesis.txt").exists()


def test_what_cannot_take_its_place_is_kept_and_named(tmp_path):
    target = tmp_path / "out"

    def work():
        with atomic_folder(target) as folder:
            (folder / "made").write_text("minutes of work")
            target.mkdir()
            (target / "thesis.txt").write_text("years of work")

    with pytest.raises(tn.InputError, match=r"out is not empty: .*; the results are in ") as caught:
        work()
    kept = Path(str(caught.value).split("the results are in ")[1])
    assert (kept / "made").read_text() == "minutes of work"
    assert (target / "thesis.txt").read_text() == "years of work"


def test_one_run_at_a_time_writes_to_a_folder_and_a_killed_one_does_not_count(tmp_path):
    target = tmp_path / "out"
    if (process := os.fork()) == 0:
        with atomic_folder(target) as folder:
            (folder / "half").write_text("")
            os._exit(9)
    os.waitpid(process, 0)
    with atomic_folder(target) as folder:
        (folder / "new").write_text("")
        owner = f"out is in use by process {os.getpid()} on "
        with pytest.raises(tn.InputError, match=owner), atomic_folder(target):
            pass
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(target)) == [".tnmoe-files", "new"]


def test_places_that_cannot_be_written_are_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for target, message in (
        (file, "is a file, not a folder"),
        (file / "out", "cannot write to .*: (Not a directory|File exists)"),
    ):
        with pytest.raises(tn.InputError, match=message), atomic_folder(target):
            pass
    assert file.read_text() == ""

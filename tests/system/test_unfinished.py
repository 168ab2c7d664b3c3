"""A folder is whole or not at its target, whenever the process dies that makes it."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tnmoe.errors import InputError
from tnmoe.system.folders import check_target
from tnmoe.system.unfinished import UnfinishedFolder


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Skip real syncs: processes are killed here, not machines."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def make(target, text="new", overwrite=True):
    """A folder with two files, made as conversions are."""
    unfinished = UnfinishedFolder(target)
    with unfinished.lock() as in_place:
        if in_place == text:
            return
        check_target(unfinished.target, overwrite)
        if unfinished.journal()[:1] == [text] and unfinished.new.is_dir():
            unfinished.resume()
        else:
            unfinished.begin(text)
        if not unfinished.is_whole:
            (unfinished.new / "sub").mkdir(exist_ok=True)
            (unfinished.new / "sub" / "file").write_text(text)
            (unfinished.new / "file").write_text(text)
        unfinished.move_to_target(overwrite)


def contents(folder):
    """Texts of visible files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_text() for path in files if path.name[0] != "."
    }


def made_from(text):
    return {"file": text, "sub/file": text}


def killed_at(number, folder, function, *arguments):
    """Call a function in a process that dies at a given operation on files of a folder."""
    if (process := os.fork()) == 0:
        left = iter(range(number))

        def count(event, details):
            if event == "open" or event.startswith("os."):
                concerned = any(str(folder) in str(each) for each in details)
                if concerned and next(left, None) is None:
                    os._exit(9)

        try:
            sys.addaudithook(count)
            function(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("old", [True, False])
def test_a_process_may_be_killed_at_any_time(old, tmp_path):
    for number in range(1000):
        folder = tmp_path / str(number)
        target = folder / "target"
        if old:
            make(target, "old")
        killed = killed_at(number, folder, make, target)
        if target.exists():
            assert contents(target) in (made_from("old"), made_from("new"))
        elif old:  # moved away, until the next call
            assert contents(folder / "target.partial" / "old") == made_from("old")
        if number % 2:  # a conversion of another purpose takes over
            make(target, "other")
            assert contents(target) == made_from("other")
        else:
            make(target)
            assert contents(target) == made_from("new")
        assert os.listdir(folder) == ["target"]
        if not killed:
            break
    assert number > 30


def test_the_old_folder_comes_back_even_if_the_next_call_refuses(tmp_path, monkeypatch):
    target = tmp_path / "target"
    make(target, "old")
    with monkeypatch.context() as patch:
        patch.setattr(UnfinishedFolder, "_move_new", lambda self: killed_here())
        killed_here = lambda: os._exit(9)  # noqa: E731
        if (process := os.fork()) == 0:
            make(target)
        os.waitpid(process, 0)
    assert not target.exists()
    with pytest.raises(InputError, match="is not empty"):
        make(target, overwrite=False)
    assert contents(target) == made_from("old")


def test_a_new_folder_takes_the_place_of_another(tmp_path):
    make(tmp_path / "target", "old")
    make(tmp_path / "target", "new")
    assert contents(tmp_path / "target") == made_from("new")
    assert os.listdir(tmp_path) == ["target"]


def failing(monkeypatch, *times):
    """Make these calls of rename fail, counted from 0."""
    rename, calls = Path.rename, iter(range(10))

    def may_fail(self, target):
        if next(calls) in times:
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", may_fail)


@pytest.mark.parametrize("time", [0, 1])
def test_a_failure_leaves_both_folders_as_they_were(time, tmp_path, monkeypatch):
    make(tmp_path / "target", "old")
    with monkeypatch.context() as patch:
        failing(patch, time)
        with pytest.raises(OSError, match="Permission denied"):
            make(tmp_path / "target")
    assert contents(tmp_path / "target") == made_from("old")
    assert contents(tmp_path / "target.partial" / "new") == made_from("new")
    make(tmp_path / "target")
    assert os.listdir(tmp_path) == ["target"]


def test_a_folder_that_cannot_be_put_back_is_kept_and_named(tmp_path, monkeypatch):
    make(tmp_path / "target", "old")
    with monkeypatch.context() as patch:
        failing(patch, 1, 2)
        with pytest.raises(
            InputError, match=r"target could not be replaced.*it is now .*old"
        ) as caught:
            make(tmp_path / "target")
    assert contents(Path(str(caught.value).split("it is now ")[1])) == made_from("old")
    with pytest.raises(InputError, match="is not empty"):
        make(tmp_path / "target", overwrite=False)
    assert contents(tmp_path / "target") == made_from("old")


def appearing(monkeypatch, target, what):
    """Let something appear at the target right before a folder moves there."""
    rename = Path.rename

    def late(self, to):
        if to == target and self.name == "new":
            what()
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", late)


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_appear_at_the_last_moment_are_not_replaced(overwrite, tmp_path, monkeypatch):
    target = tmp_path / "target"

    def thesis():
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")

    with monkeypatch.context() as patch:
        appearing(patch, target, thesis)
        with pytest.raises(InputError, match="target is not empty"):
            make(target, overwrite=overwrite)
    assert contents(target) == {"thesis.txt": "years of work"}
    with monkeypatch.context() as patch:
        appearing(patch, target, lambda: target.write_text("a file"))
        (target / "thesis.txt").unlink()
        target.rmdir()
        with pytest.raises(InputError, match="target is a file"):
            make(target, overwrite=overwrite)
    assert target.read_text() == "a file"
    target.unlink()
    make(target, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize(
    "name",
    ["thesis.txt", ".hidden", ".git/config", "sub/mine", "notes/deep/mine", "file", "empty/"],
)
def test_foreign_files_are_named_and_kept(name, tmp_path):
    target = tmp_path / "target"
    make(target, "old")
    if name.endswith("/"):
        (target / name).mkdir()
    else:
        (target / name).parent.mkdir(exist_ok=True, parents=True)
        (target / name).write_text("mine")
        later = (target / ".tnmoe-files").stat().st_mtime_ns + 1
        os.utime(target / name, ns=(later, later))
    before = contents(target)
    with pytest.raises(InputError, match=f"target holds what tnmoe did not .*: {name.strip('/')};"):
        make(target)
    assert contents(target) == before
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("bring", [shutil.copy2, shutil.move])
@pytest.mark.parametrize("text", ["mine", "old"])
def test_an_older_file_that_replaces_a_written_one_is_kept(text, bring, tmp_path):
    target, mine = tmp_path / "target", tmp_path / "mine"
    mine.write_text(text)
    os.utime(mine, (10**9, 10**9))
    make(target, "old")
    bring(mine, target / "file")
    with pytest.raises(InputError, match=r"target holds what tnmoe did not .*: file;"):
        make(target)
    assert (target / "file").read_text() == text


@pytest.mark.parametrize("to", [1, 10**9, 2 * 10**9])
def test_a_copy_of_the_folder_with_rounded_times_can_be_replaced(to, tmp_path):
    target, copy = tmp_path / "target", tmp_path / "copy"
    make(target, "old")
    shutil.copytree(target, copy)
    for path in copy.rglob("*"):
        time = path.stat().st_mtime_ns // to * to
        os.utime(path, ns=(time, time))
    make(copy, "new")
    assert contents(copy) == made_from("new")


@pytest.mark.parametrize("manifest", ["", "[]", '["file"]', '{"file": null}', '{"file": [3]}', "3"])
def test_files_are_foreign_where_the_manifest_is_damaged(manifest, tmp_path):
    target = tmp_path / "target"
    make(target, "old")
    (target / ".tnmoe-files").write_text(manifest)
    with pytest.raises(InputError, match="target holds what tnmoe did not write there"):
        make(target)
    assert contents(target) == made_from("old")


@pytest.mark.parametrize("name", ["file", "sub"])
def test_a_link_in_the_place_of_what_was_written_is_kept(name, tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    make(target, "old")
    (target / name).rename(elsewhere)
    (target / name).symlink_to(elsewhere)
    with pytest.raises(InputError, match=f"target holds what tnmoe did not .*: {name}"):
        make(target)
    assert (target / name).is_symlink()
    assert elsewhere.exists()


def test_a_file_that_came_before_the_move_brings_the_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "target"
    make(target, "old")
    rename = Path.rename

    def late(self, to):
        if self == target:
            (target / "thesis.txt").write_text("years of work")
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", late)
        with pytest.raises(InputError, match=r"target holds what tnmoe did not .*: thesis.txt"):
            make(target)
    assert contents(target) == {**made_from("old"), "thesis.txt": "years of work"}


def test_places_that_cannot_be_replaced_are_refused_before_anything_is_made(tmp_path, monkeypatch):
    made = tmp_path / "made"
    made.mkdir()
    monkeypatch.chdir(made)
    for target in (".", made, tmp_path):
        with pytest.raises(InputError, match="is or holds the working directory"):
            make(target)
    monkeypatch.chdir("/")
    with pytest.raises(InputError, match="/ cannot be replaced: choose another folder"):
        make("/")
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: Path(path) == made)
        with pytest.raises(InputError, match="made is a mount point, which cannot be replaced"):
            make(made)
    with pytest.raises(InputError, match=r"cannot write to /proc/made.partial: No such file"):
        make("/proc/made")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="loop is a link that leads to itself"):
        make(tmp_path / "loop")
    (tmp_path / "a.partial").write_text("mine")
    with pytest.raises(InputError, match=r"a.partial is in the way"):
        make(tmp_path / "a")
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "mine").touch()
    with pytest.raises(InputError, match=r"b.partial is in the way"):
        make(tmp_path / "b")
    with pytest.raises(InputError, match=r"cannot write to .*c.partial: Not a directory"):
        make(tmp_path / "a.partial" / "c")
    assert sorted(os.listdir(tmp_path)) == ["a.partial", "b.partial", "loop", "made"]
    assert os.listdir(tmp_path / "b.partial") == ["mine"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path):
    (tmp_path / "target").mkdir(mode=0o555)
    with pytest.raises(InputError, match=r"cannot write to .*target: Permission denied"):
        make(tmp_path / "target")


@pytest.mark.parametrize("overwrite", [False, True])
def test_each_of_many_processes_makes_the_whole_folder_or_nothing(overwrite, tmp_path):
    target = tmp_path / "deep" / "target"
    for _ in range(5):
        processes = []
        for number in range(12):
            if (process := os.fork()) == 0:
                try:
                    make(target, str(number), overwrite)
                    os._exit(0)
                except InputError as error:
                    expected = "in use" in str(error) or "not empty" in str(error)
                    os._exit(3 if expected else 4)
                finally:
                    os._exit(5)
            processes.append(process)
        codes = [os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in processes]
        assert set(codes) <= {0, 3}
        made = [str(number) for number, code in enumerate(codes) if code == 0]
        assert made if overwrite else len(made) == 1
        assert contents(target) in [made_from(number) for number in made]
        assert os.listdir(target.parent) == ["target"]
        shutil.rmtree(target.parent)


def test_one_process_works_at_a_time(tmp_path):
    target = tmp_path / "new" / "target"
    with UnfinishedFolder(target).lock():
        owner = f"target is in use by process {os.getpid()} on .* since "
        with pytest.raises(InputError, match=owner), UnfinishedFolder(target).lock():
            pass
        (tmp_path / "link").symlink_to(target)
        with pytest.raises(InputError, match=owner):
            make(tmp_path / "link")
    assert os.listdir(tmp_path) == ["link"]

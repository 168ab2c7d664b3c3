"""Parts of a conversion, in any order or at the same time, make the bytes that one process does."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tnmoe as tn
from tests.disk import Disk, all_left
from tnmoe.hf.files.checkpoint import Checkpoint
from tnmoe.hf.folders.conversion import Conversion
from tnmoe.hf.folders.pieces import Piece, copy_pieces
from tnmoe.system import unfinished
from tnmoe.system.parts import Part

# Three files of weights.
SETTINGS = {"shard_bytes": 24, "jobs": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of six tensors, with a tokenizer's file."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    save_file({name: torch.randn(3) for name in "abcdef"}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"words": 1}')
    return folder


class Doubled:
    """A conversion that copies two tensors, together, and doubles others, and what it did.

    Attributes
    ----------
    conversion : Conversion
    made : list of str
        The pieces that it doubled, in order.
    """

    def __init__(self, folder, factor=2, during=lambda name: None, names="cdef"):
        checkpoint = Checkpoint(folder)
        self.made = []

        def piece(name):
            def make():
                self.made.append(name)
                during(name)
                return {name: factor * checkpoint.load(name)}

            return Piece(name, (name,), {name: checkpoint.specs[name]}, make)

        pieces = (*copy_pieces(checkpoint, {"a": "a", "b": "b"}), *map(piece, names))
        self.conversion = Conversion(checkpoint, pieces, {"type": "none"}, {"factor": factor})

    def run(self, target, **settings):
        return self.conversion.run(target, **SETTINGS | settings)

    def left(self, target):
        pieces = self.conversion.pieces_left(target, shard_bytes=SETTINGS["shard_bytes"])
        return [piece.name for piece in pieces]


def contents(folder):
    """Bytes of every file."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    """Contents that one process makes."""
    target = tmp_path_factory.mktemp("undisturbed") / "target"
    Doubled(source).run(target)
    return contents(target)


def check_finished(target, undisturbed):
    assert contents(target) == undisturbed
    assert os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize("total", [1, 2, 3, 5, 8])
def test_every_piece_belongs_to_one_part_and_parts_differ_by_one_piece(total):
    for count in range(9):
        shares = [Part(number, total).share(range(count)) for number in range(1, total + 1)]
        assert sorted(piece for share in shares for piece in share) == list(range(count))
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    "order", [order for total in (1, 2, 3) for order in permutations(range(1, total + 1))], ids=str
)
def test_parts_in_any_order_make_the_bytes_of_one_process(order, source, undisturbed, tmp_path):
    target = tmp_path / "target"
    for number in order:
        assert Doubled(source).run(target, part=(number, len(order))) == []
        assert not target.exists()
    last = Doubled(source)
    assert last.left(target) == []
    files = last.run(target)
    assert last.made == []
    assert all(file.is_file() for file in files)
    check_finished(target, undisturbed)


def test_parts_work_at_the_same_time(source, undisturbed, tmp_path):
    """Each waits within a piece until the other is within one as well."""
    both = threading.Barrier(2, timeout=60)
    met = set()

    def meet(number, name):
        if number not in met:
            both.wait()
            met.add(number)

    def work(number):
        one = Doubled(source, during=lambda name: meet(number, name))
        one.run(tmp_path / "target", part=(number, 2))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, (1, 2)))
    assert met == {1, 2}
    Doubled(source).run(tmp_path / "target")
    check_finished(tmp_path / "target", undisturbed)


def test_many_parts_begin_at_the_same_moment(source, undisturbed, tmp_path):
    start = threading.Barrier(8, timeout=60)

    def work(number):
        one = Doubled(source)
        start.wait()
        one.run(tmp_path / "target", part=(number, 8))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(1, 9)))
    last = Doubled(source)
    last.run(tmp_path / "target")
    assert last.made == []
    check_finished(tmp_path / "target", undisturbed)


def test_parts_beyond_the_number_of_pieces_have_nothing_to_do(source, undisturbed, tmp_path):
    idle = Doubled(source)
    idle.run(tmp_path / "target", part=(7, 9))
    assert idle.made == []
    for number in (9, 1, 5, 3, 2, 4):
        Doubled(source).run(tmp_path / "target", part=(number, 9))
    Doubled(source).run(tmp_path / "target")
    check_finished(tmp_path / "target", undisturbed)


def test_a_call_without_part_makes_what_parts_have_left(source, undisturbed, tmp_path):
    target = tmp_path / "target"
    Doubled(source).run(target, part=(1, 3))
    last = Doubled(source)
    assert last.left(target) == ["c", "d", "f"]
    last.run(target)
    assert last.made == ["c", "d", "f"]
    check_finished(target, undisturbed)


def test_a_part_that_is_done_makes_nothing_again(source, tmp_path):
    Doubled(source).run(tmp_path / "target", part=(2, 2))
    before = contents(tmp_path)
    again, calls = Doubled(source), []
    again.run(tmp_path / "target", part=(2, 2), on_progress=lambda *done: calls.append(done))
    assert again.made == []
    assert calls == [(24, 24)]
    assert contents(tmp_path) == before


def test_an_interrupted_part_resumes(source, undisturbed, tmp_path):
    target = tmp_path / "target"

    def interrupt(name):
        if name == "e":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Doubled(source, during=interrupt).run(target, part=(2, 2))
    journal = tmp_path / "target.partial" / ".tnmoe-journal-2-of-2"
    with open(journal, "a") as file:
        file.write('5 "g')  # a line that broke off
    again = Doubled(source)
    again.run(target, part=(2, 2))
    assert again.made == ["e"]
    again.run(target)
    check_finished(target, undisturbed)


@pytest.mark.parametrize(
    ("asked", "in_use"),
    [
        pytest.param({"part": (1, 2)}, "part 1/2 of .*target", id="the same part"),
        pytest.param({"part": (2, 3)}, "part 1/2 of .*target", id="another number of parts"),
        pytest.param({}, "part 1/2 of .*target", id="the whole"),
        pytest.param({"overwrite": True}, "part 1/2 of .*target", id="the whole anew"),
    ],
)
def test_a_part_at_work_keeps_others_out_and_is_named(asked, in_use, source, undisturbed, tmp_path):
    target, refused = tmp_path / "target", []

    def ask(name):
        with pytest.raises(tn.InputError, match=rf"{in_use} is in use by process {os.getpid()} on"):
            Doubled(source).run(target, **asked)
        refused.append(name)

    Doubled(source, during=ask).run(target, part=(1, 2))
    assert refused == ["d", "f"]
    Doubled(source).run(target)
    check_finished(target, undisturbed)


def test_a_part_does_not_begin_while_the_whole_is_made(source, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "_WAIT", 0)
    target, refused = tmp_path / "target", []

    def ask(name):
        with pytest.raises(tn.InputError, match=rf"target is in use by process {os.getpid()} on"):
            Doubled(source).run(target, part=(1, 2))
        refused.append(name)

    Doubled(source, during=ask).run(target)
    assert refused == ["c", "d", "e", "f"]
    check_finished(target, undisturbed)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_part_with_other_settings_does_not_disturb_one_at_work(
    overwrite, source, undisturbed, tmp_path
):
    target, refused = tmp_path / "target", []
    message = "part 1/2 of .* is in use by" if overwrite else "settings.factor is 2 there and 3 her"

    def ask(name):
        with pytest.raises(tn.InputError, match=message):
            Doubled(source, 3).run(target, part=(2, 2), overwrite=overwrite)
        refused.append(name)

    Doubled(source, during=ask).run(target, part=(1, 2))
    assert refused == ["d", "f"]
    Doubled(source).run(target, part=(2, 2))
    last = Doubled(source)
    last.run(target)
    assert last.made == []
    check_finished(target, undisturbed)


def test_parts_and_the_whole_must_have_the_same_settings(source, tmp_path):
    Doubled(source).run(tmp_path / "target", part=(1, 2))
    before, other = contents(tmp_path), Doubled(source, 3)
    for asked in ({"part": (2, 2)}, {}):
        with pytest.raises(
            tn.InputError,
            match=r"another conversion \(settings.factor is 2 there and 3 here\): remove it, or",
        ):
            other.run(tmp_path / "target", **asked)
    assert contents(tmp_path) == before
    other.run(tmp_path / "target", part=(2, 2), overwrite=True)
    assert other.made == ["c", "e"]
    assert other.left(tmp_path / "target") == ["a", "d", "f"]


def test_another_number_of_parts_goes_on_from_parts_that_have_ended(source, undisturbed, tmp_path):
    """Some machines may be gone."""
    target = tmp_path / "target"
    Doubled(source).run(target, part=(2, 5))
    again = [Doubled(source), Doubled(source)]
    for number, each in enumerate(again, start=1):
        each.run(target, part=(number, 2))
    assert [each.made for each in again] == [["d", "f"], ["e"]]
    Doubled(source).run(target)
    check_finished(target, undisturbed)


def test_a_finished_target_refuses_parts(source, undisturbed, tmp_path):
    Doubled(source).run(tmp_path / "target")
    with pytest.raises(tn.InputError, match="target is not empty"):
        Doubled(source).run(tmp_path / "target", part=(1, 2))
    check_finished(tmp_path / "target", undisturbed)


def test_parts_replace_an_old_target_only_once_all_are_made(source, undisturbed, tmp_path):
    target = tmp_path / "target"
    Doubled(source, 3).run(target)
    old = contents(target)
    for number in (1, 2):
        Doubled(source).run(target, part=(number, 2), overwrite=True)
    assert contents(target) == old
    Doubled(source).run(target, overwrite=True)
    check_finished(target, undisturbed)


def test_a_part_whose_source_changes_leaves_nothing_that_another_run_goes_on_from(source, tmp_path):
    copy, target = tmp_path / "source", tmp_path / "target"
    copy.mkdir()
    for name, data in contents(source).items():
        (copy / name).write_bytes(data)
    with pytest.raises(tn.InputError, match=r"model.safetensors has changed since it was first"):
        Doubled(copy, during=lambda name: os.utime(copy / "model.safetensors", (0, 0))).run(
            target, part=(1, 2)
        )
    for asked in ({"part": (2, 2)}, {}):
        with pytest.raises(tn.InputError, match=r"another conversion \(source.files differs\)"):
            Doubled(copy).run(target, **asked)
    Doubled(copy).run(target, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


@pytest.mark.parametrize(
    "part",
    [(0, 2), (3, 2), (1, 0), (-1, -1), (1,), (1, 2, 3), (1.5, 2), "1/2", 1, (True, 1)],
    ids=str,
)
def test_what_is_no_part_is_refused_before_anything_is_made(part, source, tmp_path):
    with pytest.raises(tn.InputError, match=r"part must be a pair \(i, n\) of integers with 1 <="):
        Doubled(source).run(tmp_path / "target", part=part)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_parts_resume_after_a_power_cut(source, tmp_path, monkeypatch):
    """A kill is a power cut that loses nothing. The two parts are at work at the same time."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    root, few = tmp_path / "root", {"shard_bytes": 1000}  # one file, to have fewer moments
    root.mkdir()
    Doubled(source, names="cd").run(tmp_path / "undisturbed", **few)
    disk = Disk(root)

    def second(name):
        if name == "d":
            Doubled(source, names="cd").run(root / "target", part=(2, 2), **few)

    with disk.watched():
        Doubled(source, during=second, names="cd").run(root / "target", part=(1, 2), **few)
        Doubled(source, names="cd").run(root / "target", **few)
    assert len(disk.left) > 1000
    disk.left = dict(list(disk.left.items())[::4])  # all take minutes
    for number, left in enumerate(all_left(disk, tmp_path / "left")):
        target = left / "target"
        assert contents(target) in ({}, contents(tmp_path / "undisturbed"))
        with suppress(tn.InputError):  # raised if all was done already, as the next lines check
            if number % 2:
                Doubled(source, names="cd").run(target, part=(2, 2), **few)
            Doubled(source, names="cd").run(target, **few)
        check_finished(target, contents(tmp_path / "undisturbed"))


KILLED = """
import os, signal, sys
from tests.hf.folders.test_parts import Doubled
def kill(name):
    if name == "f":
        os.kill(os.getpid(), signal.SIGKILL)
Doubled(sys.argv[1], during=kill).run(sys.argv[2], part=(1, 2))
"""


@pytest.mark.slow
def test_a_killed_part_resumes_in_another_process(source, undisturbed, tmp_path):
    target = tmp_path / "target"
    killed = subprocess.run([sys.executable, "-c", KILLED, source, target], check=False,
                            cwd=Path(__file__).parents[3])  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    Doubled(source).run(target, part=(2, 2))
    again = Doubled(source)
    again.run(target, part=(1, 2))
    assert again.made == ["f"]
    again.run(target)
    check_finished(target, undisturbed)

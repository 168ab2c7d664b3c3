"""``--part``: several processes, one target, the bytes that one process writes."""

import json
import os
import subprocess

import pytest

from tests.cli.command import TNMOE, tnmoe
from tests.hf.mixtures import make

UPCYCLE = ("--experts", 4, "--sites", 3, "--expert-noise", 0.1, "--shard-size", "50KB")


def contents(folder):
    """Bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def upcycled(dense, tmp_path_factory):
    """Contents that one process makes."""
    target = tmp_path_factory.mktemp("upcycled") / "target"
    tnmoe("upcycle", dense, target, *UPCYCLE)
    return contents(target)


def test_parts_are_made_in_any_order_and_the_plain_command_finishes(dense, upcycled, tmp_path):
    target = tmp_path / "target"
    command = ("upcycle", dense, target, *UPCYCLE)
    first = tnmoe(*command, "--part", "2/2")
    assert first.stderr == ""
    assert first.stdout.splitlines()[0] == (
        "layers      2: model.layers.0.mlp … model.layers.2.mlp"
    )
    assert first.stdout.splitlines()[-4:] == [
        "part        2/2: 2 of 4 pieces",
        "left        2 of 4 pieces: lm_head.weight, model.layers.1.mlp",
        f"written     part 2/2, into {target}.partial",
        f"next        once all parts are made, the same command without --part finishes {target}",
    ]
    assert os.listdir(tmp_path) == ["target.partial"]
    second = tnmoe(*command, "--part", "1/2")
    assert second.stdout.splitlines()[-4:] == [
        "part        1/2: 2 of 4 pieces",
        "left        0 of 4 pieces",
        f"written     part 1/2, into {target}.partial",
        f"next        the same command without --part finishes {target}",
    ]
    tnmoe(*command)
    assert contents(target) == upcycled
    assert os.listdir(tmp_path) == ["target"]


def test_a_dry_run_says_what_a_part_will_do_and_what_is_left(dense, tmp_path):
    target = tmp_path / "target"
    command = ("upcycle", dense, target, *UPCYCLE)
    planned = tnmoe(*command, "--part", "2/3", "--dry-run").stdout.splitlines()
    assert planned[0] == "layers      1: model.layers.0.mlp"
    assert planned[-2:] == [
        "part        2/3: 1 of 4 pieces",
        f"nothing written yet: part 2/3 of {target} would be created",
    ]
    assert os.listdir(tmp_path) == []
    tnmoe(*command, "--part", "2/3")
    assert tnmoe(*command, "--dry-run").stdout.splitlines()[-2:] == [
        "left        3 of 4 pieces: lm_head.weight, model.layers.1.mlp, model.layers.2.mlp",
        f"not finished yet: {target} would be created",
    ]
    done = json.loads(tnmoe(*command, "--part", "3/3", "--json").stdout)
    assert (done["part"], done["pieces"], done["layers"]) == (
        "3/3", {"total": 4, "own": 1}, ["model.layers.1.mlp"],
    )  # fmt: skip
    assert done["left"] == ["lm_head.weight", "model.layers.2.mlp"]
    assert done["files"] == []


def test_a_part_without_pieces_succeeds(dense, tmp_path):
    done = tnmoe("upcycle", dense, tmp_path / "target", *UPCYCLE, "--part", "9/9")
    assert done.stdout.splitlines()[0] == "layers      0"
    assert "part        9/9: 0 of 4 pieces" in done.stdout


@pytest.mark.parametrize("part", ["0/2", "3/2", "a/b", "1/0", "-1/2", "2", "1/2/3", ""])
def test_what_is_no_part_is_refused(part, dense, tmp_path):
    done = tnmoe("upcycle", dense, tmp_path / "target", f"--part={part}", code=2)
    assert done.stderr.splitlines()[-1] == (
        "tnmoe upcycle: error: argument --part: expected a part such as 2/4, the second of four, "
        f"got {part!r}"
    )
    assert os.listdir(tmp_path) == []


def test_a_part_with_other_settings_is_refused_with_both_values(dense, tmp_path):
    command = ("upcycle", dense, tmp_path / "target", *UPCYCLE)
    tnmoe(*command, "--part", "1/2")
    done = tnmoe(*command, "--part", "2/2", "--seed", 1, code=2)
    assert "of another conversion (settings.seed is 0 there and 1 here): remove" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_two_processes_make_parts_at_the_same_time(dense, upcycled, tmp_path):
    command = [TNMOE, "upcycle", dense, tmp_path / "target", *map(str, UPCYCLE)]
    processes = [subprocess.Popen([*command, f"--part={number}/2"]) for number in (1, 2)]
    assert [process.wait() for process in processes] == [0, 0]
    tnmoe(*command[1:])
    assert contents(tmp_path / "target") == upcycled
    assert os.listdir(tmp_path) == ["target"]


def test_an_export_has_parts_too(mpoe, tmp_path):
    source, _ = mpoe
    tnmoe("export", source, tmp_path / "whole")
    for part in ("2/2", "1/2"):
        tnmoe("export", source, tmp_path / "target", "--part", part)
    tnmoe("export", source, tmp_path / "target")
    assert contents(tmp_path / "target") == contents(tmp_path / "whole")


@pytest.fixture
def compress(tmp_path):
    """The command without its target, of a mixture with two layers."""
    make("mixtral").save_pretrained(tmp_path / "ordinary")
    return lambda target, *more, code=0: tnmoe(
        "compress", tmp_path / "ordinary", tmp_path / target, "--keep", 0.7, *more, code=code
    )


def test_parts_of_a_compression_follow_the_survey_of_a_dry_run(compress, tmp_path):
    whole = compress("whole")
    compress("target", "--dry-run")
    assert "left " not in compress("target", "--part", "1/2", "--dry-run").stdout
    for part in ("2/2", "1/2"):
        done = compress("target", "--part", part)
        assert f"part        {part}: " in done.stdout
        assert (tmp_path / "target.survey").is_dir()
    finished = compress("target")
    assert finished.stdout == whole.stdout.replace("whole", "target")
    assert contents(tmp_path / "target") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["ordinary", "target", "whole"]


def test_parts_of_a_compression_are_refused_without_a_survey(compress, tmp_path):
    for more in ((), ("--dry-run",)):
        done = compress("target", "--part", "1/2", *more, code=2)
        assert "target.survey holds no finished survey for these settings" in done.stderr
        assert "--dry-run, without --part" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert os.listdir(tmp_path) == ["ordinary"]
    compress("target", "--dry-run")
    before = contents(tmp_path / "target.survey")
    done = compress("target", "--part", "1/2", "--damping", 0.5, code=2)
    assert "holds no finished survey for these settings" in done.stderr
    assert contents(tmp_path / "target.survey") == before

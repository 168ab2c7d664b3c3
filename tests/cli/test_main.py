"""Bad input ends a command with one line, and nothing is written."""

import os

import pytest

from tests.cli.command import tnmoe
from tnmoe import hf
from tnmoe.cli import main


def pipe(path):
    os.mkfifo(path)
    return path


def damaged(folder):
    (folder / "model.safetensors").write_bytes(b"12")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda d, t: ["upcycle", d / "absent", t], "there is no folder"),
        (lambda d, t: ["upcycle", d, d], "overlaps with the source"),
        (
            lambda d, t: ["upcycle", d, t, "--dry-run", "--layers", "encoder"],
            "select none of the 3",
        ),
        (lambda d, t: ["upcycle", d, t, "--layers", "3"], "layers must be from 0 to 2"),
        (lambda d, t: ["upcycle", d, t, "--experts", "2", "--top-k", "3"], "exceeds num_experts"),
        (lambda d, t: ["upcycle", d, t, "--config", d / "absent.json"], "No such file"),
        (lambda d, t: ["upcycle", d, t, "--config", d / "config.json"], "unknown entries in an"),
        (lambda d, t: ["export", d, t], "is not an MPOE checkpoint"),
        (lambda d, t: ["upcycle", d, t, "--sites", "1000"], "sites must be at most 100, got 1000"),
        (lambda d, t: ["upcycle", d, t, "--group-size", "8"], "group_size is for layout='split'"),
        (lambda d, t: ["upcycle", d, t, "--group-size", "8,0"], "expected an integer from 1 up"),
        (lambda d, t: ["upcycle", d, t, "--bond-ratio", "2"], "bond_ratio enlarges the exact bon"),
        (lambda d, t: ["upcycle", d, t, "--bond-ratio", ".5"], "expected a number from 1 up"),
        (
            lambda d, t: ["upcycle", d, t, "--layout", "hidden", "--sites", "3"],
            "sites is for layout='interleaved' and 'residual'",
        ),
        (
            lambda d, t: ["inspect", d, "--layout", "residual", "--bonds", "4"],
            "bonds are for layouts that may cut some, got bonds=[4]",
        ),
        (lambda d, t: ["inspect", d, "--experts", "9" * 5000], "expected an integer from 1 up"),
        (lambda d, t: ["upcycle", d, t, "--config", pipe(d / "pipe")], "pipe is not JSON"),
        (lambda d, t: ["inspect", d, "--bonds", "4,0"], "expected an integer from 1 up"),
        (lambda d, t: ["upcycle", d, t, "--shard-size", "5"], "expected a size like 5GB"),
        (lambda d, t: ["upcycle", d, t, "--shard-size=-1GB"], "expected a positive number"),
        (lambda d, t: ["upcycle", d, t, "--shard-size", "1e-9KB"], "expected a size like 5GB"),
        (lambda d, t: ["upcycle", d, t, "--seed", 2**64], "expected an integer of 64 bits"),
        (lambda d, t: ["demo", "--seed", 2**64], "expected an integer of 64 bits"),
        (lambda d, t: ["inspect", damaged(d)], "is damaged or not a safetensors file"),
        (lambda d, t: ["upcycle", damaged(d), t], "is damaged or not a safetensors file"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, message, dense, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in dense.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    done = tnmoe(*arguments(source, tmp_path / "target"), code=2)
    assert message in done.stderr
    assert done.stderr.strip().count("\n") == 0 or "usage:" in done.stderr
    assert "Traceback" not in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["source"]
    assert done.stdout == ""


def test_an_error_without_a_text_is_told_by_its_name(dense, monkeypatch, capsys):
    def fail(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(hf, "inspect_checkpoint", fail)
    assert main(["inspect", str(dense)]) == 2
    assert capsys.readouterr().err == "tnmoe: TimeoutError\n"

"""The script for a GPU: a part that fails or takes too long leaves what it and the others found."""

import importlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tnmoe.nn import experts
from tnmoe.nn.compute import grouped, rebuilt

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PARTS = {
    "whole": "yield {'a': 1}\n    yield {'a': 2}",
    "raises": "yield {'a': 1}\n    raise ValueError('no such thing')",
    "hangs": "yield {'a': 1}\n    time.sleep(600)",
    "dies": "yield {'a': 1}\n    os.kill(os.getpid(), 9)",
    "goes_on": "while True:\n        time.sleep(0.01)\n        yield {'a': 1}",
    "lacks": "import a_package_that_nobody_has\n    yield {}",
}


@pytest.fixture
def benchmarks(monkeypatch):
    """Import modules of the benchmarks by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def records(benchmarks, tmp_path, monkeypatch):
    """What parts leave that end in every way."""
    gpu = benchmarks("gpu")
    for name, body in PARTS.items():
        text = f"import os, time\ndef rows(device, tiny):\n    {body}\n"
        text += "def summary(rows):\n    return f'{len(rows)} rows'\n"
        (tmp_path / f"gpu_{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options, found = Namespace(device="cpu", tiny=True), {"cpu": "one"}
    left = {}
    for name in PARTS:
        limits = gpu.Limits(0.3 if name == "goes_on" else 60, 1 if name == "hangs" else 60)
        left[name] = gpu.run_apart(name, limits, tmp_path / "results", found, options)
        assert json.loads((tmp_path / f"results/{name}.json").read_text()) == left[name]
    return left


def test_every_part_leaves_its_rows_and_says_how_it_ended(records, benchmarks):
    statuses = {name: record["status"] for name, record in records.items()}
    assert statuses == {
        "whole": "complete",
        "raises": "failed: ValueError: no such thing",
        "hangs": "killed after 1 s",
        "dies": "ended with exit status -9",
        "goes_on": "stopped when its time was up",
        "lacks": "skipped: needs the package a_package_that_nobody_has",
    }
    for name, record in records.items():
        assert record["environment"] == {"cpu": "one"}
        assert (record["rows"] == []) == (name == "lacks")
        assert record["summary"] == (f"{len(record['rows'])} rows" if record["rows"] else "")
    good = [name for name, record in records.items() if benchmarks("gpu").is_good(record)]
    assert good == ["whole", "goes_on", "lacks"]


def test_tests_that_fail_over_cupy_are_named(benchmarks, tmp_path):
    part = benchmarks("gpu_cupy")
    path = tmp_path / "test_two.py"
    path.write_text("def test_right(): pass\ndef test_wrong(): assert False\n")
    row = {"file": str(path), "library": "CuPy", **part.outcome(str(path))}
    assert row["status"] == "failed"
    assert "1 failed, 1 passed" in row["message"]
    assert "test_two.py::test_wrong" in part.summary([row])
    assert part.outcome(f"{path}::test_right")["status"] == "passed"
    assert part.outcome(str(tmp_path / "test_missing.py"))["status"] == "failed"


def test_cupy_is_named_where_it_is_missing(benchmarks, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ModuleNotFoundError, match="cupy"):
        next(benchmarks("gpu_cupy").rows("cuda", tiny=True))


def test_a_row_that_failed_fails_the_part(benchmarks):
    rows = [{"status": "passed"}, {"status": "failed"}]
    record = {"part": "checks", "seconds": 1.0, "status": "complete", "rows": rows}
    assert not benchmarks("gpu").is_good(record)
    last = benchmarks("gpu").overview([record]).splitlines()[-1]
    assert last.split() == ["checks", "1", "2", "1", "complete"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "use --tiny to try the script on the CPU"),
        (["--tiny", "--parts", "nothing"], "invalid choice: 'nothing'"),
        (["--tiny", "--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_options_that_make_no_sense_are_refused(benchmarks, capsys, arguments, message):
    with pytest.raises(SystemExit):
        benchmarks("gpu").parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_all_parts_run_by_default(benchmarks):
    gpu = benchmarks("gpu")
    assert gpu.parse_arguments(["--tiny"]).parts == list(gpu.PARTS)
    for name in gpu.PARTS:
        assert (BENCHMARKS / f"gpu_{name}.py").is_file()
    # On a card, with the time that it takes to start them.
    assert sum(limits.kill for name, limits in gpu.PARTS.items() if name != "cupy") < 8 * 60
    assert gpu.PARTS["cupy"].kill <= 3 * 60
    assert all(limits.budget < limits.kill for limits in gpu.PARTS.values())


@pytest.mark.parametrize("layout", ["ordinary", "split", "interleaved"])
def test_checks_tell_a_wrong_layer_from_a_right_one(benchmarks, layout):
    checks = benchmarks("gpu_checks")
    for check in (checks.outputs, checks.gradients):
        right, wrong = (checks.Setting(layout, device="cpu") for _ in range(2))
        assert check(right) <= checks.BOUNDS["float32"]
        next(iter(wrong.layer.down.parameters())).data[1:] *= 1.01
        assert check(wrong) > checks.BOUNDS["float32"]


@contextmanager
def error_on_reading():
    """Raise an error in the block where code reads numbers of a tensor."""

    def fail(*_):
        raise AssertionError("the CPU would wait for a GPU here")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__"):
            patch.setattr(torch.Tensor, name, fail)
        yield


def test_layers_pass_the_checks_with_the_operators_for_a_gpu(benchmarks, monkeypatch):
    checks = benchmarks("gpu_checks")
    monkeypatch.setattr(checks, "error_on_wait", error_on_reading)
    # What a GPU does, as far as torch can do it on a CPU.
    monkeypatch.setattr(experts, "values_are_readable", lambda tensor: False)
    monkeypatch.setattr(grouped, "_on_cuda", lambda array: True)
    every = slice(None)
    monkeypatch.setattr(rebuilt, "_batches_of_experts", lambda offsets: [(every, every)])
    not_here = (checks.cuda_graph, checks.upcycled_model, checks.compiled)
    chosen = [
        pair
        for pair in checks.settings("cpu", True)
        if pair[0] not in (*not_here, checks.compiled_inference)
    ]
    monkeypatch.setattr(checks, "settings", lambda device, tiny: chosen)
    rows = list(checks.rows("cpu", True))
    assert {row["status"] for row in rows} == {"passed"}, checks.summary(rows)


@pytest.mark.slow
def test_the_script_runs_on_a_cpu_from_a_checkout(tmp_path):
    folder = tmp_path / "results"
    # Without the folder of tnmoe on the path of Python.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = ["--tiny", "--device", "cpu", "--patience", "5"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), *options, "--output", str(folder)],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    parts = ["algebra", "checks", "cupy", "experts", "training"]
    assert [record["part"] for record in records] == parts
    for record in records:
        assert record["status"] == "complete"
        assert record["rows"]
        assert all(row.get("status") != "failed" for row in record["rows"])

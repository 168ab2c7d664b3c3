"""Programs for several ranks run as they are printed: the examples, and those of the how-to."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples/distributed").glob("*.py"))
README = (ROOT / "examples/distributed/README.md").read_text(encoding="utf-8")
HOWTO = (ROOT / "docs/howto/distributed.md").read_text(encoding="utf-8")
# A program, the command that runs it, and what it prints.
PROGRAM = re.compile(
    r"^```python\n([^`]+)^```\n\n```sh\ntorchrun --nproc-per-node (\d) (\w+\.py)\n```\n\n"
    r"```text\n([^`]+)^```",
    re.M,
)
PLAN = re.compile(r"^```python\n([^`]+expert_placement[^`]+)^```\n\n```text\n([^`]+)^```", re.M)
PROGRAMS = {
    name: (code, int(ranks), printed) for code, ranks, name, printed in PROGRAM.findall(HOWTO)
}
LINE = re.compile(r"(.+): loss (\d\.\d\d), after training (\d\.\d\d)\n")
BEGINNINGS = {
    "data_parallel": "2 ranks",
    "expert_parallel": "4 of 8 experts per rank",
    "fully_sharded": "50% on a rank",
    "trainer": "2 ranks",
    "accelerate_loop": "2 ranks",
    "deepspeed_zero": "2 ranks",
}
MOST_LINES = 60
NUMBER = re.compile(r"\d+\.\d+")


def output_on_ranks(program, ranks=2):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    # A port that is free now may be taken when the ranks listen: let the system choose.
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    settings = {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, *command, *meeting, str(program)],
        env=os.environ | settings, cwd=program.parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains_on_two_ranks_and_prints_one_line(path):
    if path.stem == "deepspeed_zero":
        pytest.importorskip("deepspeed")
    beginning, first, last = LINE.search(output_on_ranks(path)).groups()
    assert beginning == BEGINNINGS[path.stem]
    assert float(last) < 0.6 * float(first)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_the_how_to_prints_what_the_page_says(tmp_path, name):
    code, ranks, printed = PROGRAMS[name]
    program = tmp_path / name
    program.write_text(code, encoding="utf-8")
    found = output_on_ranks(program, ranks)
    assert NUMBER.sub("…", found) == NUMBER.sub("…", printed)
    numbers = [list(map(float, NUMBER.findall(text))) for text in (found, printed)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)


def test_the_plan_of_the_how_to_is_what_its_code_prints(capsys):
    ((code, printed),) = PLAN.findall(HOWTO)
    exec(code, {})
    assert capsys.readouterr().out == printed


def test_every_program_of_the_how_to_that_torchrun_starts_is_tested():
    assert set(re.findall(r"torchrun --nproc-per-node \d (\w+\.py)", HOWTO)) == set(PROGRAMS)
    assert {"train_spread.py", "train_divided.py"} < set(PROGRAMS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_run_it(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < MOST_LINES
    assert f"    torchrun --nproc-per-node 2 examples/distributed/{path.name}\n" in text
    assert f"[{path.name}]({path.name})" in README

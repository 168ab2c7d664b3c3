"""Progress bars are for terminals that somebody watches; a log gets none."""

import os
import subprocess
import sys

import pytest

from tests.terminal import errors_on_terminal

BARS = """
from tnmoe.system.progress import progress_bar, progress_callback
for _ in progress_bar(range(3), desc="loop", mininterval=0):
    pass
with progress_callback("call", "B") as show:
    show(0, 10)
    show(10, 10)
"""
COMMAND = [sys.executable, "-c", BARS]


def test_a_terminal_gets_bars():
    shown = errors_on_terminal(COMMAND, TERM="xterm")
    assert b"loop: 100%" in shown
    assert b"call: 100%" in shown


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "xterm", "TQDM_DISABLE": "1"}])
def test_a_terminal_that_cannot_or_should_not_show_bars_gets_none(environment):
    assert errors_on_terminal(COMMAND, **environment) == b""


@pytest.mark.parametrize(
    "details", [{}, {"TERM": "unknown"}, {"TERM": "xterm", "CI": "true"}, {"columns": 0}]
)
def test_a_log_that_is_written_through_a_terminal_gets_none(details):
    assert errors_on_terminal(COMMAND, **details) == b""


def test_a_pipe_gets_none():
    done = subprocess.run(COMMAND, capture_output=True, check=True)
    assert done.stdout + done.stderr == b""


def test_nothing_is_shown_where_standard_error_is_closed():
    closed = ["sh", "-c", '"$@" 2>&-', "sh", *COMMAND]
    subprocess.run(closed, check=True)


# The parts of the demo that take time, with a model of two narrow layers.
DEMO = """
import sys
from pathlib import Path

import transformers

from tnmoe import hf
from tnmoe.demo.data import Sentences, packaged_model
from tnmoe.demo.models import load_tokenizer
from tnmoe.demo.training import Job, fine_tune, load_and_predict, run_in_new_process

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    load_tokenizer(packaged_model()).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=30522, num_hidden_layers=2, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    sentences = Sentences(tuple(map(str, range(40))), (0, 1) * 20, ("no", "yes"))
    job = Job(
        kind="MPOE", model=folder, train=sentences, held_out=sentences,
        config=hf.MPOEConfig(num_experts=2, sites=3), steps=3, batch_size=4, learning_rate=1e-4,
        seed=0, device="cpu", checkpoint=folder / "checkpoint",
    )
    run_in_new_process(fine_tune, job)
    run_in_new_process(load_and_predict, job.checkpoint, sentences.texts)
"""


@pytest.mark.slow
def test_the_parts_of_the_demo_draw_no_bar_in_a_log(tmp_path):
    script, log = tmp_path / "demo.py", tmp_path / "log"
    script.write_text(DEMO)
    folder = tmp_path / "model"
    folder.mkdir()
    with log.open("wb") as file:
        subprocess.run([sys.executable, script, folder], stdout=file, stderr=file, check=True)
    assert log.read_bytes().count(b"\r") == 0
    assert log.read_bytes().count(b"\n") <= 5
    assert os.listdir(folder / "checkpoint")

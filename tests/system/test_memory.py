"""Errors for lack of memory keep their type, and notes say what the memory was for."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import tnmoe as tn
from tnmoe.chains.sweep import Sweep
from tnmoe.cli import main
from tnmoe.system.memory import explain_memory_error, is_memory_error

HUGE = 2**55


def no_mapping():
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def none_on_the_device():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def no_thread():
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    "ask",
    [
        lambda: bytearray(HUGE),
        lambda: np.empty(HUGE),
        lambda: torch.empty(HUGE),
        no_mapping,
        none_on_the_device,
        no_thread,
    ],
)
def test_lack_of_memory_gets_a_note_and_stays_the_same_error(ask):
    with (
        pytest.raises((MemoryError, RuntimeError, OSError)) as raised,
        explain_memory_error("a note"),
    ):
        ask()
    assert is_memory_error(raised.value)
    assert raised.value.__notes__ == ["a note"]


@pytest.mark.parametrize(
    "error",
    [
        tn.InputError("not enough memory banks"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_get_no_note(error):
    with pytest.raises(type(error)) as raised, explain_memory_error("a note"):
        raise error
    assert not is_memory_error(error)
    assert not hasattr(raised.value, "__notes__")


@pytest.mark.parametrize(
    ("matrices", "said"),
    [
        (np.ones((30, 20)), r"decomposing a matrix \(30, 20\) of float64 takes 7.2e-06 GB to"),
        (torch.ones(30, 20).bfloat16(), r"a matrix \(30, 20\) of bfloat16 takes 3.6e-06 GB to"),
        (np.ones((4, 30, 20)), r"decomposing 4 matrices \(30, 20\) of float64 takes 2.9e-05 GB to"),
    ],
)
def test_a_decomposition_names_the_memory_it_needs(matrices, said, monkeypatch):
    monkeypatch.setattr(Sweep, "run", lambda self: bytearray(HUGE))
    decompose = tn.decompose if matrices.ndim == 2 else tn.decompose_batch
    with pytest.raises(MemoryError) as raised:
        decompose(matrices)
    assert re.search(said, raised.value.__notes__[0])


# Limits memory to what is used when the first layer is about to be made, plus a little.
LIMITED = """
import resource, sys
from tnmoe.cli import main
from tnmoe.hf.files.shards import ShardWriter

create = ShardWriter.create
def then_little_memory(self):
    create(self)
    with open("/proc/self/status") as status:
        (size,) = (int(line.split()[1]) for line in status if line.startswith("VmSize"))
    limit = size * 1024 + 24 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

ShardWriter.create = then_little_memory
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="sets Linux's limits")
def test_a_command_without_enough_memory_says_so_in_a_line_and_resumes_later(tmp_path):
    sizes = {"vocab_size": 50, "n_embd": 1024, "n_inner": 4096, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    transformers.GPT2Model(config).save_pretrained(tmp_path / "dense")
    command = ["upcycle", tmp_path / "dense", tmp_path / "target", "--experts", "2", "--jobs", "1"]
    limited = [sys.executable, "-c", LIMITED, *map(str, command)]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(
        r"tnmoe: out of memory: .*h.0.mlp becomes 0.*GB.*; the same command goes on from there\n",
        done.stderr,
    )
    assert os.listdir(tmp_path / "target.partial" / "new") == ["model.safetensors"]
    assert main([*map(str, command)]) == 0
    assert sorted(os.listdir(tmp_path)) == ["dense", "target"]

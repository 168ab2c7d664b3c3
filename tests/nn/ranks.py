"""Distributed runs of a few processes on this machine."""

import datetime
import multiprocessing
import tempfile
from pathlib import Path

import torch
from torch import distributed

# Ranks are copies of a process that has imported these already, which takes seconds.
multiprocessing.set_forkserver_preload(["pytest", "tnmoe.hf", "tnmoe.nn.parallel"])


def on_two_ranks(function):
    """Run a function of the rank in two processes of a distributed run; return both results."""
    return on_ranks(2, function)


def on_ranks(count, function):
    """Run a function of the rank in processes of a distributed run; return all results.

    The ranks meet in a file: another process could take a free port before they listen. A rank
    that fails stops the others, and its own traceback is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = count, function, Path(folder)
        torch.multiprocessing.start_processes(_run_rank, given, count, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(count)]


def _run_rank(rank, count, function, folder):
    distributed.init_process_group(
        "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(minutes=5),
    )
    torch.save(function(rank), folder / f"{rank}.pt")
    distributed.destroy_process_group()

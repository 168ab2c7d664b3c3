"""Distributed runs of a few processes on this machine."""

import datetime
import tempfile
from pathlib import Path

import torch
from torch import distributed


def on_two_ranks(function):
    """Run a function of the rank in two processes of a distributed run; return both results."""
    return on_ranks(2, function)


def on_ranks(count, function):
    """Run a function of the rank in processes of a distributed run; return all results.

    The ranks meet in a file: another process could take a free port before they listen. A rank
    that fails stops the others, and its own traceback is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run_rank, (count, function, Path(folder)), nprocs=count)
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

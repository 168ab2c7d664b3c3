"""Distributed runs of two processes on this machine."""

import datetime
import tempfile
from pathlib import Path

import torch
from torch import distributed


def on_two_ranks(function):
    """Run a function of the rank in two processes of a distributed run; return both results.

    The ranks meet in a file: another process could take a free port before they listen. A rank
    that fails stops the other one, and its own traceback is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run_rank, (function, Path(folder)), nprocs=2)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in (0, 1)]


def _run_rank(rank, function, folder):
    distributed.init_process_group(
        "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(minutes=5),
    )
    torch.save(function(rank), folder / f"{rank}.pt")
    distributed.destroy_process_group()

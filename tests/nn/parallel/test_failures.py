"""A rank that dies ends the others with an error; it does not hang them."""

import datetime
import os
import signal

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from tests.nn.parallel.training import model_of, rows_of, spread

pytestmark = pytest.mark.slow

# Seconds after which a collective gives up, and after which the test does.
PATIENCE, LIMIT = 60, 300


def run(rank, folder):
    distributed.init_process_group(
        "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    model = model_of("residual")
    wrapped = spread(model, init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep")))
    for step in range(100):
        if rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        wrapped(rows_of(rank, step, [4, 4])).square().mean().backward()
        (folder / f"{rank}-{step}").touch()


def test_the_other_rank_ends_with_an_error(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=run, args=(rank, tmp_path)) for rank in (0, 1)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(LIMIT)
    try:
        assert [each.exitcode for each in ranks] == [1, -signal.SIGKILL]
    finally:
        for each in ranks:
            each.kill()
    assert (tmp_path / "0-1").exists()
    assert not (tmp_path / "0-99").exists()

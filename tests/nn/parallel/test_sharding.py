"""Experts that are spread over ranks train as in one process."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.nn.parallel.training import LAYOUTS, model_of, spread, train
from tests.nn.ranks import on_ranks

# Settings of a model, and the rows of each of two ranks.
CASES = {f"{layout}": ({"layout": layout}, (6, 6)) for layout in LAYOUTS}
CASES |= {
    f"{experts} experts, top-{top_k}": (
        {"layout": layout, "experts": experts, "top_k": top_k}, (6, 6)
    )
    for (experts, top_k), layout in zip(
        ((2, 1), (2, 2), (4, 1), (4, 4), (8, 1), (8, 2), (8, 4)), LAYOUTS * 2, strict=False
    )
}  # fmt: skip
CASES |= {
    "ranks with different numbers of tokens": ({}, (1, 9)),
    "a rank without tokens": ({}, (6, 0)),
    "a rank without tokens, whole matrices": ({"layout": "dense"}, (0, 6)),
    "an idle expert": ({"closed": (1,)}, (6, 6)),
    "an idle rank": ({"closed": (2, 3)}, (6, 6)),
    "an idle rank, interleaved": ({"layout": "interleaved", "closed": (0, 1)}, (6, 6)),
    "no gate and common biases": ({"gated": False, "bias": "common"}, (6, 6)),
    "several auxiliary cores": ({"layout": "interleaved", "sites": 5}, (6, 6)),
}
# Balance losses are computed in single precision.
BALANCED = {
    "even": ({}, (6, 6)),
    "different numbers of tokens": ({"layout": "residual"}, (2, 9)),
    "a rank without tokens": ({}, (6, 0)),
}
# Sizes of a mesh with the dimensions dp and ep, settings, and rows of each of four ranks.
LARGER = {
    f"{shape[0]} × {shape[1]}, {layout}": (shape, {"layout": layout, "experts": 8}, (3, 5, 0, 6))
    for shape in ((2, 2), (1, 4), (4, 1))
    for layout in ("dense", "hidden", "residual")
}


def run_of_two(rank):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
    found = {name: on_mesh(rank, mesh, *case) for name, case in CASES.items()}
    balanced = {name: on_mesh(rank, mesh, *case, balance=0.1) for name, case in BALANCED.items()}
    return found | {"balanced": balanced}


def run_of_four(rank):
    meshes = {
        shape: init_device_mesh("cpu", shape, mesh_dim_names=("dp", "ep"))
        for shape, *_ in LARGER.values()
    }
    return {name: on_mesh(rank, meshes[shape], *case) for name, (shape, *case) in LARGER.items()}


def on_mesh(rank, mesh, settings, rows, **options):
    model = model_of(**settings)
    found = train(model, spread(model, mesh), [rank], rows, **options)
    del found["optimizer"]
    return found


@pytest.fixture(scope="module")
def two():
    return on_ranks(2, run_of_two)


@pytest.fixture(scope="module")
def four():
    return on_ranks(4, run_of_four)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_process_does(two, case):
    compare([found[case] for found in two], *CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGER)
def test_four_ranks_compute_what_one_process_does(four, case):
    compare([found[case] for found in four], *LARGER[case][1:])


@pytest.mark.parametrize("case", BALANCED)
def test_a_balance_loss_of_all_ranks_is_that_of_one_process(two, case):
    compare([found["balanced"][case] for found in two], *BALANCED[case], 1e-6, balance=0.1)


def compare(ranks, settings, rows, tolerance=1e-10, **options):
    model = model_of(**settings)
    alone = train(model, model, range(len(rows)), rows, **options)

    def close(found, expected):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

    for step, outputs in enumerate(alone["outputs"]):
        close(torch.cat([found["outputs"][step] for found in ranks]), outputs)
    losses = torch.tensor([found["losses"] for found in ranks], dtype=torch.float64)
    close(losses.mean(0), torch.tensor(alone["losses"], dtype=torch.float64))
    for found in ranks:
        assert found["gradients"].keys() == alone["gradients"].keys()
        for what in ("gradients", "parameters", "load biases", "norms"):
            close(found[what], alone[what])

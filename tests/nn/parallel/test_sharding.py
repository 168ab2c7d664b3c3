"""Experts that are spread over ranks train as in one process."""

import copy
from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import tnmoe as tn
from tests.nn.parallel.training import LAYOUTS, model_of, rows_of, spread, train, whole
from tests.nn.ranks import on_ranks
from tnmoe import nn
from tnmoe.nn import parallel

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
# What is spread, over which dimension, and what the error says.
REFUSED = {
    "an unknown dimension": (lambda rank: model_of(), "tp"),
    "no experts": (lambda rank: torch.nn.Linear(2, 2), "ep"),
    "a number of experts that is no multiple": (lambda rank: model_of(experts=3), "ep"),
    "experts that are spread": (lambda rank: spread_twice(rank), "ep"),
    "a parametrized core": (lambda rank: parametrized(rank), "ep"),
    "experts of different sizes": (lambda rank: low_rank([2, 2, 3, 2]), "ep"),
    "other settings": (lambda rank: model_of(top_k=1 + rank), "ep"),
    "other numbers of experts": (lambda rank: model_of(experts=3 + rank), "ep"),
    "experts on one rank only": (lambda rank: model_of() if rank else torch.nn.Linear(2, 2), "ep"),
    "other sizes": (lambda rank: model_of("interleaved", max_bond=2 + rank), "ep"),
    "other dtypes": (lambda rank: model_of().to([torch.float32, torch.float64][rank]), "ep"),
}
MESSAGES = {
    "an unknown dimension": "the mesh has no dimension 'tp': it has dp, ep",
    "no experts": "Linear has no experts to spread",
    "a number of experts that is no multiple": "3 experts (1.experts) cannot be spread over 2 rank",
    "experts that are spread": "the experts 1.experts are spread over ranks already",
    "a parametrized core": "aux_0 is not a parameter of its own, but parametrized or pruned",
    "experts of different sizes": "would give ranks 4 to 5 rows of 'outer'",
    "other settings": "first one has 'top_k=1', number 1 of the mesh has 'top_k=2'",
    "other numbers of experts": "has 'num_experts=3', number 1 of the mesh has 'num_experts=4'",
    "experts on one rank only": "the first one has 'Linear(in_features=2', number 1",
    "other sizes": "number 1 of the mesh has ",
    "other dtypes": "number 1 of the mesh has '0.weight: (8, 8) torch.float64'",
}
# Whether FSDP2 shards over all ranks, or over the mesh's last dimension; settings and rows.
FULLY_SHARDED = {
    f"FSDP2 {'over all ranks' if flat else 'over one dimension'}, {layout}": (
        flat, {"layout": layout}, (3, 5, 2, 6)
    )
    for flat in (True, False)
    for layout in LAYOUTS
}  # fmt: skip
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
    found["low rank"] = trained(rank, mesh, low_rank([2, 3, 3, 2]), (6, 6))
    found["settings"] = {name: variant(rank, mesh) for name, variant in VARIANTS.items()}
    messages = {name: message(rank, mesh, *case) for name, case in REFUSED.items()}
    return found | {"balanced": balanced, "messages": messages}


def run_of_four(rank):
    meshes = {
        shape: init_device_mesh("cpu", shape, mesh_dim_names=("dp", "ep"))
        for shape, *_ in LARGER.values()
    }
    found = {name: on_mesh(rank, meshes[shape], *case) for name, (shape, *case) in LARGER.items()}
    return found | {
        name: fully_sharded(rank, meshes[2, 2], flat, *case)
        for name, (flat, *case) in FULLY_SHARDED.items()
    }


def fully_sharded(rank, mesh, flat, settings, rows):
    """Train on a mesh, with everything but what experts own under FSDP2."""
    model = model_of(**settings)
    owned = set(parallel.shard_experts(model, mesh))
    over = init_device_mesh("cpu", (4,)) if flat else mesh
    for part in [*model, model]:
        fully_shard(part, mesh=over, ignored_params=owned)
    found = train(model, model, [rank], rows)
    del found["optimizer"]
    return found


def message(rank, mesh, make, dim):
    try:
        parallel.shard_experts(make(rank), mesh, dim)
    except tn.InputError as error:
        return str(error)
    return None


def parametrized(rank):
    model = model_of()
    torch.nn.utils.parametrizations.orthogonal(model[1].experts.up, "aux_0")
    return model


def checkpointed(rank, mesh):
    """Return parameters after training with activation checkpointing, and without."""
    plain, model = model_of("residual"), model_of("residual")
    expected = train(plain, spread(plain, mesh), [rank], (6, 5))["parameters"]
    wrapped = spread(model, mesh)
    model[1].forward = partial(checkpoint, model[1].forward, use_reentrant=False)
    return train(model, wrapped, [rank], (6, 5))["parameters"], expected


def copied(rank, mesh):
    """Return outputs and gradients of a copy that is made between the passes, and expected ones."""
    found = []
    for make in (copy.deepcopy, lambda model: model):
        model = model_of("residual")
        parallel.shard_experts(model, mesh)
        model(rows_of(rank, 0, (4, 4))).square().mean().backward()
        model.zero_grad()
        model = make(model)
        outputs = model(rows_of(rank, 1, (4, 4)))
        outputs.square().mean().backward()
        gradients = {name: whole(each.grad) for name, each in model.named_parameters()}
        found.append({"outputs": outputs.detach(), **gradients})
    return found


def dropping(rank, mesh):
    """Return outputs in evaluation, and whether training drops values."""
    model, expected = (model_of("residual", dropout=0.5) for _ in range(2))
    parallel.shard_experts(model, mesh)
    rows = rows_of(rank, 0, (4, 6))
    drops = not torch.equal(model(rows), model(rows))
    outputs = model.eval()(rows).detach()
    return {"drops": drops, "outputs": outputs}, {
        "drops": True, "outputs": expected.eval()(rows).detach(),
    }  # fmt: skip


class Described(torch.nn.SiLU):
    """An activation that shows where it lies in memory, which differs from rank to rank."""

    def extra_repr(self):
        return f"at {hex(id(self))}"


def described(rank, mesh):
    model = model_of("residual", activation=Described())
    parallel.shard_experts(model, mesh)
    return {"spread": model[1].experts.exchange is not None}, {"spread": True}


def refused_calls(rank, mesh):
    """Return what a layer says of inputs that no layer takes."""
    model = model_of("residual")
    parallel.shard_experts(model, mesh)
    experts, rows, weights = model[1].experts, rows_of(rank, 0, (4, 6)), torch.ones(4 + 2 * rank, 1)
    calls = {
        "too high": lambda: experts(rows, torch.full((len(rows), 1), 5), weights),
        "negative": lambda: experts(rows, torch.full((len(rows), 1), -1), weights),
        "other rows": lambda: experts(rows[:2], torch.zeros(3, 1, dtype=torch.int64), weights),
        "torch.func": lambda: torch.func.vmap(model[1])(rows),
    }
    found = {}
    for name, call in calls.items():
        with pytest.raises(tn.InputError) as error:
            call()
        found[name] = str(error.value)[:23]
    return found, {
        "too high": "top_k_index must hold e", "negative": "top_k_index must hold e",
        "other rows": "expected hidden_states ", "torch.func": "torch.func does not sup",
    }  # fmt: skip


def compiled(rank, mesh):
    model = model_of("residual").eval()
    parallel.shard_experts(model, mesh)
    rows = rows_of(rank, 0, (4, 6))
    with torch.no_grad():
        return {"outputs": torch.compile(model, backend="eager")(rows)}, {"outputs": model(rows)}


def autocast(rank, mesh):
    model, expected = (model_of("residual").float() for _ in range(2))
    parallel.shard_experts(model, mesh)
    rows = rows_of(rank, 0, (4, 6)).float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        outputs, alone = model(rows), expected(rows)
    # Outputs of two ranks are rounded before their sum.
    is_close = (outputs - alone).norm() < 0.01 * alone.norm()
    return {"dtype": outputs.dtype, "is close": is_close}, {
        "dtype": torch.bfloat16, "is close": torch.tensor(True),
    }  # fmt: skip


VARIANTS = {
    "activation checkpointing": checkpointed,
    "a copy": copied,
    "torch.compile": compiled,
    "autocast": autocast,
    "dropout": dropping,
    "an address in a representation": described,
    "refused calls": refused_calls,
}


def low_rank(ranks):
    """Make a model whose experts are products of factors, with buffers that say of which inputs."""
    torch.manual_seed(0)
    up, down = (nn.LowRankProjection(4, *size, ranks) for size in ((16, 8), (8, 16)))
    for each in (up, down):
        each.columns.copy_(torch.stack([torch.randperm(each.in_features) for _ in range(4)]))
    layer = nn.MPOMoE(nn.TopKRouter(8, 4, top_k=2, load_bias=True), nn.Experts(up, down))
    return torch.nn.Sequential(layer).double()


def spread_twice(rank):
    model = model_of()
    parallel.shard_experts(model, init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep")))
    return model


def on_mesh(rank, mesh, settings, rows, **options):
    return trained(rank, mesh, model_of(**settings), rows, **options)


def trained(rank, mesh, model, rows, **options):
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


@pytest.mark.slow
@pytest.mark.parametrize("case", FULLY_SHARDED)
def test_fully_sharded_parts_beside_spread_experts_train_as_one_process(four, case):
    compare([found[case] for found in four], *FULLY_SHARDED[case][1:])


@pytest.mark.parametrize("case", REFUSED)
def test_every_rank_refuses_what_cannot_be_spread(two, case):
    for found in two:
        assert MESSAGES[case] in found["messages"][case]


@pytest.mark.parametrize("variant", VARIANTS)
def test_spread_experts_work_as_others_do(two, variant):
    for ranks in two:
        found, expected = ranks["settings"][variant]
        assert found.keys() == expected.keys()
        for name, each in expected.items():
            if isinstance(each, torch.Tensor):
                torch.testing.assert_close(found[name], each)
            else:
                assert found[name] == each


def test_experts_of_low_rank_are_spread_if_ranks_own_as_much(two):
    compare_with(low_rank([2, 3, 3, 2]), [found["low rank"] for found in two], (6, 6))


def compare(ranks, settings, rows, tolerance=1e-10, **options):
    compare_with(model_of(**settings), ranks, rows, tolerance, **options)


def compare_with(model, ranks, rows, tolerance=1e-10, **options):
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

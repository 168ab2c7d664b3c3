"""Ranks that divide the hidden units of experts train as one process does."""

from functools import partial

import pytest
import torch
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune

from tests.nn.parallel.training import HIDDEN, INNER, LAYOUTS, STEPS, model_of, train, whole
from tests.nn.ranks import on_ranks
from tnmoe import InputError, MPOShape, nn
from tnmoe.nn import parallel


class Conv1D(torch.nn.Module):
    """A linear module that stores its matrix as (in, out), like that of transformers."""

    def __init__(self, rows, columns):
        super().__init__()
        self.nf = rows
        self.weight = torch.nn.Parameter(torch.randn(columns, rows))
        self.bias = torch.nn.Parameter(torch.randn(rows))

    def forward(self, x):
        return x @ self.weight + self.bias


# Legs that four ranks can divide.
SETTINGS = {"interleaved": {"sites": 2}, "split": {"group_size": 4}, "hidden": {"group_size": 4}}


def model_in(layout, **settings):
    return model_of(layout, **{**SETTINGS.get(layout, {}), **settings})


def model_around(up, down, layout, frozen=False, **settings):
    """Make a model whose experts share modules with biases."""
    torch.manual_seed(0)
    modules = up(INNER, HIDDEN), down(HIDDEN, INNER)
    settings = {"activation": "gelu", "noise": 0.5, "rng": 0, **settings}
    layer = nn.MPOMoE.from_dense(
        *modules, num_experts=4, top_k=2, layout=layout, router={"load_bias": True}, **settings
    )
    for module in modules:
        module.requires_grad_(not frozen)
    return torch.nn.Sequential(torch.nn.Linear(HIDDEN, HIDDEN), layer).double()


def model_with(make):
    """Make a model of the experts that a function returns."""
    model = model_of()
    torch.manual_seed(1)
    model[1].experts = make().double()
    return model


def with_gate_up():
    """Return experts whose gate and up are one projection."""
    gate_up = nn.MPOProjection(4, MPOShape((2, 4, 4), (2, 2, 2)), bias=True)
    down = nn.MPOProjection(4, MPOShape((2, 2, 2), (1, 4, 4)), bias=True, center_site=1)
    return nn.Experts(gate_up=gate_up, down=down, activation="silu")


def acting_on_the_other_side():
    """Return experts that act on the inputs of one shared module and the outputs of the other."""
    up = nn.HiddenProjection(4, MPOShape((INNER, 1), (2, 4)), center_site=0, bias=True)
    down = nn.HiddenProjection(4, MPOShape((2, 4), (1, INNER)), center_site=1, bias=True)
    return nn.Experts(up, down, activation="silu")


class Quantised(torch.nn.Linear):
    """A linear module of a kind that tnmoe does not know."""


def with_unknown_module(layout="hidden", frozen=True):
    model = model_in(layout)
    up = model[1].experts.up
    up.base.requires_grad_(not frozen)
    up.base.__class__ = Quantised
    return model


def linear(rows, columns, bias=True):
    return torch.nn.Linear(columns, rows, bias=bias)


MODELS = {layout: partial(model_in, layout) for layout in LAYOUTS}
MODELS |= {f"{layout}, top-1": partial(model_in, layout, top_k=1) for layout in LAYOUTS}
MODELS |= {
    f"{layout}, no gate and a common bias": partial(
        model_in, layout, gated=False, bias="common", activation="gelu"
    )
    for layout in LAYOUTS
}
MODELS |= {
    "interleaved, many sites": partial(model_of, "interleaved", sites=5),
    "hidden, one group": partial(model_of, "hidden"),
    "split, legs that differ": partial(model_of, "split", group_size=2),
    "hidden, legs that differ": partial(model_of, "hidden", group_size=2),
    "hidden, enlarged bond": partial(model_of, "hidden", group_size=4, bond_ratio=2.0),
    "hidden, experts act on the other side": partial(
        model_with, acting_on_the_other_side
    ),
    "hidden, several cores": partial(model_of, "hidden", group_size=(2, 2)),
    "interleaved, several shared cores": partial(
        model_of, "interleaved", sites=4, shared_sites={1, 2}
    ),
    "interleaved, padded inputs": partial(
        model_of, "interleaved", gated=False, bias=False,
        up_shape=MPOShape((4, 4), (3, 3), in_features=HIDDEN),
    ),
    "residual, several sites": partial(model_of, "residual", sites=4),
    "one MPO, one whole matrix": partial(model_of, "interleaved", matrices=("up",), sites=2),
    "clamped unit": partial(model_of, "residual", activation="clamped_swiglu"),
    "idle experts": partial(model_of, "hidden", closed=(0, 2)),
    "gate and up in one": partial(model_with, with_gate_up),
    "shared modules with biases, residual": partial(model_around, linear, linear, "residual"),
    "shared modules with biases, hidden": partial(
        model_around, linear, linear, "hidden", group_size=4
    ),
    "Conv1D, residual": partial(model_around, Conv1D, Conv1D, "residual"),
    "Conv1D, hidden": partial(model_around, Conv1D, Conv1D, "hidden", group_size=4),
    "a frozen module of an unknown kind": with_unknown_module,
    "frozen modules": partial(model_around, linear, linear, "hidden", frozen=True, group_size=4),
}  # fmt: skip


def steps_of(name):
    return STEPS if name in LAYOUTS else 2


def wrap(model, mesh, how):
    """Divide the hidden units of a model, and let the other ranks of a mesh be data-parallel."""
    if how == "DDP":
        parallel.shard_hidden_units(model, mesh)
        return DistributedDataParallel(model, process_group=mesh.get_group("dp"))
    options = {"mesh": mesh["dp"]}
    divided = parallel.shard_hidden_units(model, mesh if how == "FSDP of the rest" else mesh["tp"])
    if how == "FSDP of the rest":
        options["ignored_params"] = set(divided)
    for part in model:
        fully_shard(part, **options)
    return fully_shard(model, **options)


def run_of_two(folder, rank):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    trained = {}
    for name, make in MODELS.items():
        model = make()
        trained[name] = train(model, wrap(model, mesh, "DDP"), [0], (6,), steps=steps_of(name))
        del trained[name]["optimizer"]
    return {
        "trained": trained,
        "collectives": {layout: collectives(mesh, layout) for layout in LAYOUTS},
        "numbers": {layout: numbers(rank, mesh, layout, folder) for layout in LAYOUTS},
        "refused": {case: message_about(mesh, *args) for case, (*args, _) in REFUSED.items()},
        "changed": changes(mesh),
        "sharded twice": sharded_twice(),
        "differing": differing(rank, mesh),
    }


# Sizes of a mesh with the dimensions dp and tp, and who shares out what is left.
FOUR = {
    f"{dp} × {tp}, {how}, {layout}": ((dp, tp), how, layout)
    for dp, tp, how in (
        (1, 4, "DDP"), (2, 2, "DDP"), (2, 2, "FSDP of the rest"), (2, 2, "FSDP of all")
    )
    for layout in LAYOUTS
}  # fmt: skip


def run_of_four(folder, rank):
    trained = {}
    for name, (sizes, how, layout) in FOUR.items():
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp"))
        model, group = model_in(layout), rank // sizes[1]
        trained[name] = train(model, wrap(model, mesh, how), [group], (6, 4)[: sizes[0]])
        del trained[name]["optimizer"]
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    divide = partial(parallel.shard_hidden_units, mesh=mesh)
    loaded = {
        layout: {
            name: whole(each)
            for name, each in restored(folder / layout, model_in(layout), divide)[0]
            .state_dict()
            .items()
        }
        for layout in LAYOUTS
    }
    return {"trained": trained, "loaded": loaded}


def restored(folder, model, prepare):
    """Return a prepared model with its optimizer, and the numbers of a checkpoint."""
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.load(state, checkpoint_id=folder, no_dist=not distributed.is_initialized())
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return model, optimizer


def collectives(mesh, layout):
    """Count the collectives of a layer's forward and backward pass."""
    model = model_in(layout)
    parallel.shard_hidden_units(model, mesh)
    with CommDebugMode() as forward:
        loss = model(torch.randn(6, HIDDEN, dtype=torch.float64)).sum()
    with CommDebugMode() as backward:
        loss.backward()
    return [
        {operator.__name__: count for operator, count in counted.get_comm_counts().items()}
        for counted in (forward, backward)
    ]


def numbers(rank, mesh, layout, folder):
    """Return the numbers of a model whose ranks draw different ones, and save it after training."""
    model = model_in(layout)
    if rank:
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
    divided = parallel.shard_hidden_units(model, mesh)
    found = {name: whole(each) for name, each in model.state_dict().items()}
    local = sum(each.to_local().numel() for each in divided), sum(map(torch.numel, divided))
    optimizer = train(model, model, [0], (6,), steps=2)["optimizer"]
    state = get_state_dict(model, optimizer)
    checkpoint.save({"model": state[0], "optimizer": state[1]}, checkpoint_id=folder / layout)
    return found, local


def message_about(mesh, make, dimension="tp"):
    """Return the error of a model that cannot be divided, and whether it is as before."""
    model = make(mesh)
    before = list(map(id, model.parameters()))
    try:
        parallel.shard_hidden_units(model, mesh, dimension)
    except InputError as error:
        return str(error), before == list(map(id, model.parameters()))
    return "no error", False


def sharded_twice():
    """Return the error of a layer one of whose projections ``fully_shard`` divides further."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    model = model_in("interleaved")
    parallel.shard_hidden_units(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    fully_shard(model[1].experts.up, mesh=mesh, ignored_params={model[1].experts.up.center})
    with pytest.raises(InputError) as caught:
        model(torch.randn(3, HIDDEN, dtype=torch.float64))
    return str(caught.value)


def changes(mesh):
    """Return the errors of changes that come after hidden units are divided."""
    model = model_in("interleaved")
    parallel.shard_hidden_units(model, mesh)
    messages = []
    for change in (
        lambda: parallel.shard_experts(model, mesh, "tp"),
        lambda: parallel.shard_hidden_units(model, mesh),
        lambda: nn.remove_experts(model[1], 0),
    ):
        with pytest.raises(InputError) as caught:
            change()
        messages.append(str(caught.value))
    return messages


def differing(rank, mesh):
    with pytest.raises(InputError) as caught:
        parallel.shard_hidden_units(model_of(experts=4 + rank), mesh)
    return str(caught.value)


def changed(change, **settings):
    """Return a function that makes a model and changes its experts."""

    def make(mesh):
        model = model_of(**settings)
        change(model[1].experts)
        return model

    return make


def with_gate_up_whole(mesh):
    experts = nn.Experts(
        gate_up=nn.StackedProjection(4, 32, 8), down=nn.StackedProjection(4, 8, 16)
    )
    return torch.nn.Sequential(experts)


def with_experts_spread(mesh):
    model = model_of()
    parallel.shard_experts(model, mesh, "tp")
    return model


def with_shared_module(mesh):
    model = model_of("residual")
    model.append(model[1].experts.up.base)
    return model


# What makes a model, perhaps the dimension, and what the error says.
REFUSED = {
    "no dimension": (lambda mesh: model_of(), "ep", "no dimension 'ep': it has dp, tp"),
    "no experts": (lambda mesh: torch.nn.Linear(2, 2), "Linear has no experts"),
    "legs that 2 does not divide": (
        lambda mesh: torch.nn.Sequential(nn.DenseExperts(2, 4, 15)),
        "2 ranks cannot divide the hidden units of 0: up has 15, down has 15",
    ),
    "legs that do not agree": (
        lambda mesh: torch.nn.Sequential(
            nn.MPOExperts(
                2, 8, 9 * 2, up_shape=MPOShape((2, 9), (2, 4)), down_shape=MPOShape((2, 4), (9, 2))
            )
        ),
        "up has the legs (2, 9), down has the legs (9, 2). They must divide a leg of every",
    ),
    "padded hidden units": (
        lambda mesh: torch.nn.Sequential(
            nn.MPOExperts(
                2, 8, 14, up_shape=MPOShape((4, 4), (2, 4), 14), matrices=("up",), layout="split"
            )
        ),
        "up has the legs (4, 4), padded from 14",
    ),
    "gate and up in whole matrices": (with_gate_up_whole, "gate_up has 32, down has 16"),
    "matrices of low rank": (
        lambda mesh: torch.nn.Sequential(
            nn.Experts(nn.LowRankProjection(2, 16, 8, [2, 2]), nn.StackedProjection(2, 8, 16))
        ),
        "up is a LowRankProjection",
    ),
    "dropout": (
        changed(lambda experts: setattr(experts, "dropout", 0.1)),
        "1.experts have dropout=0.1 between their projections",
    ),
    "softmax": (
        lambda mesh: model_of(gated=False, activation=torch.nn.Softmax(-1)),
        "must be an elementwise function without parameters and random numbers, got Softmax",
    ),
    "an activation with parameters": (
        lambda mesh: model_of(gated=False, activation=torch.nn.PReLU(INNER)),
        "got PReLU",
    ),
    "spread experts": (with_experts_spread, "1.experts are spread over ranks already"),
    "a module of an unknown kind, residual": (
        lambda mesh: with_unknown_module("residual"), "up has a Quantised",
    ),
    "a module of an unknown kind that is trained": (
        lambda mesh: with_unknown_module(frozen=False),
        "up.base.weight of 1.experts is trained, but",
    ),
    "a shared module that another layer has": (
        with_shared_module, "3.weight is also a part of experts whose hidden units are to be",
    ),
    "a parametrized core": (
        changed(
            lambda experts: parametrizations.weight_norm(experts.up, "center"),
            layout="interleaved",
        ),
        "parametrized",
    ),
    "a pruned core": (
        changed(
            lambda experts: prune.l1_unstructured(experts.up, "aux_0", 0.5), layout="interleaved"
        ),
        "a core of 1.experts is not a parameter",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two(folder):
    return on_ranks(2, partial(run_of_two, folder))


@pytest.mark.parametrize("case", MODELS)
def test_two_ranks_compute_what_one_process_does(two, case):
    compare([found["trained"][case] for found in two], MODELS[case], (6,), steps=steps_of(case))


@pytest.fixture(scope="module")
def four(two, folder):
    return on_ranks(4, partial(run_of_four, folder))


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR)
def test_four_ranks_compute_what_one_process_does(four, case):
    (dp, tp), _, layout = FOUR[case]
    found = [each["trained"][case] for each in four]
    compare(found, partial(model_in, layout), (6, 4)[:dp], every=tp)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_ranks_load_a_checkpoint_of_two(four, layout):
    alone = model_in(layout)
    train(alone, alone, [0], (6,), steps=2)
    for found in four:
        close(found["loaded"][layout], dict(alone.state_dict()))


def compare(ranks, make, rows, every=2, steps=STEPS):
    """Compare with one process; ``every`` adjacent ranks have the same tokens."""
    model = make()
    alone = train(model, model, range(len(rows)), rows, steps=steps)
    for step, outputs in enumerate(alone["outputs"]):
        for first in range(every):
            close(torch.cat([found["outputs"][step] for found in ranks[first::every]]), outputs)
    for found in ranks:
        assert found["gradients"].keys() == alone["gradients"].keys()
        for what in ("gradients", "parameters", "load biases", "norms"):
            close(found[what], alone[what])


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_sums_outputs_once_and_gradients_once(two, layout):
    expected = [{"allreduce_": 1}, {"allreduce_": 1}]
    if layout == "hidden":  # and gathers what shared modules make of the tokens, for up and gate
        expected = [{"allreduce_": 1, "allgather_": 2}, {"allreduce_": 1, "reduce_scatter_": 2}]
    assert [found["collectives"][layout] for found in two] == [expected, expected]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_have_parts_of_the_numbers_of_the_first_one(two, layout):
    expected = model_in(layout).state_dict()
    for found in two:
        numbers, (local, all_) = found["numbers"][layout]
        assert numbers.keys() == expected.keys()
        for name, each in expected.items():
            assert torch.equal(numbers[name], each), name
        assert 0 < local == all_ // 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_goes_on_from_a_checkpoint_of_two(two, layout, folder):
    model, optimizer = restored(folder / layout, model_in(layout), lambda model: None)
    found = train(model, model, [0], (6,), steps=3, first=2, state=optimizer.state_dict())
    alone = model_in(layout)
    expected = train(alone, alone, [0], (6,), steps=5)
    close(found["parameters"], expected["parameters"])


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_divided_is_refused_before_anything_changes(two, case):
    for found in two:
        message, is_as_before = found["refused"][case]
        assert REFUSED[case][-1] in message
        assert is_as_before


def test_divided_layers_are_neither_spread_nor_edited(two):
    for found in two:
        spread, divided, edited = found["changed"]
        assert "1.experts are spread over ranks already" in divided
        assert "spread over ranks already" in spread
        assert "experts are spread over ranks: edit it before that" in edited


def test_tensors_that_are_not_whole_in_a_call_are_refused(two):
    assert all("and not its projections" in found["sharded twice"] for found in two)


def test_ranks_with_other_models_are_refused(two):
    assert all("ranks differ in their models" in found["differing"] for found in two)

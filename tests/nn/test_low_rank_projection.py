"""Matrices of low rank against dense algebra on each expert's factors."""

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradgradcheck
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig, PreTrainedModel

from tests.nn.layouts import (
    E,
    F,
    H,
    assert_is_the_loop,
    low_rank_experts,
    low_rank_projection,
    routed,
)
from tnmoe import InputError, MPOShape, nn
from tnmoe.nn.compute.once_per_token import Load
from tnmoe.nn.compute.slots import Groups

INDEX = torch.tensor([0, 1, 1, 3, 3, 3])  # expert 2 has no rows


def make(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    made = low_rank_projection(E, F, H, bias=bias, dtype=dtype)
    assert made.ranks == (0, 2, 4, 6)
    return made


def rows_of(count=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, H, generator=generator, dtype=torch.float64).to(dtype)


def dense(made):
    """Fill the matrices entry by entry, as the class defines them."""
    stack, row, number = [], 0, 0
    for expert, rank in enumerate(made.ranks):
        size = rank * (made.in_features - rank)
        outer = made.outer[row : row + rank].T
        inner = made.inner[number : number + size].reshape(rank, made.in_features - rank)
        columns = {int(where): place for place, where in enumerate(made.columns[expert])}
        stack.append(
            torch.stack(
                [
                    outer[:, place] if place < rank else outer @ inner[:, place - rank]
                    for place in (columns[which] for which in range(made.in_features))
                ],
                1,
            )
        )
        row, number = row + rank, number + size
    return torch.stack(stack)


def multiply_densely(made, rows, index=INDEX):
    result = torch.einsum("noi,ni->no", dense(made)[index], rows)
    return result if made.bias is None else result + made.bias[index]


def gradients(function, made, rows):
    rows = rows.clone().requires_grad_()
    output = function(rows)
    leaves = [rows, *made.parameters()]
    return [output, *torch.autograd.grad(output.sin().sum(), leaves, materialize_grads=True)]


def test_matrices_are_the_products_of_their_factors():
    made = make()
    torch.testing.assert_close(made.weight(), dense(made))
    assert torch.linalg.matrix_rank(made.weight()).tolist() == [0, 2, 4, 6]
    results = [
        torch.autograd.grad(matrices.sin().sum(), [made.outer, made.inner])
        for matrices in (made.weight(), dense(made))
    ]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_and_gradients_are_those_of_the_matrices(dtype, compiled):
    made, rows, groups = make(dtype), rows_of(dtype=dtype), Groups.of(INDEX, E)
    call = torch.compile(made, backend="aot_eager", fullgraph=True) if compiled else made
    found = gradients(lambda rows: call(rows, groups), made, rows)
    expected = gradients(lambda rows: multiply_densely(made, rows), made, rows)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(call(rows, groups), expected[0])


def test_matrices_of_full_rank_and_of_rank_zero_are_no_special_cases():
    for out, in_ in ((3, 5), (5, 3), (4, 4)):
        for rank in (0, min(out, in_)):
            made = nn.LowRankProjection(1, out, in_, [rank], dtype=torch.float64)
            rows = torch.randn(2, in_, dtype=torch.float64)
            expected = rows @ dense(made)[0].T
            groups = Groups.of_one_expert(2, rows.device)
            torch.testing.assert_close(made(rows, groups), expected)
            torch.testing.assert_close(made.weight(), dense(made))


@pytest.mark.parametrize("compiled", [False, True])
def test_experts_without_rows_get_zero_gradients_and_not_none(compiled):
    made = make(bias=False)
    call = torch.compile(made, backend="aot_eager", fullgraph=True) if compiled else made
    for index in (INDEX, INDEX[:0], torch.full((2,), E)):
        made.zero_grad()
        call(rows_of(len(index)), Groups.of(index, E)).sum().backward()
        for part, expert in zip(made.outer.grad.split(made.ranks), range(E), strict=True):
            assert bool((part != 0).any()) == (expert in index and made.ranks[expert] > 0)
        assert made.inner.grad is not None


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_without_an_expert_change_nothing(compiled):
    made, rows = make(bias=False), rows_of(8)
    call = torch.compile(made, backend="aot_eager", fullgraph=True) if compiled else made
    groups = Groups.of(torch.cat([INDEX, torch.tensor([E, E])]), E)
    rows[6:] = torch.nan
    assert call(rows, groups).shape == (8, F)
    found = gradients(lambda rows: call(rows, groups)[:6], made, rows)
    expected = gradients(lambda rows: multiply_densely(made, rows), made, rows[:6])
    found[1] = found[1][:6]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_derivatives_of_second_order_agree_with_finite_differences():
    made, groups = make(), Groups.of(INDEX, E)
    names = [name for name, _ in made.named_parameters()]

    def function(rows, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(made, named, (rows, groups))

    inputs = [rows_of(), *(each.detach() for each in made.parameters())]
    assert gradgradcheck(function, [each.requires_grad_() for each in inputs], fast_mode=True)


def test_forward_derivatives_and_transformations_are_those_of_the_matrices():
    made, rows, groups = make(), rows_of(), Groups.of(INDEX, E)
    direction = torch.randn_like(rows)
    expected = multiply_densely(made, direction) - made.bias[INDEX]
    with forward_ad.dual_level():
        output = made(forward_ad.make_dual(rows, direction), groups)
        torch.testing.assert_close(forward_ad.unpack_dual(output).tangent, expected)

    def call(rows):
        return made(rows, groups)

    torch.testing.assert_close(torch.func.jvp(call, (rows,), (direction,))[1], expected)
    many = torch.stack([rows, direction])
    expected = torch.stack([multiply_densely(made, each) for each in many])
    torch.testing.assert_close(torch.func.vmap(call)(many), expected)
    slope = torch.func.grad(lambda rows: call(rows).sin().sum())(rows)
    torch.testing.assert_close(
        slope, gradients(lambda rows: multiply_densely(made, rows), made, rows)[1]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_numbers(dtype):
    half, groups, rows = make(dtype), Groups.of(INDEX, E), rows_of(dtype=dtype)
    exact = copy.deepcopy(half).double()
    expected = multiply_densely(exact, rows.double())
    assert half(rows, groups).dtype == dtype
    torch.testing.assert_close(half(rows, groups).double(), expected, rtol=0.03, atol=0.03)
    single = copy.deepcopy(half).float()
    for given in (rows, rows.float()):
        with torch.autocast("cpu", dtype=dtype):
            found = single(given, groups)
            weight = single.weight()
        assert found.dtype == given.dtype
        tolerance = 0.03 if given is rows else 1e-5
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(weight.double(), dense(exact), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True, "common"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_layer_is_the_loop_over_its_experts(gated, bias):
    torch.manual_seed(0)
    experts = low_rank_experts(gated=gated, bias=bias, dtype=torch.float64)
    for tokens in (0, 1, 9, 200):
        assert_is_the_loop(experts, routed(tokens))
    given = routed()
    found = torch.func.vmap(experts, in_dims=(0, None, None))(given[0][None], *given[1:])[0]
    torch.testing.assert_close(found, experts(*given))


@pytest.mark.parametrize("transformed", [False, True])
def test_an_expert_that_is_nan_stays_alone(transformed):
    torch.manual_seed(0)
    experts = low_rank_experts(dtype=torch.float64)
    states, index, weights = routed()
    index[index == 2] = 0
    results = []
    for value in (0.5, torch.nan):
        for each in (experts.up, experts.down):
            with torch.no_grad():
                each.outer.split(each.ranks)[2].fill_(value)
                each.inner.split([r * (each.in_features - r) for r in each.ranks])[2].fill_(value)
        call = torch.func.vmap(lambda x: experts(x, index, weights)) if transformed else None
        leaf = states.clone().requires_grad_()
        output = call(leaf[None])[0] if call else experts(leaf, index, weights)
        results.append(
            [output, *torch.autograd.grad(output.sin().sum(), [leaf, *experts.parameters()])]
        )
    for ill, well in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ill, well)


def factors_of(made):
    """Return the factors of every expert as those that a decomposition returns."""
    inner = made.inner.detach().split([r * (made.in_features - r) for r in made.ranks])
    return [
        LowRank(outer.T, part.view(rank, -1) if rank else part.view(0, H), columns.long())
        for outer, part, rank, columns in zip(
            made.outer.detach().split(made.ranks), inner, made.ranks, made.columns, strict=True
        )
    ]


class LowRank:
    def __init__(self, outer, inner, columns):
        self.outer, self.inner, self.columns = outer, inner, columns


def test_a_projection_takes_over_factors():
    made = make(torch.bfloat16, bias=False)
    taken = nn.LowRankProjection.from_factors(factors_of(made))
    assert taken.ranks == made.ranks
    assert taken.outer.dtype == torch.bfloat16
    assert taken.state_dict().keys() == made.state_dict().keys()
    for name, tensor in made.state_dict().items():
        assert torch.equal(taken.state_dict()[name], tensor)
    assert all(each.is_contiguous() for each in taken.parameters())


def test_factors_that_fit_no_matrix_are_refused():
    factors = factors_of(make())
    with pytest.raises(InputError, match="one expert at least"):
        nn.LowRankProjection.from_factors([])
    factors[1].outer = factors[1].outer[:-1]
    with pytest.raises(InputError, match=r"expert 1 must be outer .* 12×6 matrix, got \(11, 2\)"):
        nn.LowRankProjection.from_factors(factors)
    factors = factors_of(make())
    factors[3].columns[0] = factors[3].columns[1]
    with pytest.raises(InputError, match="columns of expert 3 must be all inputs from 0 to 5"):
        nn.LowRankProjection.from_factors(factors)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([1, 2, 3], "one per expert: got 3 for 4"),
        ([1, 2, 3, 7], "a 12×6 matrix has a rank of 6 at most, got 7"),
        ([1, 2, 3, -1], "every rank must be an integer of at least 0, got -1"),
        ([1, 2, 3, 0.5], "every rank must be an integer"),
        (3, "ranks must be integers, got 3"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(ranks, message):
    with pytest.raises(InputError, match=message):
        nn.LowRankProjection(E, F, H, ranks)


def test_new_numbers_have_the_variance_of_a_linear_layers():
    torch.manual_seed(0)
    made = nn.LowRankProjection(3, 400, 300, [100, 200, 300])
    variances = made.weight().detach().var((1, 2)) * 3 * 300
    torch.testing.assert_close(variances, torch.ones(3), rtol=0.05, atol=0)
    assert made.columns.tolist() == [list(range(300))] * 3


def test_copies_and_state_dicts_hold_the_columns():
    made, groups, rows = make(), Groups.of(INDEX, E), rows_of()
    expected = made(rows, groups)
    loaded = nn.LowRankProjection(E, F, H, made.ranks, bias=True, dtype=torch.float64)
    loaded.load_state_dict(made.state_dict())
    assigned = nn.LowRankProjection(E, F, H, made.ranks, bias=True, device="meta")
    assigned.load_state_dict(made.state_dict(), assign=True)
    for other in (loaded, assigned, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        torch.testing.assert_close(other(rows, groups), expected)
    assert made.to(torch.bfloat16).columns.dtype == torch.int32


class Config(PretrainedConfig):
    model_type = "low-rank"


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.experts = low_rank_projection(E, F, H)
        self.post_init()


def test_transformers_loads_the_columns(tmp_path):
    model = Model(Config())
    with torch.no_grad():
        model.experts.columns.copy_(model.experts.columns.flip(1))
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.experts.columns, model.experts.columns)
    assert loaded.experts.columns.dtype == torch.int32
    assert torch.equal(loaded.experts.inner, model.experts.inner.bfloat16())


def test_the_plan_counts_the_operations_of_a_call():
    experts = low_rank_experts()
    index = torch.arange(E)[:, None]  # as many rows for every expert
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        experts(torch.randn(E, H), index, torch.ones(E, 1))
    plan = experts.plan(E)
    assert counter.get_total_flops() == sum(step.flops for step in plan.steps)
    numbers = sum(each.numel() for each in experts.parameters())
    assert counter.get_total_flops() == 2 * numbers
    loads = [each.work_of_call(Load(1, 1, False, True)) for each in (experts.up, experts.down)]
    assert sum(each.owned_bytes for each in loads) == numbers  # 4 bytes each, by one of 4 experts


@pytest.mark.parametrize("training", [False, True])
def test_operations_without_numbers_are_those_of_evenly_routed_rows(training):
    """Only the gradient computes the product with the inner factors again."""
    counts, index = [], torch.arange(E)[:, None]

    def count(device):
        experts = low_rank_experts(device=None)
        states = torch.randn(E, H)
        given = (states, index, torch.ones(E, 1))
        experts, given = experts.to(device), [each.to(device) for each in given]
        with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
            given[0].requires_grad_(training)
            output = experts(*given)
            if training:
                output.sum().backward()
        inner = sum(experts.get_parameter(f"{name}.inner").numel() for name in ("up", "down"))
        return counter.get_total_flops(), 2 * inner

    counts = [count(device) for device in ("cpu", "meta")]
    again = counts[0][1] if training else 0
    assert counts[1][0] == counts[0][0] + again


def test_fake_tensors_get_sizes():
    with FakeTensorMode():
        made = nn.LowRankProjection(E, F, H, [0, 2, 4, 6])
        rows = torch.randn(6, H, requires_grad=True)
        output = made(rows, Groups.of(torch.zeros(6, dtype=torch.int64), E))
        output.sum().backward()
    assert output.shape == (6, F)
    assert made.inner.grad.shape == made.inner.shape


def test_a_short_text_shows_the_ranks():
    assert "ranks=0…6" in repr(make())
    assert "ranks=2)" in repr(nn.LowRankProjection(2, 3, 4, [2, 2]))


def test_experts_own_the_factors_and_share_nothing():
    up = nn.MPOProjection(E, MPOShape((3, 2, 2), (1, 2, 3)), max_bond=2)
    down = low_rank_projection(E, H, F)
    experts = nn.Experts(up, down)
    assert nn.shared_parameters(experts) == [up.center]
    assert down.owned_parameters == [down.outer, down.inner]
    nn.train_auxiliary(experts)
    assert down.outer.requires_grad
    assert down.inner.requires_grad
    assert not up.center.requires_grad

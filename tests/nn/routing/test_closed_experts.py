"""Closed experts: a router works as one that does not have them."""

import copy
import io
import warnings

import pytest
import torch

from tests.nn.routing.kinds import KINDS, E, H, all_kinds
from tnmoe import nn
from tnmoe.errors import InputError

# Groups of three in the router of the kind "deepseek" keep their size.
CLOSED = [1, 4, 6]
OPEN = [0, 2, 3, 5, 7, 8]


def pair(kind, **common):
    """Make a router of six experts, and one that has three closed ones between them."""
    plain = all_kinds(bias=True, **common)[kind]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if getattr(plain, "load_bias", None) is not None:
            plain.load_bias.value.copy_(torch.rand(E, generator=generator))
    layer = nn.MPOMoE(copy.deepcopy(plain), nn.DenseExperts(E, H, 4))
    nn.add_experts(layer, 3, like=[2, 0, 5], noise=1.0, rng=0)
    nn.reorder_experts(layer, [0, 6, 1, 2, 7, 3, 8, 4, 5])
    return plain, layer.router


def call(router, x, mask=None):
    torch.manual_seed(3)
    router.zero_grad()
    with nn.record_routing(router) as routing:
        logits, weights, index = router(x, mask)
    losses = routing.balance_loss(), routing.balance_loss(scope="sequence"), routing.z_loss()
    (sum(losses) + weights.square().sum()).backward()
    return logits, weights, index, routing, losses


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_results_losses_and_statistics_are_bit_for_bit_those_without_closed_experts(
    kind, masked, training
):
    plain, router = (each.train(training) for each in pair(kind, jitter_noise=0.1))
    x = torch.randn(2, 20, H, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(40).view(2, 20) % 7 > 0) if masked else None
    expected, found = call(plain, x, mask), call(router, x, mask)

    assert torch.equal(found[0][:, OPEN], expected[0])
    assert (found[0][:, CLOSED] == -torch.inf).all()
    assert torch.equal(found[1], expected[1])
    numbers = torch.tensor([*OPEN, router.num_experts])
    assert torch.equal(found[2], numbers[expected[2]])
    assert all(map(torch.equal, found[4], expected[4]))

    for name, parameter in plain.named_parameters():
        gradient = router.get_parameter(name).grad
        if parameter.grad is None:
            assert gradient is None
        else:
            assert torch.equal(gradient[OPEN], parameter.grad)
            assert not gradient[CLOSED].any()

    (statistics,) = nn.routing_statistics(found[3]).values()
    (of_plain,) = nn.routing_statistics(expected[3]).values()
    for name in ("load", "importance"):
        values = getattr(statistics, name)
        assert torch.equal(values[OPEN], getattr(of_plain, name))
        assert not values[CLOSED].any()
    for name in ("entropy", "dropped", "untouched", "max_violation"):
        assert torch.equal(getattr(statistics, name), getattr(of_plain, name))
    assert torch.equal(found[3].counts()[:, OPEN], expected[3].counts())


def test_load_biases_move_as_if_closed_experts_did_not_exist():
    plain, router = pair("deepseek")
    closed = router.load_bias.value[CLOSED].clone()
    for each in (plain, router):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.0)
        with nn.BiasBalancer(optimizer, each, rate=0.1):
            for step in range(3):
                x = torch.randn(30, H, generator=torch.Generator().manual_seed(step))
                each(x)[1].sum().backward()
                optimizer.step()
    assert torch.equal(router.load_bias.value[OPEN], plain.load_bias.value)
    assert torch.equal(router.load_bias.value[CLOSED], closed)


def test_opened_experts_are_experts_like_any_other():
    _, router = pair("sigmoid, not normalised")
    x = torch.randn(500, H, generator=torch.Generator().manual_seed(0))
    always = copy.deepcopy(router)
    always.open_experts = None
    layer = nn.MPOMoE(router, nn.DenseExperts(9, H, 4))
    nn.open_experts(layer, CLOSED)
    assert router.open_experts is None
    for found, expected in zip(router(x), always(x), strict=True):
        assert torch.equal(found, expected)
    assert torch.bincount(router(x)[2].flatten(), minlength=9).all()


def test_a_state_says_which_experts_are_closed():
    _, router = pair("deepseek")
    stream = io.BytesIO()
    torch.save(router.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream)
    x = torch.randn(40, H)
    for assign in (True, False):
        fresh = copy.deepcopy(router)
        fresh.open_experts = None
        fresh.load_state_dict(state, assign=assign)
        assert fresh.open_experts.tolist() == OPEN
        assert torch.equal(fresh.eval()(x)[2], router.eval()(x)[2])


def test_a_state_without_closed_experts_opens_all_of_them():
    plain, router = pair("top-1")
    state = {name: each for name, each in router.state_dict().items() if name != "open_experts"}
    assert "open_experts" not in plain.state_dict()
    router.load_state_dict(state)
    assert router.open_experts is None


def test_a_state_of_other_modules_leaves_closed_experts_closed():
    _, router = pair("top-1")
    router.load_state_dict({}, strict=False)
    assert router.open_experts.tolist() == OPEN


def test_casts_and_copies_keep_closed_experts():
    _, router = pair("shazeer")
    for moved in (copy.deepcopy(router), router.to(torch.bfloat16), router.to("meta")):
        assert moved.open_experts.dtype == torch.int64
        assert len(moved.open_experts) == len(OPEN)
    assert "open=6" in repr(router)


@pytest.mark.parametrize("kind", ["top-1", "deepseek", "expert choice"])
def test_compiled_routers_have_closed_experts(kind):
    _, router = pair(kind)
    x = torch.randn(24, H)
    compiled = torch.compile(router.eval(), backend="aot_eager")
    for found, expected in zip(compiled(x), router(x), strict=True):
        if found.shape == expected.shape:  # compiled, an expert-choice router has more choices
            torch.testing.assert_close(found, expected)
        assert not torch.isin(found, torch.tensor(CLOSED)).any() or found.is_floating_point()


def test_a_collapse_is_measured_against_the_open_experts():
    layer = nn.MPOMoE(nn.TopKRouter(H, 40), nn.DenseExperts(40, H, 4))
    nn.close_experts(layer, range(3, 40))
    history = nn.RoutingHistory(window=1)
    with nn.record_routing(layer) as routing:
        layer(torch.randn(300, H))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history.append(routing)
    layer.router.open_experts = None
    with nn.record_routing(layer) as routing:
        layer(torch.zeros(300, H))
    with pytest.warns(nn.RouterCollapseWarning, match="of 40 experts"):
        history.append(routing)
    assert history["router"]["load"].shape == (2, 40)


def test_a_history_refuses_another_number_of_experts():
    layer = nn.MPOMoE(nn.TopKRouter(H, 4), nn.DenseExperts(4, H, 4))
    history = nn.RoutingHistory()

    def append():
        with nn.record_routing(layer) as routing:
            layer(torch.randn(30, H))
        history.append(routing)

    append()
    nn.add_experts(layer)
    with pytest.raises(InputError, match="router router had 4 experts and has 5 now"):
        append()
    assert len(history["router"]["load"]) == 1


@pytest.mark.parametrize("kind", ["top-1", "shazeer", "deepseek", "expert choice"])
def test_closed_experts_under_transforms(kind):
    plain, router = (each.eval() for each in pair(kind))
    x = torch.randn(3, 12, H)

    def weights(router):
        return torch.vmap(lambda one: router(one)[1])(x)

    def slope(router):
        return torch.func.grad(lambda given: router(given)[1].square().sum())(x)

    for function in (weights, slope):
        torch.testing.assert_close(function(router), function(plain))

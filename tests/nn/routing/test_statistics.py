"""Statistics of routing against counting by hand, their history, its warning and its pictures."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tnmoe as tn
from tnmoe import nn, plot

E = 4


@given(st.integers(0, 200), st.integers(1, 3), st.booleans())
def test_statistics_are_what_counting_gives(seed, k, masked):
    torch.manual_seed(seed)
    router = nn.TopKRouter(8, E, k, capacity_factor=0.7)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(3, 7, 8)
    mask = torch.rand(3, 7) < 0.7
    mask[0, 0] = True
    with nn.record_routing(router) as routing:
        logits, _, index = router(x, mask) if masked else router(x)
    found = nn.routing_statistics(routing)[""]
    real = mask.flatten().tolist() if masked else [True] * 21
    chosen, probabilities = logits.topk(k).indices.tolist(), logits.detach().softmax(-1).double()
    tokens = [t for t in range(21) if real[t]]
    slots = [expert for t in tokens for expert in chosen[t]]
    load = [slots.count(e) / len(slots) for e in range(E)]
    got = [expert for t in tokens for expert in index[t].tolist()]
    expected = {
        "load": load,
        "importance": probabilities[tokens].mean(0).tolist(),
        "entropy": -float((probabilities[tokens] * probabilities[tokens].log()).sum(1).mean()),
        "dropped": got.count(E) / len(got),
        "untouched": sum((index[t] == E).all().item() for t in tokens) / len(tokens),
        "max_violation": E * max(load) - 1,
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), torch.tensor(value), rtol=1e-4, atol=1e-5)


def test_tokens_that_no_expert_takes_are_counted_for_expert_choice():
    router = nn.ExpertChoiceRouter(8, E, 0.5)
    with nn.record_routing(router) as routing:
        _, _, index = router(torch.randn(40, 8))
    found = nn.routing_statistics(routing)[""]
    torch.testing.assert_close(found.load, torch.full((E,), 1 / E))
    assert found.untouched == pytest.approx((index == E).all(1).float().mean().item())
    assert found.untouched >= 0.5 - 1e-6  # a mean of float32
    assert found.dropped == 0


@pytest.mark.parametrize("seed", range(20))
def test_what_is_not_dropped_is_not_counted_as_dropped_by_rounding(seed):
    torch.manual_seed(seed)
    router = nn.TopKRouter(8, 6, 2)
    with nn.record_routing(router) as routing:
        router(torch.randn(48, 8))
    assert nn.routing_statistics(routing)[""].dropped == 0


def two_layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        *(nn.MPOMoE(nn.TopKRouter(8, E), nn.DenseExperts(E, 8, 8)) for _ in range(2))
    )


def test_tokens_of_several_calls_of_a_router_are_taken_together():
    layer = two_layers()[0]
    batches = torch.randn(7, 8), torch.randn(0, 8), torch.randn(2, 8)
    with nn.record_routing(layer) as several:
        for batch in batches:
            layer(batch)
    with nn.record_routing(layer) as one:
        layer(torch.cat(batches))
    ours, whole = (nn.routing_statistics(each)["router"] for each in (several, one))
    for name in ("load", "importance", "entropy", "untouched"):
        torch.testing.assert_close(getattr(ours, name), getattr(whole, name))


def test_statistics_are_those_of_the_routers_scores_and_in_single_precision():
    router = nn.TopKRouter(8, E, 2, score_function="sigmoid")
    history = nn.RoutingHistory()
    with torch.autocast("cpu", torch.bfloat16):
        with nn.record_routing(router) as routing:
            logits, _, _ = router(torch.randn(500, 8))
        history.append(routing)
    scores = logits.detach().sigmoid() / logits.detach().sigmoid().sum(-1, keepdim=True)
    np.testing.assert_allclose(history[""]["importance"][0], scores.mean(0), rtol=1e-5)


def test_a_history_holds_every_statistic_of_every_router_by_step():
    model, history = two_layers(), nn.RoutingHistory()
    last = None
    for _ in range(3):
        with nn.record_routing(model) as routing:
            model(torch.randn(5, 8))
        history.append(routing)
        last = nn.routing_statistics(routing)
    assert list(history) == ["0.router", "1.router"]
    assert len(history) == 2
    for name in history:
        arrays = history[name]
        assert arrays["load"].shape == arrays["importance"].shape == (3, E)
        for each in ("entropy", "dropped", "untouched", "max_violation"):
            assert arrays[each].shape == (3,)
        np.testing.assert_allclose(arrays["load"][-1], last[name].load)
    with pytest.raises(tn.InputError, match=r"no router 'x' was recorded, only \['0.router'"):
        history["x"]


def collapsed(router):
    with torch.no_grad():
        router.weight.zero_()
        router.weight[1] = 5
    return router


def record(history, router, steps):
    for _ in range(steps):
        with nn.record_routing(router) as routing:
            router(torch.rand(30, 8))
        history.append(routing)


def test_a_collapse_is_warned_about_once():
    history = nn.RoutingHistory(window=10)
    router = collapsed(nn.TopKRouter(8, E))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(history, router, 9)
        with pytest.raises(nn.RouterCollapseWarning, match=r"used about 1.0 of 4 experts"):
            record(history, router, 1)
        record(history, router, 30)


def test_a_router_that_spreads_tokens_over_steps_has_not_collapsed():
    # Every step has its own expert, but together they use all.
    history = nn.RoutingHistory(window=8)
    router = nn.TopKRouter(8, E)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(16):
            with torch.no_grad():
                router.weight.zero_()
                router.weight[step % E] = 5
            record(history, router, 1)
        # Nor has one whose tokens need all experts, or one that saw nothing but padding.
        for experts in (4, 8, 10, 64):
            record(nn.RoutingHistory(window=4), nn.TopKRouter(8, experts, experts), 4)
        record(nn.RoutingHistory(window=4), nn.ExpertChoiceRouter(8, 8, 8), 4)
        history = nn.RoutingHistory(window=2)
        for _ in range(2):
            with nn.record_routing(router) as routing:
                router(torch.rand(6, 8), torch.zeros(6))
            history.append(routing)


@pytest.mark.parametrize(("used", "warns"), [(1, True), (2, False)])
def test_a_collapse_is_an_eighth_of_the_experts_that_tokens_could_do_without(used, warns):
    # Of 12 experts, 1 + 11 / 8 = 2.4 are hardly more than the one that a token needs.
    router, history = nn.TopKRouter(8, 12), nn.RoutingHistory(window=4)
    with torch.no_grad():
        router.weight.zero_()
        for expert in range(used + 1):
            router.weight[expert, expert] = 9
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            with nn.record_routing(router) as routing:
                router(torch.eye(8)[: used + 1].repeat(10, 1))
            history.append(routing)
    assert any(each.category is nn.RouterCollapseWarning for each in caught) == warns


def test_only_the_last_steps_are_looked_at():
    history, router = nn.RoutingHistory(window=8), nn.TopKRouter(8, E)
    record(history, router, 40)
    with pytest.warns(nn.RouterCollapseWarning, match="in the last 8 steps"):
        record(history, collapsed(router), 8)


def test_histories_are_drawn():
    model, history = two_layers(), nn.RoutingHistory()
    for _ in range(4):
        with nn.record_routing(model) as routing:
            model(torch.randn(5, 8))
        history.append(routing)
    ax = plot.routing_statistic(history, "entropy")
    assert len(ax.lines) == 2
    np.testing.assert_allclose(ax.lines[1].get_ydata(), history["1.router"]["entropy"])
    ax = plot.load_history(history, "0.router")
    np.testing.assert_allclose(ax.images[0].get_array(), history["0.router"]["load"].T)
    for call, message in (
        (lambda: plot.routing_statistic(history, "load"), "statistic must be one of entropy, "),
        (lambda: plot.load_history(history, "2.router"), r"routers \['2.router'\] were not"),
        (lambda: plot.routing_statistic(nn.RoutingHistory()), r"routers \[\] were not recorded"),
    ):
        with pytest.raises(tn.InputError, match=message):
            call()

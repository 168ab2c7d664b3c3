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
    wanted, probabilities = logits.topk(k).indices.tolist(), logits.detach().softmax(-1).double()
    tokens = [t for t in range(21) if real[t]]
    asked = [expert for t in tokens for expert in wanted[t]]
    load = [asked.count(e) / len(asked) for e in range(E)]
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
    assert found.untouched >= 0.5
    assert found.dropped == pytest.approx(0, abs=1e-6)


def two_layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        *(nn.MPOMoE(nn.TopKRouter(8, E), nn.DenseExperts(E, 8, 8)) for _ in range(2))
    )


def test_calls_of_the_same_router_are_averaged():
    layer = two_layers()[0]
    batches = torch.randn(2, 5, 8)
    with nn.record_routing(layer) as both:
        for batch in batches:
            layer(batch)
    loads = []
    for batch in batches:
        with nn.record_routing(layer) as one:
            layer(batch)
        loads.append(nn.routing_statistics(one)["router"].load)
    torch.testing.assert_close(
        nn.routing_statistics(both)["router"].load, torch.stack(loads).mean(0)
    )


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
        # Nor has one whose tokens need all experts.
        record(nn.RoutingHistory(window=4), nn.TopKRouter(8, E, E), 8)


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

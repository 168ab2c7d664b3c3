"""NaN and infinity stay where they are: with one expert's tokens, with one token, with padding."""

from itertools import product

import pytest
import torch

from tnmoe import nn
from tnmoe.nn.compute import grouped as grouped_module
from tnmoe.nn.compute.slots import Groups
from tnmoe.nn.mpo_projection import MPOProjection

E, H, F = 4, 6, 8
KINDS = {
    "dense experts": lambda **more: nn.DenseExperts(E, H, F, **more),
    "interleaved": lambda **more: nn.MPOExperts(E, H, F, sites=3, **more),
    "split": lambda **more: nn.MPOExperts(E, H, F, layout="split", **more),
    "nothing shared": lambda **more: nn.MPOExperts(E, H, F, sites=2, shared_sites="none", **more),
    "two of three shared": lambda **more: nn.MPOExperts(
        E, H, F, sites=3, shared_sites=(0, 1), **more
    ),
    "centre owned": lambda **more: nn.MPOExperts(E, H, F, sites=3, shared_sites=(0,), **more),
}
SICK = 2


def make(kind, route=None, gated=False, bias=True):
    torch.manual_seed(0)
    experts = KINDS[kind](gated=gated, bias=bias, activation="gelu").double()
    for name, parameter in experts.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    for module in experts.modules():
        if isinstance(module, MPOProjection):
            module.route = route
    return experts


def owned(experts):
    """Return the parameters that have an expert axis."""
    return {name: each for name, each in experts.named_parameters() if len(each) == E}


def routed(avoid=None):
    """Route tokens to all experts but one."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(12, H, generator=generator, dtype=torch.float64)
    scores = torch.rand(12, E, generator=generator, dtype=torch.float64)
    if avoid is not None:
        scores[:, avoid] = -1
    weights, index = scores.topk(2)
    return states, index, weights


def run(experts, states, index, weights, transformed=False):
    """Return the output, and gradients by name."""
    states, weights = (each.clone().requires_grad_() for each in (states, weights))

    def call(states, weights):
        return experts(states, index, weights)

    output = (
        torch.func.vmap(call)(states[None], weights[None])[0]
        if transformed
        else call(states, weights)
    )
    named = {"states": states, "weights": weights, **dict(experts.named_parameters())}
    visible = output[~output.isnan().any(1)]
    grads = torch.autograd.grad(visible.sin().sum(), named.values(), materialize_grads=True)
    return output.detach(), dict(zip(named, grads, strict=True))


def spoil(experts, value):
    """Fill all parameters of one expert."""
    with torch.no_grad():
        for parameter in owned(experts).values():
            parameter[SICK] = value


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("route", ["rebuilt", "joint", "per_expert", None, "transformed"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_that_no_token_visits_changes_nothing(kind, route, gated, value):
    transformed, route = route == "transformed", None if route == "transformed" else route
    given = routed(avoid=SICK)
    expected, grads = run(make(kind, route, gated), *given)
    sick = make(kind, route, gated)
    spoil(sick, value)
    output, found = run(sick, *given, transformed)
    torch.testing.assert_close(output, expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, grads[name], msg=name)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("route", ["rebuilt", "joint", "per_expert", None, "transformed"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_other_experts_do_not_see_a_sick_one(kind, route, gated):
    transformed, route = route == "transformed", None if route == "transformed" else route
    states, index, weights = routed()
    well = (index != SICK).all(1)
    assert well.any()
    assert not well.all()
    expected, grads = run(make(kind, route, gated), states[well], index[well], weights[well])
    sick = make(kind, route, gated)
    spoil(sick, torch.nan)
    output, found = run(sick, states, index, weights, transformed)
    torch.testing.assert_close(output[well], expected)
    assert output[~well].isnan().all()
    torch.testing.assert_close(found["states"][well], grads["states"])
    torch.testing.assert_close(found["weights"][well], grads["weights"])
    others = [expert for expert in range(E) if expert != SICK]
    for name in owned(sick):
        torch.testing.assert_close(found[name][others], grads[name][others], msg=name)


@pytest.mark.parametrize("route", ["rebuilt", "joint", "per_expert", "cached", None])
@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_too(kind, route):
    states, index, weights = routed()
    well = (index != SICK).all(1)
    sick = make(kind, route)
    with torch.no_grad():
        expected = sick(states, index, weights)
        spoil(sick, torch.inf)
        torch.testing.assert_close(sick(states, index, weights)[well], expected[well])


def test_one_expert_after_the_other_does_not_mix_them():
    torch.manual_seed(0)
    experts = nn.MPOExperts(E, 16, 4096, sites=3, max_bond=2, bias=True)
    index = torch.randint(0, E, (1200, 1))
    states, weights = torch.randn(1200, 16), torch.ones(1200, 1)
    with torch.no_grad():
        expected = experts(states, index, weights)
        spoil(experts, torch.nan)
        states[0] = torch.nan
        output = experts(states, index, weights)
    well = index[:, 0] != SICK
    well[0] = False
    torch.testing.assert_close(output[well], expected[well])


@pytest.mark.parametrize("route", ["rebuilt", "joint", "per_expert", None, "transformed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_is_nan_stays_alone(kind, route):
    transformed, route = route == "transformed", None if route == "transformed" else route
    states, index, weights = routed()
    index[0] = torch.tensor([SICK, SICK + 1])
    expected, grads = run(make(kind, route), states[1:], index[1:], weights[1:])
    states[0] = torch.nan
    output, found = run(make(kind, route), states, index, weights, transformed)
    assert output[0].isnan().all()
    torch.testing.assert_close(output[1:], expected)
    torch.testing.assert_close(found["states"][1:], grads["states"])
    for name in owned(make(kind)):
        torch.testing.assert_close(found[name][:SICK], grads[name][:SICK], msg=name)


@pytest.mark.parametrize(
    ("kind", "compiled"),
    [
        *product(["dense experts", "interleaved", "split", "centre owned"], [False]),
        *product(["dense experts", "centre owned"], [True]),  # the compiler takes seconds
    ],
)
def test_slots_without_an_expert_give_zeros_whatever_is_in_them(kind, compiled):
    states, index, weights = routed(avoid=E - 1)
    index[0, 1] = index[3] = E
    expected, grads = run(make(kind), states, index, weights.masked_fill(index == E, 0))
    # NaN in the last expert, which has no tokens, and in a token and weights without an expert.
    sick = make(kind)
    with torch.no_grad():
        for parameter in owned(sick).values():
            parameter[-1] = torch.nan
    states[3], weights[0, 1], weights[3] = torch.nan, torch.nan, torch.inf
    if compiled:
        sick.compile(backend="aot_eager", fullgraph=True)
    output, found = run(sick, states, index, weights)
    torch.testing.assert_close(output, expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, grads[name], msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 2, "capacity_factor": 0.5},
        {"top_k": 2, "capacity_factor": 0.5, "normalize": False},
        {"top_k": 1, "capacity_factor": 0.5},
        {"top_k": 2, "second_expert": "threshold", "second_threshold": 0.45},
        {"top_k": 2, "score_function": "sigmoid", "load_bias": True},
    ],
)
def test_a_layer_keeps_a_sick_token_and_padding_to_themselves(settings):
    torch.manual_seed(0)
    layer = nn.MPOMoE(nn.TopKRouter(H, E, **settings), make("interleaved").float())
    states = torch.randn(12, H)
    mask = torch.ones(12)
    mask[[3, 7]] = 0
    expected = layer(states, mask)
    states[3], states[7] = torch.nan, torch.inf
    torch.testing.assert_close(layer(states, mask), expected)
    # The last token does not use up capacity.
    states[11] = torch.nan
    torch.testing.assert_close(layer(states, mask)[:11], expected[:11])


def test_losses_and_statistics_do_not_see_tokens_that_do_not_count():
    torch.manual_seed(0)
    router, mask = nn.TopKRouter(H, E, top_k=2), torch.ones(12)
    mask[3] = 0
    states, found = torch.randn(12, H), []
    for value in (0.0, torch.nan):
        states[3] = value
        with nn.record_routing(router) as routing:
            router(states)
        losses = [
            routing.balance_loss(mask, scope="batch"),
            routing.balance_loss(mask, form="gshard"),
            routing.z_loss(mask),
        ]
        slopes = torch.autograd.grad(losses[0] + losses[2], routing.calls[0].logits)
        (statistics,) = nn.routing_statistics(routing, mask).values()
        found.append([*losses, *slopes, *vars(statistics).values()])
    for well, sick in zip(*found, strict=True):
        torch.testing.assert_close(sick, well)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_on_an_accelerator_have_the_gradients_of_their_own_rows(dtype, monkeypatch):
    monkeypatch.setattr(grouped_module, "_on_cuda", lambda array: True)
    torch.manual_seed(0)
    groups = Groups.of(torch.tensor([0, 0, 0, 2, 2, 3]), 4)
    table = torch.randn(4, 16).to(dtype).requires_grad_()
    slopes = torch.randn(6, 16).to(dtype)
    slopes[4] = torch.nan
    (gradient,) = torch.autograd.grad(grouped_module.per_row(table, groups), table, slopes)
    expected = torch.zeros(4, 16).index_add(0, groups.experts, slopes.float())
    torch.testing.assert_close(
        gradient.float(),
        expected,
        equal_nan=True,
        rtol=1e-2 if dtype.itemsize == 2 else 1e-6,
        atol=1e-2,
    )
    assert gradient[2].isnan().all()
    assert gradient[[0, 1, 3]].isfinite().all()

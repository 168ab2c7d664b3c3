"""A layer made of a pretrained feed-forward network starts as that network."""

import pytest
import torch
from torch.nn import functional

from tnmoe import InputError, MPOShape, nn

HIDDEN, INNER = 24, 36
ACTIVATIONS = {"gelu": functional.gelu, "silu": functional.silu}


def pretrained(gated, biased, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)

    def numbers(*size):
        return (torch.randn(*size, generator=draw) / size[-1] ** 0.5).to(dtype)

    given = {"up": numbers(INNER, HIDDEN), "down": numbers(HIDDEN, INNER)}
    if gated:
        given["gate"] = numbers(INNER, HIDDEN)
    if biased:
        given |= {f"{name}_bias": numbers(len(matrix)) for name, matrix in given.items()}
    return given


def network(x, given, activation):
    def linear(name, x):
        return functional.linear(x, given[name], given.get(f"{name}_bias"))

    if "gate" in given:
        inner = ACTIVATIONS[activation](linear("gate", x)) * linear("up", x)
    else:
        inner = ACTIVATIONS[activation](linear("up", x))
    return linear("down", inner)


@pytest.mark.parametrize("layout", ["interleaved", "split", "dense"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_layer_computes_what_the_network_computes(layout, gated, biased, top_k):
    given = pretrained(gated, biased)
    layer = nn.MPOMoE.from_dense(
        **given, num_experts=4, top_k=top_k, layout=layout, activation="gelu"
    )
    x = torch.randn(2, 5, HIDDEN)
    torch.testing.assert_close(layer(x), network(x, given, "gelu"), rtol=1e-4, atol=1e-4)
    kind = nn.DenseExperts if layout == "dense" else nn.MPOExperts
    assert type(layer.experts) is kind
    assert (layer.router.num_experts, layer.router.top_k) == (4, top_k)


@pytest.mark.parametrize("layout", ["interleaved", "split", "hidden", "residual", "dense"])
def test_modules_stand_for_their_matrices_and_biases(layout):
    up = torch.nn.Linear(HIDDEN, INNER, dtype=torch.float64)
    down = torch.nn.Linear(INNER, HIDDEN, dtype=torch.float64)
    layer = nn.MPOMoE.from_dense(up, down, num_experts=4, top_k=2, layout=layout, activation="gelu")
    assert layer.router.weight.dtype == torch.float64
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), down(functional.gelu(up(x))))
    if layout in ("hidden", "residual"):
        assert layer.experts.up.base is up
        assert layer.experts.down.base is down


def test_settings_of_experts_router_and_layer_arrive_where_they_belong():
    layer = nn.MPOMoE.from_dense(
        **pretrained(gated=True, biased=True, dtype=torch.float64),
        num_experts=3,
        sites=2,
        max_bond=4,
        shared_sites={"up": "none"},
        common_bias=True,
        dropout=0.25,
        output_dropout=0.5,
        router={"jitter_noise": 0.1, "bias": True},
    )
    assert layer.experts.up.shape == MPOShape.for_matrix(INNER, HIDDEN, 2)
    assert layer.experts.down.center.shape[-1] <= 4
    assert layer.experts.up.shared_sites == frozenset()
    assert layer.experts.up.bias.shape == (1, INNER)
    assert (layer.experts.dropout, layer.dropout) == (0.25, 0.5)
    assert layer.router.jitter_noise == 0.1
    assert {each.dtype for each in layer.parameters()} == {torch.float64}


def test_noise_makes_experts_differ_and_a_seed_reproduces_it():
    first, second = (
        nn.MPOMoE.from_dense(**pretrained(False, False), sites=3, noise=0.1, rng=3).experts
        for _ in range(2)
    )
    weight = first.up.weight()
    assert not torch.allclose(weight[0], weight[1])
    torch.testing.assert_close(second.up.weight(), weight)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"layout": "ring"},
            InputError,
            "layout must be one of interleaved, split, hidden, residual, dense",
        ),
        ({"top_k": 9}, InputError, "top_k=9 exceeds num_experts=8"),
        ({"num_experts": 0}, InputError, "num_experts must be a positive integer"),
        ({"up": torch.ones(3, 5)}, InputError, r"up and gate must be \(F, H\) and down \(H, F\)"),
        ({"up": torch.nn.Linear(2, 2)}, InputError, r"got up \(2, 2\), down \(24, 36\)"),
        ({"up": torch.nn.ReLU()}, InputError, "must be linear, .*; got ReLU"),
        ({"up": 3.0}, InputError, "up must be a Tensor or a linear Module, got a float"),
        ({"layout": "dense", "sites": 3}, TypeError, "sites"),
        ({"router": {"magic": 1}}, TypeError, "magic"),
    ],
)
def test_what_does_not_fit_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        nn.MPOMoE.from_dense(**{**pretrained(False, False), **arguments})


@pytest.mark.parametrize("layout", ["interleaved", "split", "hidden", "residual", "dense"])
def test_training_leaves_matrices_that_were_given_as_they_are(layout):
    given = pretrained(gated=True, biased=True)
    before = {name: tensor.clone() for name, tensor in given.items()}
    layer = nn.MPOMoE.from_dense(**given, num_experts=4, layout=layout, activation="gelu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 1
    for name, tensor in given.items():
        assert torch.equal(tensor, before[name]), name

"""Slots that go through in chunks give what they give together, in every mode of torch."""

import copy
from dataclasses import fields

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.nn.layouts import (
    LAYOUTS,
    E,
    H,
    assert_all_close,
    assert_is_the_loop,
    assert_within_rounding,
    call,
    from_linear,
    linear_loss,
    loop,
    make,
    results,
    routed,
)
from tnmoe.nn.compute import slot_chunks, slot_sums
from tnmoe.nn.compute.slots import Groups

# Layouts all of whose projections act once per token in part.
CHUNKED = [kind for kind in LAYOUTS if kind.startswith(("hidden", "residual"))]
FEW = ["hidden, ragged groups", "hidden, bonds of 1.3", "residual", "residual, end shared"]


@pytest.fixture
def chunks(request, monkeypatch):
    """Make every call go through in chunks of 2 rows; return the numbers of rows so far.

    The backward pass computes the chunks again, or with True takes those of the forward pass.
    """
    is_kept = getattr(request, "param", False)
    monkeypatch.setattr(slot_sums, "_LAST_LEVEL_CACHE", -1)
    monkeypatch.setattr(slot_sums, "_FEW_SLOTS", -1)
    monkeypatch.setattr(slot_chunks, "_KEPT", 1 << 62 if is_kept else -1)
    sizes, of_one_expert, init = [], Groups.of_one_expert, slot_chunks._Chunks.__init__
    names = [field.name for field in fields(slot_chunks._Chunks)]

    def counted(rows, device):
        sizes.append(rows)
        return of_one_expert(rows, device)

    def small(self, *values):
        init(self, **dict(zip(names, values, strict=True)) | {"step": 2})

    monkeypatch.setattr(Groups, "of_one_expert", counted)
    monkeypatch.setattr(slot_chunks._Chunks, "__init__", small)
    return sizes


BOTH = pytest.mark.parametrize("chunks", [False, True], indirect=True)


def together(experts, states, index, weights):
    """Run without chunks."""
    limit = slot_sums._LAST_LEVEL_CACHE
    slot_sums._LAST_LEVEL_CACHE = 1 << 30
    try:
        return experts(states, index, weights)
    finally:
        slot_sums._LAST_LEVEL_CACHE = limit


@BOTH
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", CHUNKED)
def test_chunks_are_the_loop(kind, gated, chunks):
    for bias in (False, True, "common"):
        assert_is_the_loop(make(kind, gated=gated, bias=bias), routed())
    assert_is_the_loop(from_linear(kind, gated=gated, common_bias=gated), routed(top_k=3))
    assert set(chunks) == {1, 2}


@pytest.mark.parametrize("kind", FEW)
def test_slots_without_an_expert_are_in_no_chunk(kind, chunks):
    experts = from_linear(kind, gated=True)
    states, index, weights = routed(tokens=7)
    index[1, 0] = index[3] = index[6] = E
    with torch.no_grad():
        expected = loop(experts, states, index, weights)
        states[3], weights[1, 0], weights[6] = torch.nan, torch.nan, torch.inf
    output = experts(states, index, weights)
    torch.testing.assert_close(output, expected)
    assert (output[[3, 6]] == 0).all()
    output.sin().sum().backward()
    assert sum(chunks) == 2 * 9
    index[:] = E
    assert (experts(states, index, weights) == 0).all()
    assert sum(chunks) == 2 * 9


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", FEW)
def test_half_precision_in_chunks_is_within_rounding(kind, dtype, chunks):
    for way in ("autocast", "cores"):
        own = torch.float32 if way == "autocast" else dtype
        experts, given = from_linear(kind, gated=True, dtype=own), routed(dtype=own)
        with torch.autocast("cpu", dtype, enabled=way == "autocast"):
            found = results(call, experts, given, linear_loss)
        assert {each.dtype for each in found} == {own}
        full, exact = copy.deepcopy(experts).double(), [each.to(torch.double) for each in given]
        exact[1] = given[1]
        assert_within_rounding(found, results(loop, full, exact, linear_loss), dtype)
    assert chunks


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", FEW)
def test_derivatives_of_every_order_are_those_of_finite_differences(kind, gated, chunks):
    experts, (states, index, weights) = make(kind, gated=gated, bias=True), routed(tokens=4)
    names = [name for name, _ in experts.named_parameters()]

    def function(states, weights, *parameters):
        for name, value in zip(names, parameters, strict=True):
            holder, _, last = name.rpartition(".")
            experts.get_submodule(holder)._parameters[last] = value
        return experts(states, index, weights)

    parameters = [each.detach().clone().requires_grad_() for each in experts.parameters()]
    given = states.requires_grad_(), weights.requires_grad_(), *parameters
    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)
    assert chunks


@BOTH
@pytest.mark.parametrize("frozen", ["weights", "states", "base", "own", "everything but weights"])
@pytest.mark.parametrize("kind", FEW)
def test_gradient_penalties_with_frozen_parts_are_those_of_the_loop(kind, frozen, chunks):
    found = []
    for function in (call, loop):
        experts, (states, index, weights) = from_linear(kind, gated=True), routed(tokens=4)
        freeze(experts, frozen)
        states.requires_grad_(frozen not in ("states", "everything but weights"))
        weights.requires_grad_(frozen != "weights")
        leaves = [each for each in (states, weights, *experts.parameters()) if each.requires_grad]
        output = function(experts, states, index, weights)
        first = torch.autograd.grad(
            output.sin().sum(), leaves, create_graph=True, materialize_grads=True
        )
        penalty = sum(each.square().sum() for each in first)
        found.append([*first, *torch.autograd.grad(penalty, leaves, materialize_grads=True)])
    assert chunks
    assert_all_close(*found)


def freeze(experts, what):
    for name, parameter in experts.named_parameters():
        is_base = ".base." in name
        if what == "everything but weights" or what == ("base" if is_base else "own"):
            parameter.requires_grad_(False)


@BOTH
@pytest.mark.parametrize("frozen", ["weights", "states", "base", "own", "everything but weights"])
@pytest.mark.parametrize("kind", FEW)
def test_what_is_frozen_gets_no_gradient_and_takes_no_work(kind, frozen, chunks, monkeypatch):
    wanted, grad = [], torch.autograd.grad
    experts, (states, index, weights) = from_linear(kind, gated=True), routed()
    freeze(experts, frozen)
    states.requires_grad_(frozen not in ("states", "everything but weights"))
    weights.requires_grad_(frozen != "weights")
    expected = loop(experts, states, index, weights).sin().sum()
    leaves = [each for each in (states, weights, *experts.parameters()) if each.requires_grad]
    expected = grad(expected, leaves)
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: wanted.append(len(a[1])) or grad(*a, **k)
    )
    experts(states, index, weights).sin().sum().backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)
    for each in (states, weights, *experts.parameters()):
        assert (each.grad is None) == (not each.requires_grad)
    # Of every chunk, gradients of rows and of cores and biases that experts own.
    most = {"everything but weights": 0, "own": 4}.get(frozen, torch.inf)
    assert max(wanted, default=0) <= most


class Scaled(torch.nn.Module):
    def __init__(self, frozen=False):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.scale.requires_grad_(not frozen)

    def forward(self, x):
        return torch.tanh(self.scale * x)


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("how", ["module", "function"])
def test_an_activation_with_parameters_trains_them(kind, how, chunks):
    scaled = Scaled()
    activation = scaled if how == "module" else lambda x: scaled(x)
    experts, (states, index, weights) = make(kind, activation=activation), routed()
    experts(states, index, weights).sin().sum().backward()
    found = scaled.scale.grad.clone()
    scaled.scale.grad = None
    loop(experts, states, index, weights).sin().sum().backward()
    torch.testing.assert_close(found, scaled.scale.grad)
    with torch.no_grad():
        torch.testing.assert_close(
            experts(states, index, weights), loop(experts, states, index, weights)
        )


@pytest.mark.parametrize("kind", FEW)
def test_an_activation_with_parameters_is_tried_in_their_dtype(kind, chunks):
    experts, (states, index, weights) = make(kind, activation=torch.nn.PReLU()).double(), routed()
    states, weights = states.double(), weights.double()
    torch.testing.assert_close(
        experts(states, index, weights), loop(experts, states, index, weights)
    )


@pytest.mark.parametrize(
    "activation",
    [
        torch.nn.RReLU(),
        torch.nn.Sequential(torch.nn.GELU(), torch.nn.Dropout(0.5)),
        lambda x: torch.rrelu(x, training=True),
        lambda x: torch.nn.functional.dropout(torch.sigmoid(x), 0.5),
        lambda x: x * torch.rand_like(x),
    ],
    ids=["RReLU", "Dropout", "rrelu", "dropout", "noise"],
)
@pytest.mark.parametrize("kind", FEW)
def test_a_random_activation_draws_the_same_in_both_passes(kind, activation, chunks):
    experts, (states, index, weights) = make(kind, activation=activation), routed()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    output = experts(states, index, weights.requires_grad_())
    output.sum().backward()
    # The output is linear in the weights.
    torch.testing.assert_close((weights.grad * weights).sum(), output.sum())
    torch.set_rng_state(state)
    torch.testing.assert_close(together(experts, states, index, weights), output)


@pytest.mark.parametrize("kind", FEW)
def test_dropout_drops_the_same_in_both_passes(kind, chunks):
    experts, (states, index, weights) = make(kind, dropout=0.5), routed()
    output = experts(states, index, weights.requires_grad_())
    output.sum().backward()
    torch.testing.assert_close((weights.grad * weights).sum(), output.sum())
    assert not chunks
    experts.eval()
    experts(states, index, weights).sum().backward()
    assert chunks


@BOTH
@pytest.mark.parametrize("kind", FEW)
def test_a_second_backward_pass_gives_the_same_gradients(kind, chunks):
    experts = from_linear(kind, gated=True)
    loss = experts(*routed()).sin().sum()
    first, second = (
        torch.autograd.grad(loss, [*experts.parameters()], retain_graph=True) for _ in range(2)
    )
    assert_all_close(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", FEW)
def test_checkpointing_gives_the_same_gradients(kind, reentrant, chunks):
    experts = from_linear(kind, gated=True)

    def checkpointed(experts, *given):
        return checkpoint(experts, *given, use_reentrant=reentrant)

    found = []
    for function in (checkpointed, loop):
        states, index, weights = routed()
        experts.zero_grad()
        states.requires_grad_(), weights.requires_grad_()
        function(experts, states, index, weights).sin().sum().backward()
        found.append([states.grad, weights.grad, *(each.grad for each in experts.parameters())])
    assert chunks
    assert_all_close(*found)


@BOTH
@pytest.mark.parametrize("kind", FEW)
def test_saved_tensor_hooks_see_what_is_saved(kind, chunks):
    experts, packed = from_linear(kind, gated=True), []

    def pack(tensor):
        packed.append(tensor.numel())
        return tensor.numpy() if not tensor.requires_grad else tensor.detach().numpy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        found = results(call, experts, routed())
    assert packed
    assert_all_close(found, results(loop, experts, routed()))


@pytest.mark.parametrize("kind", FEW)
def test_deterministic_mode_is_respected(kind, chunks):
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (results(call, make(kind, gated=True), routed()) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_all_close(first, second, rtol=0, atol=0)
    assert chunks


@BOTH
@pytest.mark.parametrize("kind", FEW)
def test_activations_that_ignore_an_input_give_it_no_gradient(kind, chunks):
    for gated, activation in (
        (True, lambda gate: torch.sigmoid(gate).detach()),
        (True, torch.ones_like),
        (False, torch.ones_like),
    ):
        experts = make(kind, gated=gated, bias=True, activation=activation)
        assert_is_the_loop(experts, routed())
    assert chunks


@pytest.mark.parametrize("kind", FEW)
def test_an_output_that_no_loss_uses_and_tokens_that_no_expert_has(kind, chunks):
    experts = from_linear(kind)
    states, index, weights = routed(tokens=0)
    assert experts(states, index, weights).shape == (0, H)
    output = experts(*routed())
    (output[:, :0]).sum().backward()
    assert all(each.grad is None or not each.grad.any() for each in experts.parameters())


@BOTH
@pytest.mark.parametrize("kind", FEW)
def test_a_graph_that_is_kept_goes_backward_twice_and_notices_changed_cores(kind, chunks):
    experts, (states, index, weights) = from_linear(kind, gated=True), routed()
    loss = experts(states.requires_grad_(), index, weights).sin().sum()
    first = torch.autograd.grad(loss, [states, *experts.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [states, *experts.parameters()], retain_graph=True)
    assert_all_close(first, second, rtol=0, atol=0)
    with torch.no_grad():
        experts.up.owned_parameters[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert chunks

"""Moments of a calibration, added up slot by slot, and what the choice of layouts makes of them."""

import pytest
import torch

from tests.hf.mixtures import make, tokens
from tnmoe import hf
from tnmoe.hf.calibration import layer_around
from tnmoe.hf.compress import collect_moments
from tnmoe.hf.compression_plan import LayerWeights, MatrixOptions, choose
from tnmoe.hf.ordinary import find_ordinary
from tnmoe.nn.activations import resolve_activation

CONFIG = hf.CompressionConfig(keep=0.5, layout="low_rank")


def slots_of(model, batches):
    """Yield token by token (its input, the output of its layer, pairs of expert and weight)."""
    (each, *_) = find_ordinary(model)
    seen, streams = [], []
    hooks = [
        each.module.register_forward_pre_hook(
            lambda _, args, named: seen.append((*args, *named.values())), with_kwargs=True
        ),
        model.get_submodule(layer_around(each.name)).register_forward_hook(
            lambda _, __, out: streams.append(out[0] if isinstance(out, tuple) else out)
        ),
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    for (states, index, weights), stream in zip(seen, streams, strict=True):
        rows = stream.reshape(-1, stream.shape[-1])
        for token in range(len(states)):
            pairs = list(zip(index[token].tolist(), weights[token].tolist(), strict=True))
            yield states[token].double(), rows[token].double(), pairs


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_moments_are_sums_over_slots_and_tokens(name):
    model, batches = make(name), list(tokens(4, 7)[:, None])
    (each, *_) = find_ordinary(model)
    found = collect_moments(model, [each], [{"input_ids": b} for b in batches], CONFIG)[each.name]
    stacks = {key: value.detach().double() for key, value in each.matrices.items()}
    biases = {key: value.detach().double() for key, value in each.biases.items()}
    activation = resolve_activation(each.settings()["activation"], gated=True)
    inputs, inner, outputs = (torch.zeros(n, n).double() for n in (32, stacks["up"].shape[1], 32))
    shares, separate, stream, slots = torch.zeros(len(stacks["up"])).double(), 0.0, 0.0, 0
    for state, layer, pairs in slots_of(model, batches):
        total = torch.zeros(32).double()
        for expert, weight in pairs:
            sides = [
                stacks[side][expert] @ state + (biases[side][expert] if biases else 0)
                for side in ("gate", "up")
            ]
            hidden = weight * activation(*sides)
            output = stacks["down"][expert] @ hidden
            inputs += weight**2 * torch.outer(state, state)
            inner += torch.outer(hidden, hidden)
            shares[expert] += weight**2 * state @ state
            separate += float(output @ output)
            total, slots = total + output, slots + 1
        outputs += torch.outer(total, total)
        stream += float(layer @ layer)
    for made, expected in (
        (found.inputs, inputs),
        (found.inner, inner),
        (found.outputs, outputs),
        (found.shares, shares / shares.sum()),
    ):
        torch.testing.assert_close(made.double(), expected, rtol=1e-4, atol=1e-8)
    assert found.slots == slots
    assert found.separate == pytest.approx(separate, rel=1e-4)
    assert found.stream == pytest.approx(stream, rel=1e-4)
    assert found.energy == pytest.approx(float(outputs.trace()) / stream, rel=1e-4)
    expected = min(1.0, separate / float(outputs.trace()))
    assert found.independence == pytest.approx(expected, rel=1e-4)


def test_experts_that_say_the_same_add_up_and_their_errors_count_less_if_independent():
    model = make("mixtral")
    (each, *_) = find_ordinary(model)
    with torch.no_grad():
        for parameter in each.module.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    found = collect_moments(model, [each], [{"input_ids": tokens(4, 7)}], CONFIG)[each.name]
    assert 0.5 <= found.independence < 0.9  # two experts with weights that sum to 1
    weights = LayerWeights(found, 0.01)
    assert weights.factor("hidden") == LayerWeights(None, 0.01).factor("low_rank") == 1
    assert weights.factor("low_rank") == weights.factor("residual") == found.independence


def test_the_layer_that_counts_more_gets_more_parameters():
    options = [
        MatrixOptions(layer, "up", (4, 10, 10), ("hidden",) * 3, (2, 4, 6), (100, 200, 300), errors)
        for layer in ("first", "second")
        for errors in [(0.6, 0.4, 0.2)]
    ]
    for energies in ((1.0, 0.1), (0.1, 1.0)):
        chosen = choose(options, energies, hf.CompressionConfig(keep=0.5), 400)
        params = [choice.num_params for choice in chosen]
        assert params == ([300, 100] if energies[0] > energies[1] else [100, 300])


def test_damping_keeps_directions_that_the_text_did_not_show():
    errors = []
    for damping in (0.001, 0.9):
        config = hf.CompressionConfig(keep=0.5, layout="hidden", damping=damping)
        _, report = hf.compress(make("mixtral"), config, [tokens(1, 6)], return_report=True)
        errors.append(sum(matrix.error for matrix in report.matrices))
    assert errors[1] < 0.95 * errors[0]

"""Moments of a calibration, added up slot by slot, and what the choice of layouts makes of them."""

import copy
import dataclasses

import pytest
import torch

from tests.hf.mixtures import make, tokens
from tnmoe import hf
from tnmoe.hf.calibration import MomentsCollector, Needs, layer_around
from tnmoe.hf.compress import collect_moments, needs_of, options_of_mixture
from tnmoe.hf.compression_plan import ProjectionOptions, choose, form_of
from tnmoe.hf.compression_weights import LayerWeights
from tnmoe.hf.ordinary import find_ordinary
from tnmoe.nn.activations import resolve_activation

CONFIG = hf.CompressionConfig(keep=0.5, layout="low_rank")
LAYOUTS = ("hidden", "residual", "low_rank")


def slots_of(model, each, calls):
    """Yield token by token (its input, the output of its layer, pairs of expert and weight)."""
    seen, streams = [], []
    hooks = [
        each.module.register_forward_pre_hook(
            lambda _, args, named: seen.append(each.format.choices(*args, *named.values())),
            with_kwargs=True,
        ),
        model.get_submodule(layer_around(each.name)).register_forward_hook(
            lambda _, __, out: streams.append(out[0] if isinstance(out, tuple) else out)
        ),
    ]
    with torch.no_grad():
        for call in calls:
            model(**call)
    for hook in hooks:
        hook.remove()
    for (states, index, weights), stream in zip(seen, streams, strict=True):
        states, rows = states.reshape(-1, states.shape[-1]), stream.reshape(-1, stream.shape[-1])
        index, weights = (each.reshape(len(states), -1) for each in (index, weights))
        for token in range(len(states)):
            pairs = list(zip(index[token].tolist(), weights[token].tolist(), strict=True))
            yield states[token].double(), rows[token].double(), pairs


def output_of(activation, down, sides, rows):
    return down @ activation(*rows.chunk(sides))


@pytest.mark.parametrize("moments", ["expert", "layer"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "switch"])
def test_moments_are_sums_over_slots_and_tokens(name, moments):
    model, batches = make(name), list(tokens(4, 7)[:, None])
    (each, *_) = find_ordinary(model)
    config = dataclasses.replace(CONFIG, moments=moments)
    calls = [{"input_ids": batch} for batch in batches]
    if name == "switch":
        calls = [{**call, "decoder_input_ids": call["input_ids"]} for call in calls]
    found = collect_moments(model, [each], calls, config)[each.name]
    stacks = {key: value.detach().double() for key, value in each.matrices.items()}
    biases = {key: value.detach().double() for key, value in each.biases.items()}
    names = [side for side in ("gate", "up") if side in stacks]
    activation = resolve_activation(each.settings()["activation"], gated=len(names) == 2)
    experts, inner_size = stacks["up"].shape[:2]
    inputs, inner, written = (torch.zeros(experts, n, n).double() for n in (32, inner_size, 32))
    outputs, rows = torch.zeros(32, 32).double(), torch.zeros(experts, len(names) * inner_size)
    rows, weights = rows.double(), torch.zeros(experts).double()
    separate, stream, slots = 0.0, 0.0, 0
    for state, layer, pairs in slots_of(model, each, calls):
        total = torch.zeros(32).double()
        for expert, weight in pairs:
            if expert == experts:
                continue
            sides = [
                stacks[side][expert] @ state + (biases[side][expert] if biases else 0)
                for side in names
            ]
            hidden = weight * activation(*sides)
            output = stacks["down"][expert] @ hidden
            derivatives = torch.func.jacfwd(
                lambda row, expert=expert: (
                    stacks["down"][expert] @ activation(*row.chunk(len(names)))
                )
            )(torch.cat(sides))
            rows[expert] += weight**2 * derivatives.square().sum(0)
            weights[expert] += weight**2
            inputs[expert] += weight**2 * torch.outer(state, state)
            inner[expert] += torch.outer(hidden, hidden)
            written[expert] += torch.outer(output, output)
            separate += float(output @ output)
            total, slots = total + output, slots + 1
        outputs += torch.outer(total, total)
        stream += float(layer @ layer)
    met = weights > 0
    means = rows[met] / weights[met, None]
    rows = torch.where(met[:, None], rows / weights.clamp_min(1e-300)[:, None], means.mean(0))
    shares = inputs.diagonal(dim1=1, dim2=2).sum(1)
    squares = float(inner.diagonal(dim1=1, dim2=2).sum())
    # Of inputs and outputs of down, the smaller moments of experts are kept.
    if moments == "layer":
        inputs, inner = inputs.sum(0, keepdim=True), inner.sum(0, keepdim=True)
    elif inner_size > 32:
        inner = torch.zeros(1, 0, 0).double()
    if moments == "layer" or inner_size <= 32:
        written = torch.zeros(experts, 0, 0).double()
    for made, expected in (
        (found.inputs, inputs),
        (found.inner, inner),
        (found.own_outputs, written),
        (found.rows, rows),
        (found.outputs, outputs),
        (found.shares, shares / shares.sum()),
    ):
        torch.testing.assert_close(made.double(), expected, rtol=1e-4, atol=1e-8)
    assert found.slots == slots
    assert found.gates == (inner_size if "gate" in stacks else 0)
    assert found.inner_squares == pytest.approx(squares, rel=1e-4)
    assert found.separate == pytest.approx(separate, rel=1e-4)
    assert found.stream == pytest.approx(stream, rel=1e-4)
    expected = min(1.0, separate / float(outputs.trace()))
    assert found.independence == pytest.approx(expected, rel=1e-4)


def test_moments_of_outputs_say_what_those_of_inputs_say_about_down():
    model = make("mixtral")
    (each, *_) = find_ordinary(model)
    calls, found = [{"input_ids": tokens(16, 20)}], []
    for needs in (needs_of(CONFIG), Needs(own=True, down=True, base=True)):
        collector = MomentsCollector(model, [each], needs)
        with collector.collecting(), torch.no_grad():
            for call in calls:
                model(**call)
        found.append(collector.moments()[each.name])
    assert found[0].inner.numel() == 0
    assert found[1].inner.shape == (1, 48, 48)
    # By hand: moments of the inputs of every expert.
    inner = torch.zeros(4, 48, 48)
    matrices = each.matrices
    for state, _, pairs in slots_of(model, each, calls):
        for expert, weight in pairs:
            gate, up = (matrices[side][expert].double() @ state for side in ("gate", "up"))
            hidden = weight * torch.nn.functional.silu(gate) * up
            inner[expert] += torch.outer(hidden, hidden).float()
    of_inputs = dataclasses.replace(found[0], inner=inner, own_outputs=torch.zeros(4, 0, 0))
    down, made = matrices["down"].detach(), []
    for moments in (found[0], of_inputs):
        form = form_of(down, "down", "low_rank", LayerWeights(moments, 0.01))
        made.append((form.squared_errors, form.decompose(down, (0, 5, 17, 32))))
    (errors, factors), (expected, others) = made
    torch.testing.assert_close(torch.tensor(errors), torch.tensor(expected), rtol=1e-3, atol=1e-6)
    for one, other in zip(factors, others, strict=True):
        torch.testing.assert_close(one.matrix(), other.matrix(), rtol=1e-3, atol=1e-5)


def test_an_expert_that_met_no_token_keeps_the_mean_rows_and_some_rank():
    model = make("mixtral")
    (each, *_) = find_ordinary(model)
    with torch.no_grad():
        gate = model.model.layers[0].mlp.gate.weight
        gate[2] = 0
        gate[[0, 1, 3]] = 10 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).abs()
    states = torch.rand(40, 32) + 0.1  # all positive: expert 2 always has the smallest score
    index, weights = model.model.layers[0].mlp.gate(states)[2], torch.ones(40, 2)
    collector = MomentsCollector(model, [each], needs_of(CONFIG))
    with collector.collecting(), torch.no_grad():
        each.module(states, index, weights)
        collector._sums[each.name]["stream"] = 1.0
    found = collector.moments()[each.name]
    assert found.shares[2] == 0
    assert not found.inputs[2].any()
    torch.testing.assert_close(found.rows[2], found.rows[[0, 1, 3]].mean(0))
    options = options_of_mixture(each, found, CONFIG)
    for option in options:
        large = max(range(len(option.params)), key=option.params.__getitem__)
        assert option.bonds[large][2] > 0
        *others, own = sorted(range(4), key=lambda expert: expert == 2)
        mean = [sum(ranks[expert] for ranks in option.bonds) for expert in (*others, own)]
        assert mean[-1] < 0.8 * min(mean[:-1])


def test_experts_that_say_the_same_add_up_and_their_errors_count_less_if_independent():
    model = make("mixtral")
    (each, *_) = find_ordinary(model)
    with torch.no_grad():
        for parameter in each.module.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    found = collect_moments(model, [each], [{"input_ids": tokens(4, 7)}], CONFIG)[each.name]
    assert 0.5 <= found.independence < 0.9  # two experts with weights that sum to 1
    losses = {layout: LayerWeights(found, 0.01).loss(layout) for layout in LAYOUTS}
    assert losses["hidden"] == found.energy
    assert losses["low_rank"] == losses["residual"] == found.independence * found.energy
    assert {LayerWeights(None, 0.01).loss(layout) for layout in LAYOUTS} == {1.0}


def test_rows_count_as_much_as_the_outputs_depend_on_them():
    """The predicted error of small changes is that of the outputs, where inputs are alike."""
    model = make("mixtral")
    model.set_experts_implementation("eager")
    (each, *_) = find_ordinary(model)
    calls = [{"input_ids": tokens(16, 20)}]
    found = collect_moments(model, [each], calls, CONFIG)[each.name]
    matrices = each.projections()["gate_up"].detach()
    draw, losses = torch.Generator().manual_seed(0), []
    before = copy.deepcopy(each.module).double()
    slots, changed = list(slots_of(model, each, calls)), copy.deepcopy(before)
    heavy = found.rows.argsort(1, descending=True)
    for rows in (heavy[:, :10], heavy[:, -10:]):
        noise = torch.zeros_like(matrices)
        for expert, chosen in enumerate(rows):
            noise[expert, chosen] = 1e-3 * torch.randn(10, 32, generator=draw)
        missed = ((noise.double() @ found.inputs.double()) * noise.double()).sum(2)
        predicted, lost = float((missed * found.rows).sum()), 0.0
        with torch.no_grad():
            changed.gate_up_proj.copy_(matrices.double() + noise.double())
            for state, _, pairs in slots:
                for expert, weight in pairs:
                    arguments = state[None], torch.tensor([[expert]]), torch.ones(1, 1).double()
                    made, given = (module(*arguments) for module in (changed, before))
                    lost += weight**2 * float((made - given).square().sum())
        losses.append((predicted, lost))
    for predicted, lost in losses:
        assert predicted == pytest.approx(lost, rel=0.4)  # Kronecker factors are no identity
    assert losses[0][1] > 3 * losses[1][1]


@pytest.mark.parametrize("name", ["gate_up", "gate", "up"])
def test_predicted_errors_weigh_inputs_and_rows_both_damped(name):
    """Against singular values of dense matrices, expert by expert."""
    (each, *_), calls = find_ordinary(model := make("mixtral")), [{"input_ids": tokens(16, 20)}]
    found = collect_moments(model, [each], calls, CONFIG)[each.name]
    matrices = {**each.matrices, **each.projections()}[name].detach()
    form = form_of(matrices, name, "low_rank", LayerWeights(found, 0.2))
    rows = {"gate_up": found.rows, "gate": found.rows[:, :48], "up": found.rows[:, 48:]}[name]
    rows = 0.8 * rows / rows.mean() + 0.2
    mean = found.inputs.double().diagonal(dim1=1, dim2=2).mean()
    inputs = 0.8 * found.inputs.double() / mean + 0.2 * torch.eye(32).double()
    white = rows.sqrt()[:, :, None] * matrices.double() @ torch.linalg.cholesky(inputs)
    squares = torch.linalg.svdvals(white).square()
    for rank in (0, 3, 20):
        expected = squares[:, rank:].sum(1)
        predicted = torch.tensor([errors[rank] for errors in form.squared_errors])
        torch.testing.assert_close(predicted.double(), expected, rtol=1e-6, atol=0)


def test_predicted_errors_of_shared_parts_weigh_inputs_shares_and_rows():
    (each, *_), calls = find_ordinary(model := make("mixtral")), [{"input_ids": tokens(16, 20)}]
    found = collect_moments(model, [each], calls, CONFIG)[each.name]
    matrices, weights = each.projections()["gate_up"].detach(), LayerWeights(found, 0.2)
    shares, total = 0.8 * found.shares + 0.2 / 4, found.inputs.double().sum(0)
    inputs = 0.8 * total * 32 / total.trace() + 0.2 * torch.eye(32).double()
    root, rows = torch.linalg.cholesky(inputs), 0.8 * found.rows / found.rows.mean() + 0.2
    # One basis: all matrices one below another.
    stacked = ((shares[:, None] * rows).sqrt()[:, :, None] * matrices.double() @ root).flatten(0, 1)
    tail = torch.linalg.svdvals(stacked)[7:].square().sum()
    basis = form_of(matrices, "gate_up", "hidden", weights)
    assert basis.squared_errors[7] == pytest.approx(float(tail), rel=1e-5)
    # One matrix: the mean, with the mean weights of rows.
    common = (shares[:, None] * rows).sum(0)
    mean = (shares[:, None, None] * matrices.double()).sum(0)
    missed = common.sqrt()[:, None] * (matrices.double() - mean) @ root
    tails = (torch.linalg.svdvals(missed).square()[:, 5:].sum(1) * shares).sum()
    base = form_of(matrices, "gate_up", "residual", weights)
    assert base.squared_errors[5] == pytest.approx(float(tails), rel=1e-5)


def test_the_layer_that_counts_more_gets_more_parameters():
    for first, second in ((1.0, 0.1), (0.1, 1.0)):
        options = [
            ProjectionOptions(
                layer, "up", (4, 10, 10), ("hidden",) * 3, (2, 4, 6), (100, 200, 300),
                errors, tuple(factor * error**2 for error in errors),
            )
            for layer, factor in (("first", first), ("second", second))
            for errors in [(0.6, 0.4, 0.2)]
        ]  # fmt: skip
        chosen = choose(options, hf.CompressionConfig(keep=0.5), 400)
        params = [choice.num_params for choice in chosen]
        assert params == ([300, 100] if first > second else [100, 300])


def test_damping_keeps_directions_that_the_text_did_not_show():
    errors = []
    for damping in (0.001, 0.9):
        config = hf.CompressionConfig(keep=0.5, layout="hidden", damping=damping)
        _, report = hf.compress(make("mixtral"), config, [tokens(1, 6)], return_report=True)
        errors.append(sum(matrix.error for matrix in report.matrices))
    assert errors[1] < 0.99 * errors[0]


def test_an_activation_may_change_its_inputs_in_place():
    model = make("mixtral")
    for each in find_ordinary(model):
        each.module.act_fn = torch.nn.ReLU(inplace=True)
    found = collect_moments(model, find_ordinary(model), [{"input_ids": tokens()}], CONFIG)
    for each in find_ordinary(model):
        each.module.act_fn = torch.nn.ReLU()
    expected = collect_moments(model, find_ordinary(model), [{"input_ids": tokens()}], CONFIG)
    for name, moments in expected.items():
        torch.testing.assert_close(found[name].rows, moments.rows)
        torch.testing.assert_close(found[name].inner, moments.inner)


def test_autocast_changes_no_dtype_of_moments():
    model = make("mixtral")
    experts, calls = find_ordinary(model), [{"input_ids": tokens()}]
    expected = collect_moments(model, experts, calls, CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        found = collect_moments(model, experts, calls, CONFIG)
    for name, moments in expected.items():
        assert found[name].outputs.dtype == torch.float32
        torch.testing.assert_close(found[name].rows, moments.rows, rtol=0.2, atol=0)


def test_damping_keeps_an_expert_that_met_no_token_from_being_free():
    model = make("mixtral")
    (each, *_) = find_ordinary(model)
    config = dataclasses.replace(CONFIG, moments="layer", keep=0.3)
    found = collect_moments(model, [each], [{"input_ids": tokens()}], config)[each.name]
    idle = dataclasses.replace(found, shares=torch.tensor([0.5, 0.5, 0.0, 0.0]))
    matrices = each.projections()["down"]
    assert LayerWeights(idle, 0.0).shares(matrices) == [0.5, 0.5, 0, 0]
    assert LayerWeights(idle, 0.2).shares(matrices) == pytest.approx([0.45, 0.45, 0.05, 0.05])
    for option in options_of_mixture(each, idle, dataclasses.replace(config, damping=0.2)):
        large = max(range(len(option.params)), key=option.params.__getitem__)
        assert min(option.bonds[large]) > 0


def test_padding_is_no_part_of_the_stream():
    model, ids = make("mixtral"), tokens()
    experts, mask = find_ordinary(model), torch.ones(2, 29, dtype=torch.int64)
    mask[:, 9:] = 0
    padded = {"input_ids": torch.cat([ids, ids.new_zeros(2, 20)], dim=1), "attention_mask": mask}
    expected = collect_moments(model, experts, [{"input_ids": ids}], CONFIG)
    found = collect_moments(model, experts, [padded], CONFIG)
    for name, moments in expected.items():
        assert found[name].stream == pytest.approx(moments.stream, rel=1e-4)
        assert found[name].energy == pytest.approx(moments.energy, rel=1e-4)

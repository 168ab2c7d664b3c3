"""Mixtures made smaller: the same function where it can be, the best of its size elsewhere."""

import copy
import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.hf.mixtures import MIXTURES, call, give_common_bases, logits, make, relative, tokens
from tnmoe import InputError, hf, nn
from tnmoe.hf.ordinary import find_ordinary

CONFIG = hf.CompressionConfig(keep=0.7)


def text(name, count=16, length=20):
    return [call(name, each[None]) for each in tokens(count, length, seed=7)]


def test_auto_loses_no_more_than_any_layout_by_its_own_measure():
    """That is the sum of squared predicted errors of outputs, in a single layer."""
    losses = {}
    for layout in ("auto", "hidden", "residual", "low_rank"):
        config = hf.CompressionConfig(keep=0.7, layout=layout, layers=[0])
        _, report = hf.compress(make("mixtral"), config, text("mixtral"), return_report=True)
        losses[layout] = sum(matrix.weighted_error**2 for matrix in report.matrices)
    assert losses["auto"] <= min(losses.values()) * (1 + 1e-9)


@pytest.mark.parametrize("calibrated", [True, False])
def test_experts_near_each_other_share_a_matrix(calibrated):
    """As after upcycling. Alone, each of them would need its full rank."""
    model = make("mixtral")
    for experts in find_ordinary(model):
        for stack in experts.matrices.values():
            noise = 0.01 * torch.randn(stack.shape, generator=torch.Generator().manual_seed(0))
            stack.data.copy_(stack[:1] * (1 + noise))
    given = text("mixtral") if calibrated else None
    config = hf.CompressionConfig(keep=0.45)
    before = logits(model, "mixtral")
    small, report = hf.compress(model, config, given, return_report=True)
    layouts = {matrix.layout for matrix in report.matrices}
    assert "residual" in layouts
    assert layouts <= {"residual", None}  # what fits as it is stays
    assert max(matrix.error for matrix in report.matrices) < 0.015
    assert relative(logits(small, "mixtral"), before) < 0.02


def matrices_of(model):
    return {
        each.name: {name: stack.detach().clone() for name, stack in each.matrices.items()}
        for each in find_ordinary(model)
    }


@pytest.mark.parametrize("name", MIXTURES)
def test_at_bonds_that_suffice_the_function_stays_and_parameters_go(name):
    model = make(name)
    give_common_bases(model, 10)
    before, known = logits(model, name), sum(p.numel() for p in model.parameters())
    small, report = hf.compress(model, hf.CompressionConfig(rtol=1e-5), return_report=True)
    assert {matrix.bond for matrix in report.matrices} == {10}
    assert max(matrix.error for matrix in report.matrices) < 1e-5
    assert relative(logits(small, name), before) < 1e-4
    saved = report.params_before - report.params_after
    assert sum(p.numel() for p in small.parameters()) == known - saved
    assert saved > 0


def test_generation_is_the_same_at_bonds_that_suffice():
    model = make("qwen3_moe")
    give_common_bases(model, 10)
    settings = {"max_new_tokens": 12, "do_sample": False}
    before = model.generate(tokens(), **settings)
    small = hf.compress(model, hf.CompressionConfig(rtol=1e-5))
    assert torch.equal(small.generate(tokens(), **settings), before)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(
    "layout",
    [
        "auto",
        pytest.param("hidden", marks=pytest.mark.slow),
        pytest.param("residual", marks=pytest.mark.slow),
        pytest.param("low_rank", marks=pytest.mark.slow),
    ],
)
def test_a_compressed_model_is_saved_and_loaded_and_becomes_ordinary_again(name, layout, tmp_path):
    config = hf.CompressionConfig(keep=0.7, layout=layout)
    small, report = hf.compress(make(name), config, text(name), return_report=True)
    assert report.params_after <= 0.7 * report.params_before
    assert hf.compression_of(small) == config
    expected = logits(small, name)
    small.save_pretrained(tmp_path / "small")
    loaded = hf.from_pretrained(tmp_path / "small")
    assert type(loaded) is type(small)
    assert relative(logits(loaded, name), expected) < 1e-6
    ordinary = hf.to_moe(small)
    assert relative(logits(ordinary, name), expected) < 1e-5
    ordinary.save_pretrained(tmp_path / "moe")
    again = type(ordinary).from_pretrained(tmp_path / "moe")
    assert relative(logits(again, name), expected) < 1e-5
    if name != "own":
        assert type(ordinary) is type(small)
        assert "tnmoe" not in json.loads((tmp_path / "moe" / "config.json").read_text())


def test_auto_classes_load_a_compressed_folder_whole_or_in_part(tmp_path):
    small = hf.compress(make("mixtral"), CONFIG)
    small.save_pretrained(tmp_path)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative(logits(whole, "mixtral"), logits(small, "mixtral")) < 1e-6
    part = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(part.layers[0].mlp.experts) is nn.MPOExperts
    torch.testing.assert_close(part.state_dict(), small.model.state_dict())


def test_the_calibration_lowers_the_error_of_outputs_for_its_text():
    """The inputs of the first mixture are the same whatever is compressed."""
    config = hf.CompressionConfig(keep=0.5, layers=[0])
    batches = text("mixtral", 64)
    errors = []
    for calibration in (None, batches):
        model = make("mixtral")
        experts = find_ordinary(model)[0]
        seen = []
        hook = experts.module.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args)
        )
        with torch.no_grad():
            for batch in batches:
                model(**batch)
            hook.remove()
            given = [experts.module(*args) for args in seen]
            small = hf.compress(model, config, calibration)
            made = small.model.layers[0].mlp.experts
            pairs = zip(seen, given, strict=True)
            errors.append(sum(float((made(*a) - b).square().sum()) for a, b in pairs))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "switch"])
def test_the_weighted_error_is_that_of_outputs_for_the_calibrated_inputs(name):
    """For ``down`` of a single layer, summed up token by token without tnmoe's moments."""
    model = make(name)
    each = find_ordinary(model)[0]
    config = hf.CompressionConfig(
        keep=0.6, layers=[0], matrices=["down"], layout="hidden", damping=0.0
    )
    batches = text(name, 8)
    before, biases, activation = each.matrices, each.biases, each.settings()["activation"]
    before = {key: value.detach().clone() for key, value in before.items()}
    _, report = hf.compress(copy.deepcopy(model), config, batches, return_report=True)
    small = hf.compress(copy.deepcopy(model), config, batches)
    inputs = []
    hook = each.module.register_forward_pre_hook(
        lambda _, args, named: inputs.append(each.format.choices(*args, *named.values())),
        with_kwargs=True,
    )
    with torch.no_grad():
        for batch in batches[:7]:  # the eighth one is held out
            model(**batch)
    hook.remove()
    made = dict(small.named_modules())[each.name].down.weight()
    missed = total = 0.0
    for states, index, weights in inputs:
        states = states.reshape(-1, states.shape[-1])
        output, lost = torch.zeros_like(states), torch.zeros_like(states)
        for token, slot in torch.ones_like(index).nonzero().tolist():
            expert = int(index[token, slot])
            if expert == len(made):
                continue
            sides = [
                states[token] @ before[side][expert].T + biases.get(side, {expert: 0})[expert]
                for side in ("gate", "up")
                if side in before
            ]
            gated = nn.activations.resolve_activation(activation, gated=len(sides) == 2)
            inner = weights[token, slot] * gated(*sides)
            output[token] += before["down"][expert] @ inner
            lost[token] += (before["down"] - made)[expert] @ inner
        total += float(output.square().sum())
        missed += float(lost.square().sum())
    (matrix,) = report.matrices
    assert matrix.weighted_error == pytest.approx((missed / total) ** 0.5, rel=1e-3)


def test_matrices_and_layers_that_are_not_chosen_stay_bit_for_bit():
    model = make("qwen3_moe")
    before = matrices_of(model)
    config = hf.CompressionConfig(
        keep=0.5, layout="hidden", layers=r"layers\.1\.", matrices=["up", "down"]
    )
    small = hf.compress(model, config)
    first, second = (layer.mlp.experts for layer in small.model.layers)
    assert type(first).__name__ == "Qwen3MoeExperts"
    assert torch.equal(second.gate.weight(), before["model.layers.1.mlp.experts"]["gate"])
    assert type(second.up) is type(second.down) is nn.HiddenProjection


def test_a_limit_in_bytes_bounds_the_whole_model():
    model = make("mixtral").to(torch.bfloat16)
    whole = sum(p.numel() * p.itemsize for p in model.parameters())
    limit = int(0.8 * whole)
    small = hf.compress(model, hf.CompressionConfig(num_bytes=limit))
    size = sum(p.numel() * p.itemsize for p in small.parameters())
    assert 0.97 * limit < size <= limit
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("layout", ["auto", "hidden", "residual", "low_rank"])
def test_the_budget_holds_and_the_error_falls_with_it(keep, layout):
    model = make("olmoe")
    config = hf.CompressionConfig(keep=keep, layout=layout)
    if keep < 0.5 and layout == "residual":  # the common matrix has a quarter
        with pytest.raises(InputError, match="they can have"):
            hf.compress(model, config)
        return
    _, report = hf.compress(model, config, return_report=True)
    assert report.params_after <= keep * report.params_before
    if keep == 1:
        assert {matrix.error for matrix in report.matrices} == {0.0}


def test_routers_losses_are_those_of_the_class():
    small = hf.compress(make("mixtral"), CONFIG).train()
    ids = tokens()
    output = small(ids, labels=ids, output_router_logits=True)
    assert output.aux_loss is not None
    plain = small(ids, labels=ids)
    expected = plain.loss + small.config.router_aux_loss_coef * output.aux_loss
    assert torch.isclose(output.loss, expected)


def test_a_compressed_model_trains():
    small = hf.compress(make("mixtral"), hf.CompressionConfig(keep=0.4), text("mixtral")).train()
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    ids = tokens(4, 16)
    losses = []
    for _ in range(25):
        loss = small(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    experts = small.model.layers[0].mlp.experts
    assert all(parameter.grad is not None for parameter in experts.parameters())


def test_a_token_beyond_the_capacity_of_switch_gets_nothing():
    model = make("switch")
    give_common_bases(model, 10)
    block = model.encoder.block[1].layer[1].mlp
    rows = torch.randn(1, 1, 32).expand(1, 7, 32)  # all want one expert, which takes four
    before = block(rows)
    hf.compress(model, hf.CompressionConfig(rtol=1e-5))
    after = block(rows)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-5)
    assert not after[0, 4:].any()
    assert after[0, :4].all()


def test_a_model_is_left_alone_if_its_last_mixture_has_infinity():
    model = make("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0, 0, 0] = float("inf")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        InputError, match=r"down matrices of model.layers.1.* contain NaN or infinity"
    ):
        hf.compress(model, CONFIG)
    torch.testing.assert_close(model.state_dict(), before)
    assert not hasattr(model.config, "tnmoe")


def test_losses_of_routers_count_in_no_perplexity():
    model, batches = make("mixtral"), text("mixtral")
    model.config.output_router_logits = True
    _, report = hf.compress(model, hf.CompressionConfig(keep=1), batches, return_report=True)
    expected = [float(make("mixtral")(**each, labels=each["input_ids"]).loss) for each in batches]
    assert report.loss_before == pytest.approx((expected[7] + expected[15]) / 2, rel=1e-5)


def test_a_mixture_without_the_chosen_matrices_is_refused():
    config = hf.CompressionConfig(keep=0.5, matrices=["gate"])
    with pytest.raises(InputError, match="names no matrix of the network, which has up, down"):
        hf.compress(make("switch"), config)


def test_a_text_on_which_numbers_overflow_is_refused():
    model = make("mixtral")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] = float("inf")
    with pytest.raises(InputError, match=r"layers.0.*inputs or outputs that are NaN"):
        hf.compress(model, CONFIG, text("mixtral"))


def test_the_modes_and_the_callers_configuration_stay():
    model = make("mixtral").train()
    model.model.norm.eval()
    given = model.config
    small = hf.compress(model, CONFIG, text("mixtral"))
    assert small.training
    assert not small.model.norm.training
    assert small.model.layers[0].mlp.experts.training
    assert not hasattr(given, "tnmoe")
    transformers.MixtralForCausalLM(given)  # builds an ordinary model


def test_the_report_prints_a_table_and_has_perplexities():
    seen = []
    _, report = hf.compress(
        make("mixtral"), CONFIG, text("mixtral"), on_matrix=seen.append, return_report=True
    )
    assert seen == list(report.matrices)
    printed = str(report)
    assert "model.layers.0.mlp.experts" in printed
    assert re.search(r"perplexity of held-out text: [\d.]+ before, [\d.]+ after", printed)
    assert json.loads(json.dumps(report.to_dict()))["params"]["after"] == report.params_after
    assert 1 < report.perplexity_before < 2 * 64


def test_padding_counts_in_no_moment():
    ids = tokens(8, 20)
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    padded = [{"input_ids": ids, "attention_mask": mask}]
    short = [{"input_ids": ids[:, :10]}]
    one = hf.compress(make("mixtral"), CONFIG, padded)
    other = hf.compress(make("mixtral"), CONFIG, short)
    assert relative(logits(one, "mixtral"), logits(other, "mixtral")) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of keep, num_bytes and rtol, got none"),
        ({"keep": 0.5, "rtol": 0.1}, r"got keep=0.5, rtol=0.1"),
        ({"keep": 0}, r"keep must be in \(0, 1\]"),
        ({"keep": 1.5}, "keep must be in"),
        ({"num_bytes": 0}, "num_bytes must be a positive integer"),
        ({"rtol": 1}, "rtol must be in"),
        ({"keep": 0.5, "layout": "split"}, "layout must be one of"),
        ({"keep": 0.5, "matrices": ["left"]}, "matrices must be some of"),
        ({"keep": 0.5, "layers": "("}, "not a regular expression"),
        ({"keep": 0.5, "damping": 2}, "damping must be in"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(InputError, match=message):
        hf.CompressionConfig(**settings)


def test_a_configuration_survives_json():
    config = hf.CompressionConfig(num_bytes=10**9, layers=[3, 1], matrices=["up"])
    data = json.loads(json.dumps(config.to_dict()))
    assert hf.CompressionConfig.from_dict(data) == config
    with pytest.raises(InputError, match=r"unknown entries.*'size'"):
        hf.CompressionConfig.from_dict({"keep": 0.5, "size": 3})


def test_a_folder_that_would_not_load_is_not_saved(tmp_path):
    """Where the record does not name all experts that share cores, or names ordinary ones."""
    small = hf.compress(make("mixtral"), CONFIG)
    recorded = small.config.tnmoe["compression"]["experts"]
    name, structures = recorded.popitem()
    with pytest.raises(InputError, match=f"{name} .* shares cores, but its configuration does not"):
        small.save_pretrained(tmp_path)
    recorded[name] = structures
    small.get_submodule(name.rpartition(".")[0]).experts = make("mixtral").get_submodule(name)
    with pytest.raises(InputError, match=f"{name} are compressed experts, but they are ordinary"):
        small.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("_apply_gate", lambda self, inner: inner, "has the gate of MixtralExperts"),
        ("has_post_expert_norm", True, "has a norm after every expert"),
    ],
)
def test_experts_that_do_more_are_refused(attribute, value, message, monkeypatch):
    model = make("mixtral")
    experts = model.model.layers[1].mlp.experts
    owner = experts if attribute in vars(experts) else type(experts)
    monkeypatch.setattr(owner, attribute, value)
    with pytest.raises(InputError, match=message):
        hf.compress(model, CONFIG)


def test_what_cannot_be_compressed_is_refused():
    dense = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2,
        )
    )  # fmt: skip
    with pytest.raises(InputError, match="no ordinary mixture of experts"):
        hf.compress(dense, CONFIG)
    small = hf.compress(make("mixtral"), CONFIG)
    with pytest.raises(InputError, match="are made of cores already"):
        hf.compress(small, CONFIG)
    with pytest.raises(InputError, match="was compressed and not converted"):
        hf.average_experts(small)
    with pytest.raises(InputError, match="was compressed and not converted"):
        hf.config_of(small)
    with pytest.raises(InputError, match="not a compressed model"):
        hf.compression_of(make("mixtral"))
    with pytest.raises(TypeError, match="CompressionConfig"):
        hf.compress(make("mixtral"), 0.7)
    with pytest.raises(TypeError, match="model of transformers"):
        hf.compress(torch.nn.Linear(2, 2), CONFIG)
    with pytest.raises(InputError, match="selects none of the 2 mixtures"):
        hf.compress(make("mixtral"), hf.CompressionConfig(keep=0.5, layers="attention"))
    with pytest.raises(InputError, match=r"layers must be from 0 to 1.*\[7\]"):
        hf.compress(make("mixtral"), hf.CompressionConfig(keep=0.5, layers=[7]))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batches"),
        ([torch.zeros(3, dtype=torch.int64)], r"tokens of shape \(B, S\).*got \(3,\)"),
        (["some text"], "got str"),
        ([torch.full((2, 3), 64)], "tokens from 0 to 63, the calibration has 64"),
        ([torch.full((2, 3), -1)], "tokens from 0 to 63, the calibration has -1"),
    ],
)
def test_a_calibration_of_another_form_is_refused(batches, message):
    with pytest.raises(InputError, match=message):
        hf.compress(make("mixtral"), CONFIG, batches)


def test_a_folder_that_lacks_numbers_of_compressed_experts_is_refused(tmp_path):
    hf.compress(make("mixtral"), CONFIG).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if ".experts.gate_up." in name)
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 tensors of the feed-forward networks"):
        hf.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("experts"),
        lambda record: record.update(config={"keep": 5}),
        lambda record: record["experts"].update({"model.layers.0.mlp.experts": {"down": 3}}),
        lambda record: record["experts"]["model.layers.0.mlp.experts"].pop("down"),
        lambda record: record["experts"]["model.layers.0.mlp.experts"]["down"].update(kind="x"),
        lambda record: record["experts"]["model.layers.0.mlp.experts"]["down"].update(
            kind="hidden", bond_dims=[10**9]
        ),
        lambda record: record["experts"]["model.layers.0.mlp.experts"]["down"].update(
            kind="low_rank", ranks=[10**9]
        ),
    ],
)
def test_a_damaged_record_is_an_input_error(change, tmp_path):
    hf.compress(make("mixtral"), hf.CompressionConfig(rtol=0.5)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    entries = json.loads(path.read_text())
    change(entries["tnmoe"]["compression"])
    path.write_text(json.dumps(entries))
    with pytest.raises(InputError):
        hf.from_pretrained(tmp_path)

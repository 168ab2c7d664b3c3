"""Linear layers of whole models as MPOs: the same function where it can be, saved and loaded."""

import copy
import json

import pytest
import torch
import transformers as tf
from transformers.pytorch_utils import Conv1D

import tnmoe as tn
from tests.hf import families
from tests.hf.mixtures import make, tokens
from tests.nn.test_mpo_linear import Quantized, halved
from tnmoe import InputError, hf, nn

SMALL = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = SMALL | {"hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 1}

GPT2 = {"vocab_size": 64, "n_layer": 2, "n_embd": 16, "n_head": 2}
# The legs (out | in), at which an MPO is a matrix of low rank.
LOW_RANK = {(out, in_): tn.MPOShape((out, 1), (1, in_)) for out in (16, 24) for in_ in (16, 24)}

MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)),
    "tied llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "bert": lambda: tf.BertForMaskedLM(
        tf.BertConfig(**SMALL, hidden_size=16, intermediate_size=24)
    ),
    "classifier": lambda: tf.BertForSequenceClassification(
        tf.BertConfig(**SMALL, hidden_size=16, intermediate_size=24)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    ),
}  # fmt: skip


def model_of(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits(model):
    ids = tokens()
    extra = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **extra).logits


def mpo_layers(model):
    return {name for name, each in model.named_modules() if isinstance(each, nn.MPOLinear)}


def state(model):
    """All that a failed call must leave as it was."""
    modules = dict(model.named_modules())
    tensors = {name: each.clone() for name, each in model.state_dict().items()}
    return modules, tensors, getattr(model, "config", None)


def assert_unchanged(model, before):
    modules, tensors, config = before
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(each, tensors[name]) for name, each in model.state_dict().items())
    assert getattr(model, "config", None) is config


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_layers_but_the_head_become_mpos_of_the_same_function(name):
    model = model_of(name)
    plain = {path for path, each in model.named_modules()
             if type(each) in (torch.nn.Linear, Conv1D)}  # fmt: skip
    head = {"llama": "lm_head", "tied llama": "lm_head", "gpt2": "lm_head", "t5": "lm_head",
            "bert": "cls.predictions.decoder"}.get(name)  # fmt: skip
    before = logits(model)
    report = hf.tensorize(model, max_bond=1000)
    assert mpo_layers(model) == plain - {head}
    assert [layer.name for layer in report.layers] == sorted(
        mpo_layers(model), key=[*dict(model.named_modules())].index
    )
    assert max(layer.error for layer in report.layers) < 1e-6
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", ["falcon", "wav2vec2", "clip vision", "whisper"])
def test_models_that_read_or_draw_their_layers_in_ways_of_their_own(name, residual, tmp_path):
    model = families.make(name)
    before = families.outputs(model, name)
    hf.tensorize(model, max_bond=1000, residual=residual)
    torch.testing.assert_close(families.outputs(model, name), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = hf.from_pretrained(tmp_path).eval()
    assert torch.equal(families.outputs(loaded, name), families.outputs(model, name))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_saved_models_load_with_equal_logits_in_every_way(name, residual, tmp_path):
    model = model_of(name)
    hf.tensorize(model, max_bond=2, residual=residual)
    with torch.no_grad():
        for path in mpo_layers(model):
            for core in model.get_submodule(path).projection.parameters():
                core += 0.1 * torch.randn_like(core)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    for load in (hf.from_pretrained, type(model).from_pretrained):
        loaded = load(tmp_path).eval()
        assert type(loaded) is type(model)
        assert mpo_layers(loaded) == mpo_layers(model)
        assert torch.equal(logits(loaded), expected)


def test_auto_classes_load_the_model_with_and_without_its_head(tmp_path):
    model = model_of("llama")
    hf.tensorize(model, ["q_proj", "down_proj"], max_bond=3)
    model.save_pretrained(tmp_path)
    whole = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(whole), logits(model))
    body = tf.AutoModel.from_pretrained(tmp_path).eval()
    assert mpo_layers(body) == {name.removeprefix("model.") for name in mpo_layers(model)}
    with torch.no_grad():
        expected = model.model(tokens()).last_hidden_state
        assert torch.equal(body(tokens()).last_hidden_state, expected)
    body.save_pretrained(tmp_path / "body")
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path / "body")
    assert mpo_layers(again) == mpo_layers(model)


def test_a_model_inside_another_one_loads_alone(tmp_path):
    torch.manual_seed(0)
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 16}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    config = tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = tf.CLIPModel(config).eval()
    hf.tensorize(model, ["fc1"], max_bond=2)
    model.save_pretrained(tmp_path)
    alone = tf.CLIPTextModel.from_pretrained(tmp_path).eval()
    ids = tokens(1, 5)
    with torch.no_grad():
        expected = model.text_model(ids).last_hidden_state
        assert torch.equal(alone(ids).last_hidden_state, expected)
    assert len(mpo_layers(alone)) == 1


def test_saved_folders_are_refused_without_their_record(tmp_path):
    model = model_of("llama")
    hf.tensorize(model, ["q_proj"], max_bond=2)
    model.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    assert "converted by tnmoe" in entries["model_type"]
    plain = tf.LlamaConfig(**LLAMA)
    with pytest.raises(InputError, match="given as config describes a dense one"):
        tf.LlamaForCausalLM.from_pretrained(tmp_path, config=plain)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("residual", [False, True])
def test_untensorized_models_are_plain_ones_of_the_same_function(name, residual, tmp_path):
    model, plain = model_of(name), model_of(name, seed=1)
    kinds = {path: type(each) for path, each in model.named_modules()}
    names = set(model.state_dict())
    hf.tensorize(model, max_bond=3, residual=residual)
    with torch.no_grad():
        for path in mpo_layers(model):
            model.get_submodule(path).projection.center += 0.1
    expected = logits(model)
    assert hf.untensorize(model) is model
    assert {path: type(each) for path, each in model.named_modules()} == kinds
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == names
    assert not hasattr(model.config, "tnmoe")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(model))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(plain), logits(model))


def test_state_dicts_load_into_a_model_tensorized_alike():
    model, other = model_of("gpt2"), model_of("gpt2", seed=1)
    for each in (model, other):
        hf.tensorize(each, ["c_fc", "c_proj"], max_bond=2, sites=3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_any_module_will_do():
    torch.manual_seed(0)
    encoder = torch.nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0).eval()
    model = torch.nn.Sequential(encoder, torch.nn.Linear(16, 4))
    x = torch.randn(2, 5, 16)
    expected = model(x)
    report = hf.tensorize(model, max_bond=1000)
    # The attention reads the weight of its output layer by name, and never calls it.
    assert {layer.name for layer in report.layers} == {"0.linear1", "0.linear2", "1"}
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():  # torch's fast path reads weights by name
        torch.testing.assert_close(model(x), expected)


def test_a_model_of_transformers_inside_of_a_module_is_saved_and_loaded(tmp_path):
    inner = model_of("llama")
    hf.tensorize(torch.nn.ModuleDict({"policy": inner}), max_bond=2)
    assert type(inner.lm_head) is torch.nn.Linear
    inner.save_pretrained(tmp_path)
    assert torch.equal(logits(hf.from_pretrained(tmp_path).eval()), logits(inner))


def test_adapters_of_peft_are_not_decomposed():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model_of("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(InputError, match="q_proj, a Linear, does not hold a matrix of floats"):
        hf.tensorize(model, max_bond=2)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_a_budget_holds_and_is_spent_where_it_lowers_the_error_most(keep):
    model = model_of("llama")
    q = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():  # of rank 1: small without any loss
        q.weight.copy_(torch.randn(16, 1) @ torch.randn(1, 16))
    equal = copy.deepcopy(model)
    targets = ["q_proj", "up_proj", "down_proj"]
    sizes = {(16, 16), (24, 16), (16, 24)}
    shapes = {size: shape for size, shape in LOW_RANK.items() if size in sizes}
    report = hf.tensorize(model, targets, keep=keep, shapes=shapes)
    assert report.params_after <= keep * report.params_before
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["model.layers.0.self_attn.q_proj"].error < 1e-6
    # The same share for every layer alone does worse.
    squares = 0.0
    for layer in report.layers:
        size = tuple(equal.get_submodule(layer.name).weight.shape)
        one = hf.tensorize(equal, [layer.name], keep=keep, shapes={size: LOW_RANK[size]})
        squares += one.layers[0].error ** 2
    assert sum(layer.error**2 for layer in report.layers) < squares


def test_a_tolerance_holds_for_every_layer_and_layers_that_would_grow_stay():
    model = model_of("llama")
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.copy_(torch.randn(24, 2) @ torch.randn(2, 16) + 0.01 * torch.randn(24, 16))
    before = {name: each.weight.clone() for name, each in model.named_modules()
              if name.endswith("up_proj")}  # fmt: skip
    shapes = {(24, 16): LOW_RANK[24, 16]}
    report = hf.tensorize(model, ["up_proj"], rtol=0.1, shapes=shapes)
    assert mpo_layers(model) == {"model.layers.0.mlp.up_proj"}
    small, large = report.layers
    error = model.get_submodule(small.name).weight - before[small.name]
    relative = float((error.norm() / before[small.name].norm()).detach())
    assert small.error == pytest.approx(relative, rel=1e-4)
    assert 0 < small.error <= 0.1
    assert small.params_after < small.params_before
    assert (large.shape, large.error, large.params_after) == (None, 0, large.params_before)


def test_residual_layers_keep_their_modules_and_train_beside_frozen_ones():
    model = model_of("llama").requires_grad_(False)
    before, q = logits(model), model.model.layers[0].self_attn.q_proj
    report = hf.tensorize(model, ["q_proj", "v_proj"], max_bond=2, residual=True)
    assert model.model.layers[0].self_attn.q_proj.base is q
    assert torch.equal(logits(model), before)
    model(tokens(), labels=tokens()).loss.backward()
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trained == {name for name, each in model.named_parameters() if each.grad is not None}
    assert all(".projection." in name for name in trained)
    added = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert report.params_after - report.params_before == added


def test_quantized_layers_take_a_residual_and_refuse_a_decomposition():
    model = torch.nn.Sequential(Quantized(torch.nn.Linear(8, 8)), torch.nn.Linear(8, 4))
    before, x = state(model), torch.randn(3, 8)
    with pytest.raises(InputError, match="0, a Quantized, does not hold a matrix of floats"):
        hf.tensorize(model, max_bond=2)
    assert_unchanged(model, before)
    expected = model(x)
    hf.tensorize(model, max_bond=2, residual=True)
    assert mpo_layers(model) == {"0", "1"}
    assert torch.equal(model(x), expected)


def test_a_quantizers_own_tensors_are_no_matrix_of_floats():
    with pytest.raises(InputError, match="0, a Linear, does not hold a matrix of floats"):
        hf.tensorize(torch.nn.Sequential(halved()), max_bond=2)


def test_a_layer_in_two_places_becomes_one_mpo_in_both():
    shared = torch.nn.Linear(8, 8)
    model = torch.nn.ModuleDict({"a": shared, "b": torch.nn.Sequential(shared), "c": shared})
    report = hf.tensorize(model, ["a"], max_bond=2)
    assert model["a"] is model["b"][0] is model["c"]
    assert isinstance(model["a"], nn.MPOLinear)
    assert len(report.layers) == 1


def test_shapes_by_size_and_modes_of_layers():
    model = model_of("llama").train()
    model.model.layers[0].mlp.up_proj.eval()
    shape = tn.MPOShape((4, 6), (4, 4))
    report = hf.tensorize(model, ["up_proj", "down_proj"], max_bond=2, shapes={(24, 16): shape})
    assert {layer.shape for layer in report.layers if layer.name.endswith("up_proj")} == {shape}
    assert {layer.shape.sites for layer in report.layers} == {2, 5}
    assert not model.model.layers[0].mlp.up_proj.training
    assert model.model.layers[1].mlp.up_proj.training


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["up_proj"], ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]),
        (["layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (
            r".*\.1\.mlp\.(up|down)_proj",
            ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"],
        ),
        (["lm_head"], ["lm_head"]),
    ],
    ids=str,
)  # fmt: skip
def test_targets_choose_as_those_of_peft(targets, expected):
    from peft import LoraConfig, get_peft_model

    model = model_of("llama")
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=1, target_modules=targets))
    of_peft = {
        name.removeprefix("base_model.model.")
        for name, each in adapted.named_modules()
        if hasattr(each, "base_layer")
    }
    hf.tensorize(model, targets, max_bond=2)
    assert mpo_layers(model) == set(expected) == of_peft


def test_other_conversions_of_the_same_model_stay(tmp_path):
    model = model_of("llama")
    hf.upcycle(model, hf.MPOEConfig(num_experts=2, sites=3))
    report = hf.tensorize(model, max_bond=2)
    assert all("self_attn" in layer.name for layer in report.layers)
    model.save_pretrained(tmp_path)
    loaded = hf.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert hf.config_of(loaded).num_experts == 2
    for export in (hf.to_moe, hf.average_experts):
        with pytest.raises(InputError, match=r"has linear layers that are MPOs .*untensorize"):
            export(loaded)
    with pytest.raises(InputError, match=r"has linear layers that are MPOs .*untensorize"):
        hf.prepare_export(tmp_path, to="moe")
    expected = logits(loaded)
    hf.untensorize(loaded)
    assert hf.config_of(loaded).num_experts == 2
    torch.testing.assert_close(logits(hf.to_moe(loaded)), expected, rtol=1e-3, atol=1e-3)


def test_mixtures_of_a_tensorized_model_are_compressed_in_memory_and_in_folders(tmp_path):
    model = make("mixtral")
    hf.tensorize(model, ["q_proj"], max_bond=2)
    model.save_pretrained(tmp_path / "given")
    config = hf.CompressionConfig(keep=0.5)
    hf.prepare_compress(tmp_path / "given", config).run(tmp_path / "small")
    loaded = hf.from_pretrained(tmp_path / "small").eval()
    hf.compress(model, config)
    assert len(mpo_layers(loaded)) == len(mpo_layers(model)) == 2
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)


def test_tensorizing_again_adds_to_the_record(tmp_path):
    model = model_of("llama")
    hf.tensorize(model, ["q_proj"], max_bond=2)
    hf.tensorize(model, ["k_proj"], max_bond=3)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hf.from_pretrained(tmp_path).eval()), logits(model))
    with pytest.raises(InputError, match="was tensorized and not converted"):
        hf.config_of(model)


def test_other_models_of_the_same_configuration_stay_plain():
    config = tf.LlamaConfig(**LLAMA)
    hf.tensorize(tf.LlamaForCausalLM(config), max_bond=2)
    assert not mpo_layers(tf.LlamaForCausalLM(config))


def test_generation_and_training_of_an_exact_model_are_those_of_the_plain_one():
    plain, model = model_of("llama"), model_of("llama")
    hf.tensorize(model, max_bond=1000, sites=2)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens(), **settings), plain.generate(tokens(), **settings))
    losses = [each(tokens(), labels=tokens()).loss for each in (model, plain)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    one, other = (each.model.embed_tokens.weight.grad for each in (model, plain))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_the_report_prints_as_a_table_and_as_data():
    report = hf.tensorize(model_of("llama"), ["q_proj"], max_bond=2, sites=2)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "out", "in", "bonds", "before", "after", "error"]
    assert lines[2].startswith("model.layers.0.self_attn.q_proj")
    assert lines[-1].split() == ["all", "512", str(report.params_after)]
    assert json.loads(json.dumps(report.to_dict()))["params"]["before"] == 512
    assert repr(report) == f"TensorizeReport(layers=2, params=512 → {report.params_after})"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["qkv"]}, r"the target 'qkv' matches none of the 15 linear layers of Llama"),
        ({"targets": ["q_proj", "qkv"]}, "the target 'qkv' matches none"),
        ({"targets": "q_proj"}, "the target 'q_proj' matches none"),
        ({"targets": "("}, r"targets='\(' is not a regular expression"),
        ({"targets": []}, r"targets must be a string or names of layers, got \[\]"),
        ({"targets": [3]}, r"targets must be a string or names of layers, got \[3\]"),
        ({"targets": None}, "targets must be a string or names of layers, got None"),
        ({"max_bond": None}, "give exactly one of max_bond, rtol and keep, got none"),
        ({"rtol": 0.1}, "give exactly one of max_bond, rtol and keep, got max_bond=2, rtol=0.1"),
        ({"max_bond": 0}, "max_bond must be a positive integer"),
        ({"max_bond": None, "rtol": 1}, r"rtol must be in \[0, 1\)"),
        ({"max_bond": None, "keep": 0}, r"keep must be in \(0, 1\]"),
        ({"max_bond": None, "keep": 0.001}, "keep=0.001 leaves .* they can have .* at least"),
        ({"residual": True, "keep": 0.5}, "residual=True decomposes nothing and takes max_bond"),
        ({"residual": "yes"}, "residual must be one of"),
        ({"sites": 1}, "at least 2 sites"),
        (
            {"shapes": {(3, 3): tn.MPOShape((3, 1), (1, 3))}},
            r"no chosen layer has the size \(3, 3\)",
        ),
        ({"shapes": {(16, 16): tn.MPOShape((3, 1), (1, 3))}}, "shape must be for a 16×16 matrix"),
        ({"shapes": 3}, "shapes must map"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_named_and_change_nothing(settings, message):
    model = model_of("llama")
    before = state(model)
    with pytest.raises(InputError, match=message):
        hf.tensorize(model, **({"max_bond": 2} | settings))
    assert_unchanged(model, before)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", ["tied llama", "gpt2"])
def test_a_head_tied_to_the_embedding_is_refused(name, residual):
    model = model_of(name)
    before = state(model)
    with pytest.raises(InputError, match=r"lm_head has parameters that the model ties \(.*"):
        hf.tensorize(model, ["lm_head"], max_bond=2, residual=residual)
    assert_unchanged(model, before)


def test_layers_that_share_a_parameter_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(InputError, match=r"0 has parameters that the model ties \(1.weight\)"):
        hf.tensorize(model, ["0"], max_bond=2)


def test_a_late_failure_changes_nothing():
    model = model_of("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    before = state(model)
    for limits in ({"max_bond": 2}, {"keep": 0.5}, {"rtol": 0.1}):
        with pytest.raises(InputError, match="NaN or infinity"):
            hf.tensorize(model, **limits)
        assert_unchanged(model, before)


def test_layers_that_are_not_in_memory_are_refused():
    with torch.device("meta"):
        model = MODELS["llama"]()
    with pytest.raises(InputError, match="q_proj is not in memory"):
        hf.tensorize(model, max_bond=2)


def test_what_is_no_module_or_has_no_mpo_is_refused():
    with pytest.raises(TypeError, match="model must be a module, got dict"):
        hf.tensorize({}, max_bond=2)
    with pytest.raises(InputError, match="has no layer that is an MPO"):
        hf.untensorize(model_of("llama"))
    with pytest.raises(InputError, match="matches none of the 0 linear layers"):
        hf.tensorize(torch.nn.ReLU(), max_bond=2)


def test_saving_a_model_whose_layers_differ_from_its_record_is_refused(tmp_path):
    model = model_of("llama")
    hf.tensorize(model, ["q_proj"], max_bond=2)
    attention = model.model.layers[0].self_attn
    attention.q_proj = attention.q_proj.to_linear()
    with pytest.raises(InputError, match=r"says that model.layers.0.self_attn.q_proj is an MPO"):
        model.save_pretrained(tmp_path)
    hf.tensorize(model, ["layers.0.self_attn.q_proj"], max_bond=2)
    attention.k_proj = nn.MPOLinear.from_linear(attention.k_proj)
    with pytest.raises(InputError, match="k_proj of this LlamaForCausalLM is an MPO, but"):
        model.save_pretrained(tmp_path)


def damage(folder, change):
    path = folder / "config.json"
    entries = json.loads(path.read_text())
    change(entries["tnmoe"]["linear"])
    path.write_text(json.dumps(entries))


def other_shape(linear):
    for each in linear.values():
        each["shape"] = {"out_dims": [4, 1], "in_dims": [1, 4], "out_features": 4, "in_features": 4}


def other_bonds(linear):
    for each in linear.values():
        each["bond_dims"] = [3 for _ in each["bond_dims"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_shape, "cannot have the structure"),
        (other_bonds, "is of shape .* its configuration says"),
        (lambda linear: linear.update({next(iter(linear)): 3}), "is not the structure"),
        (lambda linear: next(iter(linear.values())).update(kind="hidden"), "cannot have"),
    ],
    ids=["shape", "bonds", "data", "kind"],
)
def test_damaged_records_are_refused(change, message, tmp_path):
    model = model_of("llama")
    hf.tensorize(model, ["q_proj"], max_bond=2)
    model.save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(InputError, match=message):
        hf.from_pretrained(tmp_path)


def test_folders_that_lack_a_core_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = model_of("llama")
    hf.tensorize(model, ["q_proj"], max_bond=2)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.projection.center"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 tensors of the linear layers"):
        hf.from_pretrained(tmp_path)


def test_cores_of_other_sizes_are_drawn_anew_where_that_is_allowed(tmp_path):
    model = model_of("llama")
    hf.tensorize(model, ["q_proj"], max_bond=2, residual=True)
    model.save_pretrained(tmp_path)
    damage(tmp_path, other_bonds)
    loaded = hf.from_pretrained(tmp_path, ignore_mismatched_sizes=True).eval()
    assert loaded.model.layers[0].self_attn.q_proj.projection.bond_dims == (3,)
    assert torch.equal(logits(loaded), logits(model))  # what was drawn anew starts at zero

"""upcycle and its checkpoints, on small models of real transformers classes."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import tnmoe as tn
from tests.hf.families import IDS, LAYOUTS, MASK, make, relative
from tnmoe import hf, nn
from tnmoe.demo.data import packaged_model

CONFIG = hf.MPOEConfig(num_experts=3, sites=3)


@torch.no_grad()
def outputs(model: transformers.PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=MASK)[0]


def test_only_the_chosen_layers_are_converted():
    model = make("bert")
    expected = outputs(model)
    hf.upcycle(model, hf.MPOEConfig(num_experts=2, sites=2, layers=[2, 0]))
    converted = [isinstance(layer.intermediate, nn.MPOMoE) for layer in model.encoder.layer]
    assert converted == [True, False, True]
    assert relative(outputs(model), expected) < 1e-5


def test_given_shapes_win_over_the_layout():
    shapes = {(40, 24): tn.MPOShape((10, 4), (4, 6)), (24, 40): tn.MPOShape((4, 6), (10, 4))}
    model = hf.upcycle(make("bert"), hf.MPOEConfig(num_experts=2, shapes=shapes))
    experts = model.encoder.layer[0].intermediate.experts
    assert experts.up.shape == shapes[40, 24]
    assert experts.down.shape == shapes[24, 40]


def test_truncation_is_told_per_matrix():
    seen = {}
    model = make("bert")
    dense = model.encoder.layer[1].intermediate.dense.weight.detach().clone()
    hf.upcycle(model, hf.MPOEConfig(num_experts=2, sites=3, max_bond=4), seen.__setitem__)
    assert set(seen) == {f"encoder.layer.{n}.{m}" for n in range(3) for m in ("up", "down")}
    experts = model.encoder.layer[1].intermediate.experts
    error = float((experts.up.weight()[0].detach() - dense).norm())
    assert 0 < error <= seen["encoder.layer.1.up"].error_bound * (1 + 1e-4)


@pytest.mark.parametrize("name", ["bert", "mpnet", "llama with biases"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_saved_model_loads_to_the_same_outputs(tmp_path, name, layout):
    model = hf.upcycle(make(name), hf.MPOEConfig(num_experts=3, **LAYOUTS[layout]))
    with torch.no_grad():
        for parameter in model.parameters():  # as after training: experts differ
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 1
    loaded = hf.from_pretrained(tmp_path / "saved")
    assert type(loaded) is type(model)
    # Where an array lies in memory decides the order of its sums: equal numbers, to rounding.
    torch.testing.assert_close(outputs(loaded.eval()), outputs(model))
    for (name_, mine), (other, theirs) in zip(
        sorted(model.state_dict().items()), sorted(loaded.state_dict().items()), strict=True
    ):
        assert name_ == other
        assert (mine == theirs).all()
    # And once more from the loaded model, which must be an ordinary one.
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        outputs(hf.from_pretrained(tmp_path / "again").eval()), outputs(model)
    )


def test_each_central_core_is_stored_once(tmp_path):
    model = hf.upcycle(make("bert"), CONFIG)
    model.save_pretrained(tmp_path)
    numbers = sum(array.numel() for array in load_file(tmp_path / "model.safetensors").values())
    assert numbers == sum(p.numel() for p in model.parameters())
    assert not list(tmp_path.glob("*.bin"))


def test_auto_classes_load_a_checkpoint_in_a_new_process(tmp_path):
    model = hf.upcycle(make("bert"), CONFIG)
    model.save_pretrained(tmp_path)
    code = f"""
import numpy as np, torch, tnmoe.hf, transformers
model = transformers.AutoModel.from_pretrained({str(tmp_path)!r}).eval()
ids = torch.tensor({IDS.tolist()})
mask = torch.ones_like(ids); mask[1, 5:] = 0
with torch.no_grad():
    np.save({str(tmp_path / "out.npy")!r}, model(input_ids=ids, attention_mask=mask)[0].numpy())
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    np.testing.assert_allclose(
        np.load(tmp_path / "out.npy"), outputs(model).numpy(), rtol=1e-5, atol=1e-5
    )


def test_a_loaded_model_is_not_taken_for_a_quantized_one(tmp_path):
    hf.upcycle(make("bert"), CONFIG).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert not getattr(model, "is_quantized", False)
    assert model.half().dtype == torch.float16
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_the_real_minilm_keeps_its_outputs_and_trains(tmp_path):
    folder = packaged_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = ["A quiet triumph.", "Two hours I will never get back, and a ticket I would return."]
    inputs = tokenizer(text, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = dense(**inputs)[0]
        hf.upcycle(dense, hf.MPOEConfig(num_experts=8))
        assert relative(dense(**inputs)[0], expected) <= 1e-4
    dense.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        with nn.record_routing(model) as routing:
            loss = model(**inputs, labels=torch.tensor([1, 0])).loss
        loss = loss + 0.01 * routing.balance_loss(inputs["attention_mask"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(center.grad is not None for center in nn.shared_parameters(model))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_failed_conversion_leaves_the_model_as_it_was(layout):
    model = make("bert")
    model.encoder.layer[2].intermediate.dense.weight.data[0, 0] = torch.nan
    with pytest.raises(tn.InputError, match="NaN"):
        hf.upcycle(model, hf.MPOEConfig(num_experts=3, **LAYOUTS[layout]))
    assert len(hf.find_ffns(model)) == 3
    assert not hasattr(model.config, "tnmoe")


@pytest.mark.parametrize("name", ["gpt2", "t5", "llama"])
def test_models_made_of_one_configuration_are_converted_each_by_itself(name):
    config = make(name).config
    before = dict(vars(config))
    models = [make(name).__class__(config) for _ in range(2)]
    for experts, model in enumerate(models, 2):
        hf.upcycle(model, hf.MPOEConfig(num_experts=experts, sites=3))
    assert vars(config) == before
    for experts, model in enumerate(models, 2):
        assert hf.config_of(model).num_experts == experts
        # A setting that is changed later reaches the modules that look it up.
        held = {id(each.config) for each in model.modules() if hasattr(each, "config")}
        assert id(config) not in held
        assert id(model.config) in held


@pytest.mark.parametrize(
    ("make_error", "message"),
    [
        (
            lambda _: hf.find_ffns(torch.nn.Linear(2, 2)),
            "Linear has no feed-forward network of a known",
        ),
        (
            lambda _: hf.upcycle(make("bert"), hf.MPOEConfig(layers=[3])),
            r"from 0 to 2 .* got \[3\]",
        ),
        (lambda _: hf.upcycle(hf.upcycle(make("bert"), CONFIG), CONFIG), "already converted"),
        (
            lambda _: hf.parameter_report(hf.upcycle(make("bert"), CONFIG), CONFIG),
            "already converted",
        ),
        (lambda _: hf.MPOEConfig(num_experts=2, num_experts_per_tok=3), "exceeds num_experts=2"),
        (lambda _: hf.MPOEConfig(layout="magic"), "layout must be one of"),
        (lambda _: hf.MPOEConfig(mask_probability=2), "mask_probability must be in"),
        (
            lambda _: hf.MPOEConfig(shapes={(3, 3): tn.MPOShape((2,), (2,))}),
            "is for another matrix",
        ),
        (lambda _: hf.MPOEConfig.from_dict({"magic": 1}), r"unknown entries .* \['magic'\]"),
        (lambda path: hf.from_pretrained(path / "none"), "there is no folder .*none"),
        (lambda path: hf.from_pretrained(path), "is not a Hugging Face folder: no config.json"),
        (lambda path: hf.from_pretrained(saved_dense(path) / "config.json"), "a file, not a fold"),
        (lambda path: hf.from_pretrained(with_text(path, "{")), "config.json is not JSON"),
        (
            lambda path: hf.from_pretrained(with_text(path, '{"quantization_config": ["tnmoe"]}')),
            "is not an MPOE checkpoint",
        ),
        (
            lambda path: hf.from_pretrained(saved_with(path, None)),
            "tnmoe must be an object, got None",
        ),
        (
            lambda path: hf.prepare_export(saved_with(path, {"magic": 1}), to="moe"),
            "tnmoe has unknown entries 'magic'",
        ),
        (
            lambda path: hf.from_pretrained(saved_with(path, {"networks": "all"})),
            "networks of tnmoe must be a list of names, got 'all'",
        ),
        (
            lambda path: AutoModel.from_pretrained(saved_with(path, {"config": 3})),
            "config of tnmoe must be an object, got 3",
        ),
        (lambda path: hf.from_pretrained(saved_dense(path)), "is not an MPOE checkpoint"),
        (
            lambda path: hf.from_pretrained(saved_with(path, {"format": 99})),
            "tnmoe has format 99, this version of tnmoe reads 2",
        ),
        (
            lambda path: hf.from_pretrained(saved_with(path, {}, ["Magic"])),
            "transformers has no architecture 'Magic'",
        ),
    ],
)
def test_bad_input_is_named(tmp_path, make_error, message):
    with pytest.raises(tn.InputError, match=message):
        make_error(tmp_path)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (lambda: "bert-base", CONFIG, "model must be a model of transformers, got str"),
        (
            lambda: torch.nn.Linear(3, 3),
            CONFIG,
            "model must be a model of transformers, got Linear",
        ),
        (lambda: make("bert"), {"num_experts": 3}, "config must be an MPOEConfig, got dict"),
    ],
)
def test_other_objects_are_named(model, config, message):
    with pytest.raises(TypeError, match=message):
        hf.upcycle(model(), config)


@pytest.mark.parametrize("call", [hf.prepare_upcycle, hf.inspect_checkpoint, hf.parameter_report])
def test_other_configurations_are_named(call):
    with pytest.raises(TypeError, match="config must be an MPOEConfig, got dict"):
        call("folder", {"num_experts": 3})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=["query"])),
    ],
)
def test_a_wrapper_is_refused_since_the_model_in_it_would_have_other_names(wrap):
    dense, mixture = wrap(make("bert")), wrap(hf.upcycle(make("bert"), CONFIG))
    kind = type(dense).__name__
    for call in (
        lambda: hf.upcycle(dense, CONFIG),
        lambda: hf.average_experts(mixture),
        lambda: hf.to_moe(mixture),
    ):
        with pytest.raises(TypeError, match=f"got {kind}: give the model that it wraps"):
            call()
    assert len(hf.find_ffns(dense)) == 3


def saved_dense(path):
    make("bert").save_pretrained(path)
    return path


def with_text(path, text):
    (path / "config.json").write_text(text)
    return path


def saved_with(path, entries, architectures=("BertModel",)):
    hf.upcycle(make("bert"), CONFIG).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config["tnmoe"] = None if entries is None else config["tnmoe"] | entries
    config["architectures"] = list(architectures)
    (path / "config.json").write_text(json.dumps(config))
    return path

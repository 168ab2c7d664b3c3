"""Adapters of routed experts: PEFT's operations, against the model without them."""

import copy
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from safetensors.torch import load_file

import tnmoe as tn
from tests.hf.families import IDS, MODELS, make, outputs
from tnmoe import hf, nn

RESIDUAL = {"layout": "residual", "bond": 3}
HIDDEN = {"layout": "hidden", "group_size": 8}
LAYOUTS = {"residual": RESIDUAL, "hidden": HIDDEN, "tensor train": RESIDUAL | {"sites": 4}}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def config(layout="residual", **settings):
    return hf.MPOEAdapterConfig(**{"num_experts": 4, "top_k": 2} | LAYOUTS[layout] | settings)


def adapted(layout="residual", name="llama", **settings):
    torch.manual_seed(3)
    return peft.get_peft_model(make(name), config(layout, **settings))


def own(model):
    """Return the parameters of a model's adapters by name."""
    return {name: each for name, each in model.named_parameters() if ".mpoe_mixtures." in name}


@torch.no_grad()
def disturb(model, scale=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in own(model).values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter += scale * noise.to(parameter.dtype)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def train(model, steps=3, rate=1e-2):
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


# What it computes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["residual", "hidden"])
def test_a_model_starts_unchanged_and_is_itself_again_without_the_adapter(name, layout):
    model = make(name)
    modules, before = [path for path, _ in model.named_modules()], outputs(model, name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = peft.get_peft_model(model, config(layout))
    inner = adapter.base_model.model
    torch.testing.assert_close(outputs(inner, name), before, rtol=1e-5, atol=1e-5)
    disturb(adapter)
    assert (outputs(inner, name) - before).norm() > 1e-4 * before.norm()
    with adapter.disable_adapter():
        assert torch.equal(outputs(inner, name), before)
    unloaded = adapter.unload()
    assert [path for path, _ in unloaded.named_modules()] == modules
    assert torch.equal(outputs(unloaded, name), before)
    assert all(torch.equal(value, state[key]) for key, value in unloaded.state_dict().items())


def dense_network(network, states, top_k):
    """Compute a gated network with routed low-rank experts as a loop over tokens."""
    base, mixture = network.base_layer, network.mpoe_mixtures["default"]
    scores = (states @ mixture.router.weight.T).softmax(-1)
    result = torch.zeros_like(states)
    for row, (token, score) in enumerate(zip(states, scores, strict=True)):
        chosen = score.topk(top_k)
        for expert, weight in zip(chosen.indices, chosen.values / chosen.values.sum(), strict=True):

            def product(name, rows, expert=expert):
                delta = getattr(mixture.experts, name).delta
                left, right = delta.center[expert], delta.aux[0][expert]
                if delta.center_site == 1:
                    left, right = right, left
                low_rank = left[0, :, 0, :] @ right[:, 0, :, 0]
                return (getattr(base, f"{name}_proj").weight + low_rank) @ rows

            inner = F.silu(product("gate", token)) * product("up", token)
            result[row] += weight * product("down", inner)
    return result


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_every_token_gets_its_experts_matrices(top_k):
    model = disturb(adapted(top_k=top_k).double())
    network = model.base_model.model.model.layers[0].mlp
    states = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = dense_network(network, states, top_k)
        torch.testing.assert_close(network(states[None])[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["bart", "bert", "phi3", "gpt2", "whisper"])
def test_a_disabled_adapter_draws_the_dropout_that_the_model_draws(name):
    model = make(name).train()
    for module in model.modules():
        if hasattr(module, "activation_dropout"):
            module.activation_dropout = 0.25
    torch.manual_seed(5)
    before = outputs(model, name)
    adapter = peft.get_peft_model(model, config())
    torch.manual_seed(5)
    with adapter.disable_adapter():
        assert torch.equal(outputs(adapter.base_model.model, name), before)


def test_a_probability_that_the_model_holds_as_a_number_comes_back():
    model = make("bart")
    layer = model.model.encoder.layers[0]
    layer.activation_dropout = 0.25
    adapter = peft.get_peft_model(model, config())
    assert layer.fc1.mpoe_mixtures["default"].experts.dropout == 0.25
    assert layer.activation_dropout == 0.0
    adapter.unload()
    assert layer.activation_dropout == 0.25


# What is trained, and where it is


@pytest.mark.parametrize("layout", LAYOUTS)
def test_routers_and_owned_cores_are_trained_and_nothing_else(layout):
    model = adapted(layout)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trained == set(own(model))
    parts = {name.split(".mpoe_mixtures.default.")[1].split(".")[0] for name in trained}
    assert parts == {"router", "experts"}


def storages(model):
    tensors = itertools.chain(model.parameters(), model.buffers())
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}


@pytest.mark.parametrize("name", ["llama", "phi3", "bert", "gpt2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_base_is_held_once(name, layout):
    model = make(name)
    before = storages(model)
    adapter = peft.get_peft_model(model, config(layout))
    added = sum(each.numel() * each.element_size() for each in own(adapter).values())
    assert sum(storages(adapter).values()) == sum(before.values()) + added


def test_a_copy_uses_its_own_base():
    model = disturb(adapted())
    other = copy.deepcopy(model)
    before = logits(model)
    with torch.no_grad():
        for layer in other.base_model.model.model.layers:
            layer.mlp.base_layer.up_proj.weight.zero_()
    assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(other), before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_matrix_that_is_replaced_later_counts(layout):
    """As a quantisation replaces it, or LoRA."""
    model = disturb(adapted(layout))
    network = model.base_model.model.model.layers[1].mlp.base_layer
    other = torch.nn.Linear(24, 40, bias=False)
    network.up_proj, old = other, network.up_proj
    replaced = logits(model)
    network.up_proj = old
    assert not torch.allclose(logits(model), replaced)
    with torch.no_grad():
        old.weight.copy_(other.weight)
    assert torch.equal(logits(model), replaced)


def test_layers_and_every_choose_networks():
    assert {name.split(".")[4] for name in own(adapted(layers=[0, 2]))} == {"0", "2"}
    assert {name.split(".")[4] for name in own(adapted(every=2))} == {"1"}
    assert {name.split(".")[4] for name in own(adapted(layers=r"\.1$"))} == {"1"}


# Files


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_trained_adapter_loads_bit_for_bit(layout, low_cpu_mem_usage, tmp_path):
    model = train(adapted(layout))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.replace(".default.", ".") for name in own(model)} == set(stored)
    loaded = peft.PeftModel.from_pretrained(
        make("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert not any(each.requires_grad for each in loaded.parameters())
    again = peft.PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    assert {name for name, each in again.named_parameters() if each.requires_grad} == set(
        own(again)
    )


def test_an_adapter_of_a_bare_model_loads_under_another_name(tmp_path):
    model = disturb(adapted(name="bert"))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make("bert"), tmp_path, adapter_name="mine")
    expected = outputs(model.base_model.model.eval(), "bert")
    assert torch.equal(outputs(loaded.base_model.model.eval(), "bert"), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_whose_experts_came_and_went_loads_bit_for_bit(layout, tmp_path):
    model = disturb(adapted(layout))
    before = logits(model)
    mixtures = [each for each in model.modules() if isinstance(each, nn.MPOMoE)]
    for mixture in mixtures:
        nn.add_experts(mixture, 2, noise=0.1, rng=0)
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "closed")
    for mixture in mixtures:
        nn.open_experts(mixture, [4])
        nn.remove_experts(mixture, [0, 5])
    train(model)
    model.save_pretrained(tmp_path / "other")
    for folder, expected, count in (("closed", before, 6), ("other", logits(model), 4)):
        loaded = peft.PeftModel.from_pretrained(make("llama"), tmp_path / folder).eval()
        assert loaded.peft_config["default"].num_experts == count
        assert torch.equal(logits(loaded), expected)


def test_networks_with_different_numbers_of_experts_are_not_saved(tmp_path):
    model = adapted()
    nn.add_experts(model.base_model.model.model.layers[1].mlp.mpoe_mixtures["default"], 1)
    with pytest.raises(
        tn.InputError, match=r"different numbers of experts.*4 in .*layers\.0.*5 in"
    ):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"intermediate_size": 48},
            r"made for model\.layers\.0\.mlp with .*'up': \[40, 24\].*'up': \[48",
        ),
        ({"num_hidden_layers": 2}, r"made for model\.layers\.2\.mlp .* the model has none there"),
        ({"num_hidden_layers": 4}, r"made for model\.layers\.3\.mlp with matrices none"),
    ],
)
def test_an_adapter_of_another_model_is_refused_by_name(change, message, tmp_path):
    adapted().save_pretrained(tmp_path)
    other = tf.LlamaForCausalLM(tf.LlamaConfig(**make("llama").config.to_dict() | change))
    paths = [path for path, _ in other.named_modules()]
    with pytest.raises(tn.InputError, match=message):
        peft.PeftModel.from_pretrained(other, tmp_path)
    assert [path for path, _ in other.named_modules()] == paths


def test_another_configuration_of_the_same_sizes_brings_a_warning(tmp_path):
    adapted().save_pretrained(tmp_path)
    entries = make("llama").config.to_dict() | {"rms_norm_eps": 0.1}
    with pytest.warns(UserWarning, match="made for a model with another configuration"):
        peft.PeftModel.from_pretrained(tf.LlamaForCausalLM(tf.LlamaConfig(**entries)), tmp_path)


# Several adapters


def test_adapters_on_one_base_are_switched_and_deleted():
    model = disturb(adapted(), seed=1)
    one, base = logits(model), logits(make("llama"))
    model.add_adapter("second", config("hidden", num_experts=2))
    assert torch.equal(logits(model), one)
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), base, rtol=1e-5, atol=1e-5)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trained
    assert all(".second." in name for name in trained)
    model.set_adapter("default")
    assert torch.equal(logits(model), one)
    model.delete_adapter("second")
    assert torch.equal(logits(model), one)
    assert not any(".second." in name for name in own(model))


def test_adapters_may_sit_in_different_layers():
    model = disturb(adapted(layers=[0]))
    one = logits(model)
    model.add_adapter("second", config(layers=[2]))
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), logits(make("llama")), rtol=1e-5, atol=1e-5)
    model.set_adapter("default")
    assert torch.equal(logits(model), one)


def test_two_active_adapters_are_refused():
    model = adapted()
    model.add_adapter("second", config())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(tn.InputError, match=r"one adapter .* at a time, got default, second"):
        logits(model)


def test_one_configuration_serves_several_models():
    settings = config()
    for name in ("llama", "bert"):
        model = peft.get_peft_model(make(name), settings)
        assert own(model)


# Merging


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "llama with biases", "bert", "gpt2", "phi3"])
def test_one_expert_merges_into_an_ordinary_model(layout, name):
    model = disturb(adapted(layout, name, num_experts=1, top_k=1))
    inner = model.base_model.model
    expected, plain = outputs(inner, name), make(name)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, name), expected, rtol=1e-4, atol=1e-5)
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert type(merged) is type(plain)


def test_merging_is_undone_bit_for_bit():
    model = disturb(adapted(num_experts=1, top_k=1))
    before, state = logits(model), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_several_experts_are_not_merged_and_the_error_names_what_to_do():
    model = disturb(adapted())
    before = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(tn.InputError, match=r"has 4 experts, which no single matrix replaces"):
            merge()
    assert torch.equal(logits(model), before)


def test_a_merge_with_nan_in_the_last_layer_changes_no_layer():
    model = disturb(adapted(num_experts=1, top_k=1))
    state = copy.deepcopy(model.state_dict())
    last = model.base_model.model.model.layers[2].mlp.mpoe_mixtures["default"]
    with torch.no_grad():
        last.experts.down.delta.center.fill_(math.nan)
    with pytest.raises(tn.InputError, match=r"layers\.2.*makes down NaN or infinite"):
        model.merge_and_unload(safe_merge=True)
    kept = {key: value for key, value in model.state_dict().items() if "mpoe" not in key}
    assert all(torch.equal(value, state[key]) for key, value in kept.items())


# Beside other adapters and losses


@pytest.mark.parametrize("experts_first", [True, False])
def test_lora_on_attention_trains_and_is_saved_beside_experts(experts_first, tmp_path):
    order = [lambda: config(), lambda: peft.LoraConfig(**LORA)]
    first, second = order if experts_first else reversed(order)

    def both():
        torch.manual_seed(0)
        return peft.get_peft_model(peft.get_peft_model(make("llama"), first()), second())

    model = both()
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert {"lora_" in name for name in trained} == {True, False}
    start = {name: each.detach().clone() for name, each in model.named_parameters()}
    train(model)
    moved = {name for name, each in model.named_parameters() if not torch.equal(each, start[name])}
    assert moved == trained
    model.save_pretrained(tmp_path)
    inner = peft.get_peft_model(make("llama"), first())
    loaded = peft.PeftModel.from_pretrained(inner, tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_modules_to_save_are_trained_and_saved_too(tmp_path):
    model = train(adapted(modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(loaded.base_model.model.lm_head.weight, make("llama").lm_head.weight)


def loss_of(model):
    return float(model(input_ids=IDS, labels=IDS).loss.detach())


def test_routers_losses_are_those_of_the_active_adapter():
    model = disturb(adapted(balance_weight=0.0))
    model.train()
    plain = loss_of(model)
    model.add_adapter("balanced", config(balance_weight=0.5, z_weight=0.25))
    balanced, own_state = model.base_model.model, model.state_dict()
    with torch.no_grad():
        for name, value in own_state.items():
            if ".balanced." in name:
                value.copy_(own_state[name.replace(".balanced.", ".default.")])
    assert loss_of(model) == plain
    model.set_adapter("balanced")
    with nn.record_routing(balanced) as routing:
        model(input_ids=IDS)
    losses = [
        0.5 * float(nn.Routing([call]).balance_loss()) + 0.25 * float(nn.Routing([call]).z_loss())
        for call in routing.calls
    ]
    assert loss_of(model) == pytest.approx(plain + sum(losses) / len(losses), rel=1e-5)
    assert loss_of(model.eval()) == pytest.approx(plain, rel=1e-5)
    unloaded = model.train().unload()
    assert not unloaded._forward_hooks
    assert not unloaded._forward_pre_hooks
    assert loss_of(unloaded) == pytest.approx(loss_of(make("llama").train()), rel=1e-5)


def test_no_warning_says_that_peft_would_not_save_the_experts(recwarn):
    train(adapted(), steps=1)
    assert not [each for each in recwarn if "does not save" in str(each.message)]


# Ways of running


def test_gradients_with_checkpointing_are_the_same():
    model = disturb(adapted())
    other = copy.deepcopy(model)
    other.enable_input_require_grads()
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for each in (model.train(), other.train()):
        each(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in own(other).items():
        torch.testing.assert_close(parameter.grad, own(model)[name].grad)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["residual", "hidden"])
def test_a_compiled_model_computes_the_same(layout):
    model = disturb(adapted(layout))
    expected = logits(model)
    torch.testing.assert_close(logits(torch.compile(model)), expected, rtol=1e-5, atol=1e-5)


def test_generation_with_a_cache_gives_the_tokens_without_one():
    model = disturb(adapted(), scale=0.5)
    settings = {"input_ids": IDS, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**settings, use_cache=True)
    assert torch.equal(cached, model.generate(**settings, use_cache=False))


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_base_in_half_precision_keeps_its_dtype(autocast_adapter_dtype):
    torch.manual_seed(0)
    model = peft.get_peft_model(
        make("llama").bfloat16(), config(), autocast_adapter_dtype=autocast_adapter_dtype
    )
    dtypes = {each.dtype for each in own(model).values()}
    assert dtypes == {torch.float32 if autocast_adapter_dtype else torch.bfloat16}
    before = logits(make("llama").bfloat16())
    assert logits(model).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model), before, rtol=0.05, atol=0.05)
    train(model)


@pytest.mark.slow
def test_trainer_resumes_to_the_same_bits(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]

    def trainer(folder, steps, **more):
        arguments = tf.TrainingArguments(
            folder, max_steps=steps, save_steps=2, per_device_train_batch_size=2, use_cpu=True,
            report_to=[], disable_tqdm=True, learning_rate=1e-2, seed=0, **more,
        )  # fmt: skip
        return tf.Trainer(adapted(), arguments, train_dataset=data)

    whole = trainer(tmp_path / "whole", 4, lr_scheduler_type="constant")
    whole.train()
    trainer(tmp_path / "parts", 2, lr_scheduler_type="constant").train()
    rest = trainer(tmp_path / "parts", 4, lr_scheduler_type="constant")
    rest.train(resume_from_checkpoint=True)
    expected = own(whole.model)
    assert all(torch.equal(each, expected[name]) for name, each in own(rest.model).items())


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "split"}, "layout must be one of residual, hidden, got 'split'"),
        ({"bond": 0}, "bond must be a positive integer, got 0"),
        ({"num_experts": 0}, "num_experts must be a positive integer"),
        ({"top_k": 5}, "top_k=5 exceeds num_experts=4"),
        ({"layout": "hidden", "bond": 2}, r"bond is for layout='residual', got bond=2"),
        ({"router": {"normalize": False}}, "weights that sum to 1 for every token"),
        ({"router": {"capacity_factor": 1.0}}, "weights that sum to 1 for every token"),
        ({"router": {"jiter": 1}}, "router has no settings jiter"),
        ({"layers": "("}, "is not a regular expression"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(tn.InputError, match=message):
        hf.MPOEAdapterConfig(**{"num_experts": 4, "top_k": 2} | settings)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"layers": range(1)}, [0]),
        ({"layers": np.array([1, 0])}, [0, 1]),
        ({"layers": {2}}, [2]),
        ({"bond": np.int64(3)}, 3),
        ({"num_experts": np.int64(3)}, 3),
        ({"balance_weight": np.float32(0.5)}, 0.5),
        ({"router": {"jitter_noise": np.float32(0.5)}}, {"jitter_noise": 0.5}),
        ({"group_size": (8, 5), "layout": "hidden", "bond": None}, [8, 5]),
    ],
)
def test_settings_of_other_types_are_saved_as_plain_ones(settings, kept, tmp_path):
    """Not only after hours of training does one learn that JSON cannot hold them."""
    model = adapted(**settings)
    model.save_pretrained(tmp_path)
    (name,) = [each for each in settings if each not in ("layout", "bond")] or ["bond"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())[name] == kept
    loaded = peft.PeftModel.from_pretrained(make("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def with_nan(model):
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = math.nan
    return model


def with_another_size(model):
    """Make the last network one that groups of 8 do not divide."""
    network = model.model.layers[2].mlp
    network.gate_proj, network.up_proj = torch.nn.Linear(24, 39), torch.nn.Linear(24, 39)
    network.down_proj = torch.nn.Linear(39, 24)
    return model


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (with_nan, RESIDUAL, r"layers\.2: the up matrix contains NaN or infinity"),
        (with_another_size, {"layout": "hidden", "group_size": [8]}, "must divide the matrix"),
        (lambda model: model, {"layout": "hidden", "group_size": 7}, "share no divisor with 7"),
    ],
)
def test_a_network_that_cannot_get_experts_leaves_all_networks_as_they_are(
    change, settings, message
):
    model = change(make("llama"))
    paths = [path for path, _ in model.named_modules()]
    with pytest.raises(tn.InputError, match=message):
        peft.get_peft_model(model, hf.MPOEAdapterConfig(**settings))
    assert [path for path, _ in model.named_modules()] == paths


def test_mixtures_and_adapted_networks_are_named_as_such():
    converted = hf.upcycle(make("llama"), hf.MPOEConfig(num_experts=2, sites=2))
    with pytest.raises(tn.InputError, match=r"layers\.0\.mlp is a mixture already"):
        peft.get_peft_model(converted, config())
    inner = adapted().base_model.model
    with pytest.raises(tn.InputError, match="merge or unload the adapters of PEFT first"):
        hf.upcycle(inner, hf.MPOEConfig(num_experts=2))


def test_models_without_known_networks_and_layers_out_of_range_are_refused():
    with pytest.raises(tn.InputError, match="has no feed-forward network of a known family"):
        peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), config())
    with pytest.raises(tn.InputError, match=r"layers must be from 0 to 2 .*, got \[7\]"):
        adapted(layers=[7])


def test_without_peft_the_error_names_the_extra():
    code = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "sys.modules['peft'] = None\n"
        "u.find_spec = lambda name, *a: None if name == 'peft' else find(name, *a)\n"
        "import tnmoe.hf\n"
        "assert 'MPOEAdapterConfig' not in dir(tnmoe.hf)\n"
        "tnmoe.hf.MPOEAdapterConfig"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "tnmoe[peft]" in found.stderr

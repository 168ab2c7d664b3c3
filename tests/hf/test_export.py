"""Exported models compute the same logits as the model that they came from."""

import copy
from itertools import combinations, cycle

import pytest
import torch
import transformers

import tnmoe as tn
from tests.hf.families import IDS, LAYOUTS, MODELS, inputs, make, outputs, relative
from tnmoe import hf, nn
from tnmoe.hf.export_targets import _switch_steps
from tnmoe.nn.compute.slots import Groups

CONFIG = {"num_experts": 3, "sites": 3, "num_experts_per_tok": 2}
SWITCH = {"num_experts_per_tok": 1}

# The ordinary mixture of every model that has one.
MIXTURES = {
    "llama": transformers.MixtralForCausalLM,
    "mistral": transformers.MixtralForCausalLM,
    "qwen2": transformers.Qwen2MoeForCausalLM,
    "qwen3": transformers.Qwen3MoeForCausalLM,
    "t5": transformers.SwitchTransformersForConditionalGeneration,
}


def trained(model, **settings):
    """Make a converted model whose experts differ, as after training."""
    model = make(model) if isinstance(model, str) else model
    model = hf.upcycle(model, hf.MPOEConfig(**CONFIG | settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(torch.randn_like(each) * 0.05)
    return model.eval()


def exported(model, folder):
    """Load an exported folder as another program would."""
    hf.to_moe(model).save_pretrained(folder)
    both = model.config.is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if both else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (name, layout)
        for name, layouts in zip(MODELS, cycle((("interleaved", "residual"), ("hidden", "dense"))))
        for layout in layouts
    ],
)
def test_averaging_experts_that_are_alike_gives_the_dense_model_back(name, layout):
    dense = make(name)
    expected = outputs(dense, name)
    names = set(dense.state_dict())
    config = hf.MPOEConfig(num_experts=3, every=2, **LAYOUTS[layout])
    back = hf.average_experts(hf.upcycle(dense, config))
    assert type(back) is type(dense)
    assert set(back.state_dict()) == names
    assert not any(isinstance(each, nn.MPOMoE) for each in back.modules())
    assert not hasattr(back.config, "tnmoe")
    assert relative(outputs(back, name), expected) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "bert", "flan-t5"])
@pytest.mark.parametrize("common_bias", [False, True])
def test_averages_are_those_of_matrices_and_biases(name, common_bias, tmp_path):
    model = trained(name, common_bias=common_bias)
    back = hf.average_experts(model)
    moes = [each for each in model.modules() if isinstance(each, nn.MPOMoE)]
    for ffn, layer in zip(hf.find_ffns(back), moes, strict=True):
        for part, matrix in ffn.matrices.items():
            projection = getattr(layer.experts, part)
            stack = torch.stack([projection.expert(e).to_matrix() for e in range(3)])
            weight = matrix.weight.T if name == "gpt2" else matrix.weight
            torch.testing.assert_close(weight, stack.mean(0))
            if matrix.bias is not None:
                torch.testing.assert_close(matrix.bias, projection.bias.mean(0))
    back.save_pretrained(tmp_path)
    loaded = type(back).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs(loaded, name), outputs(back, name))


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama with biases"])
@pytest.mark.parametrize("common_bias", [False, True])
@pytest.mark.parametrize("layout", ["hidden", "two matrices", "residual"])
def test_averages_of_experts_around_a_module_are_those_of_what_experts_compute(
    name, common_bias, layout
):
    model = trained(name, common_bias=common_bias, **{"sites": None, **LAYOUTS[layout]})
    back = hf.average_experts(model)
    moes = [each for each in model.modules() if isinstance(each, nn.MPOMoE)]
    for ffn, layer in zip(hf.find_ffns(back), moes, strict=True):
        for part, matrix in ffn.matrices.items():
            projection = getattr(layer.experts, part)
            rows = torch.eye(projection.in_features)
            rows = torch.cat([rows, torch.zeros_like(rows[:1])]).repeat(3, 1)
            experts = torch.arange(3).repeat_interleave(len(rows) // 3)
            with torch.no_grad():
                computed = projection(rows, Groups.of(experts, 3)).unflatten(0, (3, -1)).mean(0)
                torch.testing.assert_close(computed[-1], matrix.bias)
                weight = matrix.weight if name == "gpt2" else matrix.weight.T
                torch.testing.assert_close(computed[:-1] - computed[-1], weight)


@pytest.mark.parametrize(
    ("name", "layout", "top_k"),
    [
        (name, layout, 1 if name == "t5" else 1 + (row + column) % 2)
        for row, name in enumerate(MIXTURES)
        for column, layout in enumerate(LAYOUTS)
    ],
)
def test_an_ordinary_mixture_of_the_same_experts_computes_the_same(name, top_k, layout, tmp_path):
    model = trained(name, **{"num_experts_per_tok": top_k, "sites": None, **LAYOUTS[layout]})
    mixture = exported(model, tmp_path)
    assert type(mixture) is MIXTURES[name]
    assert relative(outputs(mixture, name), outputs(model, name)) < 1e-5
    assert relative(outputs(hf.to_moe(model), name), outputs(model, name)) < 1e-5
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(mixture.generate(IDS, **settings), model.generate(IDS, **settings))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen2", {"router": {"normalize": False}}),
        ("qwen3", {"router": {"normalize": False}}),
        ("t5", {**SWITCH, "router": {"normalize": False}}),
        ("t5", {**SWITCH, "router": {"normalize": False, "bias": True, "scale": 3.0}}),
        ("t5", {**SWITCH, "router": {"bias": True, "score_function": "sigmoid"}}),
        ("llama", {"router": {"scale": 3.0}}),
        ("llama", {**SWITCH, "router": {"score_function": "sigmoid"}}),
        ("llama", {"router": {"second_expert": "random", "capacity_factor": 0.5, "noisy": True}}),
    ],
)
def test_routers_are_expressed_as_far_as_they_can_be(name, settings, tmp_path):
    model = trained(name, **settings)
    assert relative(outputs(exported(model, tmp_path), name), outputs(model, name)) < 1e-5


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("qwen2", [1]),
        ("qwen3", [0, 2]),
        ("t5", "decoder"),
        ("t5", [1, 4]),
        ("t5", [0, 1, 2, 4]),
    ],
)
def test_layers_without_experts_stay_as_they_are(name, layers, tmp_path):
    model = trained(name, layers=layers, **(SWITCH if name == "t5" else {}))
    assert relative(outputs(exported(model, tmp_path), name), outputs(model, name)) < 1e-5


@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_every_nth_layer_from_the_second_one_on_is_a_switch_layer(every, tmp_path):
    config = transformers.T5Config(
        vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=7, num_decoder_layers=4, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    layers = range(11) if every == 1 else [*range(1, 7, every), *range(8, 11, every)]
    model = trained(transformers.T5ForConditionalGeneration(config), layers=list(layers), **SWITCH)
    switch = exported(model, tmp_path)
    assert relative(outputs(switch, "t5"), outputs(model, "t5")) < 1e-5


def test_no_token_of_a_long_sequence_is_dropped_by_a_switch():
    model = trained("t5", **SWITCH)
    ids = torch.randint(50, (1, 500), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for each in model.modules():
            if isinstance(each, nn.MPOMoE):  # hundreds of tokens for each of two experts
                each.router.weight.copy_(torch.tensor([[1.0], [0.0], [-1.0]]))
        one, other = (each(ids, decoder_input_ids=ids).logits for each in (hf.to_moe(model), model))
    assert relative(one, other) < 1e-5


def test_a_switch_makes_its_decoders_inputs_of_labels_as_its_t5_did(tmp_path):
    model = trained("t5", **SWITCH)
    switch = exported(model, tmp_path)
    one, other = (each(input_ids=IDS, labels=IDS.flip(1)) for each in (switch, model))
    torch.testing.assert_close(one.loss, other.loss)


@pytest.mark.parametrize("feed_forward", ["relu", "gelu"])
@pytest.mark.parametrize("scales", [True, False])
def test_a_switch_has_the_activation_and_the_head_of_its_t5(feed_forward, scales, tmp_path):
    config = transformers.T5Config(
        vocab_size=50, d_model=24, d_kv=12, d_ff=40, num_layers=2, num_heads=2,
        decoder_start_token_id=0, feed_forward_proj=feed_forward, tie_word_embeddings=scales,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    if not scales:  # as in T5 1.1
        model.lm_head.weight = torch.nn.Parameter(torch.randn(50, 24))
    model = trained(model, **SWITCH)
    assert relative(outputs(exported(model, tmp_path), "t5"), outputs(model, "t5")) < 1e-5


@pytest.mark.parametrize(("name", "full"), [("qwen2", 1), ("qwen3", 0), ("qwen3", 3)])
def test_sliding_windows_stay_in_their_layers(name, full, tmp_path):
    dense = make(name)
    config = copy.deepcopy(dense.config)
    config.update({"use_sliding_window": True, "sliding_window": 3, "max_window_layers": full})
    config.layer_types = ["full_attention"] * full + ["sliding_attention"] * (3 - full)
    model = trained(type(dense)(config))
    mixture = exported(model, tmp_path)
    assert relative(outputs(mixture, name), outputs(model, name)) < 1e-5


@pytest.mark.parametrize("name", MIXTURES)
def test_exports_keep_what_a_model_is_beside_its_function_and_leave_it_alone(name):
    model = trained(name, **SWITCH).to(torch.bfloat16).train()
    model.generation_config.max_new_tokens = 17
    before = {name: each.clone() for name, each in model.state_dict().items()}
    for other in (hf.average_experts(model), hf.to_moe(model)):
        assert {each.dtype for each in other.parameters()} == {torch.bfloat16}
        assert other.training
        assert other.generation_config.max_new_tokens == 17
        assert not hasattr(other.config, "tnmoe")
        assert torch.isfinite(other(**inputs(name)).logits).all()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(each, before[name]) for name, each in after.items())
    assert model.training
    assert hf.config_of(model).num_experts == CONFIG["num_experts"]


def test_rotary_embeddings_of_a_model_loaded_in_half_precision_stay_precise(tmp_path):
    trained("llama").save_pretrained(tmp_path)
    model = hf.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for other in (hf.average_experts(model), hf.to_moe(model)):
        frequencies = other.model.rotary_emb.inv_freq
        torch.testing.assert_close(frequencies, model.model.rotary_emb.inv_freq, rtol=0, atol=0)


def untied():
    model = trained("t5", **SWITCH)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(50, 24))
    return model


def sliding_in_some():
    config = make("qwen3").config
    config.layer_types = ["full_attention", "full_attention", "sliding_attention"]
    return trained(transformers.Qwen3ForCausalLM(config))


def with_shared_expert():
    model = trained("qwen2")
    model.model.layers[1].mlp.shared_expert = torch.nn.Identity()
    return model


def biased_attention():
    config = make("llama").config
    config.attention_bias = True
    return trained(transformers.LlamaForCausalLM(config))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: make("llama"), "LlamaForCausalLM is not a converted model"),
        (
            lambda: trained("gpt2"),
            "no ordinary mixture like GPT2LMHeadModel .* only like LlamaForCausalLM, Mistral",
        ),
        (
            lambda: trained("llama", layers=[0, 2]),
            "Mixtral has experts in all 3 layers, the model in 2",
        ),
        (lambda: trained("llama with biases"), "cannot express biases of experts"),
        (
            biased_attention,
            r"Mixtral.* has no place for: model\.layers\.0\.self_attn\.k_proj\.bias",
        ),
        (with_shared_expert, "Qwen2Moe.* cannot express a shared expert"),
        (sliding_in_some, "sliding windows in all layers or in none, the model in 1 of 3"),
        (lambda: trained("t5"), "Switch.* cannot express top_k=2"),
        (lambda: trained("flan-t5", **SWITCH), "Switch.* cannot express gates"),
        (untied, r"Switch.* ties what the model does not: .*shared\.weight"),
        (
            lambda: trained("t5", layers=[0, 4], **SWITCH),
            "no layer of a stack, in all, or in layers 1, .* the model's encoder in 0 of 3",
        ),
        (
            lambda: trained("t5", **SWITCH).half(),
            r"Switch cannot express normalize=True in torch\.float16",
        ),
        (
            lambda: trained("llama", router_kind="expert_choice"),
            "has top-k routers, the model has ExpertChoiceRouter",
        ),
    ],
)
def test_models_that_no_mixture_expresses_are_refused(model, message):
    with pytest.raises(tn.InputError, match=message):
        hf.to_moe(model())


@pytest.mark.parametrize(
    ("name", "router", "message"),
    [
        ("llama", {"normalize": False}, "Mixtral.* cannot express normalize=False"),
        ("qwen2", {"score_function": "sigmoid"}, "express score_function='sigmoid'$"),
        ("qwen3", {"load_bias": True}, "express load_bias=True$"),
        ("qwen3", {"bias": True, "eval_capacity_factor": 2.0}, "bias=True, eval_capacity_factor="),
        ("llama", {"num_groups": 3, "top_groups": 2}, "express num_groups=3$"),
        ("mistral", {"second_expert": "threshold"}, "express second_expert='threshold'$"),
    ],
)
def test_routers_that_no_mixture_expresses_are_refused(name, router, message):
    model = trained(name, router=router)
    with pytest.raises(tn.InputError, match=message):
        hf.to_moe(model)


def test_averaging_needs_a_converted_model():
    with pytest.raises(tn.InputError, match="BertModel is not a converted model"):
        hf.average_experts(make("bert"))


def test_switch_is_told_the_distance_of_its_layers_with_experts_wherever_there_is_one():
    def layers(step, total):
        """Return the layers that the class gives experts: see SwitchTransformersStack."""
        return {each for each in range(total) if step == 1 or (step and each % step == 1)}

    for total in range(1, 8):
        for sparse in (
            set(each) for r in range(total + 1) for each in combinations(range(total), r)
        ):
            if any(layers(step, total) == sparse for step in range(total + 1)):
                told = _switch_steps("encoder", sparse, total)
                assert layers(told["encoder_sparse_step"], total) == sparse
                assert told["num_sparse_encoder_layers"] == len(sparse)
            else:
                with pytest.raises(tn.InputError, match="Switch has experts in no layer"):
                    _switch_steps("encoder", sparse, total)

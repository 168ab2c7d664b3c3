"""transformers' mixtures computed by tnmoe, compared with their own loop over experts."""

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from torch.autograd import forward_ad
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import tnmoe.hf  # noqa: F401 - registers the implementation
from tests.hf.families import IDS, MASK, relative

E = 4

_SMALL = {
    "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 12, "intermediate_size": 40,
    "moe_intermediate_size": 16, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 4,
}  # fmt: skip

MODELS = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_SMALL, num_local_experts=E)),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**_SMALL, num_experts=E)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**_SMALL, num_experts=E)),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(**_SMALL | _LATENT, n_routed_experts=E)
    ),
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**_SMALL, num_local_experts=E, swiglu_limit=0.5)
    ),
}

_SIZES = {"hidden_size": 8, "intermediate_size": 12, "hidden_act": "silu", "num_local_experts": E}

# What is special: nothing; matrices lie the other way round; besides, gate and up alternate, and
# there are biases; no gate; a norm behind every expert.
EXPERTS = {
    MixtralExperts: {},
    AriaExperts: {"moe_num_experts": E},
    GptOssExperts: {"swiglu_alpha": 1.7, "swiglu_limit": 0.5},
    NemotronHExperts: {
        "n_routed_experts": E, "moe_intermediate_size": 12, "moe_latent_size": None,
        "mlp_hidden_act": "relu2",
    },
    MuseSparkExperts: {
        "moe_hidden_size": 8, "moe_intermediate_size": 12, "post_norm_eps": 1e-5,
    },
}  # fmt: skip

# Those whose own loop takes a slot without an expert.
TAKES_NONE = (MixtralExperts, AriaExperts, MuseSparkExperts)


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def make_experts(kind):
    torch.manual_seed(0)
    experts = kind(SimpleNamespace(**_SIZES | EXPERTS[kind]))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def routed(tokens=9, dtype=torch.float32):
    """Make tokens, their experts and weights."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(tokens, 8, generator=generator, dtype=dtype)
    weights, index = torch.rand(tokens, E, generator=generator, dtype=dtype).topk(2)
    return states, index, weights


def run(experts, implementation, states, index, weights):
    """Return the output, and the gradients of states, weights and parameters."""
    experts.config._experts_implementation = implementation
    states, weights = (each.clone().requires_grad_() for each in (states, weights))
    output = experts(states, index, weights)
    variables = [states, weights, *experts.parameters()]
    return output.detach(), *torch.autograd.grad(output.sin().sum(), variables)


@pytest.fixture
def calls(monkeypatch):
    """Count the tokens in every call of tnmoe's implementation."""
    seen, forward = [], ALL_EXPERTS_FUNCTIONS["tnmoe"]

    def count(experts, states, *args):
        seen.append(len(states))
        return forward(experts, states, *args)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "tnmoe", count)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same_with_the_same_gradients(name, calls):
    model, results = make(name).train(), {}
    for implementation in ("eager", "tnmoe"):
        model.set_experts_implementation(implementation)
        logits = model(input_ids=IDS, attention_mask=MASK).logits
        variables = [each for each in model.parameters() if each.requires_grad]
        grads = torch.autograd.grad(logits.sin().sum(), variables, materialize_grads=True)
        results[implementation] = (logits, *grads)
        assert bool(calls) == (implementation == "tnmoe")
    for mine, own in zip(results["tnmoe"], results["eager"], strict=True):
        assert (mine - own).norm() <= 1e-5 * own.norm()


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_generates_the_same(name, calls, tmp_path):
    model = make(name)
    model.set_experts_implementation("eager")
    mask = MASK.flip(1)
    settings = {
        "attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0,
        "eos_token_id": None,
    }  # fmt: skip
    expected = model.generate(IDS * mask, **settings)
    model.set_experts_implementation("tnmoe")
    model.save_pretrained(tmp_path)
    # Others, who lack tnmoe, load it all the same.
    assert "tnmoe" not in (tmp_path / "config.json").read_text()
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="tnmoe")
    assert loaded.get_experts_implementation()[""] == "tnmoe"
    assert torch.equal(loaded.generate(IDS * mask, **settings), expected)
    assert IDS.numel() in calls
    assert len(IDS) in calls  # one token of each at a time


@pytest.mark.parametrize("kind", EXPERTS)
def test_every_kind_of_experts_is_read_as_its_class_does(kind):
    experts = make_experts(kind)
    for mine, own in zip(
        run(experts, "tnmoe", *routed()), run(experts, "eager", *routed()), strict=True
    ):
        assert relative(mine, own) < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", TAKES_NONE)
def test_what_goes_to_no_expert_counts_for_nothing(kind, compiled):
    experts = make_experts(kind)
    states, index, weights = routed()
    index[0, 1] = index[3] = E
    expected = run(experts, "eager", states, index, weights)
    states[3] = torch.nan
    if compiled:
        experts.compile(backend="aot_eager", fullgraph=True)
    output, *grads = run(experts, "tnmoe", states, index, weights)
    assert not output[3].any()
    for mine, own in zip((output, *grads), expected, strict=True):
        assert relative(mine, own) < 1e-5


def test_biases_of_absent_experts_are_not_added():
    experts, (states, index, weights) = make_experts(GptOssExperts), routed()
    index[0, 1] = index[3] = E
    output, _, weight_grad, *_ = run(experts, "tnmoe", states, index, weights)
    assert not output[3].any()
    assert not weight_grad[index == E].any()
    alone = run(experts, "eager", states[:1], index[:1, :1], weights[:1, :1])[0]
    torch.testing.assert_close(output[:1], alone)


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("kind", EXPERTS)
def test_what_is_not_finite_in_an_expert_stays_with_its_tokens(kind, transformed):
    experts, (states, index, weights) = make_experts(kind), routed(tokens=30)
    well = (index != 2).all(1)
    expected = run(experts, "tnmoe", states[well], index[well], weights[well])
    with torch.no_grad():
        for parameter in experts.parameters():
            if len(parameter) == E:
                parameter[2] = torch.nan
    experts.config._experts_implementation = "tnmoe"
    states, weights = (each.requires_grad_() for each in (states, weights))
    forward = (
        (lambda *x: torch.func.vmap(experts)(*(each[None] for each in x))[0])
        if (transformed)
        else experts
    )
    output = forward(states, index, weights)
    assert output[~well].isnan().any(1).all()
    variables = [states, weights, *experts.parameters()]
    grads = torch.autograd.grad(output[well].sin().sum(), variables)
    torch.testing.assert_close(output[well], expected[0])
    for mine, own in zip(grads[:2], expected[1:3], strict=True):
        torch.testing.assert_close(mine[well], own)
    for mine, own in zip(grads[2:], expected[3:], strict=True):
        if len(own) == E:  # a norm behind all experts has seen the others' tokens, too
            torch.testing.assert_close(mine[[0, 1, 3]], own[[0, 1, 3]])


def test_weights_of_slots_without_an_expert_do_not_count():
    experts, (states, index, weights) = make_experts(MixtralExperts), routed()
    index[0, 1] = index[3] = E
    expected = run(experts, "tnmoe", states, index, weights)
    weights[index == E] = torch.nan
    for mine, own in zip(run(experts, "tnmoe", states, index, weights), expected, strict=True):
        torch.testing.assert_close(mine, own)


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_are_vectorised_over_inputs_and_parameters(kind):
    experts, (states, index, weights) = make_experts(kind), routed(tokens=12)
    if kind in TAKES_NONE:
        index[5, 0] = index[7] = E
    batch = [each.unflatten(0, (3, 4)) for each in (states, index, weights)]
    many = {
        name: torch.stack([each, 2 * each, each.sin()]) for name, each in experts.named_parameters()
    }

    def call(parameters, *given):
        return torch.func.functional_call(experts, parameters, given)

    def one(number, *given):
        return call({name: each[number] for name, each in many.items()}, *given)

    def slope(parameters, *given):
        return torch.func.grad(lambda x: call(x, *given).sin().sum())(parameters)

    expected = torch.stack(
        [run(experts, "eager", *(each[i] for each in batch))[0] for i in range(3)]
    )
    experts.config._experts_implementation = "tnmoe"
    own = dict(experts.named_parameters())
    torch.testing.assert_close(torch.func.vmap(call, (None, 0, 0, 0))(own, *batch), expected)
    together = torch.func.vmap(call, (0, None, None, None))(many, states, index, weights)
    torch.testing.assert_close(
        together, torch.stack([one(i, states, index, weights) for i in range(3)])
    )
    slopes = torch.func.vmap(slope, (None, 0, 0, 0))(own, *batch)
    for number in range(3):
        alone = run(experts, "eager", *(each[number] for each in batch))[3:]
        for mine, theirs in zip(slopes.values(), alone, strict=True):
            torch.testing.assert_close(mine[number], theirs)


@pytest.mark.parametrize("kind", EXPERTS)
def test_derivatives_of_second_order_and_forward_mode_are_those_of_the_class(kind):
    experts, (states, index, weights) = make_experts(kind).double(), routed(dtype=torch.float64)
    if kind in TAKES_NONE:
        index[0, 1] = index[3] = E
    direction, results = torch.randn_like(states), []
    for implementation in ("eager", "tnmoe"):
        experts.config._experts_implementation = implementation
        given = states.clone().requires_grad_()
        variables = [given, *experts.parameters()]
        slopes = torch.autograd.grad(
            experts(given, index, weights).sin().sum(), variables, create_graph=True
        )
        penalty = sum(each.square().sum() for each in slopes)
        results.append([*torch.autograd.grad(penalty, variables)])
        with forward_ad.dual_level():
            dual = experts(forward_ad.make_dual(states, direction), index, weights)
            results[-1] += forward_ad.unpack_dual(dual)
    # A norm is computed in single precision.
    limit = 1e-4 if kind is MuseSparkExperts else 1e-12
    for mine, own in zip(results[1], results[0], strict=True):
        assert relative(mine, own) < limit


def test_models_are_vectorised_as_with_the_implementations_of_transformers():
    model = make("mixtral")
    embedded = model.get_input_embeddings()(IDS).detach()
    found = []
    for implementation in ("batched_mm", "tnmoe"):
        model.set_experts_implementation(implementation)
        found.append(
            torch.func.vmap(
                lambda each: model(inputs_embeds=each[None], use_cache=False).logits[0]
            )(embedded)
        )
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("index", [torch.zeros(0, 2).long(), torch.full((3, 2), E)])
def test_no_tokens_or_none_with_an_expert_give_zeros_and_gradients(index):
    states, weights = torch.randn(len(index), 8), torch.rand(len(index), 2)
    output, *grads = run(make_experts(MixtralExperts), "tnmoe", states, index, weights)
    assert output.shape == states.shape
    assert not any(each.any() for each in (output, *grads))


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_that_of_the_class(kind, autocast):
    experts, results = make_experts(kind), []
    states, index, weights = routed()
    if not autocast:
        experts.bfloat16()
        states, weights = states.bfloat16(), weights.bfloat16()
    for implementation in ("tnmoe", "eager"):
        experts.config._experts_implementation = implementation
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(experts(states, index, weights))
    assert results[0].dtype == results[1].dtype
    assert relative(*(each.float() for each in results)) < 2e-2


def test_what_has_no_such_experts_is_as_before(tmp_path):
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(**_SMALL)).eval()
    expected = llama(IDS).logits
    llama.set_experts_implementation("tnmoe")
    assert torch.equal(llama(IDS).logits, expected)
    llama.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="tnmoe")
    assert torch.equal(loaded.eval()(IDS).logits, expected)


def test_unknown_names_are_transformers_to_refuse():
    with pytest.raises(ValueError, match='`experts_implementation="tnmoe"`'):
        make("mixtral").set_experts_implementation("tnmo")

"""Exports run as what they claim to be: by logits, against the model they came from."""

import pytest
import torch
import transformers

import tnmoe as tn
from tests.hf.families import IDS, MODELS, inputs, make, outputs, relative
from tnmoe import hf, nn

CONFIG = {"num_experts": 3, "sites": 3, "num_experts_per_tok": 2}


def trained(name, **settings):
    """A converted model whose experts have gone their own ways."""
    model = hf.upcycle(make(name), hf.MPOEConfig(**CONFIG, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(torch.randn_like(each) * 0.05)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["interleaved", "dense"])
def test_averaging_experts_that_are_alike_gives_the_dense_model_back(name, layout):
    dense = make(name)
    expected = outputs(dense, name)
    names = set(dense.state_dict())
    back = hf.average_experts(hf.upcycle(dense, hf.MPOEConfig(**CONFIG, layout=layout, every=2)))
    assert type(back) is type(dense)
    assert set(back.state_dict()) == names
    assert not any(isinstance(each, nn.MPOMoE) for each in back.modules())
    assert getattr(back.config, "quantization_config", None) is None
    assert relative(outputs(back, name), expected) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "bert", "flan-t5"])
@pytest.mark.parametrize("shared_bias", [False, True])
def test_averages_are_those_of_matrices_and_biases(name, shared_bias, tmp_path):
    model = trained(name, shared_bias=shared_bias)
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


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("layout", ["interleaved", "split", "dense"])
def test_a_mixtral_of_the_same_experts_computes_the_same(name, top_k, layout, tmp_path):
    settings = CONFIG | {"num_experts_per_tok": top_k, "layout": layout}
    model = hf.upcycle(make(name), hf.MPOEConfig(**settings))
    with torch.no_grad():
        for each in model.parameters():
            each.add_(torch.randn_like(each) * 0.05)
    mixtral = hf.to_mixtral(model)
    assert relative(outputs(mixtral, name), outputs(model, name)) < 1e-5
    mixtral.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is transformers.MixtralForCausalLM
    assert relative(outputs(loaded, name), outputs(model, name)) < 1e-5
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(loaded.generate(IDS, **settings), model.generate(IDS, **settings))


def test_exports_keep_dtype_and_mode_and_leave_the_model_alone():
    model = trained("llama").to(torch.bfloat16).train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    for other in (hf.average_experts(model), hf.to_mixtral(model)):
        assert other.dtype == torch.bfloat16
        assert other.training
        assert torch.isfinite(other(**inputs("llama")).logits).all()
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


@pytest.mark.parametrize(
    ("export", "message"),
    [
        (lambda: hf.average_experts(make("bert")), "BertModel is no converted model"),
        (lambda: hf.to_mixtral(make("llama")), "LlamaForCausalLM is no converted model"),
        (lambda: hf.to_mixtral(trained("qwen2")), "become Mixtral, got Qwen2ForCausalLM"),
        (
            lambda: hf.to_mixtral(trained("llama", layers=[0, 2])),
            "Mixtral has experts in all 3 layers, the model in 2",
        ),
        (lambda: hf.to_mixtral(trained("llama with biases")), "Mixtral has no biases"),
        (
            lambda: hf.to_mixtral(trained("llama", router={"normalize": False})),
            r"weights that sum to 1, the model has TopKRouter\(.* with normalize",
        ),
        (
            lambda: hf.to_mixtral(trained("llama", router={"load_bias": True})),
            "weights that sum to 1, the model has TopKRouter",
        ),
        (
            lambda: hf.to_mixtral(trained("llama", router_kind="expert_choice")),
            "weights that sum to 1, the model has ExpertChoiceRouter",
        ),
    ],
)
def test_what_cannot_be_exported_is_named(export, message):
    with pytest.raises(tn.InputError, match=message):
        export()

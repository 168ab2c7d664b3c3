"""Mixtures share the model's own modules as they stand, and hold nothing twice."""

import copy
import pickle
from contextlib import nullcontext

import matplotlib
import pytest
import torch
import transformers
from matplotlib import pyplot
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.hf.families import IDS, LAYOUTS, MASK, make, outputs, relative
from tnmoe import hf, nn, plot

AROUND_A_MODULE = ("hidden", "two groups", "residual", "tensor train")
NAMES = ("bert", "llama", "llama with biases", "gpt2", "t5", "albert")


def config_of(layout, **settings):
    return hf.MPOEConfig(num_experts=3, num_experts_per_tok=2, **LAYOUTS[layout] | settings)


def mixtures(model):
    return [each for each in model.modules() if isinstance(each, nn.MPOMoE)]


def trained(name, layout, **settings):
    """Make a converted model whose experts differ."""
    model = hf.upcycle(make(name), config_of(layout, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def stored_and_needed(model):
    """Bytes of all storages behind a model's parameters, and of the parameters themselves."""
    parameters = list(model.parameters())
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in parameters}
    stored = sum(each.nbytes() for each in storages.values())
    return stored, sum(each.numel() * each.element_size() for each in parameters)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", AROUND_A_MODULE)
@pytest.mark.parametrize("common_bias", [False, True])
def test_experts_use_the_models_own_modules_as_they_stand(name, layout, common_bias):
    model = make(name)
    ffns = hf.find_ffns(model)
    weights = [{part: each.weight for part, each in ffn.matrices.items()} for ffn in ffns]
    before = [{part: each.weight.clone() for part, each in ffn.matrices.items()} for ffn in ffns]
    hf.upcycle(model, config_of(layout, common_bias=common_bias))
    for ffn, layer, parameters, numbers in zip(ffns, mixtures(model), weights, before, strict=True):
        for part, module in ffn.matrices.items():
            projection = getattr(layer.experts, part)
            assert projection.base is module
            assert module.weight is parameters[part]
            assert torch.equal(module.weight, numbers[part])
            has_own = module.bias is not None and not common_bias
            assert (projection.bias is not None) == has_own
            if has_own:
                assert not projection.bias.any()
    stored, needed = stored_and_needed(model)
    assert stored == needed


@pytest.mark.parametrize("name", ["gpt2", "phi3", "llama with biases"])
@pytest.mark.parametrize("layout", AROUND_A_MODULE)
def test_a_loaded_model_holds_every_number_once(name, layout, tmp_path):
    model = trained(name, layout)
    stored, needed = stored_and_needed(model)
    assert stored == needed  # halves of a fused matrix keep no other half alive
    model.save_pretrained(tmp_path)
    loaded = hf.from_pretrained(tmp_path).eval()
    assert stored_and_needed(loaded)[1] == needed
    # A checkpoint's tensors may lie in one buffer, which they fill.
    assert stored_and_needed(loaded)[0] < 1.01 * needed + 4096
    ffn = hf.find_ffns(make(name))[0]
    experts = mixtures(loaded)[0].experts
    kinds = {part: type(each) for part, each in ffn.matrices.items()}
    for part, kind in kinds.items():
        expected = torch.nn.Linear if kind.__name__ == "FusedHalf" else kind
        assert type(getattr(experts, part).base) is expected
    torch.testing.assert_close(outputs(loaded, name), outputs(model, name))


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
@pytest.mark.parametrize("layout", [*AROUND_A_MODULE, "two matrices"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_compute_the_same_and_share_nothing(name, layout, copied):
    model = trained(name, layout)
    expected, other = outputs(model, name), copied(model)
    assert torch.equal(outputs(other, name), expected)
    assert not {id(each) for each in other.parameters()} & {id(each) for each in model.parameters()}
    with torch.no_grad():
        mixtures(other)[0].experts.up.base.weight.zero_()
    assert torch.equal(outputs(model, name), expected)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "t5"])
@pytest.mark.parametrize("layout", [*AROUND_A_MODULE, "two matrices"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_when_converted_and_when_loaded(name, layout, dtype, tmp_path):
    dense = make(name)
    expected = outputs(dense, name)
    model = hf.upcycle(dense.to(dtype), config_of(layout))
    assert {each.dtype for each in model.parameters()} == {dtype}
    assert relative(outputs(model, name).float(), expected) < 0.05
    model.save_pretrained(tmp_path)
    loaded = hf.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {each.dtype for each in mixtures(loaded)[0].parameters()} == {dtype}
    torch.testing.assert_close(outputs(loaded, name), outputs(model, name), rtol=0.02, atol=0.02)
    again = hf.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert relative(outputs(again, name), expected) < 0.05


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
@pytest.mark.parametrize("layout", [*AROUND_A_MODULE, "two matrices"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_configuration_builds_the_same_structure_on_any_device(name, layout, device):
    model = trained(name, layout)
    with torch.device("meta") if device == "meta" else nullcontext():
        built = type(model)(copy.deepcopy(model.config)).eval()
    sizes = {key: each.shape for key, each in model.state_dict().items()}
    assert {key: each.shape for key, each in built.state_dict().items()} == sizes
    assert all(each.is_meta == (device == "meta") for each in built.parameters())
    if device == "cpu":
        assert torch.isfinite(outputs(built, name)).all()


@pytest.mark.parametrize("name", ["gpt2", "llama with biases"])
@pytest.mark.parametrize("layout", [*AROUND_A_MODULE, "two matrices"])
@pytest.mark.parametrize("entries", [{"num_experts": 5}, {"max_bond": 4}])
def test_what_has_another_size_is_drawn_anew_around_the_modules(name, layout, entries, tmp_path):
    if layout in ("two matrices", "tensor train") and "max_bond" in entries:
        pytest.skip("other bonds are refused, or change nothing")
    trained(name, layout).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.tnmoe["config"].update(entries)
    _ = [torch.full((1 << 16,), 1e30) for _ in range(50)]
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True
    ).eval()
    for key, tensor in model.state_dict().items():
        assert float(tensor.abs().max()) < 10, key
    assert torch.isfinite(outputs(model, name)).all()


@pytest.mark.parametrize("layout", [*AROUND_A_MODULE, "two matrices"])
def test_a_model_loads_as_another_class_of_its_family(layout, tmp_path):
    model = trained("gpt2", layout)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        states = model.transformer(input_ids=IDS, attention_mask=MASK)[0]
        bare = AutoModel.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(bare(input_ids=IDS, attention_mask=MASK)[0], states)
    head = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path)
    assert len(mixtures(head)) == 3


# The compiler takes seconds, so not every layout meets every model.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama", "hidden"),
        ("gpt2", "two groups"),
        ("llama", "two matrices"),
        ("gpt2", "residual"),
        ("llama", "tensor train"),
    ],
)
def test_a_compiled_model_and_one_with_checkpointing_train_alike(name, layout):
    torch.compiler.reset()
    model = trained(name, layout).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MPOMoE):
            module.dropout = 0.0

    def gradients(function):
        model.zero_grad()
        loss = function(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return [loss.detach(), *(each.grad.clone() for each in model.parameters())]

    expected = gradients(model)
    compiled = gradients(torch.compile(model, backend="aot_eager"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for other in (compiled, gradients(model)):
        for one, two in zip(other, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each != "dense"])
def test_pictures_show_converted_models_of_every_layout(layout):
    matplotlib.use("Agg")
    dense, config = make("gpt2"), config_of(layout)
    report = hf.parameter_report(dense, config)
    assert len(plot.parameter_bars(report).patches) == 6
    up = mixtures(hf.upcycle(dense, config))[0].experts.up
    bonds = up.expert(0).shape.sites - 1
    assert len(plot.schmidt_spectra(up.expert(0)).lines) == bonds
    assert plot.entropy(up.expert(0)).lines
    pyplot.close("all")

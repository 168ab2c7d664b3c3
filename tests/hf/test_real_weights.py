"""Real weights from end to end: convert folders, load, compute, generate, export."""

import copy
import functools

import pytest
import torch
import transformers

from tests.hf import pretrained
from tests.hf.families import relative
from tnmoe import hf

# How the models are loaded again, whether they generate, and what they become for serving.
CASES = {
    "minilm": (transformers.AutoModel, None),
    "smollm2": (transformers.AutoModelForCausalLM, transformers.MixtralForCausalLM),
    "flan_t5": (transformers.AutoModelForSeq2SeqLM, None),
}


LARGE = pytest.mark.slow


@pytest.fixture(scope="module")
def load():
    """Return a function that loads models by name, each once: to unpack GGUF takes seconds."""
    return functools.cache(lambda name: getattr(pretrained, name)())


@pytest.fixture(scope="module", params=["minilm", pytest.param("smollm2", marks=LARGE), "flan_t5"])
def case(request, load, tmp_path_factory):
    """Return name, folder, inputs, outputs and generated tokens of the dense model."""
    folder = tmp_path_factory.mktemp("real") / request.param
    model, inputs = load(request.param)
    model.save_pretrained(folder)
    return request.param, folder, inputs, outputs(model, inputs), generated(model, inputs)


@torch.no_grad()
def outputs(model, inputs):
    return model(**inputs)[0]


def generated(model, inputs):
    if not model.can_generate():
        return None
    return model.generate(inputs["input_ids"], max_new_tokens=8, min_new_tokens=8, do_sample=False)


def check(folder, case, limit):
    """Check that a folder loads with its Auto class, and computes and generates the same."""
    name, _, inputs, expected, tokens = case
    model = CASES[name][0].from_pretrained(folder).eval()
    assert relative(outputs(model, inputs), expected) < limit
    if tokens is not None:
        assert torch.equal(generated(model, inputs), tokens)
    return model


@pytest.mark.parametrize("layout", ["interleaved", "split"])
def test_real_models_compute_the_same_as_mixtures_and_back(layout, case, tmp_path):
    name, folder, *_ = case
    config = hf.MPOEConfig(num_experts=2, layout=layout, num_experts_per_tok=2)
    hf.prepare_upcycle(folder, config).run(tmp_path / "mpoe", shard_bytes=10**8)
    model = check(tmp_path / "mpoe", case, 1e-4)
    # Of the model, since transformers' configuration of T5 cannot say that flan-T5 ties nothing.
    report = hf.parameter_report(CASES[name][0].from_pretrained(folder), config)
    assert model.num_parameters() == report.total.mpoe
    hf.prepare_export(tmp_path / "mpoe", to="dense").run(tmp_path / "dense")
    check(tmp_path / "dense", case, 1e-4)
    if CASES[name][1] is not None and layout == "split":
        hf.prepare_export(tmp_path / "mpoe", to="moe").run(tmp_path / "moe")
        assert type(check(tmp_path / "moe", case, 1e-4)) is CASES[name][1]


def test_what_inspection_predicts_is_what_truncation_does(case):
    _, folder, *_ = case
    config = hf.MPOEConfig(layers=[0, 1], sites=3)
    found = hf.inspect_checkpoint(folder, config, bonds=[16])
    model = CASES[case[0]][0].from_pretrained(folder)
    norms = {
        f"{ffn.name}.{name}": float(matrix.weight.detach().norm())
        for ffn in hf.find_ffns(model)
        for name, matrix in ffn.matrices.items()
    }
    cut = {}
    hf.upcycle(
        model, hf.MPOEConfig(layers=[0, 1], sites=3, max_bond=16),
        lambda name, info: cut.update({name: info.error_bound}),
    )  # fmt: skip
    assert len(cut) == len(found.matrices) >= 4
    for matrix in found.matrices:
        assert cut[matrix.name] / norms[matrix.name] <= matrix.errors[16] * (1 + 1e-4)
        assert 0.05 < matrix.errors[16] <= 1


@LARGE
def test_a_model_from_gguf_is_converted_saved_and_loaded(load, tmp_path):
    dense, inputs = load("smollm2")
    model = copy.deepcopy(dense)
    expected = outputs(model, inputs)
    hf.upcycle(model, hf.MPOEConfig(num_experts=2, layers=[0, 29]))
    assert relative(outputs(model, inputs), expected) < 1e-4
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert relative(outputs(loaded, inputs), expected) < 1e-4

"""The scripts of the benchmarks on small sizes: what they run is right, and they run to the end."""

import importlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


@pytest.fixture
def script(monkeypatch):
    """Import a file of the benchmarks, which find each other by their plain names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run(name, *arguments):
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(7, 5, 1), (7, 5, 3), (1, 4, 4)])
def test_every_token_visits_different_experts_with_weights_that_sum_to_one(
    script, tokens, experts, top_k
):
    states, index, weights = script("expert_layers").inputs(tokens, experts, 6, top_k)
    assert states.shape == (tokens, 6)
    assert all(len(set(row)) == top_k for row in index.tolist())
    assert set(index.flatten().tolist()) <= set(range(experts))
    torch.testing.assert_close(weights.sum(1), torch.ones(tokens))


def sum_over_experts(weights, states, index, factors):
    """What an ordinary mixture computes, written token by token."""
    outputs = torch.zeros_like(states)
    for token, choice in torch.cartesian_prod(*map(torch.arange, index.shape)).tolist():
        expert, state = index[token, choice], states[token]
        if "gate_up_proj" in weights:
            gate, up = (weights["gate_up_proj"][expert] @ state).chunk(2)
            inner = F.silu(gate) * up
        else:
            inner = F.relu(weights["up_proj"][expert] @ state)
        outputs[token] += factors[token, choice] * (weights["down_proj"][expert] @ inner)
    return outputs


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_transformers_implementations_compute_the_same_mixture(script, gated, top_k):
    transformers = script("expert_transformers")
    weights = transformers.stacked_weights(4, 8, 12, gated)
    inputs = script("expert_layers").inputs(5, 4, 8, top_k)
    expected = sum_over_experts(weights, *inputs)
    for name in IMPLEMENTATIONS:
        torch.testing.assert_close(transformers.stacked_experts(weights, name)(*inputs), expected)


def test_switch_experts_compute_the_same_mixture(script):
    loop = script("expert_transformers").SwitchLoop(4, 6, 10)
    experts = loop.experts.values()
    weights = {
        "up_proj": torch.stack([expert.wi.weight for expert in experts]),
        "down_proj": torch.stack([expert.wo.weight for expert in experts]),
    }
    inputs = script("expert_layers").inputs(5, 4, 6, 2)
    torch.testing.assert_close(loop(*inputs), sum_over_experts(weights, *inputs))


def test_copies_of_too_many_matrices_are_refused(script, monkeypatch):
    transformers = script("expert_transformers")
    weights = transformers.stacked_weights(4, 6, 10, False)
    layer = transformers.stacked_experts(weights, "batched_mm")
    inputs = script("expert_layers").inputs(5, 4, 6, 2)
    monkeypatch.setattr(transformers, "MAX_COPIED_BYTES", 10 * 2 * 60 * 4)
    layer(*inputs)
    monkeypatch.setattr(transformers, "MAX_COPIED_BYTES", 10 * 2 * 60 * 4 - 1)
    with pytest.raises(script("library").Unsupported, match="copies"):
        layer(*inputs)


@pytest.mark.parametrize(
    "name",
    ["dense FFN", *IMPLEMENTATIONS, "tnmoe exact", "tnmoe bond 8", "tnmoe split 32",
     "tnmoe hidden 32", "tnmoe residual 4", "tnmoe residual 16, 4 sites"],
)  # fmt: skip
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 2), (3, 2), (40, 4)])
def test_bytes_read_are_those_of_the_weights_that_matter(script, name, tokens, top_k):
    layers = script("expert_layers")
    experts = 6
    layer = dict(layers.layers(experts, 32, 64, True))[name]()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    inputs = layers.inputs(tokens, experts, 32, top_k)
    layer(*inputs).square().sum().backward()
    weights = [weight for weight in layer.parameters() if weight.grad is not None]
    matter = sum(int(weight.grad.count_nonzero()) * 4 for weight in weights)
    assert layers.read_bytes(layer, inputs[1], experts) == matter


def test_variants_of_a_model_continue_prompts_as_the_dense_model_does(script):
    end_to_end = script("end_to_end")
    torch.manual_seed(0)
    counts = {}
    models = end_to_end.build(end_to_end.tiny_model(), ["*"], counts)
    assert all("note" not in count for count in counts.values())
    assert list(models) == [name for name, _ in end_to_end.variants()]
    ids = torch.randint(64, (2, 4))
    generate = partial(end_to_end.generate, ids=ids, how=end_to_end.generation(5, "eager"))
    expected = generate(models["dense"])
    assert expected.shape == (2, 9)
    assert all(torch.equal(generate(model), expected) for model in models.values())


@pytest.mark.slow
def test_compiled_generation_continues_prompts_as_eager_generation_does(script):
    end_to_end = script("end_to_end")
    torch.manual_seed(0)
    models = end_to_end.build(end_to_end.tiny_model(), ["dense", "*top-2"], {})
    ids = torch.randint(64, (2, 4))
    for model in models.values():
        eager, compiled = (
            end_to_end.generate(model, ids, end_to_end.generation(5, mode))
            for mode in ("eager", "compiled")
        )
        assert torch.equal(compiled, eager)


@pytest.mark.slow
def test_a_tiny_run_of_whole_models_has_a_figure_for_every_variant(tmp_path):
    text = run("end_to_end.py", "--tiny", "--repeats", 2, "--output", tmp_path / "models.json")
    result = json.loads((tmp_path / "models.json").read_text())
    cases = ["generate, batch 1", "generate, batch 2", "training step"]
    assert [case["case"] for case in result["cases"]] == cases
    assert [case["tokens"] for case in result["cases"]] == [4, 8, 16]
    for case in result["cases"]:
        assert case["models"].keys() == result["variants"].keys()
        assert all(len(row["seconds"]) == 2 for row in case["models"].values())
        assert case["case"] in text
    run("report.py", tmp_path / "models.json", "--output", tmp_path / "page.md")
    assert "| dense | 1.00 | 1.00 | 1.00 | 1.00 |" in (tmp_path / "page.md").read_text()


@pytest.mark.slow
def test_a_small_run_of_experts_has_times_and_bytes_for_every_layer(tmp_path):
    names = ("dense FFN", "eager", "grouped_mm", "tnmoe hidden 32", "tnmoe residual 4")
    run(
        "experts.py", "--ffn", "32x64", "--experts", 4, "--top-k", 1, 2, 8, "--tokens", 3,
        "--repeats", 2, "--layers", *names, "--output", tmp_path / "experts.json",
    )  # fmt: skip
    result = json.loads((tmp_path / "experts.json").read_text())
    assert [case["top_k"] for case in result["cases"]] == [1, 2]
    for case in result["cases"]:
        assert tuple(case["layers"]) == names
        for row in case["layers"].values():
            assert row["weight bytes"] >= 3 * row["bytes per token"] > 0
            assert all(len(row[mode]["seconds"]) == 2 for mode in ("infer", "train"))
    run("report.py", tmp_path / "experts.json", "--output", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "32x64, 4 experts, top-2: **training** / dense FFN" in page

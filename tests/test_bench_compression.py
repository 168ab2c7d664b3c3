"""The benchmark of compression: what its methods store, what they lose, and what its models do."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tensorly")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    """Import a file of the benchmarks, which find each other by their plain names."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def model(script):
    size = script("compression_models").SIZES["tiny"]
    model = size.model(0)
    for name, weight in model.named_parameters():
        if "experts" in name:
            # Experts large enough to matter.
            weight.data *= 20
    return model.eval()


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 300, (24, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def layers(script, model, windows):
    return script("compression_calibration").calibrate(model, windows)


def methods():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return list(importlib.import_module("compression_methods").METHODS)
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_unchanged_experts_compute_what_the_model_computes(script, model, layers, windows):
    compressed = script("compression_methods").unchanged(layers, 1.0)
    changed = script("compression_measures").with_experts(model, compressed)
    with torch.no_grad():
        torch.testing.assert_close(changed(input_ids=windows).logits, model(windows).logits)


@pytest.mark.parametrize("method", methods())
def test_no_method_stores_more_than_its_share(script, layers, method):
    # 0.5 leaves room for the base of residual forms, which costs a quarter.
    compressed = script("compression_methods").METHODS[method](layers, 0.5)
    stored = sum(experts.count for experts in compressed)
    assert stored <= 0.5 * sum(layer.numbers for layer in layers)
    for layer, experts in zip(layers, compressed, strict=True):
        up, gate, down = experts.matrices()
        assert up.shape == gate.shape == down.mT.shape
        assert up.shape[0] == (len(layer.up) if experts.kept is None else len(experts.kept))
        assert all(each.isfinite().all() for each in (up, gate, down))


@pytest.mark.parametrize("metric", ["plain", "inputs", "both"])
def test_predicted_errors_of_own_low_rank_are_those_that_arise(script, layers, metric):
    families, calibration = script("compression_families"), script("compression_calibration")
    given = families.stack(layers[0], ("up",), metric)
    family = families.owned_family(given)
    missed = given.matrices - family.make(5)().detach().double()
    inputs, outputs = (calibration.damped(each) for each in (given.inputs, given.outputs))
    arisen = float(((outputs @ missed @ inputs) * missed).sum())
    assert arisen == pytest.approx(family.errors[4], rel=1e-4)


@pytest.mark.parametrize("names", [("up",), ("down",), ("up", "gate")])
def test_a_shared_basis_is_the_best_one_for_common_moments(script, layers, names):
    families = script("compression_families")
    given = families.stack(layers[0], names, "plain")
    family = families.shared_family(given)
    whole = given.matrices
    rows = whole.transpose(0, 1).flatten(1).mT if names == ("down",) else whole.flatten(0, 1)
    values = torch.linalg.svdvals(rows)
    missed = float((whole - family.make(6)().detach().double()).square().sum())
    assert missed == pytest.approx(float((values[6:] ** 2).sum()), rel=1e-5)
    assert missed == pytest.approx(family.errors[5], rel=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_goes_to_the_nearest_level(script, bits):
    value = torch.randn(3, 5, 100, generator=torch.Generator().manual_seed(1))
    rounding, forms = script("compression_rounding"), script("compression_forms")
    codes, scales = rounding.round_nearest(value, bits)
    form = forms.Quantised(codes, scales, bits)
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() < 2 ** (bits - 1)
    step = scales.repeat_interleave(64, -1)[..., :100]
    # A scale in half precision moves the outermost level of 8 bits by up to 0.07 steps.
    assert ((form() - value).abs() <= 0.6 * step).all()
    assert form.bits == bits * 1500 + 16 * 3 * 5 * 2


def test_calibrated_rounding_loses_less_of_the_outputs(script, layers):
    rounding, forms = script("compression_rounding"), script("compression_forms")
    value = layers[0].up
    # Inputs of which a few directions carry most.
    inputs = torch.randn(4, 50, 3) @ torch.randn(4, 3, 16) + 0.2 * torch.randn(4, 50, 16)
    moments = inputs.mT @ inputs
    losses = []
    for codes, scales in (
        rounding.round_nearest(value, 3),
        rounding.round_calibrated(value, moments, 3),
    ):
        missed = (forms.Quantised(codes, scales, 3)() - value).detach()
        losses.append(float(((missed @ moments) * missed).sum()))
    assert losses[1] < 0.8 * losses[0]


def test_a_turned_bond_keeps_the_product(script):
    forms, rounding = script("compression_forms"), script("compression_rounding")
    product = forms.Product(forms.Whole(torch.randn(3, 6, 4)), forms.Whole(torch.randn(1, 4, 5)))
    before = product().detach().clone()
    rounding.turn_bond(product)
    torch.testing.assert_close(product().detach(), before)


def test_spreading_never_predicts_a_larger_loss(script, layers):
    families = script("compression_families")
    given = [
        [families.owned_family(families.stack(layer, (name,), "both")) for name in ("up", "down")]
        for layer in layers
    ]
    losses = []
    for spend in (families.uniform, families.distributed):
        forms = spend(given, 0.5)
        total = 0.0
        for parts, stacks in zip(forms, given, strict=True):
            for form, family in zip(parts, stacks, strict=True):
                rank = form.factors[0].value.shape[-1] if hasattr(form, "factors") else 0
                total += family.errors[rank - 1] if rank else 0.0
        losses.append(total)
    assert losses[1] <= losses[0]


def test_units_that_are_pruned_stay_zero_in_training(script, model, layers, windows):
    compressed = script("compression_methods").prune_units(layers, 0.5)
    changed = script("compression_measures").with_experts(model, compressed)
    changed.config.output_router_logits = False
    optimizer = torch.optim.AdamW(changed.parameters(), lr=1e-2, weight_decay=0.0)
    script("compression_models").make_step(changed, optimizer, windows[:4])
    experts = changed.model.layers[0].mlp.experts
    up, _, down = experts.matrices()
    assert int((up.abs().sum(2) > 0).sum()) == int((down.abs().sum(1) > 0).sum()) == 4 * 12
    assert not torch.equal(up, compressed[0].matrices()[0])


def test_training_goes_on_where_it_stopped(script, tmp_path, monkeypatch):
    models = script("compression_models")
    size = models.SIZES["tiny"]
    tokens = torch.randint(0, 300, (5000,), dtype=torch.int32)
    data = models.Data({"a": tokens, "b": tokens.flip(0)}, {"a": tokens}, 1.0)
    whole = models.trained(size, "tiny", 0, data, tmp_path)
    monkeypatch.setattr(models, "_CHECKPOINT_SECONDS", 0.0)
    steps, made = models.make_step, []

    def stops(*arguments):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(1)
        return steps(*arguments)

    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(models, "make_step", stops)
    with pytest.raises(KeyboardInterrupt):
        models.trained(size, "tiny", 0, data, other)
    monkeypatch.setattr(models, "make_step", steps)
    resumed = models.trained(size, "tiny", 0, data, other)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_the_script_runs_to_the_end(tmp_path):
    output = tmp_path / "result.json"
    command = [
        sys.executable, "-W", "ignore", str(BENCHMARKS / "compression.py"), "--tiny", "--work",
        str(tmp_path), "--methods", "int4", "REAP", "basis, both", "--shares", "0.5",
        "--output", str(output),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(output.read_text())["models"]
    assert [case["method"] for case in run["cases"]] == ["original", "REAP", "basis, both", "int4"]
    assert all(case["bytes"] <= 1 and case["healed"] > 0 for case in run["cases"])

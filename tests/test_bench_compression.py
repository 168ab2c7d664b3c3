"""The benchmark of compression: what its methods store, what they lose, and what its models do."""

import copy
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tensorly")
hf = pytest.importorskip("tnmoe.hf")

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


@pytest.mark.parametrize("layout", ["auto", "hidden", "residual", "low_rank"])
def test_the_librarys_method_is_the_library(script, model, layers, windows, layout):
    compressed = script("compression_product").product(layers, 0.6, layout=layout)
    changed = script("compression_measures").with_experts(model, compressed)
    batches = list(windows.split(8))
    config = hf.CompressionConfig(keep=0.6, layout=layout)
    # The last batch would measure the loss.
    small, report = hf.compress(
        copy.deepcopy(model), config, [*batches, windows[:1]], return_report=True
    )
    assert sum(experts.count for experts in compressed) == report.params_after
    with torch.no_grad():
        torch.testing.assert_close(
            changed(windows).logits, small(windows).logits, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("whitened", [False, True])
def test_truncated_matrices_are_the_best_of_their_rank(script, layers, whitened):
    methods, calibration = script("compression_methods"), script("compression_calibration")
    layer = layers[0]
    (experts, *_) = methods.truncated(layers, 0.5, whitened=whitened)
    moments = calibration.damped(layer.inputs) if whitened else torch.eye(16).double()[None]
    rank = experts.up.factors[0].value.shape[-1]
    missed = layer.up.double() - experts.up().detach().double()
    values, vectors = torch.linalg.eigh(moments)
    root = (vectors * values.sqrt()[:, None]) @ vectors.mT
    left = torch.linalg.svdvals(layer.up.double() @ root)[:, rank:].square().sum()
    assert float(((missed @ moments) * missed).sum()) == pytest.approx(float(left), rel=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_goes_to_the_nearest_level(script, bits):
    value = torch.randn(3, 5, 100, generator=torch.Generator().manual_seed(1))
    rounding, forms = script("compression_rounding"), script("compression_forms")
    codes, scales = rounding.round_nearest(value, bits)
    form = forms.Quantised(codes, scales, bits)
    levels = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).float()
    steps = scales.repeat_interleave(64, -1)[..., :100, None]
    nearest = (levels * steps - value[..., None]).abs().amin(-1)
    torch.testing.assert_close((form() - value).abs(), nearest)
    assert form.bits == bits * 1500 + 16 * 3 * 5 * 2


@pytest.mark.parametrize("bits", [2, 4])
def test_scales_lose_no_more_than_those_that_reach_the_largest_number(script, bits):
    value = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    rounding, forms = script("compression_rounding"), script("compression_forms")
    found = forms.Quantised(*rounding.round_nearest(value, bits), bits)
    highest = 2 ** (bits - 1) - 1
    scale = value.abs().amax(-1, keepdim=True) / (highest + 0.5)
    reaching = torch.round(value / scale).clamp(-highest - 1, highest) * scale
    errors = [(each.detach() - value).norm(dim=-1) for each in (found(), reaching)]
    assert (errors[0] <= 1.001 * errors[1]).all()  # scales have half precision
    assert errors[0].sum() < 0.99 * errors[1].sum()


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


@pytest.mark.parametrize("share", [0.1, 0.95])
@pytest.mark.parametrize("calibrated", [False, True])
def test_ranks_of_nothing_and_of_everything_are_rounded(script, layers, share, calibrated):
    methods, rounding = script("compression_methods"), script("compression_rounding")
    low_rank = partial(methods.product, layout="low_rank")
    whole = low_rank(layers, share)
    made = rounding.quantised(layers, share, method=low_rank, bits=8, calibrated=calibrated)
    for one, other in zip(whole, made, strict=True):
        for before, after in zip(one.matrices(), other.matrices(), strict=True):
            assert float((after - before).norm()) <= 0.02 * float(before.norm())


def test_a_factor_makes_up_for_the_rounding_of_the_other_one(script):
    forms, rounding = script("compression_forms"), script("compression_rounding")
    draw = torch.Generator().manual_seed(3)
    outer, inner = (torch.randn(2, *size, generator=draw) for size in ((20, 6), (6, 30)))
    inputs = torch.randn(2, 50, 30, generator=draw)
    moments = (inputs.mT @ inputs).double()
    form = forms.Product(forms.Whole(outer), forms.Whole(inner))
    before = form().detach().double()
    rounding.round_for(form, moments, 3)
    alone = forms.Product(forms.Whole(outer), form.factors[1])
    fitted = before @ moments @ (rounded := form.factors[1]().detach().double()).mT
    fitted = fitted @ torch.linalg.inv(rounded @ moments @ rounded.mT)
    nearest, _ = rounding.round_calibrated(fitted.float(), rounded @ moments @ rounded.mT, 3)
    torch.testing.assert_close(form.factors[0].codes, nearest)

    def loss(matrices):
        missed = matrices.detach().double() - before
        return float(((missed @ moments) * missed).sum())

    assert loss(fitted @ rounded) < 0.8 * loss(alone())


def test_without_the_gauge_an_expert_keeps_its_factors_or_its_matrix(script, layers):
    product = script("compression_methods").product
    gauged = product(layers, 0.7, layout="low_rank")
    plain = product(layers, 0.7, layout="low_rank", gauge=False)
    kinds = set()
    for layer, one, other in zip(layers, gauged, plain, strict=True):
        assert other.count <= layer.numbers
        both = torch.cat([layer.gate, layer.up], dim=1)
        for given, before, after in (
            (both, one.gate.whole, other.gate.whole), (layer.down, one.down, other.down)
        ):  # fmt: skip
            for number, form in enumerate(getattr(after, "forms", [])):
                kinds.add(type(form).__name__)
                expected = given if type(form).__name__ == "Whole" else before().detach()
                torch.testing.assert_close(form()[0].detach(), expected[number])
    assert kinds == {"Whole", "Product"}


def test_a_turned_bond_keeps_the_product(script):
    forms, rounding = script("compression_forms"), script("compression_rounding")
    product = forms.Product(forms.Whole(torch.randn(3, 6, 4)), forms.Whole(torch.randn(1, 4, 5)))
    before = product().detach().clone()
    rounding.turn_bond(product)
    torch.testing.assert_close(product().detach(), before)


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
    monkeypatch.setattr(models, "_CHECKPOINT_SHARE", float("inf"))
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


def test_a_probe_of_some_experts_is_a_part_of_the_whole_one(script, model, layers, windows):
    probe = script("compression_measures").probe
    whole, some = (probe(model, layers, windows[:4], most) for most in (None, 3))
    removed = {
        (number, expert): loss
        for number, row in enumerate(some["without one"])
        for expert, loss in enumerate(row)
        if loss is not None
    }
    # Of two layers with four experts each: the first, one in the middle, and the last.
    assert list(removed) == [(0, 0), (1, 0), (1, 3)]
    assert all(loss == whole["without one"][n][e] for (n, e), loss in removed.items())
    assert all(some[key] == whole[key] for key in ("loss", "distance", "load", "random routing"))


def test_a_calibration_comes_back_from_its_file(script, model, layers, windows, tmp_path):
    calibrated, file = script("compression_calibration").calibrated, tmp_path / "calibration.pt"
    first = calibrated(file, model, windows, 8)
    again = calibrated(file, model, windows, 8)
    with pytest.raises(SystemExit, match="delete it"):
        calibrated(file, model, windows[1:], 8)
    for expected, *found in zip(layers, first, again, strict=True):
        for each in found:
            torch.testing.assert_close(_plain(each), _plain(expected))


def _plain(layer):
    return vars(layer) | {"seen": vars(layer.seen)}


@pytest.fixture
def dense():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        rms_norm_eps=0.01, rope_parameters={"rope_type": "default", "rope_theta": 50.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" not in name:
            # Weights large enough that every part of the model matters.
            weight.data *= 10
    return model


@pytest.fixture
def upcycled(script, dense):
    smollm2 = script("compression_smollm2")

    def build(noise=0.0, **settings):
        size = replace(smollm2.SMOLLM2, experts=4, noise=noise, **settings)
        return smollm2.upcycled(copy.deepcopy(dense), size)

    return build


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_copies_compute_what_the_dense_model_does_whatever_routers_choose(dense, upcycled, scale):
    mixture = upcycled()
    for layer in mixture.model.layers:
        layer.mlp.gate.weight.data *= scale
    ids = torch.randint(0, 64, (3, 20))
    with torch.no_grad():
        expected = dense(ids).logits
        torch.testing.assert_close(mixture(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_noise_makes_experts_differ_by_its_relative_amount(dense, upcycled):
    mixture = upcycled(noise=0.1)
    for layer, source in zip(mixture.model.layers, dense.model.layers, strict=True):
        gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
        matrices = {"gate": gate, "up": up, "down": layer.mlp.experts.down_proj}
        for name, experts in matrices.items():
            weight = getattr(source.mlp, f"{name}_proj").weight
            relative = (experts - weight).norm(dim=(1, 2)) / weight.norm()
            assert relative.tolist() == pytest.approx([0.1] * 4, rel=0.2)


def test_only_experts_and_routers_train(script, upcycled):
    models, mixture = script("compression_models"), upcycled(noise=0.1)
    before = {name: each.detach().clone() for name, each in mixture.named_parameters()}
    optimizer = models.adamw(mixture.named_parameters(), 1e-2)
    models.make_step(mixture.train(), optimizer, torch.randint(0, 64, (3, 20)), balance=0.1)
    changed = {name for name, each in mixture.named_parameters() if not each.equal(before[name])}
    assert changed == {
        f"model.layers.{number}.mlp.{name}"
        for number in range(2)
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    }


def test_a_share_of_every_experts_hidden_units_is_drawn_anew(dense, upcycled):
    mixture = upcycled(redrawn=0.25)
    drawn = []
    for layer, source in zip(mixture.model.layers, dense.model.layers, strict=True):
        experts = layer.mlp.experts
        gate, up = experts.gate_up_proj.chunk(2, dim=1)
        for number in range(4):
            pairs = (
                (gate[number], source.mlp.gate_proj.weight),
                (up[number], source.mlp.up_proj.weight),
                (experts.down_proj[number].mT, source.mlp.down_proj.weight.mT),
            )
            same = [(own == old).all(1) for own, old in pairs]
            assert same[0].equal(same[1])
            assert same[0].equal(same[2])
            assert int((~same[0]).sum()) == 6
            drawn.append(tuple(same[0].tolist()))
            for own, old in pairs:
                new = own[~same[0]]
                assert 0.5 < float((new.std() / old.std()).detach()) < 1.5
    assert len(set(drawn)) > 6


def test_layers_before_the_mixed_ones_keep_their_network(script, dense, upcycled):
    mixture = upcycled(mixed=1)
    first, last = mixture.model.layers
    for name in ("gate_proj", "up_proj", "down_proj"):
        kept, given = (
            getattr(each, name).weight for each in (first.mlp, dense.model.layers[0].mlp)
        )
        assert kept.equal(given)
        assert not kept.requires_grad
    assert last.mlp.experts.down_proj.requires_grad
    ids = torch.randint(0, 64, (4, 20))
    with torch.no_grad():
        expected = dense(ids).logits
        torch.testing.assert_close(mixture(ids).logits, expected, rtol=1e-5, atol=1e-5)
    calibration, measures = script("compression_calibration"), script("compression_measures")
    layers = calibration.calibrate(mixture, ids, batch=2)
    assert len(layers) == 1
    changed = measures.with_experts(mixture, script("compression_methods").unchanged(layers, 1.0))
    with torch.no_grad():
        torch.testing.assert_close(changed(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_script_runs_to_the_end(tmp_path):
    output = tmp_path / "result.json"
    command = [
        sys.executable, "-W", "ignore", str(BENCHMARKS / "compression.py"), "--tiny", "--work",
        str(tmp_path), "--methods", "int4", "REAP", "tnmoe", "--shares", "0.5",
        "--output", str(output),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(output.read_text())["models"]
    assert [case["method"] for case in run["cases"]] == ["original", "REAP", "tnmoe", "int4"]
    assert all(case["bytes"] <= 1 and case["healed"] > 0 for case in run["cases"])

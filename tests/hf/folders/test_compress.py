"""Compression from folder to folder makes what compression in memory makes, layer by layer."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2Model, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.hf.mixtures import MIXTURES, call, logits, make, relative, tokens
from tnmoe import InputError, hf
from tnmoe.hf.files.checkpoint import Checkpoint
from tnmoe.hf.folders import streaming
from tnmoe.hf.folders.survey import runnable, streamed_loss
from tnmoe.hf.ordinary import ordinary_experts
from tnmoe.hf.record import decode_entries

TEXT = tokens(16, 20, seed=7)
CONFIG = hf.CompressionConfig(keep=0.7)


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ordinary")
    make("mixtral").save_pretrained(folder, max_shard_size="100KB")
    return folder


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("layout", ["auto", pytest.param("hidden", marks=pytest.mark.slow)])
def test_a_compressed_folder_equals_the_saved_compressed_model(name, layout, tmp_path):
    config = hf.CompressionConfig(keep=0.7, layout=layout)
    model = make(name)
    model.save_pretrained(tmp_path / "ordinary")
    conversion = hf.prepare_compress(tmp_path / "ordinary", config, TEXT)
    planned = conversion.report
    conversion.run(tmp_path / "small", shard_bytes=30_000)
    batches = [call(name, each[None]) for each in TEXT]
    expected, report = hf.compress(model, config, batches, return_report=True)
    loaded = hf.from_pretrained(tmp_path / "small")
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    assert relative(logits(loaded, name), logits(expected, name)) < 1e-5
    made = conversion.report_on(tmp_path / "small")
    for one, other, plan in zip(made.matrices, report.matrices, planned.matrices, strict=True):
        assert (one.layer, one.matrix, one.bond) == (other.layer, other.matrix, other.bond)
        assert (plan.bond, plan.params_after, plan.error) == (one.bond, one.params_after, None)
        assert one.error == pytest.approx(other.error, rel=1e-3, abs=1e-6)
        assert one.weighted_error == pytest.approx(other.weighted_error, rel=1e-3)
    assert made.loss_after is not None
    if name != "switch":  # whose encoder and decoder meet two halves of all sequences at once
        assert made.loss_before == pytest.approx(report.loss_before, rel=1e-5)
        assert made.loss_after == pytest.approx(report.loss_after, rel=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_compressed_folder_becomes_an_ordinary_one_with_the_same_tensors(name, tmp_path):
    make(name).save_pretrained(tmp_path / "ordinary")
    hf.prepare_compress(tmp_path / "ordinary", CONFIG).run(tmp_path / "small")
    hf.prepare_export(tmp_path / "small", to="moe").run(tmp_path / "back")
    small = hf.from_pretrained(tmp_path / "small")
    if name != "own":
        before, after = (
            load_file(tmp_path / each / "model.safetensors") for each in ("ordinary", "back")
        )
        assert {key: value.shape for key, value in after.items()} == {
            key: value.shape for key, value in before.items()
        }
        entries = json.loads((tmp_path / "back" / "config.json").read_text())
        assert entries == json.loads((tmp_path / "ordinary" / "config.json").read_text())
    back = type(hf.to_moe(small)).from_pretrained(tmp_path / "back")
    assert relative(logits(back, name), logits(small, name)) < 1e-5
    if name != "own":
        with pytest.raises(InputError, match="was compressed and not converted"):
            hf.prepare_export(tmp_path / "small", to="dense")


@pytest.mark.parametrize("name", MIXTURES)
def test_a_streamed_model_computes_the_same_and_keeps_no_numbers(name, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_TOKENS", 3 * 9)  # three sequences at a time
    model = make(name)
    model.save_pretrained(tmp_path)
    source = Checkpoint(tmp_path)
    skeleton = runnable(source, decode_entries(source.config))
    ids, seen, rows = tokens(8, 9 if name != "switch" else 18), [], []
    for each in ordinary_experts(skeleton.model):
        each.module.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    with torch.no_grad(), streaming.streamed(skeleton, lambda *step: seen.append(step)) as runs:
        made = runs(**call(name, ids), use_cache=False).logits
    expected = model(**call(name, ids)).logits
    assert relative(made, expected) < 1e-5
    assert max(rows) == 3 * 9
    assert seen == [(number, len(seen)) for number in range(1, len(seen) + 1)]
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_the_streamed_loss_is_that_of_the_loaded_model(ordinary):
    source = Checkpoint(ordinary)
    found = streamed_loss(source, decode_entries(source.config), TEXT)
    expected = float(make("mixtral")(TEXT, labels=TEXT).loss)
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_bytes_do_not_depend_on_jobs(ordinary, tmp_path):
    for jobs in (1, 3):
        conversion = hf.prepare_compress(ordinary, CONFIG, TEXT, jobs=jobs)
        conversion.run(tmp_path / str(jobs), jobs=jobs)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "3")


def test_an_interrupted_run_resumes_to_the_same_bytes_without_a_new_survey(ordinary, tmp_path):
    hf.prepare_compress(ordinary, CONFIG, TEXT).run(tmp_path / "undisturbed")
    survey, target = tmp_path / "survey", tmp_path / "target"
    first = hf.prepare_compress(ordinary, CONFIG, TEXT, survey=survey)

    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(target, jobs=1, on_progress=stop)
    steps = []
    again = hf.prepare_compress(
        ordinary, CONFIG, TEXT, survey=survey, on_step=lambda *step: steps.append(step)
    )
    assert steps == []
    again.run(target, jobs=1)
    assert bytes_of(target) == bytes_of(tmp_path / "undisturbed")
    assert all(matrix.error is not None for matrix in again.report.matrices)


def test_parts_make_the_bytes_of_one_process(ordinary, tmp_path):
    hf.prepare_compress(ordinary, CONFIG, TEXT).run(tmp_path / "undisturbed")
    survey, target = tmp_path / "survey", tmp_path / "target"
    hf.prepare_compress(ordinary, CONFIG, TEXT, survey=survey)
    for number in (2, 3, 1):
        each = hf.prepare_compress(ordinary, CONFIG, TEXT, survey=survey, survey_needed=True)
        assert each.run(target, part=(number, 3)) == []
    last = hf.prepare_compress(ordinary, CONFIG, TEXT, survey=survey, survey_needed=True)
    assert last.pieces_left(target) == []
    last.run(target)
    assert bytes_of(target) == bytes_of(tmp_path / "undisturbed")
    assert all(matrix.error is not None for matrix in last.report.matrices)


def test_parts_need_a_survey_that_they_have_in_common(ordinary, tmp_path):
    with pytest.raises(InputError, match="survey=None holds no finished survey"):
        hf.prepare_compress(ordinary, CONFIG, survey_needed=True)
    survey = tmp_path / "survey"
    with pytest.raises(InputError, match="survey holds no finished survey for these settings"):
        hf.prepare_compress(ordinary, CONFIG, survey=survey, survey_needed=True)
    with pytest.raises(InputError, match="have a survey in common: give prepare_compress a folder"):
        hf.prepare_compress(ordinary, CONFIG).run(tmp_path / "target", part=(1, 2))
    hf.prepare_compress(ordinary, CONFIG, survey=survey)
    before = bytes_of(survey)
    with pytest.raises(InputError, match="survey holds no finished survey for these settings"):
        hf.prepare_compress(ordinary, CONFIG, TEXT, survey=survey, survey_needed=True)
    assert bytes_of(survey) == before
    assert [path.name for path in tmp_path.iterdir()] == ["survey"]


def test_another_limit_uses_the_same_survey_and_no_old_report(ordinary, tmp_path):
    survey = tmp_path / "survey"
    hf.prepare_compress(ordinary, CONFIG, TEXT, survey=survey).run(tmp_path / "one")
    steps = []
    other = hf.prepare_compress(
        ordinary,
        hf.CompressionConfig(keep=0.4),
        TEXT,
        survey=survey,
        on_step=lambda *step: steps.append(step),
    )
    assert steps == []
    report = other.report
    assert report.params_after <= 0.4 * report.params_before
    assert {matrix.error for matrix in report.matrices} == {None}


@pytest.mark.parametrize("change", ["calibration", "none", "damping"])
def test_a_survey_of_something_else_is_made_anew(change, ordinary, tmp_path):
    survey = tmp_path / "survey"
    hf.prepare_compress(ordinary, CONFIG, TEXT, survey=survey)
    settings = {"damping": 0.3} if change == "damping" else {}
    text = {"calibration": tokens(16, 20, seed=8), "none": None}.get(change, TEXT)
    config = hf.CompressionConfig(keep=0.7, **settings)
    fresh = hf.prepare_compress(ordinary, config, text)
    reused = hf.prepare_compress(ordinary, config, text, survey=survey)
    assert reused.report == fresh.report


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_lost_or_damaged_moments_are_no_missing_calibration(damage, ordinary, tmp_path):
    survey, target = tmp_path / "survey", tmp_path / "target"
    hf.prepare_compress(ordinary, CONFIG, TEXT, survey=survey)
    damage(survey / "model.layers.1.mlp.experts.safetensors")
    conversion = hf.prepare_compress(ordinary, CONFIG, TEXT, survey=survey)
    with pytest.raises(
        InputError, match=r"layers.1.*is lost or damaged.*remove .*survey and begin"
    ):
        conversion.run(target)
    assert not target.exists()


def test_a_folder_of_other_files_is_no_place_for_a_survey(ordinary, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="files that are not of a survey"):
        hf.prepare_compress(ordinary, CONFIG, survey=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_steps_of_a_survey_are_reported(ordinary):
    steps = []
    hf.prepare_compress(ordinary, CONFIG, TEXT, on_step=lambda *step: steps.append(step))
    assert steps == [
        (what, done, 2) for what in ("calibrating", "measuring", "surveying") for done in (1, 2)
    ]


def test_a_checkpoint_of_stacked_experts_is_read_as_well(tmp_path):
    """transformers can save experts as they are in the model."""
    make("mixtral").save_pretrained(tmp_path / "stacked", save_original_format=False)
    make("mixtral").save_pretrained(tmp_path / "ordinary")
    names = load_file(tmp_path / "stacked" / "model.safetensors").keys()
    assert any(name.endswith("gate_up_proj") for name in names)
    made = []
    for each in ("stacked", "ordinary"):
        hf.prepare_compress(tmp_path / each, CONFIG).run(tmp_path / f"{each}-small")
        made.append(logits(hf.from_pretrained(tmp_path / f"{each}-small"), "mixtral"))
    assert relative(*made) < 1e-6


def test_experts_beyond_the_tenth_keep_their_place(tmp_path):
    """Sorted as text, expert 10 comes before expert 2."""
    small = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    more = {"num_attention_heads": 2, "num_key_value_heads": 1, "moe_intermediate_size": 8}
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**small, **more, num_experts=12)).eval()
    model.save_pretrained(tmp_path / "ordinary")
    hf.prepare_compress(tmp_path / "ordinary", hf.CompressionConfig(rtol=0)).run(tmp_path / "same")
    loaded = hf.from_pretrained(tmp_path / "same")
    matrices = loaded.model.layers[0].mlp.experts.down.weight()
    assert torch.equal(matrices, model.model.layers[0].mlp.experts.down_proj)


def test_dense_networks_beside_mixtures_are_upcycled_from_folders_too(tmp_path):
    """The mixtures' parameters are stored in parts, which must not disturb."""
    model = make("deepseek_v3")
    model.save_pretrained(tmp_path / "ordinary")
    config = hf.MPOEConfig(num_experts=3, sites=3, layers=[0])
    hf.prepare_upcycle(tmp_path / "ordinary", config, seed=5).run(tmp_path / "mpoe")
    torch.manual_seed(5)
    expected = hf.upcycle(model, config)
    loaded = hf.from_pretrained(tmp_path / "mpoe")
    assert relative(logits(loaded, "deepseek_v3"), logits(expected, "deepseek_v3")) < 1e-5


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ("text", r"tokens of shape \(N, S\), got str"),
        (torch.zeros(3, dtype=torch.int64), r"shape \(3,\)"),
        (torch.zeros(3, 4), "got torch.float32 of shape"),
        (torch.zeros(3, 1, dtype=torch.int64), "two tokens"),
    ],
)
def test_a_calibration_of_another_form_is_refused(calibration, message, ordinary):
    with pytest.raises(InputError, match=message):
        hf.prepare_compress(ordinary, CONFIG, calibration)


@pytest.mark.parametrize("token", [-1, 64])
def test_a_token_that_the_model_does_not_know_is_named(token, ordinary, tmp_path):
    text = TEXT.clone()
    text[3, 4] = token
    with pytest.raises(InputError, match=f"tokens from 0 to 63, the calibration has {token}"):
        hf.prepare_compress(ordinary, CONFIG, text, survey=tmp_path / "survey")
    assert not (tmp_path / "survey").exists()


def test_a_model_without_a_head_has_no_loss(tmp_path):
    make("mixtral").model.save_pretrained(tmp_path / "ordinary")
    conversion = hf.prepare_compress(tmp_path / "ordinary", CONFIG, TEXT)
    conversion.run(tmp_path / "small")
    report = conversion.report_on(tmp_path / "small")
    assert report.loss_before is report.loss_after is None
    assert report.matrices[0].weighted_error > 0
    part = hf.from_pretrained(tmp_path / "small")
    assert type(part).__name__ == "MixtralModel"


def test_a_quantized_checkpoint_is_refused(tmp_path):
    make("mixtral").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    entries = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    path.write_text(json.dumps(entries))
    with pytest.raises(InputError, match="is quantized: load it with dequantized weights"):
        hf.prepare_compress(tmp_path, CONFIG)


def test_a_checkpoint_without_mixtures_is_refused(tmp_path):
    GPT2Model(GPT2Config(n_layer=1, n_embd=16, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no ordinary mixture"):
        hf.prepare_compress(tmp_path, CONFIG, survey=tmp_path / "survey")
    assert not (tmp_path / "survey").exists()

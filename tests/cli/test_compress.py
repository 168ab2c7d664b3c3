"""``tnmoe compress``: limits, calibration, report, resume and refusals."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.cli.command import tnmoe
from tests.hf.mixtures import make
from tnmoe import hf

PROSE = "It was the best of times, it was the worst of times.\n" * 60


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    """A folder with a mixture and a tokenizer of bytes, of which the model knows the first."""
    folder = tmp_path_factory.mktemp("ordinary")
    make("mixtral").save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocab={"a": 3, "?": 4}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    (folder / "prose.txt").write_text(PROSE)
    return folder


@pytest.fixture
def prose(ordinary):
    return ordinary / "prose.txt"


def test_a_folder_becomes_smaller_and_comes_back(ordinary, prose, tmp_path):
    target = tmp_path / "small"
    done = tnmoe(
        "compress", ordinary, target, "--keep", 0.7, "--calibration", prose,
        "--calibration-tokens", 640, "--sequence-length", 32,
    )  # fmt: skip
    assert done.stderr == ""
    assert "model.layers.1.mlp.experts" in done.stdout
    assert "perplexity of held-out text" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    model = AutoModelForCausalLM.from_pretrained(target)
    assert hf.compression_of(model).keep == 0.7
    tnmoe("export", target, tmp_path / "moe")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    ids = torch.arange(3, 15)[None]
    torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_json_has_every_matrix_and_both_sizes(ordinary, tmp_path):
    done = tnmoe("compress", ordinary, tmp_path / "small", "--rtol", 0.5, "--json")
    report = json.loads(done.stdout)
    assert [each["matrix"] for each in report["matrices"]] == 2 * ["gate_up", "down"]
    assert max(matrix["error"] for matrix in report["matrices"]) <= 0.51
    assert report["parameters"]["target"] < report["parameters"]["source"]
    assert report["perplexity"] == {"before": None, "after": None}


def test_a_limit_in_bytes_is_kept(ordinary, tmp_path):
    target = tmp_path / "small"
    whole = sum(path.stat().st_size for path in ordinary.glob("*.safetensors"))
    tnmoe("compress", ordinary, target, "--bytes", f"{whole * 0.8 / 1000}K")
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    assert size < 0.85 * whole


def test_a_dry_run_keeps_the_survey_for_the_run_that_follows(ordinary, prose, tmp_path):
    words = ("compress", ordinary, tmp_path / "small", "--keep", 0.7, "--calibration", prose)
    planned = tnmoe(*words, "--dry-run")
    assert [path.name for path in tmp_path.iterdir()] == ["small.survey"]
    assert "small.survey keeps what was found" in planned.stdout
    tnmoe(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "one of the arguments --keep --bytes --rtol is required"),
        (("--keep", "0.5", "--rtol", "0.1"), "not allowed with argument"),
        (("--keep", "2"), "expected a number above 0, up to 1, got '2'"),
        (("--bytes", "many"), "expected a size like 5GB"),
        (("--keep", "0.5", "--layers", "nothing"), "selects none of the 2 mixtures"),
        (("--bytes", "1K"), "they can have"),
        (("--keep", "0.5", "--calibration", "nowhere.txt"), "nowhere.txt: No such file"),
        (("--keep", "0.5", "--matrices", "left"), "matrices must be some of"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(words, message, ordinary, tmp_path):
    done = tnmoe("compress", ordinary, tmp_path / "small", *words, code=2)
    assert message in done.stderr
    assert not (tmp_path / "small").exists()


def test_a_target_with_files_is_refused_before_any_work(ordinary, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = tnmoe("compress", ordinary, tmp_path, "--keep", 0.5, code=2)
    assert "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_target_inside_the_source_is_refused_before_any_work(ordinary):
    before = sorted(ordinary.iterdir())
    done = tnmoe("compress", ordinary, ordinary / "small", "--keep", 0.5, code=2)
    assert "overlaps with the source" in done.stderr
    assert sorted(ordinary.iterdir()) == before


def test_a_folder_without_tokenizer_cannot_be_calibrated(tmp_path):
    make("mixtral").save_pretrained(tmp_path / "source")
    (tmp_path / "prose.txt").write_text(PROSE)
    done = tnmoe(
        "compress", tmp_path / "source", tmp_path / "small", "--keep", 0.5,
        "--calibration", tmp_path / "prose.txt", code=2,
    )  # fmt: skip
    assert "has no tokenizer" in done.stderr
    assert len(done.stderr.splitlines()) == 1

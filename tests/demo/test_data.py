"""Sentences come from packages or from CSV files; a bad file is named."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tnmoe as tn
from tnmoe.demo.data import packaged_model, packaged_reviews, read_sentences, split


def write_csv(path, rows, header="text,label"):
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


ROWS = [f'"sentence, number {n}",{"good" if n % 2 else "bad"}' for n in range(30)]


def test_the_packaged_reviews_are_the_8530_rotten_tomatoes_sentences():
    sentences = read_sentences(packaged_reviews(), source="rotten_tomatoes")
    assert len(sentences) == len(set(sentences.texts)) == 8530
    assert sum(sentences.labels) == 4265
    train, held_out = split(sentences, seed=0)
    assert (len(train), len(held_out)) == (7677, 853)


def test_the_packaged_model_is_found_without_running_its_package():
    assert (packaged_model() / "model.safetensors").is_file()


def test_duplicates_are_dropped_and_parts_do_not_overlap(tmp_path):
    path = write_csv(tmp_path / "d.csv", ROWS + ROWS)
    sentences = read_sentences(path)
    assert len(sentences) == 30
    assert sentences.label_names == ("bad", "good")
    train, held_out = split(sentences, seed=1)
    assert not set(train.texts) & set(held_out.texts)
    assert set(train.texts) | set(held_out.texts) == set(sentences.texts)
    assert split(sentences, seed=1) == (train, held_out)
    assert split(sentences, seed=2) != (train, held_out)
    truth = dict(zip(sentences.texts, sentences.labels, strict=True))
    assert all(truth[text] == label for text, label in zip(train.texts, train.labels, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none.csv", "cannot read .*none.csv: No such file"),
        (lambda p: p, "is a folder"),
        (lambda p: Path("/dev/zero"), "zero is not a regular file"),
        (
            lambda p: write_csv(p / "d", ROWS, "sentence,label"),
            "text missing, found sentence, label",
        ),
        (lambda p: write_csv(p / "d", [], ""), "text and label missing"),
        (lambda p: write_csv(p / "d", ROWS[:5]), "5 different texts with 2 labels"),
        (lambda p: write_csv(p / "d", [f"t{n},same" for n in range(30)]), "30 .* with 1 labels"),
        (lambda p: write_csv(p / "d", [*ROWS, "lonely"]), "line 32: text or label is empty"),
        (lambda p: binary(p / "d"), "is not UTF-8 text"),
    ],
)
def test_bad_files_are_named(tmp_path, make, message):
    with pytest.raises(tn.InputError, match=message):
        read_sentences(make(tmp_path))


def test_sentences_come_through_a_pipe_that_the_user_names(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as writer:
        writer.submit(write_csv, tmp_path / "pipe", ROWS)
        assert len(read_sentences(tmp_path / "pipe")) == 30


def binary(path):
    path.write_bytes(b"text,label\n\xff\xfe\x00,1\n")
    return path

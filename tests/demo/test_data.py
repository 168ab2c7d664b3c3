"""Sentences and output folders of the demo."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tnmoe as tn
from tnmoe.demo.data import packaged_model, packaged_reviews, read_sentences, split
from tnmoe.demo.output import whole_folder


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


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with whole_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_new_and_the_old_untouched(tmp_path, error):
    target = tmp_path / "out"
    with whole_folder(target) as folder:
        (folder / "old").write_text("kept")

    def fail():
        with whole_folder(target, overwrite=True) as folder:
            (folder / "new").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(target)) == [".tnmoe-files", "old"]


def test_overwriting_replaces_what_was_written_and_nothing_else(tmp_path):
    target = tmp_path / "out"
    with whole_folder(target) as folder:
        (folder / "old").write_text("")
    with pytest.raises(tn.InputError, match="is not empty"), whole_folder(target):
        pass
    with whole_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("")
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(target)) == [".tnmoe-files", "new"]
    (target / "thesis.txt").write_text("years of work")
    message = r"out holds what tnmoe did not write there.*: thesis.txt;"
    with pytest.raises(tn.InputError, match=message), whole_folder(target, overwrite=True):
        raise AssertionError("before any work")
    assert (target / "thesis.txt").exists()


def test_what_cannot_take_its_place_is_kept_and_named(tmp_path):
    target = tmp_path / "out"

    def work():
        with whole_folder(target) as folder:
            (folder / "made").write_text("minutes of work")
            target.mkdir()
            (target / "thesis.txt").write_text("years of work")

    with pytest.raises(tn.InputError, match=r"out is not empty: .*; the results are in ") as caught:
        work()
    kept = Path(str(caught.value).split("the results are in ")[1])
    assert (kept / "made").read_text() == "minutes of work"
    assert (target / "thesis.txt").read_text() == "years of work"


def test_one_run_at_a_time_writes_to_a_folder_and_a_killed_one_does_not_count(tmp_path):
    target = tmp_path / "out"
    if (process := os.fork()) == 0:
        with whole_folder(target) as folder:
            (folder / "half").write_text("")
            os._exit(9)
    os.waitpid(process, 0)
    with whole_folder(target) as folder:
        (folder / "new").write_text("")
        owner = f"out is in use by process {os.getpid()} on "
        with pytest.raises(tn.InputError, match=owner), whole_folder(target):
            pass
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(target)) == [".tnmoe-files", "new"]


def test_places_that_cannot_be_written_are_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for target, message in (
        (file, "is a file, not a folder"),
        (file / "out", "cannot write to .*: (Not a directory|File exists)"),
    ):
        with pytest.raises(tn.InputError, match=message), whole_folder(target):
            pass
    assert file.read_text() == ""

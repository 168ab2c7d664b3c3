"""The benchmark of adapters: equal budgets, held-out texts, and what its tables say."""

import csv
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

peft = pytest.importorskip("peft")
nn = pytest.importorskip("tnmoe.nn")
texts = pytest.importorskip("experiments.texts")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name):
    """Import a file of the benchmarks, which find each other by their plain names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


methods = load("adapters_methods")
settings = load("adapters_settings")
measures = load("adapters_measures")
tables = load("adapters_tables")

ROUTED = [name for name in methods.METHODS if name.startswith(("residual", "hidden"))]


def write_lines(path, word):
    """Write a text in which every line occurs once; return its lines."""
    lines = [f"{word} line {number:05}\n" for number in range(4000)]
    path.write_text("".join(lines))
    return lines


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("setting")
    domains = {}
    for word in ("prose", "source"):
        write_lines(folder / f"{word}.txt", word)
        text = texts.Text(folder / f"{word}.txt")
        domains[word] = settings.TinyLlama(text, 16, 2, 256, vocabulary_from=text)
    made = settings.Setting(
        folder, domains, ffn=r".*\.mlp\.\w+_proj", linear=r".*\.(mlp|self_attn)\.\w+_proj",
        rank=20, steps=2, rates=(1e-2,),
    )  # fmt: skip
    made.prepare()
    return made


@pytest.fixture(scope="module")
def base(setting):
    return setting.base(0).eval()


def attach(name, setting, size=None):
    if size is None:
        size = 8 if methods.METHODS[name].unit == "group" else 2
    return methods.attach(name, setting.base(0), setting, size, 0)


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_adapter_starts_as_the_base_model(name, setting, base):
    ids = setting.batch(0, 0)["input_ids"]
    adapted = attach(name, setting).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, base(ids).logits)


@pytest.mark.parametrize("name", methods.METHODS)
def test_training_changes_the_adapter_and_no_number_of_the_base(name, setting):
    model = setting.base(0)
    own = list(model.parameters())
    before = [each.detach().clone() for each in own]
    size = 8 if methods.METHODS[name].unit == "group" else 2
    adapted = methods.attach(name, model, setting, size, 0)
    trained = methods.trained_parameters(adapted)
    start = [each.detach().clone() for each in trained]
    measures.train(adapted, setting, 0, 1e-2, 2)
    assert all(now.equal(then) for now, then in zip(own, before, strict=True))
    assert any(not now.equal(then) for now, then in zip(trained, start, strict=True))


@pytest.mark.parametrize("name", methods.METHODS)
def test_the_size_of_a_method_is_the_largest_within_the_budget(name, setting, base):
    budget = 2 * 3 * 20 * (32 + 64)  # layers, matrices, rank, rows and columns
    found = methods.matched(name, base, setting, 20)
    sizes = methods.METHODS[name].sizes(20, 64)
    assert found["trained"] <= budget
    assert found["trained"] == methods.count(name, base, setting, found["size"])
    larger = next((size for size in sizes if size > found["size"]), None)
    assert larger is None or methods.count(name, base, setting, larger) > budget


@pytest.mark.parametrize("name", ROUTED)
def test_routers_that_learn_are_a_part_of_the_budget(name, setting, base):
    adapted = attach(name, setting)
    routers = [each for key, each in adapted.named_parameters() if ".router." in key]
    counted = sum(each.numel() for each in routers if each.requires_grad)
    assert counted == (0 if "random" in name else 2 * 8 * 32)


def test_a_method_that_no_size_brings_into_the_budget_has_a_note(setting, base):
    # Eight experts of bond 1 are eight ranks, and their routers come on top.
    found = methods.matched("residual top-1", base, setting, 8)
    assert found == {"note": "bond 1 has 5,120 parameters, over 4,608"}


def test_x_lora_refuses_models_for_which_peft_cannot_load_loras(setting):
    with pytest.raises(load("library").Unsupported, match="named model"):
        methods.x_lora(torch.nn.Linear(2, 2), setting, 1)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "residual top-2", "hidden top-1"])
def test_stored_bytes_are_the_numbers_and_a_header(name, setting, base):
    size = 8 if "hidden" in name else 2
    numbers = 4 * methods.count(name, base, setting, size)
    assert numbers < methods.stored_bytes(name, base, setting, size) < numbers + 8000


def test_copies_share_frozen_numbers_and_have_heads_of_their_own(setting, base):
    copied = methods.fresh(base, replace(setting, head="lm_head"))
    for (key, a), (_, b) in zip(base.named_parameters(), copied.named_parameters(), strict=True):
        assert (a is b) == (not key.startswith("lm_head"))
        assert a.equal(b)


def test_no_held_out_line_is_in_the_training_text(setting):
    for word, task in setting.domains.items():
        folder = setting.folder / word
        tokenizer = task.tokenizer(folder)
        parts = {}
        for split in ("train", "validation", "test"):
            text = tokenizer.decode(np.load(folder / f"{split}.npy").tolist())
            parts[split] = set(text.splitlines()[1:-1])  # a part may begin within a line
        assert all(parts.values())
        assert not parts["train"] & (parts["validation"] | parts["test"])
        assert not parts["validation"] & parts["test"]


def test_half_of_a_batch_is_from_each_domain(setting):
    first, second = (
        task.tokenizer(setting.folder / name) for name, task in setting.domains.items()
    )
    rows = setting.batch(3, 5)["input_ids"].tolist()
    assert len(rows) == 4
    assert all("line" in first.decode(row) for row in rows[:2])
    assert (
        rows[2:]
        == setting.domains["source"].batch(setting.folder / "source", 3, 5)["input_ids"].tolist()
    )
    assert all("line" in second.decode(row) for row in rows[2:])


def test_joined_batches_are_padded_to_the_longest():
    short = {"input_ids": torch.ones(1, 2), "attention_mask": torch.ones(1, 2), "labels": [1]}
    long = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3), "labels": [0, 1]}
    for each in (short, long):
        each["labels"] = torch.tensor(each["labels"])
    found = settings.joined([short, long])
    assert found["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert found["input_ids"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert found["labels"].tolist() == [1, 0, 1]


def test_reviews_of_the_second_domain_are_those_of_imdb(tmp_path, monkeypatch):
    rows = [(f"review {n}", n % 2, "imdb" if n < 40 else "rotten_tomatoes") for n in range(80)]
    with (tmp_path / "all.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label", "source"), *rows])
    monkeypatch.setattr(settings, "packaged_reviews", lambda: tmp_path / "all.csv")
    monkeypatch.setattr(settings, "_IMDB", 30)
    settings.write_imdb(tmp_path / "imdb.csv")
    with (tmp_path / "imdb.csv").open(newline="") as stream:
        found = [(row["text"], int(row["label"])) for row in csv.DictReader(stream)]
    assert len(set(found)) == 30
    assert set(found) <= {row[:2] for row in rows[:40]}


def test_held_out_losses_are_those_of_the_model_on_each_domain(setting):
    adapted = attach("residual top-2", setting).eval()
    found, distance = measures.held_out(adapted, setting, "test")
    for word in setting.domains:
        tokens = torch.from_numpy(np.load(setting.folder / word / "test.npy").astype(np.int64))
        ids = tokens.view(-1, 16)
        with torch.no_grad():
            logits = adapted(ids).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert found[f"{word} loss"] == pytest.approx(float(expected), rel=1e-5)
    assert found["loss"] == pytest.approx((found["prose loss"] + found["source loss"]) / 2)
    assert 0 < distance < 1


def test_a_loss_that_is_not_finite_is_none(setting):
    adapted = attach("LoRA", setting)
    for parameter in methods.trained_parameters(adapted):
        parameter.data.fill_(float("nan"))
    assert measures.held_out(adapted, setting, "test")[0]["loss"] is None


def test_loads_are_the_shares_of_the_tokens_that_experts_get():
    router = nn.TopKRouter(4, num_experts=4, top_k=1)
    router.weight.data.copy_(torch.eye(4))
    with nn.record_routing(router) as routing:
        router(torch.eye(4)[[0, 0, 1, 3]])
        router(torch.eye(4)[[0, 3, 3, 3]])
    (load,) = measures.loads_of(routing).values()
    assert load.tolist() == [3 / 8, 1 / 8, 0, 4 / 8]


def test_the_routing_distance_is_the_share_of_slots_that_go_elsewhere():
    def loads(*numbers):
        return {"router": torch.tensor(numbers)}

    assert measures.routing_distance([loads(0.5, 0.5, 0.0), loads(0.5, 0.5, 0.0)]) == 0
    assert measures.routing_distance([loads(1.0, 0.0, 0.0), loads(0.0, 0.5, 0.5)]) == 1
    assert measures.routing_distance([loads(0.5, 0.25, 0.25), loads(0.25, 0.5, 0.25)]) == 0.25
    assert measures.routing_distance([{}, {}]) is None


LOSSES = {
    "LoRA": [2.0, 2.2, 2.1, 2.4],
    "residual top-2": [1.9, 2.25, 2.0, 2.3],
    "residual top-2, random routing": [2.0, 2.3, 2.2, 2.4],
}


def report():
    about = {"unit": "bond", "size": 2, "trained": 100, "bytes": None}
    about |= {"seconds": 3.0, "LoRA seconds": 2.0, "step bytes": 7 * 2**20}
    results = [
        {"method": name, "seed": seed, "learning_rate": 0.1, "validation": {"loss": 1.0},
         "test": {"a loss": loss, "loss": loss}, "routing distance": None}
        for name, losses in LOSSES.items()
        for seed, loss in enumerate(losses)
    ]  # fmt: skip
    return {
        "model": "m", "steps": 5, "seeds": [0, 1, 2, 3], "budget": 100, "rates": [0.01, 0.1],
        "before": {"a loss": 3.0, "loss": 3.0}, "results": results,
        "methods": {
            **dict.fromkeys(LOSSES, about),
            "X-LoRA": {"note": "why not"},
        },
    }  # fmt: skip


def test_a_table_has_the_interval_of_a_paired_t_test():
    headers, (_, row, _) = tables.table(report())
    found = dict(zip(headers, row, strict=True))
    ours, theirs = LOSSES["residual top-2"], LOSSES["LoRA"]
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    mean, half = (float(each) for each in found["− LoRA"].split(" ± "))
    assert (mean - half, mean + half) == pytest.approx(expected, abs=1e-4)
    assert float(found["mean loss"]) == pytest.approx(np.mean(ours), abs=1e-4)
    assert (found["step / LoRA"], found["MiB"]) == ("1.50", "7")


def test_a_table_says_if_a_better_rate_may_lie_beyond():
    _, rows = tables.table(report())
    assert {row[4] for row in rows} == {"0.1 (largest)"}


def test_notes_say_what_learned_routing_changes_and_why_methods_have_no_figures():
    learned, missing = tables.notes(report())
    # -0.1, -0.05, -0.2, -0.1: mean -0.1125, standard deviation 0.0629, times 3.182 / 2.
    assert learned == "residual top-2 − residual top-2, random routing: -0.1125 ± 0.1001."
    assert missing == "X-LoRA: why not."


@pytest.mark.slow
def test_the_memory_of_training_has_room_for_what_a_step_keeps(setting, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # for the new processes
    small, wide = (
        measures.step_bytes("LoRA", replace(setting, domains=domains), 20)
        for domains in (setting.domains, wider(setting.domains))
    )
    # The logits of 3 × 2 × 2 windows more, of 4 bytes each.
    assert wide - small > 3 * 2 * 2 * 16 * 300 * 4


def wider(domains):
    """Return the same domains, with four times the windows in a batch."""
    return {name: replace(each, windows=4 * each.windows) for name, each in domains.items()}


@pytest.mark.slow
def test_the_script_runs_to_the_end_and_trains_nothing_twice(tmp_path):
    command = [
        sys.executable, "-W", "ignore", str(BENCHMARKS / "adapters.py"), "--tiny", "--work",
        str(tmp_path), "--methods", "residual top-2", "--output", str(tmp_path / "result.json"),
    ]  # fmt: skip
    found = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / "result.json").read_text()))
    first, second = found
    assert list(first["methods"]) == ["LoRA", "residual top-2"]
    assert [each["seed"] for each in first["results"]] == [0, 1, 0, 1]
    assert {each["seed"] for each in first["tuning"]} == {1000}
    # They hold the seconds of every training, which a second one would change.
    assert (first["results"], first["tuning"]) == (second["results"], second["tuning"])
    assert "residual top-2" in done.stdout
    refused = subprocess.run([*command, "--text", "other.txt"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "another text" in refused.stderr

"""The page of the benchmarks: ratios only, no loss left out, and no file that is not a result."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STORED = [
    path for path in sorted((BENCHMARKS / "results").glob("*.json")) if "quick" not in path.name
]
TIMES = ("seconds", "median s", "first call s", "floor s", "predicted")

ORDINARY = ("Switch loop", "eager", "batched_mm", "grouped_mm")

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "uncommitted changes": True,
    "cpu": "A | CPU", "cores": 2, "threads": 1, "device": "cpu", "python": "3.11.7",
    "versions": {"tnmoe": "0.1.0", "quimb": "1.15.0"},
}  # fmt: skip


def timed(name, seconds, error=1e-7, good=True, **more):
    row = {"library": name, "seconds": [seconds], "median s": seconds, "error": error}
    return row | {"good": good, "params": 1234, **more}


def hostile_algebra():
    """A loss, a failure with a text full of Markdown, times that are not numbers, and no peers."""
    error = "fails: ValueError: <class 'x'> | a|b\n**bold** `code`"
    cases = {
        "loss": [timed("tnmoe numpy", 2.0), timed("tnmoe torch", 4.0), timed("swift", 1.0)],
        "win": [timed("tnmoe numpy", 1.0), timed("slow", 3.0)],
        "failed": [timed("tnmoe numpy", 1.0), {"library": "broken", "seconds": [], "note": error}],
        "odd": [
            timed("tnmoe numpy", 1.0),
            timed("no time", float("nan")),
            timed("null", None, error=None),
            timed("inaccurate", 0.25, error=float("nan"), good=False),
        ],
        "alone": [timed("tnmoe torch", 1.0)],
        "without us": [
            {"library": "tnmoe numpy", "seconds": [], "note": "out of memory"},
            timed("able", 1.0),
        ],
    }
    return {
        "environment": ENVIRONMENT,
        "options": {"dtype": "float64", "matrix": "gaussian"},
        "cases": [
            {"case": name, "acceptable error": 1e-5, "floor s": None, "rows": rows}
            for name, rows in cases.items()
        ],
    }


def hostile_experts():
    """With one token, tnmoe loses to two peers; with eight tokens, nothing can be compared."""

    def layers(**seconds):
        return {
            name.replace("_", " ").replace("grouped mm", "grouped_mm"): {
                "train": {"note": "no | gate"} if value == "no | gate" else {"median s": value}
            }
            for name, value in seconds.items()
        }

    one = layers(
        Switch_loop="no | gate", grouped_mm=1.0, tnmoe_exact=3.0, published_exact=2.0,
        tnmoe_split_64=0.5, tnmoe_bond_8=None,
    )  # fmt: skip
    eight = layers(Switch_loop=float("nan"), tnmoe_exact=1.0)
    cases = [
        {"ffn": "768x3072", "gated": True, "experts": 2, "tokens": tokens, "layers": case}
        for tokens, case in ((1, one), (8, eight))
    ]
    return {"environment": ENVIRONMENT, "dtype": "float32", "cases": cases}


def several_experts():
    """Two and eight experts per token; the loops are ordinary mixtures, too."""

    def row(seconds, read, weights):
        return {
            "weight bytes": weights, "bytes per token": read,
            "infer": {"seconds": [seconds], "median s": seconds},
        }  # fmt: skip

    layers = {
        2: {"dense FFN": row(2.0, 8.0, 16), "eager": row(8.0, 16.0, 128),
            "grouped_mm": row(16.0, 16.0, 128), "tnmoe hidden 64": row(4.0, 12.0, 32)},
        8: {"dense FFN": row(2.0, 8.0, 16), "eager": {"infer": {"note": "too large"}},
            "grouped_mm": row(4.0, 64.0, 128), "tnmoe hidden 64": row(5.0, 16.0, 32)},
    }  # fmt: skip
    cases = [
        {"ffn": "8x32", "gated": False, "experts": 8, "top_k": top_k, "tokens": 1, "layers": rows}
        for top_k, rows in layers.items()
    ]
    return {"environment": ENVIRONMENT, "dtype": "float32", "cases": cases}


def whole_models():
    """A variant that is faster than the ordinary mixture, a slower one, and two without figures."""

    def rows(**seconds):
        timed = {
            name.replace("_", " top-"): {"seconds": [value], "median s": value}
            for name, value in seconds.items()
        }
        return timed | {"residual top-2": {"note": "no | graph"}}

    return {
        "environment": ENVIRONMENT, "dtype": "float32", "model": "A|B",
        "variants": {
            "dense": {"parameters": 100}, "ordinary top-2": {"parameters": 400},
            "hidden top-2": {"parameters": 125}, "residual top-2": {"parameters": 150},
            "residual top-8": {"note": "cannot be built"},
        },
        "cases": [
            {"case": "generate, batch 1", "tokens": 8, "models": rows(dense=1.0, ordinary_2=4.0,
                                                                      hidden_2=1.25)},
            {"case": "training step", "tokens": 8, "models": rows(dense=1.0, ordinary_2=2.0,
                                                                  hidden_2=2.5)},
        ],
    }  # fmt: skip


def run(*arguments):
    command = [sys.executable, str(BENCHMARKS / "report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def page_of(folder, *results):
    """The page of results, each a file or the contents of one."""
    files = []
    for number, result in enumerate(results):
        if not isinstance(result, Path):
            path = folder / f"result-{number}.json"
            path.write_text(json.dumps(result))
            result = path
        files.append(result)
    done = run(*files, "--output", folder / "page.md")
    assert done.returncode == 0, done.stderr
    return (folder / "page.md").read_text(encoding="utf-8")


def losses_in(page):
    return page.split("## Where tnmoe loses")[1].split("\n## ")[0]


def slowed(result, factor):
    """The same result from a machine that takes ``factor`` times as long."""

    def scaled(value):
        if isinstance(value, dict):
            return {key: scaled(each) for key, each in value.items()}
        if isinstance(value, list):
            return [scaled(each) for each in value]
        return value * factor if isinstance(value, float) else value

    if isinstance(result, dict):
        return {
            key: scaled(value) if key in TIMES else slowed(value, factor)
            for key, value in result.items()
        }
    return [slowed(each, factor) for each in result] if isinstance(result, list) else result


def test_the_committed_page_is_what_the_committed_results_give(tmp_path):
    done = run("--output", tmp_path / "page.md")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.md").read_text() == (BENCHMARKS / "results/REPORT.md").read_text()


def test_a_machine_of_another_speed_gives_the_same_page(tmp_path):
    results = [json.loads(path.read_text()) for path in STORED]
    # A power of two changes no digit of a ratio.
    assert page_of(tmp_path, *(slowed(each, 8.0) for each in results)) == page_of(
        tmp_path, *results
    )


@pytest.mark.parametrize(
    "results",
    [STORED, [hostile_algebra(), hostile_experts()], [several_experts(), whole_models()]],
)
def test_no_time_is_on_the_page(tmp_path, results):
    page = page_of(tmp_path, *results)
    assert not re.search(r"\d\s*(s|ms|µs|ns|seconds?|minutes?|GFLOP/s|GB/s)\b", page)


@pytest.mark.parametrize("path", [path for path in STORED if path.name.startswith("algebra")])
def test_every_peer_that_is_faster_is_named_as_a_loss(tmp_path, path):
    listed = losses_in(page_of(tmp_path, path))
    faster = set()
    for case in json.loads(path.read_text())["cases"]:
        good = {row["library"]: row["median s"] for row in case["rows"] if row.get("good")}
        slowest = max(good[name] for name in good if name.startswith("tnmoe"))
        for name, seconds in good.items():
            if not name.startswith("tnmoe") and round(seconds / slowest, 2) < 1:
                faster.add((case["case"].replace("*", r"\*"), name))
    rows = [line.split(" | ") for line in listed.splitlines() if line.startswith("| ")]
    assert {(row[0].removeprefix("| "), row[1]) for row in rows[2:]} == faster


@pytest.mark.parametrize("path", [path for path in STORED if path.name.startswith("experts")])
def test_every_layer_behind_the_best_mixture_is_listed(tmp_path, path):
    result = json.loads(path.read_text())
    page = page_of(tmp_path, path)
    for case in result["cases"]:
        for mode, label in (("infer", "inference"), ("train", "training")):
            medians = {
                name: row[mode]["median s"]
                for name, row in case.get("layers", {}).items()
                if "median s" in row.get(mode, {})
            }
            best = min(medians.get(name, 1e9) for name in ORDINARY)
            top_k = case.get("top_k", 1)
            network = f"{case['ffn']}{', gated' * case['gated']}, {case['experts']} experts"
            start = f"- {network}{f', top-{top_k}' * (top_k > 1)}, {case['tokens']:,} token"
            lines = [line for line in page.splitlines() if line.startswith(start)]
            line = next((each for each in lines if f", {label}: " in each and "**" in each), "")
            for name, seconds in medians.items():
                if name.startswith("tnmoe") and seconds > 1.006 * best:
                    assert f"{name} **" in line


def test_peers_that_fail_or_are_missing_leave_a_page_that_says_so(tmp_path):
    page = page_of(tmp_path, hostile_algebra())
    listed = losses_in(page)
    assert "In 4 of 6 cases no peer" in listed
    assert "| loss | swift | **0.50** | **0.25** |" in listed
    assert "| without us | able | no result | no result |" in listed
    assert "odd, inaccurate 0.25 (error not finite, allowed 1.0e-05)" in listed
    assert r"fails: ValueError: &lt;class 'x'> \| a\|b \*\*bold\*\* \`code\`" in page
    assert "| win | 1.00 | – | – | 3.00 |" in page
    assert "nan" not in page.lower()
    assert "None" not in page


def test_experts_that_fail_or_have_nothing_beside_them_are_told_apart(tmp_path):
    page = page_of(tmp_path, hostile_experts())
    listed = losses_in(page)
    assert "In 0 of 1 cases even the best" in listed
    line = "- 768x3072, gated, 2 experts, 1 token, training: "
    assert f"{line}tnmoe exact **3.00**, tnmoe exact **1.50 × published exact**" in page
    assert "tnmoe bond 8 –" in page
    assert r"| Switch loop | no \| gate | – |" in page
    assert "| tnmoe exact | **3.00** | – |" in page


def test_experts_stand_beside_the_best_mixture_and_the_dense_network(tmp_path):
    page = page_of(tmp_path, several_experts())
    listed = losses_in(page)
    assert "In 1 of 2 cases even the best" in listed
    assert "- 8x32, 8 experts, top-8, 1 token, inference: tnmoe hidden 64 1.25" in listed
    best, dense, read = (
        page.split(f"8x32, 8 experts, top-8: **{title}")[1].split("8x32")[0]
        for title in ("inference** / best MoE", "inference** / dense FFN", "weights read** / dense")
    )
    assert "| tnmoe hidden 64 | 0.25 | **1.25** |" in best
    assert "| tnmoe hidden 64 | 2.00 | 2.50 |" in dense
    assert "| eager | – | too large |" in dense
    assert "| tnmoe hidden 64 | 2.00 | 2.00 |" in read


def test_the_largest_ratio_to_the_dense_network_is_told_by_experts_per_token(tmp_path):
    summary = page_of(tmp_path, several_experts()).split("The largest ratio to the dense FFN")[1]
    assert "| layer | inference, top-2 | inference, top-8 |" in summary
    assert "| eager | 4.00 | – |" in summary
    assert "| tnmoe hidden 64 | 2.00 | 2.50 |" in summary


def test_whole_models_show_their_share_of_the_dense_model_s_speed(tmp_path):
    page = page_of(tmp_path, whole_models())
    listed = losses_in(page)
    assert "| hidden top-2 | 2 of 2 (0.40) | 1 of 2 (0.80) |" in listed
    assert "| residual top-2 | 2 of 2 (–) | 2 of 2 (–) |" in listed
    assert "ordinary top-2 |" not in listed.split("---")[-1]
    assert "| ordinary top-2 | 4.00 | 0.25 | 0.50 |" in page
    assert "| hidden top-2 | 1.25 | 0.80 | **0.40** |" in page
    assert r"| residual top-2 | 1.50 | no \| graph | no \| graph |" in page
    assert "| residual top-8 | – | cannot be built | cannot be built |" in page


def test_the_environment_is_on_the_page(tmp_path):
    page = page_of(tmp_path, hostile_experts())
    assert "2026-01-02T03:04:05+00:00, commit 0123456789 with uncommitted changes" in page
    assert r"A \| CPU, 2 cores, 1 thread; float32" in page
    assert "tnmoe 0.1.0, quimb 1.15.0" in page
    assert "not recorded: transformers, torchTT, tensorly-torch, torch" in page


def test_tables_have_as_many_cells_in_every_row(tmp_path):
    written = hostile_algebra(), hostile_experts(), several_experts(), whole_models()
    page = page_of(tmp_path, *STORED, *written)
    width = None
    for line in page.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert cells is None or width in (None, cells), line
        width = cells


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", "null", "3", '"results"', '{"cases": []}', '{"cases": [{}]}',
        '{"cases": [{"rows": []}]}', '{"environment": {}, "cases": [{"rows": [{}]}]}',
        '{"environment": 1, "cases": [{"layers": 2}]}', '[{"moe": 1}]',
        '{"cases": [{"models": {}}]}',
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused_in_one_line_that_names_it(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    done = run(path, "--output", tmp_path / "page.md")
    assert done.returncode == 1
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "page.md").exists()


def test_a_file_that_is_not_there_is_named(tmp_path):
    done = run(tmp_path / "missing.json", "--output", tmp_path / "page.md")
    assert done.returncode == 1
    assert "missing.json cannot be read" in done.stderr

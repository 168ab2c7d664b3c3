"""The comparison page: its versions, figures and statements are up to date."""

import inspect
import json
import re
from datetime import datetime
from pathlib import Path

import numpy as np
import peft
import pytest
import quimb.tensor as qtn
import tensorly
import torch
from tensorly.decomposition import tensor_train_matrix
from tensorly.tt_matrix import TTMatrix
from transformers.distributed import DistributedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import tnmoe as tn
from tnmoe import hf, nn

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/comparison.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks/results"
REPORT = (RESULTS / "REPORT.md").read_text(encoding="utf-8")

SHAPE = tn.MPOShape((4, 4, 2), (2, 3, 4))  # 32 × 24
PAIRED = (8, 12, 8)


def tables(text):
    """Yield (run, line above, header, {first cell: other cells}) for each table."""
    run = title = None
    rows = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
            continue
        if rows:
            header, _, *body = rows
            yield run, title, header, {first: cells for first, *cells in body}
            rows = []
        if found := re.match(r"(?:### )?Run (\S+)", line):
            run = found[1]
        title = line or title


FIGURES = [table for table in tables(PAGE) if table[0]]
FEATURES = [table for table in tables(PAGE) if not table[0]]


def pinned():
    lines = (
        line
        for name in ("constraints", "bench")
        for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines()
    )
    return dict(line.split("==") for line in lines if "==" in line) | {"tnmoe": tn.__version__}


def test_both_tables_of_features_are_complete():
    assert [len(header) for _, _, header, _ in FEATURES] == [8, 5]
    for _, _, header, rows in FEATURES:
        assert all(len(cells) == len(header) - 1 and all(cells) for cells in rows.values())


@pytest.mark.parametrize(
    "name",
    ["tnmoe", "tensorly", "tensorly-torch", "quimb", "torchTT", "tntorch", "transformers", "PEFT"],
)
def test_versions_are_those_that_are_tested(name):
    version = {key.lower(): value for key, value in pinned().items()}[name.lower()]
    named = re.findall(rf"(?<![\w-]){name} (\d+\.\d+(?:\.\d+)*)", PAGE)
    assert named
    assert set(named) == {version}


def test_every_note_is_used_and_explained():
    assert set(re.findall(r"\[\^(\w+)\](?!:)", PAGE)) == set(re.findall(r"\[\^(\w+)\]:", PAGE))


@pytest.mark.parametrize("figures", FIGURES, ids=lambda table: f"{table[0]}: {table[1][:40]}")
def test_figures_are_those_of_the_benchmarks(figures):
    run, title, (corner, *columns), rows = figures
    [(_, _, (_, *measured), source)] = [
        table
        for table in tables(REPORT)
        if table[0] == run and table[2][0] == corner and (corner != "layer" or table[1] == title)
    ]
    for name, cells in rows.items():
        stored = dict(zip(measured, source[name], strict=True))
        assert cells == [stored[column] for column in columns]


def test_no_figure_stands_outside_of_the_tables():
    assert len(FIGURES) == 5
    assert not re.search(r"\d ?(times|-fold|%)", PAGE)
    counts = re.findall(r"\d+ of \d+ cases", PAGE)
    assert len(counts) == 2
    assert all(count in REPORT for count in counts)


def test_runs_have_their_dates_and_commits():
    runs = re.findall(r"^Run (\S+) \((.+), commit (\w+)\)", PAGE, re.M)
    assert {name for name, *_ in runs} == {table[0] for table in FIGURES}
    for name, day, commit in runs:
        [(date, stored)] = re.findall(rf"^### Run {name}\n\n(\S+)T\S+, commit (\w+);", REPORT, re.M)
        assert commit == stored
        assert datetime.strptime(day, "%d %B %Y").date().isoformat() == date


def test_exact_bonds_train_more_slowly_everywhere_and_nothing_ran_on_a_gpu():
    behind = re.findall(r"^\| tnmoe exact \| [^|\n]+ \| (\d+) of (\d+) ", REPORT, re.M)
    assert behind
    assert all(losses == cases for losses, cases in behind)
    stored = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    devices = {each["environment"]["device"] for each in stored if "environment" in each}
    assert devices == {"cpu"}


def test_tensorly_has_ranks_but_neither_tolerance_nor_algebra():
    parameters = set(inspect.signature(tensor_train_matrix).parameters)
    assert parameters == {"tensor", "rank", "svd", "verbose", "random_state"}
    assert not any(hasattr(TTMatrix, name) for name in ("__add__", "__matmul__"))


def test_quimb_has_a_cutoff_per_bond_and_mpos_of_equal_legs():
    assert {"cutoff", "cutoff_mode"} <= set(inspect.signature(qtn.tensor_split).parameters)
    with pytest.raises(ValueError, match="reshape"):
        qtn.MatrixProductOperator.from_dense(np.ones((32, 24)), dims=SHAPE.out_dims)
    assert not hasattr(qtn.MatrixProductOperator, "center")
    assert hasattr(qtn.MatrixProductOperator, "calc_current_orthog_center")


@pytest.fixture
def on_torch():
    with tensorly.backend_context("pytorch"):
        yield


def by_tensorly(matrix):
    tensor = matrix.reshape(*SHAPE.out_dims, *SHAPE.in_dims)
    return tensor_train_matrix(tensor, rank=(1, 8, 8, 1)).to_matrix()


def by_quimb(matrix):
    tensor = matrix.reshape(*SHAPE.out_dims, *SHAPE.in_dims).permute(0, 3, 1, 4, 2, 5)
    state = qtn.MatrixProductState.from_dense(tensor.reshape(PAIRED), PAIRED, cutoff=0.0)
    return state.contract(output_inds=state.site_inds).data


def by_tnmoe(matrix):
    return tn.decompose(matrix, SHAPE, max_bond=4).to_matrix()


def test_only_tnmoe_has_finite_gradients_where_schmidt_values_are_equal(on_torch):
    def finite(decompose):
        matrix = torch.eye(32, 24, dtype=torch.float64, requires_grad=True)
        decompose(matrix).square().sum().backward()
        return bool(matrix.grad.isfinite().all())

    assert finite(by_tnmoe)
    assert not finite(by_tensorly)
    assert not finite(by_quimb)


def test_only_tnmoe_decomposes_half_precision_on_a_cpu(on_torch):
    matrix = torch.ones(32, 24, dtype=torch.float16)
    assert by_tnmoe(matrix).dtype == torch.float16
    for decompose in (by_tensorly, by_quimb):
        with pytest.raises(NotImplementedError, match="Half"):
            decompose(matrix)


def test_transformers_and_peft_have_what_the_page_says():
    assert {"batched_mm", "grouped_mm", "deepgemm", "sonicmoe"} <= set(ALL_EXPERTS_FUNCTIONS)
    assert {"ep_size", "tp_size", "pp_size", "fsdp_size"} <= set(
        inspect.signature(DistributedConfig).parameters
    )
    assert "target_parameters" in inspect.signature(peft.LoraConfig).parameters


def test_tnmoe_has_and_lacks_what_the_page_says():
    assert hasattr(tn, "decompose_shared")
    assert {"keep", "num_bytes", "rtol"} <= set(inspect.signature(hf.CompressionConfig).parameters)
    assert "calibration" in inspect.signature(hf.compress).parameters
    assert "calibration" in inspect.signature(hf.prepare_compress).parameters
    assert hasattr(nn, "MPOLinear")
    assert not any(re.search("conv|embedding", name.lower()) for name in nn.__all__)

"""decompose_streamed: the guarantees of decompose, in bounded memory, from blocks of rows."""

import re
import tracemalloc
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import safe_open

import tnmoe as tn
from tests.matrices import (
    DTYPES,
    LIBRARIES,
    dense_norm,
    libraries,
    matrices,
    rounding,
    to_library,
    to_numpy,
)
from tests.test_decompose import assert_canonical
from tnmoe.chains import sketch_sizes

# From one group of rows per block to all rows in one.
block_parts = st.sampled_from((0.0, 0.001, 0.003, 0.01, 0.03, 0.25))
limits = st.one_of(
    st.fixed_dictionaries({"max_bond": st.integers(1, 20)}),
    st.fixed_dictionaries({"rtol": st.sampled_from((1e-5, 1e-3, 0.1, 0.5, 2.0))}),
)
SHAPE = tn.MPOShape((3, 4, 5), (4, 5, 3))


class Rows:
    """A source with nothing but a shape and blocks of rows, which it counts."""

    def __init__(self, matrix, shape=None):
        self.shape = matrix.shape if shape is None else shape
        self.blocks = []
        self._matrix = matrix

    def __getitem__(self, rows):
        self.blocks.append((rows.start or 0, rows.stop))
        return self._matrix[rows]


def error_with_padding(mpo, matrix):
    padded = to_numpy(tn.MPO(mpo.cores).to_matrix())
    sizes = zip(padded.shape, matrix.shape, strict=True)
    return dense_norm(padded - np.pad(matrix, [(0, size - given) for size, given in sizes]))


def matrix_of_rank(rank, dtype="float32", noise=0.0, shape=SHAPE):
    rng = np.random.default_rng(0)
    bonds = shape.bond_dims(rank)
    cores = [rng.standard_normal(size) for size in shape.core_shapes(bonds)]
    matrix = tn.MPO(cores, shape).to_matrix()
    return (matrix + noise * matrix.std() * rng.standard_normal(matrix.shape)).astype(dtype)


@given(matrices, libraries, limits, block_parts, st.integers(0, 5))
def test_the_error_obeys_its_bound_and_the_limits_hold(case, library, limit, part, site):
    shape, matrix = case
    assume(shape.sites > 1)
    source = Rows(to_library(matrix, library))
    center_site = min(site, shape.sites - 1)
    with mock.patch.object(sketch_sizes, "_BLOCK_PART", part):
        mpo, info = tn.decompose_streamed(
            source, shape, center_site=center_site, return_info=True, **limit
        )
    error, slack = error_with_padding(mpo, matrix), rounding(matrix)
    assert error <= info.error_bound + slack
    # The measurement is of the whole error, not of more than it.
    assert error >= info.error_bound - slack
    if "rtol" in limit:
        assert error <= limit["rtol"] * dense_norm(matrix) + slack
    else:
        assert max(mpo.bond_dims) <= limit["max_bond"]
    assert type(mpo.cores[0]) is type(to_library(matrix, library))
    assert str(mpo.dtype).removeprefix("torch.") == matrix.dtype.name
    assert_canonical(mpo, center_site)
    assert len(info.discarded) == len(info.spectra) == len(info.methods) == shape.sites - 1


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bonds_that_the_matrix_needs_give_it_exactly(library, dtype):
    matrix = matrix_of_rank(4, "complex128" if dtype.startswith("complex") else "float64")
    matrix = (matrix * (1 + 1j) if dtype.startswith("complex") else matrix).astype(dtype)
    for bonds in ((4, 4), SHAPE.bond_dims()):
        mpo = tn.decompose_streamed(to_library(matrix, library), SHAPE, bonds=bonds)
        assert mpo.bond_dims == bonds
        assert dense_norm(to_numpy(mpo.to_matrix()) - matrix) <= rounding(matrix)


@pytest.mark.parametrize("limit", [{"max_bond": 6}, {"rtol": 0.02}, {"rtol": 1e-3}])
def test_the_error_is_nearly_that_of_a_matrix_in_memory(limit):
    shape = tn.MPOShape((4, 4, 4, 4), (4, 4, 4, 4))
    rows, columns = np.indices((256, 256))
    matrix = 1 / (1 + 0.1 * abs(rows - columns) + 0.01 * rows)
    streamed_mpo, info = tn.decompose_streamed(matrix, shape, return_info=True, **limit)
    mpo, in_memory = tn.decompose(matrix, shape, return_info=True, **limit)
    if "max_bond" in limit:
        assert info.error_bound <= 1.02 * in_memory.error_bound
    else:
        assert streamed_mpo.num_params <= 1.3 * mpo.num_params


def test_a_tolerance_makes_the_sketch_as_large_as_it_takes():
    shape = tn.MPOShape((16, 16), (16, 16))
    matrix = matrix_of_rank(200, shape=shape)
    source = Rows(matrix)
    mpo = tn.decompose_streamed(source, shape, rtol=1e-3)
    assert dense_norm(mpo.to_matrix() - matrix) <= 1e-3 * dense_norm(matrix)
    assert 150 < mpo.bond_dims[0] <= 200
    # Sketches of 74, 148 and 256 vectors, and the projection.
    assert sum(start == 0 and stop > 1 for start, stop in source.blocks) == 4


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 1e36])
def test_extreme_scales_lose_no_digit(library, scale):
    if library == "jax" and scale == 1e-38:
        pytest.skip("JAX takes subnormal numbers for zero")
    matrix = matrix_of_rank(3)
    mpo, info = tn.decompose_streamed(
        to_library(matrix * np.float32(scale), library), SHAPE, max_bond=2, return_info=True
    )
    plain, plain_info = tn.decompose_streamed(
        to_library(matrix, library), SHAPE, max_bond=2, return_info=True
    )
    assert info.error_bound == pytest.approx(plain_info.error_bound * scale, rel=1e-4)
    difference = to_numpy(mpo.to_matrix()).astype(float) / np.float32(scale)
    assert dense_norm(difference - to_numpy(plain.to_matrix())) <= 1e-4 * dense_norm(matrix)


@pytest.mark.parametrize("order", [1, -1])
def test_blocks_of_very_different_scales_add_up(order):
    rng = np.random.default_rng(0)
    scales = 10.0 ** np.array([-200.0, 0, 0, 200])[::order]
    matrix = np.repeat(scales, 15)[:, None] * rng.standard_normal((60, 60))
    matrix[20:25] = 0
    with mock.patch.object(sketch_sizes, "_BLOCK_PART", 0.0):
        mpo, info = tn.decompose_streamed(matrix, SHAPE, max_bond=9, return_info=True)
    error = np.linalg.norm((mpo.to_matrix() - matrix) / 1e200)
    assert error == pytest.approx(info.error_bound / 1e200, rel=1e-6)
    best = tn.decompose(matrix, SHAPE, max_bond=9, return_info=True)[1]
    assert info.error_bound <= 1.1 * best.error_bound


@pytest.mark.parametrize("limit", [{"max_bond": 3}, {"rtol": 0.1}])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_zero_matrix_stays_zero(library, limit):
    mpo, info = tn.decompose_streamed(
        to_library(np.zeros((60, 60)), library), SHAPE, return_info=True, **limit
    )
    assert info.error_bound == 0
    assert not to_numpy(mpo.to_matrix()).any()


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_a_tensor_in_a_safetensors_file_is_a_source(framework, tmp_path):
    matrix = matrix_of_rank(3)
    safetensors.torch.save_file({"weight": torch.from_numpy(matrix)}, tmp_path / "file")
    with safe_open(tmp_path / "file", framework=framework) as file:
        mpo = tn.decompose_streamed(file.get_slice("weight"), SHAPE, max_bond=3)
    assert isinstance(mpo.cores[0], {"np": np.ndarray, "pt": torch.Tensor}[framework])
    assert dense_norm(to_numpy(mpo.to_matrix()) - matrix) <= rounding(matrix)


def test_half_precision_is_rounded_once(tmp_path):
    matrix = torch.from_numpy(matrix_of_rank(3)).bfloat16()
    safetensors.torch.save_file({"weight": matrix}, tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        mpo = tn.decompose_streamed(file.get_slice("weight"), SHAPE, max_bond=6)
    wide = tn.decompose_streamed(matrix.float(), SHAPE, max_bond=6)
    assert mpo.dtype == torch.bfloat16
    assert all(
        torch.equal(core, other.bfloat16())
        for core, other in zip(mpo.cores, wide.cores, strict=True)
    )


def test_bfloat16_without_torch_says_how_to_open_the_file(tmp_path):
    safetensors.torch.save_file({"weight": torch.ones(60, 60).bfloat16()}, tmp_path / "file")
    with (
        safe_open(tmp_path / "file", framework="np") as file,
        pytest.raises(tn.InputError, match="framework='pt'"),
    ):
        tn.decompose_streamed(file.get_slice("weight"), SHAPE, max_bond=6)


def test_a_memory_map_gives_plain_arrays(tmp_path):
    matrix = matrix_of_rank(3)
    np.save(tmp_path / "matrix.npy", matrix)
    source = np.load(tmp_path / "matrix.npy", mmap_mode="r")
    mpo = tn.decompose_streamed(source, SHAPE, max_bond=3)
    assert all(type(core) is np.ndarray for core in mpo.cores)
    assert dense_norm(mpo.to_matrix() - matrix) <= rounding(matrix)


@pytest.mark.parametrize("limit", [{"max_bond": 8}, {"rtol": 0.01}])
def test_the_memory_is_kept_and_is_far_less_than_the_source(limit):
    size, memory = 4096, 2**24
    shape = tn.MPOShape((8, 8, 8, 8), (8, 8, 8, 8))
    angles = np.arange(size)[:, None] / np.array([100, 1000])

    class Product(Rows):
        def __getitem__(self, rows):
            return (self._matrix[rows] @ np.cos(angles.T)).astype(np.float32)

    source = Product(np.sin(angles), shape=(size, size))
    tracemalloc.start()
    try:
        tn.decompose_streamed(source, shape, memory=memory, **limit)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= memory == 4 * size * size / 4


@pytest.mark.parametrize("limit", [{"max_bond": 3}, {"bonds": (3, 3)}, {"rtol": 0.1}])
def test_the_source_is_read_three_times_and_progress_counts_all_rows(limit):
    source, calls = Rows(matrix_of_rank(3)), []
    with mock.patch.object(sketch_sizes, "_BLOCK_PART", 0.0):
        tn.decompose_streamed(source, SHAPE, on_progress=lambda *call: calls.append(call), **limit)
    passes = 2 if "rtol" in limit else 3
    first, *blocks = source.blocks
    assert first == (0, 1)
    assert sum(stop - start for start, stop in blocks) == passes * 60
    assert [done for done, _ in calls] == list(np.cumsum([b - a for a, b in blocks]))
    assert calls[-1] == (passes * 60, passes * 60)


def test_the_same_source_gives_the_same_bytes():
    matrix = matrix_of_rank(5, noise=0.1)
    first, second = (tn.decompose_streamed(matrix, SHAPE, rtol=0.2, rng=7) for _ in range(2))
    for core, other in zip(first.cores, second.cores, strict=True):
        np.testing.assert_array_equal(core, other)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_with_nan_or_infinity_are_named(library, value):
    matrix = np.ones((60, 60), dtype=np.float32)
    matrix[47, 3] = value
    with (
        mock.patch.object(sketch_sizes, "_BLOCK_PART", 0.0),
        pytest.raises(tn.InputError, match="rows 45 to 49 of the source contain NaN or infinity"),
    ):
        tn.decompose_streamed(to_library(matrix, library), SHAPE, max_bond=2)


class Mixed(Rows):
    def __getitem__(self, rows):
        return super().__getitem__(rows).astype("float32" if rows.start else "float64")


ONES = np.ones((60, 60))


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        (ONES, {}, "decompose_streamed needs max_bond, bonds or rtol"),
        (ONES, {"rtol": 0.0}, "rtol must be at least 1e-06 in blocks of rows, got 0"),
        (ONES, {"rtol": -1.0}, "rtol must be a finite number"),
        (ONES, {"max_bond": 0}, "max_bond must be a positive integer"),
        (ONES, {"max_bond": 2, "memory": 0}, "memory must be a positive integer, got 0"),
        (ONES, {"max_bond": 2, "memory": 1000}, "takes .* GB, more than memory=1000"),
        (ONES, {"max_bond": 2, "rng": "seed"}, "rng must be"),
        (ONES, {"max_bond": 2, "center_site": 3}, "center_site must be an integer from 0 to 2"),
        (ONES[:50], {"max_bond": 2}, r"is for a \(60, 60\) matrix, got one of shape \(50, 60\)"),
        (ONES[None], {"max_bond": 2}, r"rows and columns, got one of shape \(1, 60, 60\)"),
        (ONES[:0], {"max_bond": 2}, r"rows and columns, got one of shape \(0, 60\)"),
        (ONES.astype(int), {"max_bond": 2}, "must be of float16, .*, got dtype int64"),
        (
            Rows(ONES[:50], (60, 60)),
            {"max_bond": 2},
            r"rows 50 to 54 of the source should be a block of shape \(5, 60\), got \(0, 60\)",
        ),
        (
            Rows(ONES[:, :50], (60, 60)),
            {"max_bond": 2},
            r"the first row of the source should be a block of shape \(1, 60\), got \(1, 50\)",
        ),
        (
            Mixed(ONES),
            {"max_bond": 2},
            "rows 5 to 9 of the source are of float32, and its first row is of float64",
        ),
    ],
)
def test_bad_arguments_are_named(source, arguments, message):
    with (
        mock.patch.object(sketch_sizes, "_BLOCK_PART", 0.0),
        pytest.raises(tn.InputError, match=message),
    ):
        tn.decompose_streamed(source, SHAPE, **arguments)


def test_a_shape_of_one_site_is_refused():
    with pytest.raises(tn.InputError, match="has one site"):
        tn.decompose_streamed(ONES, tn.MPOShape((60,), (60,)), max_bond=2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (object(), r"expected a source with a shape .*, got object"),
        (mock.Mock(shape=(60, 60), spec=["shape"]), "expected a source with a shape"),
        ("matrix", "expected a source with a shape"),
        (Rows([[1.0] * 60] * 60, (60, 60)), "expected an array of one of .*, got builtins.list"),
    ],
)
def test_what_has_no_blocks_of_rows_is_a_type_error(source, message):
    with pytest.raises(TypeError, match=message):
        tn.decompose_streamed(source, SHAPE, max_bond=2)


def test_the_usual_shape_is_the_balanced_one():
    mpo = tn.decompose_streamed(np.ones((48, 36)), max_bond=1)
    assert mpo.shape == tn.MPOShape.for_matrix(48, 36)


def test_the_memory_that_a_message_names_suffices():
    with pytest.raises(tn.InputError, match="allow memory=") as refusal:
        tn.decompose_streamed(ONES, SHAPE, max_bond=2, memory=1000)
    needed = int(re.search(r"allow memory=(\d+)", str(refusal.value))[1])
    assert tn.decompose_streamed(ONES, SHAPE, max_bond=2, memory=needed).shape == SHAPE

"""Low ranks with weights on both sides are truncated SVDs of dense whitened matrices."""

from itertools import product

import numpy as np
import pytest
import torch

from tests.matrices import LIBRARIES, to_library, to_numpy
from tnmoe import InputError
from tnmoe.joint.input_moments import InputMoments
from tnmoe.joint.low_rank import low_rank
from tnmoe.joint.output_moments import OutputMoments

E = 3
SHARES = [1.0, 0.5, 2.0]
SIZES = [(9, 6), (6, 9), (6, 6)]


def draw(rows, columns, complex_=False, experts=E):
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(experts, rows, columns))
    return matrices + 1j * rng.normal(size=matrices.shape) if complex_ else matrices


def moments_of(size, seed=1):
    factor = np.random.default_rng(seed).normal(size=(size, size + 2))
    return factor @ factor.T / size


def rows_of(rows, seed=2):
    return np.random.default_rng(seed).uniform(0.1, 10, size=(E, rows)) ** 2


def whitened(matrices, moments, rows):
    """Return D^½ W R of every expert."""
    roots = np.linalg.cholesky(moments)
    return np.sqrt(rows)[:, :, None] * matrices @ roots


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
def test_moments_of_outputs_take_the_place_of_those_of_inputs(library, size, complex_, weighed):
    matrices = draw(*size, complex_)
    inputs = np.stack([moments_of(size[1], seed) for seed in range(E)])
    outputs = matrices @ inputs @ matrices.conj().mT
    rows = to_library(rows_of(size[0]), library) if weighed else None
    mean = np.trace(inputs, axis1=1, axis2=2).mean() / size[1]
    given = to_library(matrices, library)
    of_outputs, of_inputs = (
        low_rank(given, moments=moments, rows=rows)
        for moments in (
            OutputMoments(to_library(outputs, library), scale=float(mean), damping=0.1),
            InputMoments.of(to_library(inputs, library), 0.1),
        )
    )
    for made, expected in zip(of_outputs.squared_errors, of_inputs.squared_errors, strict=True):
        # One more outputs than inputs, and eigenvalues that are 0.
        assert np.allclose(made[: len(expected)], expected, rtol=1e-6, atol=1e-9)
    for ranks in ((0, 2, 4), (1, 5, 6), (3, 3, 3)):
        pairs = zip(
            of_outputs.decompose(given, ranks), of_inputs.decompose(given, ranks), strict=True
        )
        for one, other in pairs:
            assert np.allclose(to_numpy(one.matrix()), to_numpy(other.matrix()), atol=1e-6)


def test_moments_of_outputs_of_another_size_are_refused():
    moments = OutputMoments(np.zeros((E, 4, 4)), 1.0, 0.1)
    with pytest.raises(InputError, match=r"moments of outputs must have shape \(3, 6, 6\), got"):
        low_rank(draw(6, 9), moments=moments)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("complex_", [False, True])
def test_every_rank_has_the_error_of_a_truncated_svd(library, size, common, complex_):
    matrices, rows = draw(*size, complex_), rows_of(size[0])
    moments = np.stack([moments_of(size[1], 1 if common else seed) for seed in range(E)])
    part = low_rank(
        to_library(matrices, library),
        moments=InputMoments.of(to_library(moments[0] if common else moments, library)),
        rows=to_library(rows, library),
        shares=SHARES,
    )
    values = np.linalg.svd(whitened(matrices, moments, rows), compute_uv=False)
    for ranks in ((0, 2, 4), (1, 5, 6), (3, 3, 3)):
        found = part.decompose(to_library(matrices, library), ranks)
        written = np.stack([to_numpy(each.matrix()) for each in found])
        misses = np.linalg.norm(whitened(matrices - written, moments, rows), axis=(1, 2)) ** 2
        for expert, rank in enumerate(ranks):
            least = (values[expert, rank:] ** 2).sum()
            predicted = part.squared_errors[expert][rank] / SHARES[expert]
            assert np.isclose(predicted, least, atol=1e-9)
            assert np.isclose(misses[expert], least, atol=1e-9)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("complex_", [False, True])
def test_columns_of_one_factor_are_those_of_the_identity(library, size, complex_):
    matrices = to_library(draw(*size, complex_), library)
    for rank in range(min(size) + 1):
        for each in low_rank(matrices).decompose(matrices, [rank] * E):
            outer, inner, columns = map(to_numpy, (each.outer, each.inner, each.columns))
            assert each.rank == rank
            assert outer.shape == (size[0], rank)
            assert inner.shape == (rank, size[1] - rank)
            assert columns.dtype == np.int64
            assert sorted(columns) == list(range(size[1]))
            assert (np.diff(columns[:rank]) > 0).all()
            assert (np.diff(columns[rank:]) > 0).all()
            gauge = np.hstack([np.eye(rank), inner])
            np.testing.assert_allclose(to_numpy(each.matrix())[:, columns], outer @ gauge)


@pytest.mark.parametrize("size", [(60, 40), (40, 60)])
def test_entries_of_the_inner_factor_stay_moderate(size):
    """Moments with eigenvalues over twelve orders of magnitude change little."""
    matrices = draw(*size)
    moments = np.diag(np.geomspace(1, 1e-12, size[1]))
    for given in (None, InputMoments.of(moments)):
        for rank in (1, 10, 20, 39):
            for each in low_rank(matrices, moments=given).decompose(matrices, [rank] * E):
                assert np.abs(each.inner).max() < 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex128])
@pytest.mark.parametrize("size", SIZES)
def test_factors_have_the_dtype_and_the_predicted_error(dtype, size):
    matrices = torch.as_tensor(draw(*size, dtype.is_complex)).to(dtype)
    part = low_rank(matrices)
    found = part.decompose(matrices, [3] * E)
    for each, matrix, errors in zip(found, matrices, part.squared_errors, strict=True):
        assert each.outer.dtype == each.inner.dtype == dtype
        assert each.columns.dtype == torch.int64
        outer, inner = to_numpy(each.outer), to_numpy(each.inner)
        written = np.empty(size, np.result_type(outer, np.float64))
        written[:, to_numpy(each.columns)] = outer @ np.hstack([np.eye(3), inner])
        error = np.linalg.norm(to_numpy(matrix) - written) ** 2
        assert np.isclose(error, errors[3], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("moments", [None, np.geomspace(1, 1e-12, 9)], ids=["plain", "weighted"])
@pytest.mark.parametrize("rows", [None, np.geomspace(1, 1e-30, 9)], ids=["alike", "rows"])
def test_the_largest_rank_is_exact(size, moments, rows):
    matrices = draw(*size)
    part = low_rank(
        matrices,
        moments=None if moments is None else InputMoments.of(np.diag(moments[: size[1]])),
        rows=None if rows is None else rows[: size[0]],
    )
    largest = min(size)
    assert [errors[largest] for errors in part.squared_errors] == [0.0] * E
    for each, matrix in zip(part.decompose(matrices, [largest] * E), matrices, strict=True):
        np.testing.assert_allclose(each.matrix(), matrix, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_the_smallest_rank_is_a_matrix_of_zeros(size):
    matrices = draw(*size)
    for each in low_rank(matrices).decompose(matrices, [0] * E):
        assert each.matrix().shape == size
        assert not each.matrix().any()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("size", SIZES)
def test_rows_without_weight_get_their_best_fit(library, size):
    """Given the right factor, each row is a problem of least squares of its own."""
    matrices, moments, rows = draw(*size), moments_of(size[1]), rows_of(size[0])
    rows[0, :2], rows[1] = 0, 0
    part = low_rank(
        to_library(matrices, library),
        moments=InputMoments.of(to_library(moments, library)),
        rows=to_library(rows, library),
    )
    assert set(part.squared_errors[1]) == {0.0}
    root = np.linalg.cholesky(moments)
    for expert, each in enumerate(part.decompose(to_library(matrices, library), (3, 3, 3))):
        written = to_numpy(each.matrix())
        right = np.linalg.svd(written)[2][:3]
        fit = np.linalg.lstsq((right @ root).T, (matrices[expert] @ root).T, rcond=None)[0].T
        np.testing.assert_allclose(written, fit @ right, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_experts_of_very_different_sizes_stay_apart(size, scale):
    matrices = draw(*size)
    scaled = (matrices * np.array([scale, 1.0, 1 / scale])[:, None, None]).astype(np.float32)
    part = low_rank(scaled)
    alone = low_rank(matrices)
    for expert, factor in enumerate((scale, 1.0, 1 / scale)):
        np.testing.assert_allclose(
            np.array(part.squared_errors[expert]) / factor**2,
            alone.squared_errors[expert],
            rtol=1e-5,
        )
    for each, own in zip(part.decompose(scaled, [2] * E), scaled, strict=True):
        wide = own.astype(np.float64)
        left, values, right = np.linalg.svd(wide)
        best = (left[:, :2] * values[:2]) @ right[:2]
        np.testing.assert_allclose(each.matrix(), best, atol=1e-5 * np.abs(wide).max())


@pytest.mark.parametrize("size", SIZES)
def test_matrices_of_zeros_and_of_rank_one_have_no_error_beyond_their_rank(size):
    rng = np.random.default_rng(5)
    matrices = np.stack(
        [np.zeros(size), np.outer(rng.normal(size=size[0]), rng.normal(size=size[1]))]
    )
    part = low_rank(matrices)
    assert set(part.squared_errors[0]) == {0.0}
    assert part.squared_errors[1][1] < 1e-14 * part.squared_errors[1][0]
    for rank in range(min(size) + 1):
        found = part.decompose(matrices, [rank, max(rank, 1)])
        for each, matrix in zip(found, matrices, strict=True):
            np.testing.assert_allclose(each.matrix(), matrix, atol=1e-12)
            assert np.abs(each.inner).max(initial=0) < 100


def test_one_expert_that_does_not_count_has_no_error():
    part = low_rank(draw(5, 4), shares=[1, 0, 2])
    assert set(part.squared_errors[1]) == {0.0}
    assert part.frontier()[-2].ranks == (4, 0, 4)


def test_one_expert_is_enough():
    matrices = draw(5, 4, experts=1)
    part = low_rank(matrices)
    (factors,) = part.decompose(matrices, [2])
    values = np.linalg.svd(matrices[0], compute_uv=False)
    error = np.linalg.norm(factors.matrix() - matrices[0]) ** 2
    assert np.isclose(error, (values[2:] ** 2).sum())
    assert part.frontier()[-1].ranks == (4,)


@pytest.mark.parametrize("index_numbers", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_numbers_of_factors_and_of_orders_are_counted(size, index_numbers):
    matrices, ranks = draw(*size), (0, 3, 6)
    part = low_rank(matrices, index_numbers=index_numbers)
    stored = sum(
        each.outer.size + each.inner.size + index_numbers * each.columns.size
        for each in part.decompose(matrices, ranks)
    )
    assert part.num_params(ranks) == stored


@pytest.mark.parametrize("step", [1, 2, 4, 100])
@pytest.mark.parametrize("size", [(5, 4), (4, 6)])
def test_the_frontier_is_the_hull_of_all_ranks_that_are_multiples_of_a_step(step, size):
    part = low_rank(draw(*size), shares=SHARES, index_numbers=2)
    found = part.frontier(step)
    allowed = sorted({*range(0, 4, step), 4})
    sizes, errors = [each.num_params for each in found], [each.error for each in found]
    assert sizes == [part.num_params(each.ranks) for each in found]
    for ranks in product(allowed, repeat=E):
        error = sum(own[rank] for own, rank in zip(part.squared_errors, ranks, strict=True))
        least = np.interp(part.num_params(ranks), sizes, errors)
        assert error >= least * (1 - 1e-12)
    assert {rank for each in found for rank in each.ranks} <= set(allowed)
    assert errors[-1] == 0
    assert sizes[-1] == E * (size[0] * size[1] + 2 * size[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: low_rank(m, shares=[1, 2]), "shares need 3 numbers"),
        (lambda m: low_rank(m, rows=np.ones((2, 9))), r"rows must have shape \(3, 9\) or \(9,\)"),
        (lambda m: low_rank(m, rows=-np.ones(9)), "from 0 up"),
        (
            lambda m: low_rank(m, moments=InputMoments.of(np.zeros((2, 6, 6)))),
            r"shape \(6, 6\) or \(3, 6, 6\), got \(2, 6, 6\)",
        ),
        (lambda m: low_rank(m, index_numbers=-1), "index_numbers"),
        (lambda m: low_rank(m).decompose(m, [1, 2]), "ranks must hold 3 numbers"),
        (lambda m: low_rank(m).decompose(m, [1, 2, 7]), "a rank"),
        (lambda m: low_rank(m).decompose(m, [1, 2, -1]), "a rank"),
        (lambda m: low_rank(m).frontier(step=0), "step"),
        (lambda m: low_rank(m).frontier(most=0), "most"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call(draw(9, 6))

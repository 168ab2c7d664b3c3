"""decompose: exact where asked, and never further off than its bound says."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import tnmoe as tn
from tests.matrices import (
    DTYPES,
    LIBRARIES,
    OTHER,
    dense_norm,
    libraries,
    matrices,
    methods,
    rounding,
    to_library,
    to_numpy,
)
from tnmoe.backends import backend_named
from tnmoe.chains import unfolding as unfolding_module
from tnmoe.chains.unfolding import GramMatrix, TriangularFactor
from tnmoe.options import ADD_METHODS, PRODUCT_METHODS

max_bonds = st.one_of(st.none(), st.integers(1, 20))
rtols = st.one_of(st.none(), st.sampled_from((0.0, 1e-12, 1e-6, 1e-3, 0.1, 0.5, 2.0)))


def error_of(mpo: tn.MPO, matrix: np.ndarray) -> float:
    return dense_norm(to_numpy(mpo.to_matrix()) - matrix)


def error_with_padding(mpo: tn.MPO, matrix: np.ndarray) -> float:
    """A truncated MPO need not vanish in the padding; what was cut may lie there."""
    padded = to_numpy(tn.MPO(mpo.cores).to_matrix())
    padded = padded - np.pad(
        matrix, [(0, n - m) for n, m in zip(padded.shape, matrix.shape, strict=True)]
    )
    return dense_norm(padded)


@given(matrices, libraries, methods)
def test_exact_decomposition_reconstructs_to_machine_precision(case, library, method):
    shape, matrix = case
    mpo, info = tn.decompose(to_library(matrix, library), shape, method=method, return_info=True)
    assert mpo.bond_dims == shape.bond_dims()
    assert info.error_bound == 0
    assert error_of(mpo, matrix) <= rounding(matrix)


@given(matrices, libraries, methods, max_bonds, rtols)
def test_truncated_error_obeys_the_bound(case, library, method, max_bond, rtol):
    shape, matrix = case
    mpo, info = tn.decompose(
        to_library(matrix, library),
        shape,
        method=method,
        max_bond=max_bond,
        rtol=rtol,
        return_info=True,
    )
    error, slack = error_with_padding(mpo, matrix), rounding(matrix)
    assert error_of(mpo, matrix) <= error + slack
    assert error <= info.error_bound + slack
    assert error >= max(info.discarded, default=0) - slack
    if max_bond is None and rtol is not None:
        assert error <= rtol * dense_norm(matrix) + slack
    if max_bond is not None:
        assert max(mpo.bond_dims, default=1) <= max_bond


@given(matrices, libraries, methods, max_bonds, st.data())
def test_canonical_cores_are_isometries_on_their_side_of_the_centre(
    case, library, method, max_bond, data
):
    shape, matrix = case
    center_site = data.draw(st.integers(0, shape.sites - 1))
    mpo = tn.decompose(
        to_library(matrix, library),
        shape,
        max_bond=max_bond,
        center_site=center_site,
        method=method,
    )
    assert mpo.center_site == center_site
    assert_canonical(mpo, center_site)


def assert_canonical(mpo: tn.MPO, center_site: int) -> None:
    single = str(mpo.dtype).removeprefix("torch.") in ("float32", "complex64")
    tolerance = 1e-4 if single else 1e-11
    for site, core in enumerate(map(to_numpy, mpo.cores)):
        if site < center_site:
            isometry = core.reshape(-1, core.shape[-1])
        elif site > center_site:
            isometry = core.reshape(core.shape[0], -1).conj().T
        else:
            continue
        gram = isometry.conj().T @ isometry
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=tolerance)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["eigh", "svd", "randomized"])
def test_schmidt_values_seen_are_in_double_precision_whatever_the_method(method, dtype, library):
    matrix = to_library(np.arange(256).reshape(16, 16).astype(dtype), library)
    shape = tn.MPOShape((2, 2, 4), (2, 4, 2))
    mpo, info = tn.decompose(matrix, shape, max_bond=3, method=method, return_info=True)
    again = mpo.compress(max_bond=2, return_info=True)[1]
    for values in (*info.spectra, *again.spectra):
        assert type(values) is type(matrix)
        assert str(values.dtype).removeprefix("torch.") == "float64"


@pytest.mark.parametrize(("method", "kind"), [("eigh", GramMatrix), ("svd", TriangularFactor)])
def test_small_neighbouring_sites_are_read_together(method, kind, monkeypatch):
    heights, of = [], kind.of

    def counted(xp, unfolding, last=False):
        heights.append(unfolding.shape[-2])
        return of(xp, unfolding, last)

    monkeypatch.setattr(kind, "of", counted)
    shape = tn.MPOShape((3, 3, 3, 1, 3, 3, 3), (3, 3, 3, 1, 3, 3, 3))
    tn.decompose(np.eye(729), shape, max_bond=4, center_site=3, method=method)
    # From either end: two sites of 9 legs, of which three would make 729 rows; then one alone.
    assert heights == [81, 4 * 9, 81, 4 * 9]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "shape",
    [
        tn.MPOShape((8,), (6,)),
        tn.MPOShape((8, 1), (1, 6)),
        tn.MPOShape.split(8, 6, left=4, right=3),
        tn.MPOShape((2, 2, 2), (1, 3, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 1e200])
def test_an_operator_does_not_change_with_the_matrix_that_it_was_made_of(scale, shape, library):
    matrix = to_library(scale * np.random.default_rng(0).standard_normal((8, 6)), library)
    mpos = [tn.decompose(matrix, shape), *tn.decompose_batch(matrix[None], shape)]
    before = to_numpy(mpos[0].to_matrix()).copy()
    matrix *= 0
    for mpo in mpos:
        np.testing.assert_array_equal(to_numpy(mpo.to_matrix()), before)


@given(matrices, libraries)
def test_result_keeps_library_and_dtype(case, library):
    shape, matrix = case
    given_array = to_library(matrix, library)
    mpo = tn.decompose(given_array, shape, max_bond=3)
    for core in (*mpo.cores, mpo.to_matrix()):
        assert type(core) is type(given_array)
        assert core.dtype == given_array.dtype


@given(matrices)
def test_all_libraries_choose_the_same_bonds(case):
    shape, matrix = case
    bonds = [
        tn.decompose(to_library(matrix, library), shape, rtol=1e-2).bond_dims
        for library in ("numpy", "torch", OTHER)
    ]
    # A Schmidt value may sit on the threshold within rounding, so a bond may differ by one.
    assert np.ptp(bonds, axis=0).max(initial=0) <= 1


@given(matrices, libraries)
def test_methods_agree_on_schmidt_values(case, library):
    shape, matrix = case
    array = to_library(matrix, library)
    _, by_svd = tn.decompose(array, shape, method="svd", return_info=True)
    _, by_auto = tn.decompose(array, shape, method="auto", return_info=True)
    for one, other in zip(by_svd.spectra, by_auto.spectra, strict=True):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), atol=rounding(matrix))


@given(matrices, libraries)
def test_spectra_at_exact_bonds_are_the_singular_values_of_the_unfoldings(case, library):
    shape, matrix = case
    _, info = tn.decompose(to_library(matrix, library), shape, return_info=True)
    padded = np.zeros((shape.padded_out, shape.padded_in), matrix.dtype)
    padded[: shape.out_features, : shape.in_features] = matrix
    axes = [axis for site in range(shape.sites) for axis in (site, shape.sites + site)]
    tensor = padded.reshape(*shape.out_dims, *shape.in_dims).transpose(axes)
    wide = np.complex128 if np.iscomplexobj(matrix) else np.float64
    for bond, spectrum in enumerate(info.spectra):
        rows = np.prod(tensor.shape[: 2 * (bond + 1)])
        expected = np.linalg.svd(tensor.reshape(rows, -1).astype(wide), compute_uv=False)
        np.testing.assert_allclose(to_numpy(spectrum), expected, atol=rounding(matrix))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 1e37])
def test_extreme_scales_lose_no_digit(library, scale):
    if library == "jax" and scale == 1e-38:
        pytest.skip("JAX takes subnormal numbers for zero")
    matrix = (np.random.default_rng(0).standard_normal((8, 8)) * scale).astype("float32")
    shape = tn.MPOShape((2, 2, 2), (2, 2, 2))
    mpo, info = tn.decompose(to_library(matrix, library), shape, max_bond=3, return_info=True)
    relative = error_of(mpo, matrix) / dense_norm(matrix)
    reference = tn.decompose(
        to_library(matrix / np.float32(scale), library), shape, max_bond=3, return_info=True
    )[1]
    assert relative == pytest.approx(reference.error_bound / dense_norm(matrix / scale), rel=1e-4)
    assert info.error_bound == pytest.approx(reference.error_bound * scale, rel=1e-4)


def test_small_schmidt_values_survive_single_precision():
    # A Gram matrix in single precision would get the last value 40 % wrong.
    rng = np.random.default_rng(1)
    values = 10.0 ** np.linspace(0, -4, 16)
    left, _ = np.linalg.qr(rng.standard_normal((16, 16)))
    right, _ = np.linalg.qr(rng.standard_normal((256, 16)))
    unfolding = (left * values) @ right.T
    matrix = unfolding.reshape(4, 4, 16, 16).transpose(0, 2, 1, 3).reshape(64, 64)
    shape = tn.MPOShape((4, 16), (4, 16))
    _, info = tn.decompose(matrix.astype("float32"), shape, method="eigh", return_info=True)
    assert info.methods == ("eigh",)
    np.testing.assert_allclose(info.spectra[0], values, rtol=2e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_single_and_rounded_once(dtype):
    matrix = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(
        getattr(torch, dtype)
    )
    shape = tn.MPOShape((4, 4), (4, 4))
    mpo = tn.decompose(matrix, shape)
    assert mpo.dtype == matrix.dtype
    single = tn.decompose(matrix.float(), shape)
    for core, exact in zip(mpo.cores, single.cores, strict=True):
        torch.testing.assert_close(core, exact.to(matrix.dtype))


@given(matrices, libraries, st.sampled_from((1e-3, 0.1, 0.3)))
def test_rtol_never_needs_more_parameters_than_even_shares_of_the_error(case, library, rtol):
    shape, matrix = case
    array = to_library(matrix, library)
    _, exact = tn.decompose(array, shape, return_info=True)
    mpo = tn.decompose(array, shape, rtol=rtol)
    share = rtol * dense_norm(matrix) / np.sqrt(max(1, shape.sites - 1))
    even = []
    for spectrum in map(to_numpy, exact.spectra):
        tails = np.sqrt(np.cumsum(spectrum[::-1].astype("float64") ** 2))[::-1]
        even.append(max(1, int(np.sum(tails > share * (1 + 1e-5)))))
    slack = 1.0 if "128" in matrix.dtype.name or matrix.dtype == "float64" else 1.02
    assert mpo.num_params <= slack * shape.num_params(even or None) + 8 * (slack - 1) * 50


def test_rtol_spends_the_error_where_it_saves_most():
    # Half of the error is all it takes to drop either bond to 1; the right one is dearer.
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((64, 64)) @ np.diag(0.8 ** np.arange(64))
    shape = tn.MPOShape((2, 4, 8), (2, 4, 8))
    mpo = tn.decompose(matrix, shape, rtol=0.3)
    spectra = tn.decompose(matrix, shape, return_info=True)[1].spectra
    tails = [np.append(np.cumsum(s[::-1] ** 2)[::-1], 0) for s in spectra]
    budget = 0.09 * dense_norm(matrix) ** 2
    best = min(
        shape.num_params((a, b))
        for a in range(1, len(tails[0]))
        for b in range(1, len(tails[1]))
        if tails[0][a] + tails[1][b] <= budget
    )
    assert mpo.num_params <= best
    assert error_of(mpo, matrix) <= 0.3 * dense_norm(matrix)


@given(matrices, libraries, st.floats(0.01, 1.0))
def test_a_parameter_budget_is_kept_and_its_error_is_known(case, library, part):
    shape, matrix = case
    budget = max(shape.num_params(1), int(part * shape.num_params()))
    mpo, info = tn.decompose(
        to_library(matrix, library), shape, max_params=budget, return_info=True
    )
    assert mpo.num_params <= budget
    assert error_with_padding(mpo, matrix) <= info.error_bound + rounding(matrix)


@given(matrices, libraries, methods, st.data())
def test_an_exact_list_of_bonds_is_what_comes_out(case, library, method, data):
    shape, matrix = case
    requested = [data.draw(st.integers(1, bond)) for bond in shape.bond_dims()]
    bonds = shape.bond_dims(requested)
    mpo = tn.decompose(to_library(matrix, library), shape, bonds=bonds, method=method)
    assert mpo.bond_dims == bonds


@given(matrices, libraries, max_bonds, rtols, st.integers(1, 3))
def test_a_batch_holds_every_matrix_to_its_own_guarantee(case, library, max_bond, rtol, count):
    shape, matrix = case
    batch = np.stack([matrix * np.asarray(10.0**k, matrix.dtype) for k in range(count)])
    batch[-1] = batch[-1][::-1]
    assume(np.abs(batch).max() < 1e36)  # cores would not fit the dtype
    mpos, infos = tn.decompose_batch(
        to_library(batch, library), shape, max_bond=max_bond, rtol=rtol, return_info=True
    )
    assert len(mpos) == len(infos) == count
    assert len({mpo.bond_dims for mpo in mpos}) == 1
    for mpo, info, one in zip(mpos, infos, batch, strict=True):
        error, slack = error_with_padding(mpo, one), rounding(one)
        assert error <= info.error_bound + slack
        if max_bond is None:
            assert error <= (rtol or 0.0) * dense_norm(one) + slack


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("sites", range(1, 13))
def test_every_number_of_sites_and_every_centre_is_exact_where_asked(library, sites):
    shape = tn.MPOShape(
        (2,) * min(sites, 8) + (1,) * max(0, sites - 8), (1, 2) * (sites // 2) + (1,) * (sites % 2)
    )
    matrix = np.random.default_rng(sites).standard_normal((shape.out_features, shape.in_features))
    for center_site in range(sites):
        for method in ("qr", "svd"):
            mpo = tn.decompose(
                to_library(matrix, library), shape, center_site=center_site, method=method
            )
            assert_canonical(mpo, center_site)
            assert error_of(mpo, matrix) <= rounding(matrix)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(5, 10), (5, 200), (5, 203), (64, 1000), (2, 6, 300)])
def test_the_factor_of_a_wide_matrix_grown_in_blocks_is_one(size, dtype, library, monkeypatch):
    monkeypatch.setattr(unfolding_module, "_BLOCK", 100)
    matrix = np.random.default_rng(0).standard_normal(size).astype(dtype)
    xp = backend_named(library)
    factor = unfolding_module._square(xp, to_library(matrix, library))
    assert tuple(factor.shape[-2:]) == (size[-2], size[-2])
    expected = matrix @ matrix.conj().swapaxes(-1, -2)
    found = to_numpy(factor @ xp.adjoint(factor))
    np.testing.assert_allclose(found, expected, atol=rounding(expected))


@pytest.mark.parametrize(
    ("dtype", "method", "most"),
    [
        ("float32", "eigh", 1.6),
        ("float32", "svd", 2.4),
        ("float64", "eigh", 1.6),
        ("float64", "svd", 1.9),
        ("float16", "auto", 4.4),
    ],
)
def test_a_truncation_takes_little_more_memory_than_a_copy_of_the_matrix(
    dtype, method, most, monkeypatch
):
    monkeypatch.setattr(unfolding_module, "_BLOCK", 2**16)
    matrix = np.random.default_rng(0).standard_normal((1024, 1024)).astype(dtype)
    shape = tn.MPOShape.for_matrix(1024, 1024)
    tracemalloc.start()
    try:
        tn.decompose(matrix, shape, method=method, max_bond=16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= most * matrix.nbytes


@pytest.mark.parametrize("limit", [{"max_bond": 16}, {"rtol": 0.01}], ids=str)
def test_single_precision_fits_into_three_times_the_matrix(limit, monkeypatch):
    monkeypatch.setattr(unfolding_module, "_BLOCK", 2**16)
    shape = tn.MPOShape.for_matrix(1024, 1024)
    rng = np.random.default_rng(0)
    cores = [rng.standard_normal(size) for size in shape.core_shapes(shape.bond_dims(8))]
    matrix = tn.MPO(cores, shape).to_matrix()
    matrix += 0.003 * matrix.std() * rng.standard_normal(matrix.shape)
    matrix = matrix.astype(np.float32)
    tracemalloc.start()
    try:
        tn.decompose(matrix, shape, **limit)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert matrix.nbytes + peak <= 3 * matrix.nbytes


def matrix_of_decay(shape, decay, dtype, seed):
    """A matrix whose Schmidt values at every bond fall to 16 digits below the largest, or to 0."""
    rng = np.random.default_rng(seed)
    cores = [
        rng.standard_normal(core) + (1j * rng.standard_normal(core) if dtype == "complex128" else 0)
        for core in shape.core_shapes()
    ]
    for site, core in enumerate(cores[:-1]):
        values = {
            "steep": 10.0 ** (-16 * np.arange(core.shape[-1]) / core.shape[-1]),
            "low rank": 1.0 * (np.arange(core.shape[-1]) < 3),
            "low rank and noise": np.where(np.arange(core.shape[-1]) < 3, 1, 1e-10),
        }[decay]
        cores[site] = core * values
    return tn.MPO([core.astype(dtype) for core in cores], shape).to_matrix()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("decay", ["steep", "low rank", "low rank and noise"])
@pytest.mark.parametrize("legs", [(8, 8), (2, 4, 4, 2), (2, 2, 2, 2, 2, 2)], ids=str)
def test_double_precision_from_squares_keeps_what_it_promises(legs, decay, dtype, library):
    shape = tn.MPOShape(legs, legs)
    matrix = matrix_of_decay(shape, decay, dtype, len(legs))
    norm = dense_norm(matrix)
    for limit in ({"rtol": 1e-3}, {"rtol": 1e-6}, {"rtol": 1e-9}, {"rtol": 1e-12}, {"max_bond": 5}):
        array = to_library(matrix, library)
        mpo, info = tn.decompose(array, shape, method="eigh", return_info=True, **limit)
        error = error_of(mpo, matrix)
        assert error <= info.error_bound + 1e-14 * norm
        assert info.error_bound <= 1.01 * error + 1e-14 * norm
        assert "rtol" not in limit or error <= limit["rtol"] * norm + 1e-14 * norm


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [{"max_bond": 8}, {"rtol": 0.05}])
def test_randomized_is_near_the_optimum_and_reports_its_true_error(library, dtype, limit):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((96, 96)))[0] for _ in range(2))
    matrix = ((left * 0.7 ** np.arange(96)) @ right).astype(dtype)
    shape = tn.MPOShape((8, 12), (8, 12))
    unfolded = matrix.reshape(8, 12, 8, 12).transpose(0, 2, 1, 3).reshape(64, 144)
    # Give the unfolding, not the matrix, the fast decay.
    u, s, vh = np.linalg.svd(unfolded, full_matrices=False)
    unfolded = ((u * 0.6 ** np.arange(len(s))) @ vh).astype(dtype)
    matrix = unfolded.reshape(8, 8, 12, 12).transpose(0, 2, 1, 3).reshape(96, 96)
    array = to_library(matrix, library)
    mpo, info = tn.decompose(array, shape, method="randomized", return_info=True, **limit)
    _, best = tn.decompose(array, shape, method="svd", return_info=True, **limit)
    assert info.methods == ("randomized",)
    assert error_of(mpo, matrix) == pytest.approx(info.error_bound, rel=1e-2, abs=rounding(matrix))
    if "max_bond" in limit:
        assert info.error_bound <= 1.05 * best.error_bound
    else:
        assert error_of(mpo, matrix) <= 0.05 * dense_norm(matrix)
    again = tn.decompose(array, shape, method="randomized", **limit)
    np.testing.assert_array_equal(to_numpy(again.to_matrix()), to_numpy(mpo.to_matrix()))


def test_auto_takes_the_cheapest_method_that_is_accurate_and_says_which():
    matrix = np.random.default_rng(0).standard_normal((16, 16))
    shape = tn.MPOShape((4, 4), (4, 4))
    for dtype, limit, expected in (
        ("float32", None, "qr"),
        ("float64", None, "qr"),
        ("float32", 4, "eigh"),
        ("complex64", 4, "eigh"),
        ("float64", 4, "svd"),
        ("complex128", 4, "svd"),
    ):
        _, info = tn.decompose(matrix.astype(dtype), shape, max_bond=limit, return_info=True)
        assert info.methods == (expected,)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("method", ["auto", "svd", "eigh", "randomized"])
@pytest.mark.parametrize("rtol", [0.0, 0.5])
def test_a_zero_matrix_needs_no_bond_larger_than_one(library, method, rtol):
    shape = tn.MPOShape((2, 3, 2), (2, 2, 3))
    zeros = to_library(np.zeros((12, 12)), library)
    mpo, info = tn.decompose(zeros, shape, rtol=rtol, method=method, return_info=True)
    assert mpo.bond_dims == (1, 1)
    assert info.error_bound == 0
    assert error_of(mpo, np.zeros((12, 12))) == 0


@pytest.mark.parametrize("method", ["auto", "svd", "eigh", "randomized"])
def test_a_tolerance_may_be_of_any_size(method):
    shape = tn.MPOShape((2, 2, 2), (2, 2, 2))
    mpo = tn.decompose(np.eye(8), shape, rtol=1e300, method=method)
    assert mpo.bond_dims == (1, 1)
    assert mpo.compress(rtol=1e300).bond_dims == (1, 1)
    for sum_method in ADD_METHODS:
        assert tn.add([mpo, mpo], rtol=1e300, method=sum_method).bond_dims == (1, 1)
    for product_method in PRODUCT_METHODS:
        assert tn.matmul(mpo, mpo, rtol=1e300, method=product_method).bond_dims == (1, 1)


ILL_POSED = {
    "zero": torch.zeros(8, 8, dtype=torch.float64),
    "identity": torch.eye(8, dtype=torch.float64),
    "rank one": torch.ones(8, 8, dtype=torch.float64),
    "repeated": torch.kron(torch.eye(4), torch.tensor([[2.0, 1], [1, 2]])).double(),
}


@pytest.mark.parametrize("matrix", ILL_POSED.values(), ids=ILL_POSED.keys())
@pytest.mark.parametrize("method", ["auto", "svd", "eigh", "randomized"])
@pytest.mark.parametrize("limit", [{}, {"max_bond": 2}, {"rtol": 0.5}])
def test_gradients_are_finite_for_zero_identity_and_repeated_spectra(matrix, method, limit):
    matrix = matrix.clone().requires_grad_()
    mpo = tn.decompose(matrix, tn.MPOShape((2, 2, 2), (2, 2, 2)), method=method, **limit)
    (mpo.to_matrix() ** 2).sum().backward()
    assert torch.isfinite(matrix.grad).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("method", ["auto", "svd", "eigh"])
@pytest.mark.parametrize("center_site", [0, 2])
def test_gradients_through_a_truncation_agree_with_finite_differences(dtype, method, center_site):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(8, 8, dtype=dtype, generator=generator, requires_grad=True)
    shape = tn.MPOShape((2, 2, 2), (2, 2, 2))

    def truncated(matrix):
        return tn.decompose(
            matrix, shape, max_bond=2, method=method, center_site=center_site
        ).to_matrix()

    assert torch.autograd.gradcheck(truncated, matrix)


def test_gradients_flow_through_an_exact_decomposition():
    matrix = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    shape = tn.MPOShape((2, 2, 2), (2, 2, 2))
    weights = torch.randn(8, 8, dtype=torch.float64)
    (tn.decompose(matrix, shape).to_matrix() * weights).sum().backward()
    torch.testing.assert_close(matrix.grad, weights)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_refused(library, value, dtype):
    matrix = np.ones((4, 4), dtype)
    matrix[2, 1] = value
    with pytest.raises(tn.InputError, match=r"\(4, 4\) matrix contains NaN or infinity"):
        tn.decompose(to_library(matrix, library), tn.MPOShape((2, 2), (2, 2)))


@pytest.mark.parametrize(
    ("matrix", "arguments", "message"),
    [
        (np.ones((4, 5)), {}, r"is for a \(4, 4\) matrix, got one of shape \(4, 5\)"),
        (np.ones(4), {}, r"expected a matrix .*, got an array of shape \(4,\)"),
        (np.ones((2, 4, 4)), {}, r"expected a matrix \(decompose_batch takes many\), got an array"),
        (np.ones((4, 4), int), {}, "must be of float16, bfloat16, .*, complex128, got dtype int64"),
        (np.ones((4, 4)), {"max_bond": 0}, "max_bond must be a positive integer, got 0"),
        (np.ones((4, 4)), {"max_params": 7}, "max_params=7 is too few"),
        (np.ones((4, 4)), {"bonds": (5,)}, r"bonds=\(5,\) do not fit"),
        (np.ones((4, 4)), {"bonds": (4,), "max_bond": 3}, r"bonds=\(4,\) exceed max_bond=3"),
        (np.diag([1.0, 0, 0, 1]), {"bonds": (1,), "rtol": 0.1}, "more than rtol=0.1"),
        (np.ones((4, 4)), {"max_bond": 3, "method": "qr"}, "method='qr' finds no Schmidt values"),
        (
            np.ones((4, 4)),
            {"max_params": 9, "method": "randomized"},
            "max_params weighs all Schmidt values",
        ),
        (np.ones((2, 2, 4, 4)), {}, r"got an array of shape \(2, 2, 4, 4\)"),
        (np.ones((4, 4)), {"max_bond": (2, 2)}, r"got \(2, 2\) for 1 bonds"),
        (np.ones((4, 4)), {"rtol": -1}, "rtol must be a finite number of at least 0, got -1"),
        (np.ones((4, 4)), {"rtol": float("nan")}, "rtol must be"),
        (
            np.ones((4, 4)),
            {"rtol": "small"},
            "rtol must be a finite number of at least 0, got 'small'",
        ),
        (np.ones((4, 4)), {"rtol": True}, "rtol must be a finite number of at least 0, got True"),
        (np.ones((4, 4)), {"center_site": 2}, "center_site must be an integer from 0 to 1"),
        (
            np.ones((4, 4)),
            {"method": "magic"},
            "method must be one of auto, svd, qr, .* got 'magic'",
        ),
    ],
)
def test_bad_arguments_are_named(matrix, arguments, message):
    with pytest.raises(tn.InputError, match=message):
        tn.decompose(matrix, tn.MPOShape((2, 2), (2, 2)), **arguments)


def test_an_array_of_no_known_library_is_a_type_error():
    with pytest.raises(TypeError, match=r"one of .*numpy, .*torch.*, got builtins\.list"):
        tn.decompose([[1.0]], tn.MPOShape((1,), (1,)))


def test_a_shape_that_is_none_is_named():
    with pytest.raises(TypeError, match=r"shape must be an MPOShape, got tuple: \(4, 4\)"):
        tn.decompose(np.eye(4), (4, 4))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("size", [(12, 18), (1, 1), (53, 7), (64, 1)])
def test_the_usual_shape_is_the_balanced_one(library, size):
    matrix = np.random.default_rng(0).standard_normal((2, *size))
    mpo = tn.decompose(to_library(matrix[0], library))
    assert mpo.shape == tn.MPOShape.for_matrix(*size)
    np.testing.assert_allclose(to_numpy(mpo.to_matrix()), matrix[0], atol=1e-12)
    for mpo, each in zip(tn.decompose_batch(to_library(matrix, library)), matrix, strict=True):
        assert mpo.shape == tn.MPOShape.for_matrix(*size)
        np.testing.assert_allclose(to_numpy(mpo.to_matrix()), each, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 4), (0, 4, 4), (1, 2, 4, 4), (2, 4, 5)])
def test_what_is_no_batch_is_refused(shape):
    with pytest.raises(tn.InputError, match=r"batch of matrices|is for a \(4, 4\) matrix"):
        tn.decompose_batch(np.ones(shape), tn.MPOShape((2, 2), (2, 2)))

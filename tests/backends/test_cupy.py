"""What only CuPy has: devices, TF32, failures without an error. Runs over CuPy or a stand-in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

import tnmoe as tn
from tests.matrices import OTHER, make_matrix
from tnmoe.backends import backend_named
from tnmoe.interop import from_quimb, from_tensorly, to_quimb, to_scipy

if OTHER != "cupy":
    pytest.skip("runs in a process of its own: test_over_cupy.py", allow_module_level=True)

import cupy
import cupyx
from cupy._core import _routines_linalg as products

XP = backend_named("cupy")
SHAPE = tn.MPOShape((2, 4, 3), (2, 4, 3))
two_devices = pytest.mark.skipif(cupy.cuda.runtime.getDeviceCount() < 2, reason="one device")


def array(*shape: int, seed: int = 0, dtype: str = "float32") -> Any:
    return XP.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def arrays_in(result: Any) -> Iterator[Any]:
    """All arrays of CuPy in a result, which may hold operators, tuples and records."""
    if isinstance(result, cupy.ndarray):
        yield result
    elif isinstance(result, tn.MPO | tn.SharedMPO):
        yield from arrays_in((*result.cores, getattr(result, "base", None)))
    elif isinstance(result, list | tuple):
        for each in result:
            yield from arrays_in(each)
    elif hasattr(result, "__dataclass_fields__"):
        yield from arrays_in(list(vars(result).values()))


OPERATIONS = {
    "decompose": lambda m, a, s: [
        tn.decompose(m, SHAPE, rtol=0.1, method=method) for method in ("auto", "svd", "randomized")
    ],
    "decompose with weights": lambda m, a, s: tn.decompose(
        m, SHAPE, max_bond=3, weights=XP.eye(24, like=m)
    ),
    "decompose_batch": lambda m, a, s: tn.decompose_batch(XP.stack([m, m]), SHAPE, max_bond=3),
    "decompose_shared": lambda m, a, s: [
        tn.decompose_shared(s.to_matrices(), SHAPE, max_bond=3, residual=residual)
        for residual in (False, True)
    ],
    "decompose_ordered": lambda m, a, s: tn.decompose_ordered(m, SHAPE, max_bond=3),
    "apply": lambda m, a, s: [a.apply(m), a @ m, a @ m[0]],
    "entries": lambda m, a, s: [a[0], a[0, 1], a[:, 2], a[[0, 1], [1, 2]], a[:2], a.to_matrix()],
    "sums and multiples": lambda m, a, s: [
        a + a,
        a - a,
        -a,
        2 * a,
        a / 3,
        a * m[0, 0],
        a / m[0, 0],
    ],
    "products": lambda m, a, s: [a @ a.T, a.hadamard(a), tn.kron(a, a), a.H],
    "rounded sums and products": lambda m, a, s: [
        tn.add([a, a], max_bond=3),
        tn.hadamard(a, a, max_bond=3),
        *(tn.matmul(a, a, max_bond=3, method=each) for each in ("direct", "zipup", "randomized")),
    ],
    "numbers": lambda m, a, s: [
        a.trace(),
        a.partial_trace(1),
        a.inner(a),
        a.norm(),
        (a + a).norm(),
    ],
    "gauges": lambda m, a, s: [a.canonicalize(0), a.vidal(), a.compress(max_bond=2)],
    "entanglement": lambda m, a, s: [a.schmidt_values(0), tn.operator_schmidt(a, 0)],
    "fit": lambda m, a, s: tn.fit([a, 3e6 * a], max_bond=3),
    "experts": lambda m, a, s: [
        tn.SharedMPO.from_base(a, 3, rng=0),
        tn.SharedMPO.replicate(a, 3, noise=0.1, rng=0),
        s.expert(1),
        s.to_matrices(),
    ],
    "new operators": lambda m, a, s: [tn.MPO.random(SHAPE, 3, like=m), tn.MPO.identity(SHAPE, m)],
}


@two_devices
@pytest.mark.parametrize("operation", OPERATIONS)
def test_results_are_on_the_device_of_their_operands_whichever_is_current(operation):
    with cupy.cuda.Device(1):
        matrix = array(24, 24)
        mpo = tn.decompose(matrix, SHAPE, max_bond=6)
        experts = tn.SharedMPO.replicate(mpo, 3, noise=0.1, rng=0)
    results = list(arrays_in(OPERATIONS[operation](matrix, mpo, experts)))
    assert results
    assert {each.device.id for each in results} == {1}


@two_devices
def test_numbers_leave_any_device():
    with cupy.cuda.Device(1):
        mpo = tn.decompose(array(24, 24), SHAPE, max_bond=3)
    expected = np.asarray(mpo)
    np.testing.assert_allclose(to_scipy(mpo) @ np.eye(24), expected, atol=1e-5)
    assert mpo.entropy(0) > 0
    assert tn.mutual_information(mpo, 0, 2) > 0


@pytest.fixture
def failing(monkeypatch):
    """Let a decomposition of CuPy fail: with a status that CuPy may ignore, or with NaN."""

    def fail(name: str, way: str) -> None:
        real = getattr(cupy.linalg, name)

        def failed(matrix: Any, *arguments: Any, **named: Any) -> Any:
            if way == "status" and cupyx.geterr()["linalg"] == "raise":
                raise np.linalg.LinAlgError("devInfo = [3]")
            found = real(matrix, *arguments, **named)
            factor = 2.0 if way == "status" else float("nan")
            return (
                tuple(each * factor for each in found) if type(found) is tuple else found * factor
            )

        monkeypatch.setattr(cupy.linalg, name, failed)

    return fail


@pytest.mark.parametrize("way", ["status", "NaN"])
@pytest.mark.parametrize("size", [(6, 4), (4, 6), (3, 6, 4), (2, 40, 5)])
def test_numpy_finds_the_svd_that_cusolver_does_not(failing, way, size):
    matrix = array(*size, dtype="complex64")
    failing("svd", way)
    u, s = XP.left_svd(matrix)
    numbers, u, s = matrix.get(), u.get(), s.get()
    assert (u.dtype, s.dtype) == (np.complex64, np.float32)
    np.testing.assert_allclose(s, np.linalg.svd(numbers)[1], rtol=1e-5)
    projected = u @ (u.conj().swapaxes(-1, -2) @ numbers)
    np.testing.assert_allclose(projected, numbers, atol=1e-5)


@pytest.mark.parametrize("way", ["status", "NaN"])
def test_numpy_finds_the_eigenvalues_that_cusolver_does_not(failing, way):
    factor = array(3, 5, 5)
    matrix = factor @ XP.adjoint(factor)
    failing("eigh", way)
    failing("eigvalsh", way)
    values, vectors = (each.get() for each in XP.eigh(matrix))
    rebuilt = (vectors * values[:, None]) @ vectors.swapaxes(-1, -2)
    np.testing.assert_allclose(rebuilt, matrix.get(), atol=1e-4)
    np.testing.assert_allclose(XP.eigvalsh(matrix).get(), values, rtol=1e-5)
    assert (np.diff(values) <= 0).all()


def test_an_svd_of_numbers_that_are_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"infs or NaNs|did not converge"):
        XP.left_svd(array(4, 4) * float("nan"))


@pytest.mark.parametrize(
    "size", [(4, 4), (8, 3), (3, 8), (23, 23), (33, 40), (5, 16, 4), (2, 40, 33)]
)
@pytest.mark.parametrize("kind", ["zero", "low rank", "gaussian", "zero rows", "identity"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_decompositions_are_those_of_numpy(size, kind, dtype):
    *stack, rows, columns = size
    count = int(np.prod(stack))
    each = [make_matrix(kind, rows, columns, dtype, seed) for seed in range(count)]
    numbers = np.stack(each).reshape(size)
    matrix, tolerance = XP.from_numpy(numbers), 1e-4 if dtype in ("float32", "complex64") else 1e-12
    largest = max(1.0, np.abs(numbers).max()) * max(rows, columns)

    def close(found: Any, expected: np.ndarray, power: int = 1) -> None:
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * largest**power)

    def adjoint(found: np.ndarray) -> np.ndarray:
        return found.conj().swapaxes(-1, -2)

    u, s = (found.get() for found in XP.left_svd(matrix))
    q, r = (found.get() for found in XP.qr(matrix))
    close(s, np.linalg.svd(numbers)[1])
    close(u @ (adjoint(u) @ numbers), numbers)
    close(q @ r, numbers)
    for isometry in (u, q):
        close(adjoint(isometry) @ isometry - np.eye(min(rows, columns)), np.zeros(()))
    gram = matrix @ XP.adjoint(matrix)
    values, vectors = (found.get() for found in XP.eigh(gram))
    close((vectors * values[..., None, :]) @ adjoint(vectors), gram.get(), 2)
    close(XP.eigvalsh(gram).get(), values, 2)
    if rows <= columns:
        factor = XP.triangular_factor(matrix).get()
        close(factor @ adjoint(factor), gram.get(), 2)


@pytest.fixture
def tf32():
    """Let CuPy multiply in TF32, as CUPY_TF32=1 does."""
    before = products.get_compute_type("float32")
    products.set_compute_type("float32", products.COMPUTE_TYPE_TF32)
    yield
    products.set_compute_type("float32", before)


def test_only_apply_is_as_rough_as_the_products_of_cupy(tf32):
    matrix, x = array(24, 24), array(50, 24, seed=1)
    numbers, exact = matrix.get().astype(float), x.get().astype(float)
    mpo = tn.decompose(matrix, SHAPE)
    assert products.get_compute_type("float32") == products.COMPUTE_TYPE_TF32

    def error(found: Any, expected: np.ndarray) -> float:
        return float(np.linalg.norm(found.get() - expected) / np.linalg.norm(expected))

    rough = 1e-5
    if error(matrix @ matrix, numbers @ numbers) < rough:
        pytest.skip("the device has no TF32")
    assert error(mpo.apply(x), exact @ numbers.T) > rough
    assert error(mpo.to_matrix(), numbers) < rough
    assert error((mpo @ mpo).to_matrix(), numbers @ numbers) < rough
    assert error(tn.matmul(mpo, mpo, rtol=0).to_matrix(), numbers @ numbers) < rough


def test_threads_keep_products_precise_for_each_other(tf32):
    like, inside, left, found = array(2), Event(), Event(), []

    def other() -> None:
        with XP.full_precision(like):
            inside.set()
            assert left.wait(10)
            found.append(products.get_compute_type("float32"))

    thread = Thread(target=other)
    with XP.full_precision(like):
        thread.start()
        assert inside.wait(10)
    left.set()
    thread.join()
    assert found == [products.COMPUTE_TYPE_DEFAULT]
    assert products.get_compute_type("float32") == products.COMPUTE_TYPE_TF32


def test_half_precision_is_computed_in_single_and_bfloat16_is_refused():
    mpo = tn.decompose(XP.astype(array(24, 24), "float16"), SHAPE, max_bond=6)
    assert XP.dtype_name(mpo.cores[0]) == XP.dtype_name(mpo.to_matrix()) == "float16"
    with pytest.raises(TypeError, match="the cupy backend has no bfloat16"):
        XP.astype(array(2), "bfloat16")


def test_a_file_brings_an_operator_to_the_current_device_and_back(tmp_path):
    mpo = tn.decompose(array(24, 24), SHAPE, max_bond=6)
    tn.save(tmp_path / "x", mpo)
    on_the_cpu = tn.load(tmp_path / "x", library="numpy")
    np.testing.assert_array_equal(on_the_cpu.cores[1], mpo.cores[1].get())
    with cupy.cuda.Device(cupy.cuda.runtime.getDeviceCount() - 1) as device:
        loaded = tn.load(tmp_path / "x")
    assert {core.device.id for core in loaded.cores} == {device.id}


def test_operators_of_quimb_and_cores_of_tensorly_keep_arrays_of_cupy():
    pytest.importorskip("quimb")
    mpo = tn.decompose(array(24, 24), SHAPE, max_bond=6)
    for back in (from_quimb(to_quimb(mpo)), from_tensorly(list(mpo.cores))):
        assert {type(core) for core in back.cores} == {cupy.ndarray}
        np.testing.assert_array_equal(np.asarray(back), np.asarray(mpo))


def test_numpy_and_cupy_do_not_mix_by_accident():
    mpo = tn.decompose(array(24, 24), SHAPE, max_bond=6)
    with pytest.raises(TypeError, match="the cores are cupy arrays, x is a ndarray"):
        mpo.apply(np.ones(24, "float32"))
    with pytest.raises(TypeError, match="Implicit conversion to a NumPy array is not allowed"):
        np.asarray(mpo.cores[0])
    assert type(np.asarray(mpo)) is np.ndarray


def test_the_code_of_the_page_about_cupy_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/howto/cupy.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks), {})


def test_an_operator_can_be_drawn_and_printed():
    mpo = tn.decompose(array(24, 24), SHAPE, max_bond=6)
    assert "float32" in repr(mpo)
    assert "<svg" in mpo._repr_html_()
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from tnmoe import plot

    axes = plot.schmidt_spectra(mpo)
    assert axes is not None
    pyplot.close("all")

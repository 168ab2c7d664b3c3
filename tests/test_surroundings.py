"""Settings of torch and NumPy around the algebra do not change what it computes.

Every operation runs with default settings and with other ones; its results agree bit by bit.
"""

import contextlib
import functools
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import tnmoe as tn
from tests.matrices import KINDS, LIBRARIES, dense_norm, make_matrix, to_library, to_numpy
from tnmoe import interop
from tnmoe.backends import get_backend

SHAPE = tn.MPOShape((4, 4, 4), (4, 4, 4))
PADDED = tn.MPOShape((4, 4, 4), (4, 4, 4), out_features=61, in_features=59)


def numbers(*size, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    array = rng.standard_normal(size)
    if dtype.startswith("complex"):
        array = array + 1j * rng.standard_normal(size)
    return torch.from_numpy(array).to(getattr(torch, dtype))


def operator(seed, bond=8, dtype="float32"):
    """An operator with bonds of a size, and with Schmidt values that decay."""
    legs = (1, bond, bond, 1)
    sizes = [(legs[site], 4, 4, legs[site + 1]) for site in range(3)]
    decay = 0.7 ** torch.arange(bond)
    cores = [numbers(*size, dtype=dtype, seed=seed + site) for site, size in enumerate(sizes)]
    cores[0], cores[1] = cores[0] * decay, cores[1] * decay
    return tn.MPO([core.to(getattr(torch, dtype)) for core in cores])


def reloaded(obj):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "operator.safetensors"
        tn.save(path, obj)
        return tn.load(path)


def with_base(chain, base):
    whole = tn.MPO([base.to_matrix()[None, :, :, None]])
    started = tn.SharedMPO.from_base(whole, 2, SHAPE, 4, shared_sites=(2,), rng=0)
    mixed = tn.SharedMPO([chain.cores[0][None], *chain.cores[1:]], SHAPE, base=whole)
    return started.to_matrices(), mixed.to_matrices(), mixed.expert(0).to_matrix()


def squeezed(mpo):
    result = tn.squeeze({"w": mpo}, lambda mpos: float(mpos["w"].num_params), 100, max_steps=3)
    # The last bit of a product is not the same on every CPU. The phases of complex Schmidt vectors
    # hang on it; the matrices do not.
    matrices = [mpo.to_matrix() for mpo in result.mpos.values()]
    errors = torch.tensor([step.error for step in result.steps], dtype=torch.float64, device="cpu")
    return matrices, [(step.bond, step.after) for step in result.steps], errors


OPERATIONS = {
    **{
        f"decompose by {method}": lambda a, b, m, method=method: tn.decompose(
            m, SHAPE, max_bond=12, method=method, return_info=True
        )
        for method in ("auto", "svd", "eigh", "randomized")
    },
    "decompose exactly": lambda a, b, m: tn.decompose(m, SHAPE),
    "decompose to a tolerance": lambda a, b, m: tn.decompose(m, SHAPE, rtol=0.3, return_info=True),
    "decompose to a size": lambda a, b, m: tn.decompose(m, SHAPE, max_params=900, return_info=True),
    "decompose a batch": lambda a, b, m: tn.decompose_batch(m.expand(2, 64, 64), SHAPE, max_bond=6),
    "decompose a padded matrix": lambda a, b, m: tn.decompose(m[:61, :59], PADDED, max_bond=9),
    "compress": lambda a, b, m: (a + b).compress(rtol=1e-3, return_info=True),
    **{
        f"{method} sum": lambda a, b, m, method=method: tn.add(
            [a, b, a], method=method, max_bond=6, rtol=1e-3
        )
        for method in ("direct", "successive", "randomized")
    },
    **{
        f"{method} product": lambda a, b, m, method=method: tn.matmul(
            a, b, method=method, max_bond=9, rtol=1e-3
        )
        for method in ("direct", "zipup", "randomized")
    },
    "fit": lambda a, b, m: tn.fit([a, b], max_bond=6, return_info=True),
    "squeeze": lambda a, b, m: squeezed(a),
    "kron": lambda a, b, m: tn.kron(a, b),
    "norm": lambda a, b, m: (a.norm(), a.canonicalize(0).norm()),
    "inner": lambda a, b, m: a.inner(b),
    "trace": lambda a, b, m: (a.trace(), tn.MPO.identity(SHAPE, like=m).trace()),
    "Schmidt values": lambda a, b, m: (a.schmidt_values(0), a.schmidt_values(1), a.entropy(1)),
    "canonicalize": lambda a, b, m: [a.canonicalize(site) for site in range(3)],
    "Vidal's form": lambda a, b, m: a.vidal(),
    "composition": lambda a, b, m: (a @ b, a @ b.T - 2 * (b.H @ a) / 3),
    "matrix": lambda a, b, m: a.to_matrix(),
    "new operators": lambda a, b, m: (
        tn.MPO.random(SHAPE, 3, rng=0, like=m),
        tn.MPO.zeros(SHAPE, like=m),
        tn.MPO.identity(tn.MPOShape((4, 4), (4, 4), 15, 15), like=m),
    ),
    "experts": lambda a, b, m: tn.SharedMPO.replicate(a, 3, (0, 2), 0.1, rng=0).to_matrices(),
    "experts with a base": lambda a, b, m: with_base(a, b),
    "files": lambda a, b, m: (reloaded(a), reloaded(tn.SharedMPO.replicate(b, 2)).to_matrices()),
    "quimb and tensorly": lambda a, b, m: (
        interop.from_quimb(interop.to_quimb(a)),
        interop.from_tensorly(interop.to_tensorly(b)),
    ),
    "bonds": lambda a, b, m: tn.select_bonds(
        [a.schmidt_values(0), a.schmidt_values(1)], SHAPE, rtol=0.01
    ),
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def matmul_precision(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def warnings_as_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


SURROUNDINGS = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "float64 as default": lambda: default_dtype(torch.float64),
    "float16 as default": lambda: default_dtype(torch.float16),
    "meta as default": lambda: torch.device("meta"),
    "rough products": lambda: matmul_precision("medium"),
    "TF32": lambda: matmul_precision("high"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "deterministic mode": deterministic,
    "NumPy's errors raised": lambda: np.errstate(all="raise"),
    "warnings as errors": warnings_as_errors,
}


def flat(result):
    """All arrays and numbers in a result, with their dtypes."""
    if isinstance(result, tn.MPO):
        return [*(part for core in result.cores for part in flat(core)), repr(result)]
    if isinstance(result, tn.TruncationInfo | tn.FitInfo):
        return [part for value in vars(result).values() for part in flat(value)]
    if isinstance(result, tuple | list):
        return [part for each in result for part in flat(each)]
    if isinstance(result, torch.Tensor):
        return [(str(result.dtype), str(result.device), get_backend(result).to_numpy(result))]
    return [result]


def assert_same(results, expected):
    results, expected = flat(results), flat(expected)
    assert len(results) == len(expected)
    for one, other in zip(results, expected, strict=True):
        if isinstance(one, tuple):
            assert one[:2] == other[:2]
            np.testing.assert_allclose(one[2], other[2], rtol=1e-5, atol=1e-5 * abs(other[2]).max())
        else:
            assert one == other


@functools.cache
def arguments(dtype):
    return operator(0, dtype=dtype), operator(5, dtype=dtype), numbers(64, 64, dtype=dtype)


@functools.cache
def in_plain_surroundings(operation, dtype):
    return OPERATIONS[operation](*arguments(dtype))


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_gives_the_same_in_all_surroundings(operation, surroundings):
    for dtype in ("float32", "bfloat16", "complex64"):
        expected = in_plain_surroundings(operation, dtype)
        with SURROUNDINGS[surroundings]():
            result = OPERATIONS[operation](*arguments(dtype))
        assert_same(result, expected)


def relative_error(mpo, exact):
    return float(np.linalg.norm(mpo.to_matrix().double().numpy() - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("surroundings", ["autocast to bfloat16", "rough products"])
def test_a_tolerance_holds_against_dense_algebra(surroundings):
    a, b, m = arguments("float32")
    x, y = (each.to_matrix().double().numpy() for each in (a, b))
    with SURROUNDINGS[surroundings]():
        assert relative_error((a + b).compress(rtol=1e-3), x + y) <= 1e-3
        for method in ("direct", "zipup", "randomized"):
            assert relative_error(tn.matmul(a, b, rtol=1e-3, method=method), x @ y) <= 1e-3
        mpo, info = tn.decompose(m, SHAPE, rtol=0.2, return_info=True)
        exact = m.double().numpy()
        assert relative_error(mpo, exact) <= min(
            0.2, 1.00001 * info.error_bound / dense_norm(exact)
        )


@pytest.mark.parametrize("surroundings", ["autocast to bfloat16", "autocast to float16"])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "bfloat16")])
def test_a_product_with_vectors_has_its_dtype_and_is_as_rough_as_torchs(surroundings, dtypes):
    mpo = operator(0, dtype=dtypes[0])
    x = numbers(3, 64, dtype=dtypes[1])
    expected = mpo.apply(x)
    with SURROUNDINGS[surroundings]():
        result = mpo.apply(x)
    assert result.dtype == expected.dtype == torch.float32
    assert not torch.equal(result, expected)
    torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


SETTINGS = """
import torch
from tnmoe.backends import get_backend

cublas, onednn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul

def check(read):
    before = read()
    for device in ("cpu", "meta"):
        like = torch.ones(1, device=device)
        with get_backend(like).full_precision(like), get_backend(like).full_precision(like):
            assert torch.get_float32_matmul_precision() == "highest"
            assert (cublas.fp32_precision, onednn.fp32_precision) == ("ieee", "ieee")
            assert not cublas.allow_tf32
        assert read() == before

def old():
    return torch.get_float32_matmul_precision(), cublas.allow_tf32, *new()

def new():
    return torch.backends.fp32_precision, cublas.fp32_precision, onednn.fp32_precision

torch.set_float32_matmul_precision("medium")
check(old)
torch.set_float32_matmul_precision("highest")
cublas.allow_tf32 = True
check(old)
cublas.allow_tf32 = False
# From here on, by the settings of torch 2.9, which those above must not follow.
onednn.fp32_precision = "none"
torch.backends.fp32_precision = "bf16"
check(new)
torch.backends.fp32_precision = "tf32"
assert onednn.fp32_precision == "tf32", "no longer follows the setting above it"
cublas.fp32_precision = "tf32"
check(new)
"""


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="settings of torch 2.9"
)
def test_settings_are_afterwards_what_they_were():
    """In a new process, since torch cannot undo a mixture of old and new settings."""
    subprocess.run([sys.executable, "-c", SETTINGS], check=True)


def test_threads_keep_products_precise_for_each_other():
    """A block that ends in one thread does not change the precision in another thread's block."""
    backend = get_backend(torch.ones(1))
    a, b = numbers(256, 256), numbers(256, 256, seed=1)
    precise = a @ b
    inside, left = threading.Event(), threading.Event()

    def other():
        with backend.full_precision(a):
            inside.set()
            assert left.wait(10)
            results.append(a @ b)

    results: list[torch.Tensor] = []
    thread = threading.Thread(target=other)
    with matmul_precision("medium"):
        with backend.full_precision(a):
            thread.start()
            assert inside.wait(10)
        left.set()
        thread.join()
    assert torch.equal(results[0], precise)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("scale", [1e-150, 1e-38, 1.0, 1e300])
@pytest.mark.parametrize("kind", KINDS)
def test_no_error_of_numpy_and_no_warning_is_raised_whatever_the_numbers(kind, scale, library):
    matrix = to_library(make_matrix(kind, 24, 24, "float64", 3) * scale, library)
    shape = tn.MPOShape((2, 4, 3), (3, 4, 2))
    if not np.isfinite(to_numpy(matrix)).all():
        pytest.skip("beyond float64")
    with np.errstate(all="raise"), warnings_as_errors():
        mpo = tn.decompose(matrix, shape, rtol=0.1)
        for method in ("svd", "eigh", "randomized"):
            tn.decompose(matrix, shape, rtol=0.1, method=method, return_info=True)
        spectra = [mpo.schmidt_values(bond) for bond in range(2)]
        tn.select_bonds(spectra, shape, rtol=0.1)
        tn.bonds_by_entropy(spectra, shape)
        mpo.vidal(), mpo.entropy(0), mpo.norm(), mpo.to_matrix(), mpo.canonicalize(0)
        for method in ("direct", "successive", "randomized"):
            tn.add([mpo, mpo], rtol=0.1, method=method)
        tn.fit(mpo, max_bond=2)
        squeezed = tn.squeeze({"w": mpo}, lambda mpos: 1.0, 0.5, max_steps=3)
        assert all(0 <= step.error <= 1 for step in squeezed.steps)
        tn.SharedMPO.replicate(mpo, 2, noise=0.1, rng=0).to_matrices()

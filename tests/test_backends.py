"""What every backend must do alike, how a backend is found, and how one is registered."""

import numpy as np
import pytest
import torch

import tnmoe as tn
from tests.backend_toy import ToyBackend
from tests.backend_toy_array import ToyArray
from tests.matrices import LIBRARIES, to_library, to_numpy
from tnmoe import backends
from tnmoe.backends import available_backends, backend_named, get_backend, register
from tnmoe.backends.protocol import Backend
from tnmoe.errors import InputError

METHODS = [name for name in vars(Backend) if not name.startswith("_")]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_backend_has_every_operation_of_the_protocol(library):
    backend = backend_named(library)
    assert backend.name == library
    assert all(callable(getattr(backend, name)) for name in METHODS)


def test_subclasses_of_arrays_are_found():
    assert get_backend(torch.nn.Parameter(torch.ones(2))).name == "torch"
    assert get_backend(np.ones(2).view(type("Mine", (np.ndarray,), {}))).name == "numpy"
    assert get_backend(type("Mine", (ToyArray,), {})(np.ones(2))).name == "toy"


def test_an_unknown_library_is_named():
    with pytest.raises(InputError, match=r"'no library'; tnmoe has backends for .*numpy.*, torch"):
        backend_named("no library")
    with pytest.raises(TypeError, match=r"one of .*numpy.*, torch.*, got builtins\.dict"):
        get_backend({})


@pytest.fixture
def fresh_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(backends, "_registered", dict(backends._registered))
    yield
    backends._backend_of_type.cache_clear()


class OtherBackend(ToyBackend):
    name = "other"


class FirstArray:
    """Of a library with two classes of arrays."""


class SecondArray:
    """The other one."""


def test_a_registered_backend_is_found_by_type_and_by_name(fresh_registry):
    backend = OtherBackend()
    with pytest.raises(TypeError, match=r"got tests\.test_backends\.FirstArray"):
        get_backend(FirstArray())
    register(backend, FirstArray)
    register(backend, SecondArray)
    assert get_backend(FirstArray()) is get_backend(SecondArray()) is backend_named("other")
    assert backend_named("other") is backend
    assert available_backends() == tuple(sorted({*LIBRARIES, "cupy", "other", "toy"}))
    with pytest.raises(TypeError, match=r"one of .*numpy.*, other, .*got builtins\.dict"):
        get_backend({})


def test_a_subclass_may_have_a_backend_of_its_own(fresh_registry):
    mine = type("Mine", (np.ndarray,), {})
    assert get_backend(np.ones(2).view(mine)).name == "numpy"
    backend = OtherBackend()
    register(backend, mine)
    assert get_backend(np.ones(2).view(mine)) is backend
    assert get_backend(np.ones(2)).name == "numpy"


class Unfinished:
    """Without ``triangular_factor``, and with a ``qr`` that cannot be called."""

    name = "unfinished"
    qr = None


for method in set(METHODS) - {"qr", "triangular_factor"}:
    setattr(Unfinished, method, getattr(ToyBackend, method))


@pytest.mark.parametrize(
    ("backend", "types", "error", "message"),
    [
        (
            Unfinished(),
            [FirstArray],
            TypeError,
            "Unfinished is not a Backend: it lacks qr, triangular_factor$",
        ),
        (object(), [FirstArray], TypeError, "object is not a Backend: it lacks name, dtype_name, "),
        (OtherBackend, [FirstArray], TypeError, "an instance of OtherBackend, not the class"),
        (OtherBackend(), [], InputError, "the backend 'other' needs the type of its arrays"),
        (OtherBackend(), [3], TypeError, "must be classes, got 3"),
        (OtherBackend(), [ToyArray], InputError, r"_array\.ToyArray has the backend 'toy' already"),
        (OtherBackend(), [np.ndarray], InputError, r"numpy\.ndarray has the backend 'numpy'"),
        (ToyBackend(), [FirstArray], InputError, "there is another backend of the name 'toy'"),
    ],
)
def test_what_cannot_be_registered_is_refused_as_a_whole(
    fresh_registry, backend, types, error, message
):
    before = available_backends()
    with pytest.raises(error, match=message):
        register(backend, SecondArray, *types) if types else register(backend)
    assert available_backends() == before
    with pytest.raises(TypeError, match="expected an array of one of"):
        get_backend(SecondArray())


@pytest.mark.parametrize(
    "use",
    [
        np.asarray,
        np.sum,
        np.transpose,
        lambda array: np.concatenate([array, array]),
        lambda array: np.ones(2) + array,
        lambda array: array + np.float64(1),
        lambda array: array[np.array([0])],
        lambda array: array[0].__setitem__(0, 1.0),
        bool,
    ],
)
def test_toy_arrays_refuse_what_only_numpy_has(use):
    with pytest.raises((TypeError, AttributeError)):
        use(ToyArray(np.ones((2, 2))))


TRACEABLE = {
    "apply": lambda a, x: (a.apply(x), a.apply(x[0])),
    "to_matrix": lambda a, x: a.to_matrix(),
    "entries, rows and columns": lambda a, x: (a[0, 1], a[1], a[:, 0], a[[0, 1], [1, 2]], a[:2]),
    "sums and multiples": lambda a, x: (a + a - 2.0 * a).to_matrix(),
    "products": lambda a, x: (a @ a.T @ a.H.conj()).to_matrix(),
    "trace and inner": lambda a, x: (a.trace(), a.inner(a)),
    "kron": lambda a, x: tn.kron(a, a).trace(),
    "canonicalize": lambda a, x: a.canonicalize(0).to_matrix(),
    "experts": lambda a, x: tn.SharedMPO.replicate(a, 2).to_matrices(),
    "an expert": lambda a, x: tn.SharedMPO.replicate(a, 2).expert(1).to_matrix(),
    "experts with a base": lambda a, x: tn.SharedMPO.from_base(a, 2, rng=0).to_matrices(),
    "an expert with a base of its legs": lambda a, x: (
        tn.SharedMPO.from_base(a, 2, a.shape, 2, rng=0).expert(1).to_matrix()
    ),
}
EAGER = {
    "decompose": lambda a, x: tn.decompose(x, tn.MPOShape((2, 2), (2, 2))),
    "compress": lambda a, x: a.compress(max_bond=1),
    "add": lambda a, x: tn.add([a, a], max_bond=1),
    "matmul": lambda a, x: tn.matmul(a, a, max_bond=1),
    "vidal": lambda a, x: a.vidal(),
    "fit": lambda a, x: tn.fit(a, max_bond=1),
    "squeeze": lambda a, x: tn.squeeze({"a": a}, lambda mpos: 1.0, 0.0),
    "norm": lambda a, x: a.norm(),
    "schmidt_values": lambda a, x: a.schmidt_values(0),
    "entropy": lambda a, x: a.entropy(0),
    "noise": lambda a, x: tn.SharedMPO.replicate(a, 2, noise=0.1),
    "an expert with a base of other legs": lambda a, x: tn.SharedMPO.from_base(a, 2).expert(0),
}


@pytest.fixture
def without_numbers(monkeypatch):
    """A toy operator and vectors that show no numbers, as those of a library that traces."""
    like = ToyArray(np.zeros(()))
    mpo = tn.MPO.random(tn.MPOShape((2, 2), (2, 2)), 3, rng=0, like=like)

    def hidden(*_):
        raise RuntimeError("a tracer has no numbers")

    monkeypatch.setattr(ToyBackend, "to_numpy", hidden)
    monkeypatch.setattr(ToyBackend, "max_abs", hidden)
    monkeypatch.setattr(ToyArray, "__float__", hidden)
    return mpo, ToyArray(np.ones((4, 4)))


@pytest.mark.parametrize("operation", TRACEABLE)
def test_what_only_computes_looks_at_no_numbers(without_numbers, operation):
    TRACEABLE[operation](*without_numbers)


@pytest.mark.parametrize("operation", EAGER)
def test_what_decides_by_numbers_asks_for_them(without_numbers, operation):
    with pytest.raises(RuntimeError, match="a tracer has no numbers"):
        EAGER[operation](*without_numbers)


BOUNDED = {
    "decompose": lambda a, x: tn.decompose(x, tn.MPOShape((2, 2), (2, 2)), max_bond=1),
    "decompose_batch": lambda a, x: tn.decompose_batch(
        x[None], tn.MPOShape((2, 2), (2, 2)), bonds=(2,), return_info=True
    ),
    "compress": lambda a, x: a.compress(max_bond=1),
    "successive sum": lambda a, x: tn.add([a, a], method="successive", max_bond=1),
    "randomized sum": lambda a, x: tn.add([a, a], method="randomized", bonds=(1,)),
    "zip-up": lambda a, x: tn.matmul(a, a, method="zipup", max_bond=1),
    "norm": lambda a, x: (a.norm(), a.canonicalize(1).norm()),
    "schmidt_values": lambda a, x: a.schmidt_values(0),
    "experts": lambda a, x: tn.SharedMPO.replicate(a, 2).apply(x[None]),
}
UNBOUNDED = {
    "decompose": lambda a, x: tn.decompose(x, tn.MPOShape((2, 2), (2, 2)), rtol=0.1),
    "compress": lambda a, x: a.compress(max_bond=2, rtol=0.1),
    "fit": lambda a, x: tn.fit(a, max_bond=1),
    "entropy": lambda a, x: a.entropy(0),
    "noise": lambda a, x: tn.SharedMPO.replicate(a, 2, noise=0.1),
}


@pytest.fixture
def traced(without_numbers, monkeypatch):
    """The same, in a library that says so."""
    monkeypatch.setattr(ToyBackend, "has_numbers", lambda *_: False)
    return without_numbers


@pytest.mark.parametrize("operation", BOUNDED)
def test_fixed_bonds_need_no_numbers_in_a_library_that_traces(traced, operation):
    BOUNDED[operation](*traced)


@pytest.mark.parametrize("operation", UNBOUNDED)
def test_bonds_and_stops_that_follow_from_numbers_ask_for_them(traced, operation):
    with pytest.raises(RuntimeError, match="a tracer has no numbers"):
        UNBOUNDED[operation](*traced)


def test_exact_ranks_are_refused_where_numbers_are_hidden(traced):
    mpo, _ = traced
    with pytest.raises(
        InputError, match="exact rank of a bond depends on numbers, which toy hides"
    ):
        mpo.compress()


@pytest.mark.parametrize(
    "operation", ["apply", "to_matrix", "entries, rows and columns", "products", "trace and inner"]
)
def test_torch_vectorises_what_only_computes(operation):
    shape, like = tn.MPOShape((2, 2), (2, 2)), torch.zeros((), dtype=torch.float64)
    mpos = [tn.MPO.random(shape, 3, rng=seed, like=like) for seed in range(3)]
    stacks = [torch.stack(cores) for cores in zip(*(mpo.cores for mpo in mpos), strict=True)]
    x = torch.randn(4, 4, dtype=torch.float64)

    def function(*cores):
        return TRACEABLE[operation](tn.MPO(cores), x)

    results = torch.func.vmap(function)(*stacks)
    expected = [function(*mpo.cores) for mpo in mpos]
    if isinstance(results, tuple):
        results, expected = results[0], [each[0] for each in expected]
    torch.testing.assert_close(results, torch.stack(expected))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_traces_pads_and_conversions_are_those_of_numpy(library, dtype):
    xp = backend_named(library)
    numbers = np.random.default_rng(0).standard_normal((3, 2, 4, 2)).astype(dtype)
    array = to_library(numbers, library)
    for first, second in ((1, 3), (-3, -1)):
        expected = np.trace(numbers, axis1=first, axis2=second)
        np.testing.assert_allclose(to_numpy(xp.trace(array, first, second)), expected, rtol=1e-6)
    padded = to_numpy(xp.pad(array, 5, 3))
    np.testing.assert_array_equal(padded, np.pad(numbers, [(0, 0), (0, 0), (0, 1), (0, 1)]))
    assert xp.dtype_name(array) == dtype
    like = xp.astype(array, "complex64")
    assert xp.dtype_name(xp.from_numpy(numbers, like=like)) == "complex64"
    assert tuple(xp.from_numpy(np.zeros(())).shape) == ()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float32", "complex64", "complex128"])
def test_normal_numbers_are_of_unit_variance_and_the_same_in_every_library(library, dtype):
    like = to_library(np.zeros((), dtype), library)
    backend = backend_named(library)
    drawn = to_numpy(backend.normal((200, 50), np.random.default_rng(0), like))
    assert drawn.dtype == dtype
    assert drawn.mean() == pytest.approx(0, abs=0.05)
    assert drawn.var() == pytest.approx(1, abs=0.05)
    if np.iscomplexobj(drawn):  # neither part is preferred
        assert drawn.real.var() == pytest.approx(0.5, abs=0.05)
        assert (drawn**2).mean() == pytest.approx(0, abs=0.05)
    expected = backend_named("numpy").normal(
        (200, 50), np.random.default_rng(0), np.zeros((), dtype)
    )
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), torch.float32, np.random.default_rng(0)])
def test_what_a_library_has_beside_arrays_is_no_array(thing):
    with pytest.raises(TypeError, match="expected an array of one of"):
        get_backend(thing)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_norms_of_huge_and_tiny_numbers_neither_overflow_nor_vanish(library, dtype):
    for scale in (1e-30, 1.0, 1e30):
        array = np.array([3 * scale, 4 * scale], dtype)
        norm = to_numpy(get_backend(to_library(array, library)).norm(to_library(array, library)))
        assert norm.dtype == array.real.dtype
        assert float(norm) == pytest.approx(5 * scale, rel=1e-6)

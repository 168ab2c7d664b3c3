"""SharedMPO: experts share cores and a base, and each equals the sum of the base and its chain."""

import copy
import pickle
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import tnmoe as tn
from tests.matrices import (
    DTYPES,
    LIBRARIES,
    dense_norm,
    libraries,
    matrices,
    rounding,
    shapes,
    to_library,
    to_numpy,
)
from tnmoe.backends import get_backend
from tnmoe.backends.protocol import EPSILON

cases = matrices.filter(lambda case: case[0].sites > 1)


def dense_chain(cores: list[np.ndarray], shape: tn.MPOShape) -> np.ndarray:
    """The definition: one site after the other, one expert at a time."""
    matrix = np.ones((1, 1, 1))
    for core in cores:
        matrix = np.einsum("xya,aoib->xoyib", matrix, core)
        outs, out, ins, in_, bond = matrix.shape
        matrix = matrix.reshape(outs * out, ins * in_, bond)
    return matrix[: shape.out_features, : shape.in_features, 0]


def dense(shared: tn.SharedMPO) -> np.ndarray:
    """All matrices of a mixture, in double precision, by a loop over experts."""
    stored = [wide(core) for core in shared.cores]
    base = 0.0
    if shared.base is not None:
        base = dense_chain([wide(core) for core in shared.base.cores], shared.base.shape)
    experts = [
        [core[index] if core.ndim == 5 else core for core in stored]
        for index in range(shared.num_experts)
    ]
    return np.stack([base + dense_chain(cores, shared.shape) for cores in experts])


def wide(core: Any) -> np.ndarray:
    numbers = to_numpy(core)
    return numbers.astype(np.complex128 if np.iscomplexobj(numbers) else np.float64)


def gaussian(rng: np.random.Generator, size: tuple[int, ...], dtype: str) -> np.ndarray:
    numbers = rng.standard_normal(size)
    if dtype.startswith("complex"):
        numbers = numbers + 1j * rng.standard_normal(size)
    return numbers.astype(dtype)


def bases_of(shape: tn.MPOShape) -> dict[str, tn.MPOShape]:
    size = (shape.out_features, shape.in_features)
    return {
        "the same legs": shape,
        "one site": tn.MPOShape((size[0],), (size[1],)),
        "other legs": tn.MPOShape.for_matrix(*size, sites=2),
    }


@st.composite
def mixtures(draw: st.DrawFn) -> tn.SharedMPO:
    """Any shape, owned sites, bonds, dtype and library, with or without a base."""
    shape = draw(shapes(max_sites=5, max_size=1024))
    owned = draw(st.sets(st.integers(0, shape.sites - 1), min_size=1))
    experts, dtype, library = (
        draw(st.integers(1, 4)),
        draw(st.sampled_from(DTYPES)),
        draw(libraries),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def array(*size: int) -> Any:
        return to_library(gaussian(rng, size, dtype), library)

    cores = [
        array(*([experts] if site in owned else []), *core)
        for site, core in enumerate(shape.core_shapes(draw(st.integers(1, 6))))
    ]
    base_shape = draw(st.sampled_from([None, *bases_of(shape).values()]))
    base = base_shape and tn.MPO([array(*core) for core in base_shape.core_shapes(3)], base_shape)
    center_site = draw(st.none() | st.integers(0, shape.sites - 1))
    return tn.SharedMPO(cores, shape, center_site, base)


def check_matrices(found: Any, expected: np.ndarray, dtype: str) -> None:
    assert get_backend(found).dtype_name(found) == dtype
    found = to_numpy(found)
    assert found.shape == expected.shape
    assert dense_norm(found - expected) <= rounding(expected.astype(dtype))


@given(mixtures())
def test_matrices_are_those_of_the_definition_and_of_each_expert_alone(shared):
    expected, dtype = dense(shared), get_backend(shared.center).dtype_name(shared.center)
    stacked = shared.to_matrices()
    check_matrices(stacked, expected, dtype)
    for index in range(shared.num_experts):
        expert = shared.expert(index)
        assert expert.shape == shared.shape
        check_matrices(expert.to_matrix(), expected[index], dtype)


@given(mixtures(), st.sampled_from((1, 3, 200)), st.booleans())
def test_experts_apply_to_vectors_of_their_own_or_to_the_same_ones(shared, count, common):
    xp, expected = get_backend(shared.center), dense(shared)
    dtype = xp.dtype_name(shared.center)
    groups = 1 if common else shared.num_experts
    x = gaussian(np.random.default_rng(0), (groups, 2, count, shared.shape.in_features), dtype)
    found = shared.apply(xp.from_numpy(x, like=shared.center))
    products = np.einsum(
        "eoi,eabi->eabo", expected, np.broadcast_to(x, (len(expected), *x.shape[1:]))
    )
    assert tuple(found.shape) == products.shape
    assert xp.dtype_name(found) == dtype
    error = np.linalg.norm((to_numpy(found) - products).ravel())
    scale = np.linalg.norm(np.abs(expected).ravel()) * np.linalg.norm(x.ravel())
    assert error <= 60 * EPSILON[dtype] * scale


def test_experts_take_a_vector_each_or_none_and_refuse_other_sizes():
    shared = tn.SharedMPO.replicate(tn.MPO.random(tn.MPOShape((2, 2), (3, 2)), rng=0), 4)
    assert shared.apply(np.ones((4, 6))).shape == (4, 4)
    assert shared.apply(np.ones((4, 0, 6))).shape == (4, 0, 4)
    for size in ((6,), (3, 5, 6), (4, 5, 7)):
        with pytest.raises(tn.InputError, match=r"shape \(4, ..., 6\) or \(1, ..., 6\), got"):
            shared.apply(np.ones(size))
    with pytest.raises(TypeError, match="numpy arrays, x is a Tensor"):
        shared.apply(torch.ones(4, 6))


@given(mixtures())
@settings(max_examples=30)
def test_a_mixture_knows_what_is_stored(shared):
    assert shared.center is shared.cores[shared.center_site]
    aux = [core for site, core in enumerate(shared.cores) if site != shared.center_site]
    assert all(one is other for one, other in zip(shared.aux, aux, strict=True))
    assert shared.shared_sites == {
        site for site, core in enumerate(shared.cores) if len(core.shape) == 4
    }
    expert = shared.expert(shared.num_experts - 1)
    assert expert.shape == shared.shape
    if shared.base is None:
        assert expert.bond_dims == shared.bond_dims
    stored = [*shared.cores, *(shared.base.cores if shared.base else ())]
    assert shared.num_params == sum(to_numpy(core).size for core in stored)
    with pytest.raises(AttributeError, match="a SharedMPO is immutable: cannot set 'base'"):
        shared.base = None


@given(mixtures())
@settings(max_examples=30)
def test_pickles_and_copies_are_the_same_mixture(shared):
    for again in (pickle.loads(pickle.dumps(shared)), copy.deepcopy(shared), copy.copy(shared)):
        assert repr(again) == repr(shared)
        assert (again.shape, again.center_site) == (shared.shape, shared.center_site)
        np.testing.assert_array_equal(to_numpy(again.to_matrices()), to_numpy(shared.to_matrices()))


@pytest.mark.parametrize("experts", [4, 64])
def test_a_run_of_shared_cores_is_multiplied_once(experts):
    shape = tn.MPOShape((2, 2, 3, 2, 2), (2, 2, 2, 2, 2))
    bonds = (4, 64, 64, 4)
    sizes = list(zip((1, *bonds), shape.out_dims, shape.in_dims, (*bonds, 1), strict=True))
    cores = [
        torch.randn(*([experts] if site in (0, 4) else []), *size)
        for site, size in enumerate(sizes)
    ]
    with FlopCounterMode(display=False) as counter:
        tn.SharedMPO(cores, shape).to_matrices()
    legs = shape.legs
    run = 2 * 4 * 64 * (64 * prod(legs[1:3]) + 4 * prod(legs[1:4]))
    owned = 2 * 4 * (4 * prod(legs[:4]) + prod(legs))
    assert counter.get_total_flops() == run + experts * owned


@pytest.mark.parametrize("kind", [None, *bases_of(tn.MPOShape((2,), (2,)))])
def test_half_precision_is_rounded_once(kind):
    generator = torch.Generator().manual_seed(0)
    shape = tn.MPOShape((3, 2, 4), (2, 5, 2), 22, 19)

    def bfloat(*size):
        return torch.randn(size, generator=generator).bfloat16()

    cores = [bfloat(*([3] if site != 1 else []), *core)
             for site, core in enumerate(shape.core_shapes(5))]  # fmt: skip
    base_shape = kind and bases_of(shape)[kind]
    base = base_shape and tn.MPO([bfloat(*core) for core in base_shape.core_shapes(4)], base_shape)
    shared = tn.SharedMPO(cores, shape, base=base)
    expected = torch.tensor(dense(shared))
    assert shared.to_matrices().dtype == torch.bfloat16
    torch.testing.assert_close(
        shared.to_matrices().double(), expected, rtol=2**-8, atol=1e-5 * expected.abs().max()
    )
    torch.testing.assert_close(
        shared.expert(2).to_matrix().double(), expected[2], rtol=0.02, atol=0.02 * expected.std()
    )


@given(cases, libraries, st.integers(1, 5))
def test_replicated_experts_all_equal_the_matrix(case, library, num_experts):
    shape, matrix = case
    mpo = tn.decompose(to_library(matrix, library), shape)
    shared = tn.SharedMPO.replicate(mpo, num_experts)
    stacked = to_numpy(shared.to_matrices())
    assert stacked.shape == (num_experts, *matrix.shape)
    assert stacked.dtype == matrix.dtype
    for expert in stacked:
        assert dense_norm(expert - matrix) <= rounding(matrix)


def test_parameters_count_the_central_core_once():
    matrix = np.random.default_rng(0).standard_normal((3072, 768)).astype("float32")
    shape = tn.MPOShape.for_matrix(3072, 768)
    shared = tn.SharedMPO.replicate(tn.decompose(matrix, shape), 8)
    center = prod(shape.core_shapes()[shape.center_site])
    assert shared.num_params == center + 8 * (shape.num_params() - center)
    assert shared.num_params / matrix.size == pytest.approx(1 + 8 * 0.078, abs=5e-3)


def test_the_central_core_and_the_expert_views_are_not_copies():
    mpo = tn.decompose(torch.randn(8, 8), tn.MPOShape((2, 2, 2), (2, 2, 2)))
    shared = tn.SharedMPO.replicate(mpo, 3)
    expert = shared.expert(1)
    assert expert.cores[1].data_ptr() == mpo.cores[1].data_ptr() == shared.center.data_ptr()
    assert expert.cores[0].data_ptr() == shared.aux[0][1].data_ptr()


@pytest.mark.parametrize("library", LIBRARIES)
def test_noise_is_relative_to_each_core_and_seeded(library):
    matrix = np.random.default_rng(0).standard_normal((64, 64))
    mpo = tn.decompose(to_library(matrix, library), tn.MPOShape((4, 4, 4), (4, 4, 4)))
    noisy = tn.SharedMPO.replicate(mpo, 50, noise=0.1, rng=7)
    again = tn.SharedMPO.replicate(mpo, 50, noise=0.1, rng=7)
    for core, same, clean in zip(noisy.aux, again.aux, (mpo.cores[0], mpo.cores[2]), strict=True):
        np.testing.assert_array_equal(to_numpy(core), to_numpy(same))
        deviation = to_numpy(core) - to_numpy(clean)
        rms = np.sqrt(np.mean(to_numpy(clean) ** 2))
        assert np.std(deviation) == pytest.approx(0.1 * rms, rel=0.05)


@pytest.mark.parametrize("owned", [(0,), (1,), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("kind", [None, *bases_of(tn.MPOShape((2,), (2,)))])
def test_gradients_of_what_is_shared_are_summed_over_experts(kind, owned):
    shape = tn.MPOShape((2, 1, 2), (1, 3, 1), 3)
    rng = np.random.default_rng(0)

    def leaf(*size):
        return torch.tensor(rng.standard_normal(size)).requires_grad_()

    cores = [leaf(*([2] if site in owned else []), *core)
             for site, core in enumerate(shape.core_shapes(2))]  # fmt: skip
    base_shape = kind and bases_of(shape)[kind]
    base = [leaf(*core) for core in base_shape.core_shapes()] if base_shape else []

    def shared(*leaves):
        chain, rest = leaves[: len(cores)], leaves[len(cores) :]
        return tn.SharedMPO(chain, shape, base=tn.MPO(rest, base_shape) if rest else None)

    leaves = (*cores, *base)
    assert torch.autograd.gradcheck(lambda *leaves: shared(*leaves).to_matrices(), leaves)
    assert torch.autograd.gradcheck(lambda *leaves: shared(*leaves).expert(1).to_matrix(), leaves)


@pytest.mark.parametrize("shared_sites", ["center", "none", (0, 2), [np.int64(1)], set()], ids=str)
def test_experts_start_as_the_matrix_and_noise_spares_what_they_share(shared_sites):
    matrix = np.random.default_rng(0).standard_normal((23, 12))
    mpo = tn.decompose(matrix, tn.MPOShape((2, 4, 3), (3, 2, 2), 23), center_site=1)
    shared = tn.SharedMPO.replicate(mpo, 3, shared_sites)
    noisy = tn.SharedMPO.replicate(mpo, 3, shared_sites, noise=0.1, rng=0)
    named = {"center": {1}, "none": set()}
    expected = named[shared_sites] if isinstance(shared_sites, str) else set(shared_sites)
    assert shared.shared_sites == noisy.shared_sites == expected
    assert shared.center_site == 1
    np.testing.assert_allclose(shared.to_matrices(), np.stack([matrix] * 3))
    for site, (core, varied) in enumerate(zip(mpo.cores, noisy.cores, strict=True)):
        if site in expected:
            assert varied is core
        else:
            assert not (varied == core).any()
            assert not (varied[0] == varied[1]).any()


@given(cases, libraries, st.data())
def test_experts_of_a_base_start_as_the_base(case, library, data):
    shape, matrix = case
    base_shape = data.draw(st.sampled_from([*bases_of(shape).values()]))
    base = tn.decompose(to_library(matrix, library), base_shape)
    shared_sites = data.draw(st.sets(st.integers(0, shape.sites - 1), max_size=shape.sites - 1))
    max_bond, experts = data.draw(st.sampled_from([1, 3, None])), data.draw(st.integers(1, 3))
    shared = tn.SharedMPO.from_base(
        base, experts, shape, max_bond, shared_sites=shared_sites, rng=0
    )
    assert shared.shared_sites == shared_sites
    assert shared.num_experts == experts
    assert shared.bond_dims == shape.bond_dims(max_bond)
    for expert in to_numpy(shared.to_matrices()):
        np.testing.assert_array_equal(expert, to_numpy(base.to_matrix()))
    zero_site = min(set(range(shape.sites)) - shared_sites)
    tolerance = 100 * float(np.finfo(matrix.dtype).eps)
    for site, core in enumerate(shared.cores):
        for one in to_numpy(core).reshape(-1, *core.shape[-4:]):
            if site == zero_site:
                assert not one.any()
                continue
            unfolded = (
                one.reshape(-1, one.shape[-1]) if site < zero_site else one.reshape(len(one), -1)
            )
            gram = (
                unfolded.conj().T @ unfolded if site < zero_site else unfolded @ unfolded.conj().T
            )
            np.testing.assert_allclose(gram, np.eye(len(gram)), atol=tolerance)


def test_a_seed_draws_the_same_mixture_in_every_library_and_others_for_other_experts():
    drawn = []
    for library in LIBRARIES:
        base = tn.MPO([to_library(np.ones((1, 6, 8, 1)), library)])
        shared = tn.SharedMPO.from_base(base, 3, max_bond=2, rng=5)
        assert shared.shape == tn.MPOShape((6, 1), (1, 8))
        drawn.append(to_numpy(shared.cores[1]))
    for other in drawn:
        np.testing.assert_allclose(other, drawn[0], atol=1e-12)
    assert not np.isclose(drawn[0][0], drawn[0][1]).any()


def test_only_the_zero_core_learns_at_first_and_it_does():
    base = tn.MPO([torch.randn(1, 6, 8, 1)])
    start = tn.SharedMPO.from_base(base, 3, max_bond=2, rng=0)
    cores = [core.requires_grad_() for core in start.cores]
    tn.SharedMPO(cores, start.shape, base=base).to_matrices().sin().sum().backward()
    assert cores[0].grad.flatten(1).norm(dim=1).min() > 0
    assert not cores[1].grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_of_half_precision_gets_chains_of_half_precision(dtype):
    base = tn.MPO([torch.randn(1, 6, 8, 1).to(dtype)])
    shared = tn.SharedMPO.from_base(base, 2, rng=0)
    assert {core.dtype for core in shared.cores} == {dtype}
    assert torch.equal(shared.to_matrices()[1], base.to_matrix())


def test_with_a_base_of_equal_legs_bonds_add_up_and_with_others_they_are_exact():
    shape = tn.MPOShape((2, 4, 3), (3, 2, 2))
    for base_shape, expected in ((shape, (5, 5)), (tn.MPOShape((24,), (12,)), shape.bond_dims())):
        base = tn.MPO.random(base_shape, 3, rng=0)
        expert = tn.SharedMPO.from_base(base, 2, shape, 2, rng=0).expert(1)
        assert expert.bond_dims == expected


def test_an_ordinary_mixture_is_one_owned_site():
    weights = np.random.default_rng(0).standard_normal((5, 4, 3))
    shared = tn.SharedMPO([weights[:, None, :, :, None]], tn.MPOShape((4,), (3,)))
    np.testing.assert_array_equal(shared.to_matrices(), weights)
    assert (shared.num_experts, shared.bond_dims, shared.aux) == (5, (), ())
    single = tn.MPO([weights[0][None, :, :, None]])
    assert tn.SharedMPO.replicate(single, 5, "none").shared_sites == frozenset()


def one_site() -> tn.MPO:
    return tn.MPO([np.ones((1, 2, 2, 1))])


def two_sites() -> tn.MPO:
    return tn.MPO([np.ones((1, 2, 2, 2)), np.ones((2, 2, 2, 1))])


SHAPE = tn.MPOShape((2, 2), (2, 2))
OWNED, SHARED = np.ones((3, 1, 2, 2, 2)), np.ones((2, 2, 2, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tn.SharedMPO.replicate(one_site(), 2), "share all 1 sites would be the same"),
        (lambda: tn.SharedMPO.replicate(two_sites(), 2, (0, 1)), "share all 2 sites"),
        (
            lambda: tn.SharedMPO.replicate(two_sites(), 2, "centre"),
            "shared_sites must be one of center, none or sites, got 'centre'",
        ),
        (
            lambda: tn.SharedMPO.replicate(two_sites(), 2, (2,)),
            "every shared site must be an integer from 0 to 1, got 2",
        ),
        (
            lambda: tn.SharedMPO.replicate(two_sites(), 2, 1),
            "a name or the numbers of sites, got 1",
        ),
        (lambda: tn.SharedMPO.replicate(two_sites(), 0), "num_experts must be a positive integer"),
        (
            lambda: tn.SharedMPO.replicate(two_sites(), 2, noise=-1),
            r"noise must be in \[0, inf\), got -1",
        ),
        (
            lambda: tn.SharedMPO.replicate(two_sites(), 2).expert(2),
            "expert must be an integer from 0 to 1, got 2",
        ),
        (lambda: tn.SharedMPO([OWNED, np.ones((2, 2, 2, 2, 1))], SHAPE), r"got \[3, 2\] experts"),
        (lambda: tn.SharedMPO([OWNED[:0], SHARED], SHAPE), r"core per expert, got \[0\] experts"),
        (
            lambda: tn.SharedMPO([OWNED[0], SHARED], SHAPE),
            "experts must own a core, whose shape is",
        ),
        (lambda: tn.SharedMPO([], SHAPE), r"experts must own a core.* got \[\]"),
        (lambda: tn.SharedMPO([OWNED[0, 0], SHARED], SHAPE), r"needs axes .* got \[\(2, 2, 2\), "),
        (lambda: tn.SharedMPO([OWNED[None], SHARED], SHAPE), r"needs axes .* got \[\(1, 3, 1, "),
        (lambda: tn.SharedMPO([OWNED, SHARED[:1]], SHAPE), "neighbouring cores need equal bonds"),
        (lambda: tn.SharedMPO([OWNED], SHAPE), "outermost bonds must be 1"),
        (lambda: tn.SharedMPO([OWNED, SHARED], tn.MPOShape((2, 3), (2, 2))), "which do not fit"),
        (lambda: tn.SharedMPO([OWNED, SHARED], SHAPE, 2), "center_site must be an integer from 0"),
        (
            lambda: tn.SharedMPO([OWNED, SHARED.astype("float32")], SHAPE),
            "one library and one dtype",
        ),
        (lambda: tn.SharedMPO([OWNED, torch.ones(2, 2, 2, 1)], SHAPE), "one library and one dtype"),
        (lambda: tn.SharedMPO([OWNED.astype(int), SHARED.astype(int)], SHAPE), "floating-point"),
        (
            lambda: tn.SharedMPO([OWNED, SHARED], SHAPE, base=one_site()),
            r"the base must be a \(4, 4\) matrix, as its experts are, got \(2, 2\)",
        ),
        (
            lambda: tn.SharedMPO(
                [OWNED, SHARED], SHAPE, base=tn.MPO([np.ones((1, 4, 4, 1), "float32")])
            ),
            "need one dtype, got float64 and float32",
        ),
        (
            lambda: tn.SharedMPO.from_base(one_site(), 2, SHAPE),
            r"the base must be a \(4, 4\) matrix, as its experts are, got \(2, 2\)",
        ),
        (lambda: tn.SharedMPO.from_base(one_site(), 0), "num_experts must be a positive integer"),
        (lambda: tn.SharedMPO.from_base(one_site(), 2, max_bond=0), "max_bond must be a positive"),
        (lambda: tn.SharedMPO.from_base(one_site(), 2, rng="x"), "rng must be a NumPy Generator"),
        (
            lambda: tn.SharedMPO.from_base(one_site(), 2, shared_sites=(0, 1)),
            "share all 2 sites would be the same",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tn.SharedMPO([OWNED, SHARED], (2, 2)), "shape must be an MPOShape, got tuple"),
        (lambda: tn.SharedMPO([OWNED, "core"], SHAPE), "expected an array of one of .*, got .*str"),
        (
            lambda: tn.SharedMPO([OWNED, SHARED], SHAPE, base=np.ones((4, 4))),
            "base must be an MPO, got ndarray",
        ),
        (
            lambda: tn.SharedMPO([OWNED, SHARED], SHAPE, base=tn.MPO([torch.ones(1, 4, 4, 1)])),
            "need one library, got numpy and torch",
        ),
        (lambda: tn.SharedMPO.replicate(np.ones((4, 4)), 2), "mpo must be an MPO, got ndarray"),
        (lambda: tn.SharedMPO.from_base(np.ones((4, 4)), 2), "base must be an MPO, got ndarray"),
        (lambda: tn.SharedMPO.from_base(one_site(), 2, "x"), "shape must be an MPOShape, got str"),
    ],
)
def test_what_is_of_another_kind_is_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_numbers_that_cannot_be_decomposed_are_named():
    base = tn.MPO([np.full((1, 4, 4, 1), np.nan)])
    shared = tn.SharedMPO.from_base(base, 2, SHAPE)
    assert np.isnan(shared.to_matrices()).all()
    with pytest.raises(tn.InputError, match="contains NaN or infinity"):
        shared.expert(0)


def test_half_precision_is_computed_in_single():
    """Products of some cores may be larger than half precision holds, where the matrix is not."""
    cores = [torch.full((1, 2, 2, 2), 200.0), torch.full((2, 2, 2, 2), 200.0)]
    cores.append(torch.full((2, 2, 2, 1), 0.005))
    mpo = tn.MPO([core.half() for core in cores])
    shared = tn.SharedMPO.replicate(mpo, 2)
    matrices = shared.to_matrices()
    assert matrices.dtype == torch.float16
    assert torch.isfinite(matrices).all()
    torch.testing.assert_close(matrices[1], shared.expert(1).to_matrix())

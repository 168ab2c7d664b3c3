"""SharedMPO: experts share one central core, and each equals the MPO of its own cores."""

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tnmoe as tn
from tests.matrices import (
    LIBRARIES,
    dense_norm,
    libraries,
    matrices,
    rounding,
    to_library,
    to_numpy,
)

cases = matrices.filter(lambda case: case[0].sites > 1)


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


@given(cases, libraries, st.integers(1, 4), st.integers(1, 5), st.data())
def test_stacked_matrices_equal_each_expert_built_alone(case, library, experts, max_bond, data):
    shape, matrix = case
    center_site = data.draw(st.integers(0, shape.sites - 1))
    mpo = tn.decompose(
        to_library(matrix, library), shape, max_bond=max_bond, center_site=center_site
    )
    shared = tn.SharedMPO.replicate(mpo, experts, noise=0.5, rng=0)
    stacked = to_numpy(shared.to_matrices())
    for index in range(experts):
        alone = to_numpy(shared.expert(index).to_matrix())
        assert dense_norm(stacked[index] - alone) <= rounding(matrix) + rounding(alone)


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


def test_gradient_of_the_central_core_is_summed_over_experts():
    mpo = tn.decompose(torch.randn(6, 8, dtype=torch.float64), tn.MPOShape((2, 3), (4, 2)))
    shared = tn.SharedMPO.replicate(mpo, 3, noise=0.1, rng=0)
    center = shared.center.clone().requires_grad_()
    aux = [core.clone().requires_grad_() for core in shared.aux]

    def matrices_of(center, *aux):
        return tn.SharedMPO(center, aux, shared.shape, shared.center_site).to_matrices()

    assert torch.autograd.gradcheck(matrices_of, (center, *aux))


def one_site() -> tn.MPO:
    return tn.MPO([np.ones((1, 2, 2, 1))])


def two_sites() -> tn.MPO:
    return tn.MPO([np.ones((1, 2, 2, 2)), np.ones((2, 2, 2, 1))])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tn.SharedMPO.replicate(one_site(), 2), "for each of 0 sites and at least one"),
        (lambda: tn.SharedMPO.replicate(two_sites(), 0), "num_experts must be a positive integer"),
        (
            lambda: tn.SharedMPO.replicate(two_sites(), 2, noise=-1),
            r"noise must be in \[0, inf\), got -1",
        ),
        (
            lambda: tn.SharedMPO.replicate(two_sites(), 2).expert(2),
            "expert must be an integer from 0 to 1, got 2",
        ),
        (
            lambda: tn.SharedMPO(
                np.ones((1, 2, 2, 1)),
                [np.ones((2, 1, 1, 1, 1)), np.ones((3, 1, 1, 1, 1))],
                tn.MPOShape((1, 2, 1), (1, 2, 1)),
            ),
            r"got \[2, 3\] experts",
        ),
        (
            lambda: tn.SharedMPO(
                np.ones((1, 2, 2, 2)), [np.ones((2, 3, 1, 1, 1))], tn.MPOShape((2, 1), (2, 1)), 0
            ),
            "neighbouring cores need equal bonds",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make()


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

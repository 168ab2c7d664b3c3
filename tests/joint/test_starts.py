"""Where joint decompositions start."""

import numpy as np
import pytest

import tnmoe as tn
from tnmoe.joint import starts as starts_module
from tnmoe.joint.starts import starts

SHAPE = tn.MPOShape((4, 5, 4), (3, 4, 3))


def gaussian(*size, seed=0):
    return np.random.default_rng(seed).standard_normal(size)


def turned(experts=4):
    """Matrices with one central core, whose bonds every expert turns in its own way."""
    core = gaussian(12, 5, 4, 12, seed=1)
    scales = 0.7 ** np.arange(12)
    core = core * scales[:, None, None, None] * scales
    matrices = []
    for seed in range(experts):
        sides = [np.linalg.qr(gaussian(12, 12, seed=(seed, n)))[0] for n in (0, 1)]
        cores = [sides[0].reshape(1, 4, 3, 12), core, sides[1].reshape(12, 4, 3, 1)]
        matrices.append(tn.MPO(cores, SHAPE).to_matrix())
    return np.stack(matrices)


def error_of(cores, matrices):
    count = len(matrices)
    whole = [np.broadcast_to(core, (count, *core.shape[1:])) for core in cores]
    shared = tn.SharedMPO([*whole], SHAPE)
    return np.linalg.norm(shared.to_matrices() - matrices) / np.linalg.norm(matrices)


def test_central_cores_that_differ_by_turns_are_turned_towards_each_other():
    matrices = turned()
    found = dict(starts(matrices, SHAPE, [0, 2], (12, 12), 1, method="auto"))
    assert set(found) == {"joint sweep at site 0", "joint sweep at site 2", "aligned sweeps"}
    errors = {name: error_of(cores, matrices) for name, cores in found.items()}
    assert errors["aligned sweeps"] < 1e-10
    assert min(errors["joint sweep at site 0"], errors["joint sweep at site 2"]) > 0.3


@pytest.mark.parametrize("bonds", [(12, 12), (30, 12), (5, 7)])
def test_every_start_has_the_bonds_and_shares_the_other_sites(bonds):
    matrices = gaussian(3, 80, 36)
    for _, cores in starts(matrices, SHAPE, [0, 2], bonds, 1, method="auto"):
        assert [core.shape[0] for core in cores] == [3, 1, 3]
        assert (cores[0].shape[-1], cores[1].shape[-1]) == bonds


def test_experts_that_share_nothing_start_as_their_own_sweeps():
    matrices = gaussian(3, 80, 36)
    ((name, cores),) = starts(matrices, SHAPE, [0, 1, 2], (5, 7), 1, method="auto")
    assert name == "own sweeps"
    alone = tn.decompose_batch(matrices, SHAPE, bonds=(5, 7), center_site=1)
    expected = np.stack([each.to_matrix() for each in alone])
    np.testing.assert_allclose(tn.SharedMPO(cores, SHAPE).to_matrices(), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("limits", "method"),
    [
        ({"max_bond": 5}, "randomized"),
        ({"bonds": (5,)}, "randomized"),
        ({"max_bond": 30}, "auto"),
        ({"max_bond": 5, "rtol": 0.5}, "auto"),
        ({"max_params": 500}, "auto"),
        ({}, "auto"),
        ({"max_bond": 5, "method": "svd"}, "svd"),
    ],
)
def test_random_projections_find_a_few_of_many_schmidt_vectors(limits, method, monkeypatch):
    # The oracle is the truncated SVD of all experts' rows.
    monkeypatch.setattr(starts_module, "_LARGE_GRAM", 40)
    used, decompose = [], tn.decompose

    def spy(matrix, shape, **given):
        used.append(given["method"])
        return decompose(matrix, shape, **given)

    monkeypatch.setattr(starts_module, "decompose", spy)
    matrices = gaussian(8, 12, 60) + 3 * gaussian(12, 60, seed=1)
    matrices /= np.linalg.norm(matrices, axis=(1, 2), keepdims=True)
    shape = tn.MPOShape.split(12, 60, left=6, right=())
    shared, info = tn.decompose_shared(matrices, shape, return_info=True, **limits)
    assert set(used) == {method}
    values = np.linalg.svd(matrices.reshape(48, 120), compute_uv=False)
    best = np.linalg.norm(values[shared.bond_dims[0] :])
    assert np.linalg.norm(info.errors) <= 1.01 * best + 1e-12

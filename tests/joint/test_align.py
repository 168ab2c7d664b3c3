"""Orders of hidden units, against exhaustive search and known permutations."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tnmoe as tn
from tests.matrices import to_library


def networks(experts=3, units=6, size=4, noise=0.0, seed=0):
    """Networks that are one network in other orders of its units, plus noise."""
    rng = np.random.default_rng(seed)
    up, gate = rng.normal(size=(2, units, size))
    down = rng.normal(size=(size, units))
    orders = [rng.permutation(units) for _ in range(experts)]
    matrices = (
        np.stack([up[order] for order in orders]),
        np.stack([down[:, order] for order in orders]),
        np.stack([gate[order] for order in orders]),
    )
    return [each + noise * rng.normal(size=each.shape) for each in matrices]


def outputs(states, up, down, gate=None):
    """The outputs of all networks with ReLU, gated or not."""
    inner = (
        np.maximum(up @ states, 0) if gate is None else np.maximum(gate @ states, 0) * (up @ states)
    )
    return down @ inner


@given(st.integers(1, 4), st.integers(1, 7), st.booleans(), st.integers(0, 1000))
def test_networks_that_differ_in_order_alone_become_equal(experts, units, is_gated, seed):
    up, down, gate = networks(experts, units, seed=seed)
    rest = (gate,) if is_gated else ()
    alignment = tn.align_hidden_units(up, down, *rest)
    for matrix in alignment.apply(up, down, *rest):
        np.testing.assert_array_equal(matrix, np.broadcast_to(matrix[:1], matrix.shape))
    assert np.isclose(alignment.after, 1)
    assert alignment.before <= alignment.after


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("is_gated", [False, True])
def test_no_network_changes_its_function(is_gated, rescale):
    up, down, gate = networks(noise=1.0)
    up *= np.random.default_rng(1).uniform(0.1, 10, size=(3, 6, 1))
    rest = (gate,) if is_gated else ()
    alignment = tn.align_hidden_units(up, down, *rest, rescale=rescale)
    states = np.random.default_rng(2).normal(size=(4, 9))
    expected = outputs(states, up, down, *rest)
    np.testing.assert_allclose(outputs(states, *alignment.apply(up, down, *rest)), expected)
    if rescale:
        assert not np.isclose(alignment.scales, 1).all()


def test_two_networks_get_the_best_of_all_orders():
    up, down, _ = networks(experts=2, units=5, noise=1.0)
    alignment = tn.align_hidden_units(up, down)

    def explained(order):
        parts = (up[0], up[1][list(order)], up), (down[0], down[1][:, list(order)], down)
        return sum(np.linalg.norm(a + b) ** 2 / np.linalg.norm(c) ** 2 for a, b, c in parts) / 4

    best = max(explained(order) for order in permutations(range(5)))
    assert np.isclose(alignment.after, best)


@pytest.mark.parametrize("seed", [0, 1, 2, 10, 11, 51, 99])
def test_no_other_order_of_one_network_is_better_and_the_given_order_is_not(seed):
    # Networks that resemble each other as they are given.
    rng = np.random.default_rng(seed)
    up = rng.normal(size=(5, 3)) + rng.normal(size=(4, 5, 3))
    down = (rng.normal(size=(5, 3)) + rng.normal(size=(4, 5, 3))).transpose(0, 2, 1)
    alignment = tn.align_hidden_units(up, down)
    matrices = alignment.apply(up, down)
    sizes = [np.linalg.norm(each) for each in matrices]
    units = np.concatenate([matrices[0] / sizes[0], matrices[1].swapaxes(1, 2) / sizes[1]], axis=2)
    total = units.sum(0)
    assert np.isclose(alignment.after, np.linalg.norm(total) ** 2 / 4 / np.linalg.norm(units) ** 2)
    assert alignment.after >= alignment.before
    for network in units:
        rest = total - network
        best = max((rest * network[list(order)]).sum() for order in permutations(range(5)))
        assert np.isclose((rest * network).sum(), best)


@pytest.mark.parametrize("is_ordered", [False, True])
def test_scales_of_units_are_found(is_ordered):
    up, down, _ = networks()
    if is_ordered:
        up, down = (np.stack([each[0]] * 3) for each in (up, down))
    scales = np.random.default_rng(1).uniform(0.1, 10, size=(3, 6))
    up, down = up * scales[..., None], down / scales[:, None]
    alignment = tn.align_hidden_units(up, down, rescale=True)
    for matrix in alignment.apply(up, down):
        np.testing.assert_allclose(matrix, np.broadcast_to(matrix[:1], matrix.shape))
    assert np.isclose(alignment.after, 1)


def test_aligned_networks_keep_their_order():
    up, down, gate = networks(experts=1)
    equal = [np.concatenate([each] * 3) for each in (up, down, gate)]
    alignment = tn.align_hidden_units(*equal)
    assert (alignment.permutations == np.arange(6)).all()
    assert (alignment.rounds, alignment.after) == (0, alignment.before)


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64"])
def test_orders_are_those_of_any_library_and_dtype(dtype):
    matrices = [each.astype(dtype) for each in networks()]
    expected = tn.align_hidden_units(*networks())
    for library in ("numpy", "torch"):
        arrays = [to_library(each, library) for each in matrices]
        alignment = tn.align_hidden_units(*arrays)
        np.testing.assert_array_equal(alignment.permutations, expected.permutations)
        up, down, _ = alignment.apply(*arrays)
        assert type(up) is type(arrays[0])
        assert (up.dtype, down.dtype) == (arrays[0].dtype, arrays[1].dtype)


def test_joint_decompositions_gain_by_an_alignment():
    up, down, _ = networks(experts=6, units=12, size=8, noise=0.1)
    aligned, _ = tn.align_hidden_units(up, down).apply(up, down)
    shape = tn.MPOShape.split(12, 8, left=4, right=())
    errors = [
        max(tn.decompose_shared(each, shape, max_bond=4, return_info=True)[1].relative_errors)
        for each in (up, aligned)
    ]
    assert errors[1] < 0.3 * errors[0]


def test_zeros_and_units_without_numbers():
    up, down, _ = networks()
    up[:, 2], down[1, :, 3] = 0, 0
    alignment = tn.align_hidden_units(up, down, rescale=True)
    assert np.isfinite(alignment.scales).all()
    alignment = tn.align_hidden_units(0 * up, 0 * down)
    assert alignment.after == 1


def test_bad_input_is_named():
    up, down, gate = networks()
    for arguments, message in (
        ((up[0], down), r"up must have three axes, got an array of shape \(6, 4\)"),
        ((up, up), r"down must have shape \(E, H, F\) with E=3 and F=6 .* got \(3, 6, 4\)"),
        ((up, down, gate[:2]), r"gate must have shape \(E, F, H\) .* got \(2, 6, 4\)"),
        ((up * np.nan, down), "up contains NaN"),
    ):
        with pytest.raises(tn.InputError, match=message):
            tn.align_hidden_units(*arguments)
    alignment = tn.align_hidden_units(up, down)
    for wrong in ((up[:, :5],), (up[:2],), (up, down[..., :5]), (up, down, gate[:, 1:])):
        with pytest.raises(tn.InputError, match="E=3 and F=6"):
            alignment.apply(*wrong)
    with pytest.raises(tn.InputError, match="max_rounds"):
        tn.align_hidden_units(up, down, max_rounds=0)
    with pytest.raises(tn.InputError, match="rescale"):
        tn.align_hidden_units(up, down, rescale="yes")
    with pytest.raises(TypeError):
        tn.align_hidden_units([1], down)
    assert torch.is_tensor(tn.align_hidden_units(up, down).apply(torch.from_numpy(up))[0])

"""How the experts of a layout start from one matrix."""

import pytest
import torch

from tnmoe.nn import MPOExperts


def started(**details):
    torch.manual_seed(0)
    up, down = torch.randn(32, 16).double(), torch.randn(16, 32).double()
    return MPOExperts.from_dense(up, down, num_experts=4, rng=0, **details), up, down


def visible_rows(projection):
    """For every expert, which entries of the enlarged bond it reads at the start."""
    owned = projection.aux_0.flatten(2, 3) != 0  # (E, D, legs, D')
    if projection.center_site:  # the bond on the right
        return owned.any(2).any(1)
    return owned.any(3).any(2)


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_experts_take_the_repetitions_of_an_enlarged_bond_in_turn(ratio):
    experts, *_ = started(layout="hidden", group_size=8, bond_ratio=ratio)
    for projection in (experts.up, experts.down):
        seen = visible_rows(projection)
        assert seen.shape == (4, 8 * ratio)
        assert (seen.sum(1) == 8).all()  # as many entries as one matrix needs
        for expert in range(4):
            first = 8 * (expert % ratio)
            assert seen[expert, first : first + 8].all()


@pytest.mark.parametrize("sites", [2, 4])
@pytest.mark.parametrize("max_bond", [1, 4])
def test_noise_is_the_norm_of_residual_matrices_relative_to_the_shared_one(sites, max_bond):
    experts, up, down = started(layout="residual", sites=sites, max_bond=max_bond, noise=0.5)
    for projection, matrix in ((experts.up, up), (experts.down, down)):
        norms = torch.linalg.matrix_norm(projection.delta.weight()) / torch.linalg.matrix_norm(
            matrix
        )
        assert norms.mean().item() == pytest.approx(0.5, rel=0.35)


@pytest.mark.parametrize("sites", [2, 3, 4, 5])
def test_residual_cores_are_isometries_and_the_one_that_acts_last_is_zero(sites):
    experts, *_ = started(layout="residual", sites=sites, max_bond=4)
    for projection in (experts.up, experts.down):
        delta = projection.delta
        assert (delta.core_at(0) == 0).all()
        for site in range(1, sites):
            core = delta.core_at(site)
            rows = core.flatten(2)
            identity = torch.eye(rows.shape[1], dtype=rows.dtype).expand(4, -1, -1)
            torch.testing.assert_close(rows @ rows.mT, identity)

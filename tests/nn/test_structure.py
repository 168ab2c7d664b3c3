"""The structure of a projection is all that is needed to make another one for its numbers."""

import json

import pytest
import torch

from tests.nn.layouts import low_rank_projection
from tnmoe import InputError, MPOShape, decompose_shared, nn
from tnmoe.nn.structure import ProjectionStructure, projection_of

E = 3
PROJECTIONS = {
    "chains": lambda: nn.MPOProjection(
        E, MPOShape((2, 4, 2), (2, 3, 2)), max_bond=3, shared_sites=[0], bias=True
    ),
    "hidden": lambda: nn.HiddenProjection(E, MPOShape((16, 1), (1, 12)), bond_dims=[5]),
    "low_rank": lambda: low_rank_projection(E, 16, 12, bias=True),
    "residual": lambda: nn.ResidualProjection(
        torch.nn.Linear(12, 16, bias=False),
        nn.MPOProjection(E, MPOShape((16, 1), (1, 12)), max_bond=2, shared_sites="none"),
        bias="common",
    ),
    "stacked": lambda: nn.StackedProjection(E, 16, 12, bias=True),
}


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_projection_built_from_the_structure_takes_the_numbers(kind):
    projection = PROJECTIONS[kind]()
    structure = ProjectionStructure.of(projection)
    assert structure.kind == kind
    data = json.loads(json.dumps(structure.to_dict()))
    assert ProjectionStructure.from_dict(data) == structure
    other = structure.build(E, dtype=torch.float32)
    assert type(other) is type(projection)
    other.load_state_dict(projection.state_dict())
    assert torch.equal(other.weight(), projection.weight())
    assert ProjectionStructure.of(other) == structure


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"shape": MPOShape((16, 1), (1, 12)), "shared_sites": [1], "center_site": 1}, "hidden"),
        ({"shape": MPOShape((16, 1), (1, 12)), "shared_sites": [0], "center_site": 0}, "hidden"),
        ({"shape": MPOShape((16, 1), (1, 12)), "shared_sites": "none"}, "chains"),
        ({"residual": True}, "residual"),
        ({"shape": MPOShape((4, 2, 2), (2, 3, 2))}, "chains"),
    ],
)
def test_shared_matrices_become_the_projection_that_acts_once_per_token_if_it_can(settings, kind):
    matrices = torch.randn(E, 16, 12)
    shared = decompose_shared(matrices, max_bond=3, **settings)
    projection = projection_of(shared)
    assert ProjectionStructure.of(projection).kind == kind
    torch.testing.assert_close(projection.weight(), shared.to_matrices(), rtol=1e-4, atol=1e-5)


def test_experts_of_given_matrices_compute_what_whole_ones_compute():
    up, down = torch.randn(E, 16, 12), torch.randn(E, 12, 16)
    bias = torch.randn(E, 16)
    shared = decompose_shared(up, residual=True, max_bond=4)
    experts = nn.MPOExperts.from_shared(shared, down, up_bias=bias, activation="gelu")
    whole = nn.MPOExperts.from_shared(shared.to_matrices(), down, up_bias=bias, activation="gelu")
    rows, index = torch.randn(7, 12), torch.randint(E, (7, 2))
    weights = torch.rand(7, 2)
    torch.testing.assert_close(
        experts(rows, index, weights), whole(rows, index, weights), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "data",
    [3, {}, {"kind": "stacked"}, {"kind": "x", "shape": {"out_dims": [2], "in_dims": [2]}},
     {"kind": "stacked", "shape": {"out_dims": [2], "in_dims": [2]}, "size": 1},
     {"kind": "stacked", "shape": {"out_dims": [2], "in_dims": [2]}, "ranks": [1, 2]},
     {"kind": "low_rank", "shape": {"out_dims": [2], "in_dims": [2]}},
     {"kind": "low_rank", "shape": {"out_dims": [2], "in_dims": [2]}, "ranks": [1, 3]},
     {"kind": "low_rank", "shape": {"out_dims": [2], "in_dims": [2]}, "ranks": [1, -1]},
     {"kind": "low_rank", "shape": {"out_dims": [2], "in_dims": [2]}, "ranks": [1.5]},
     {"kind": "low_rank", "shape": {"out_dims": [2], "in_dims": [2]}, "ranks": 1}],
)  # fmt: skip
def test_other_data_are_no_structure(data):
    with pytest.raises(InputError):
        ProjectionStructure.from_dict(data)


def test_ranks_are_those_of_as_many_experts_as_are_built():
    structure = ProjectionStructure.of(PROJECTIONS["low_rank"]())
    assert structure.ranks == (0, 6, 12)
    with pytest.raises(InputError, match="one per expert: got 3 for 4"):
        structure.build(4)


def test_a_projection_of_another_class_has_no_structure():
    class Other(nn.StackedProjection):
        pass

    with pytest.raises(InputError, match="Other has no structure"):
        ProjectionStructure.of(Other(2, 3, 3))


def test_structures_without_a_matrix_are_refused():
    up = ProjectionStructure.of(PROJECTIONS["stacked"]())
    with pytest.raises(InputError, match="up, down and perhaps gate"):
        nn.MPOExperts.from_structures({"up": up}, E)

"""Plans of layers count what a layer computes once per token, and what once per slot."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tnmoe as tn
from tests.nn.flop_counting import count_products
from tnmoe.contraction.expert_routes import once_per_token_sites
from tnmoe.contraction.layer_plan import expected_experts
from tnmoe.nn import DenseExperts, Experts, MPOExperts, MPOProjection

LAYOUTS = {
    "hidden": {"layout": "hidden", "group_size": 8},
    "hidden, two owned sites": {"layout": "hidden", "group_size": (4, 2)},
    "hidden, larger bond": {"layout": "hidden", "group_size": 8, "bond_ratio": 2},
    "residual": {"layout": "residual", "max_bond": 4},
    "residual, tensor train": {"layout": "residual", "sites": 4, "max_bond": 4},
}


def routing(tokens, experts, top_k):
    torch.manual_seed(0)
    index = torch.rand(tokens, experts).topk(top_k).indices
    return torch.randn(tokens, 16), index, torch.rand(tokens, top_k)


def counted(experts, *inputs):
    """Operations that torch counts in a forward pass with gradients."""
    return count_products(lambda: experts(*inputs))


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operations_of_a_plan_are_those_that_torch_counts(layout, gated, top_k):
    experts = MPOExperts(4, 16, 32, gated=gated, bias=True, **LAYOUTS[layout])
    inputs = routing(12, 4, top_k)
    assert experts.plan(12, top_k).flops == counted(experts, *inputs)


@pytest.mark.parametrize("layout", ["hidden", "residual"])
def test_a_module_that_gate_and_up_have_in_common_counts_once(layout):
    experts = MPOExperts(4, 16, 32, gated=True, **LAYOUTS[layout])
    apart = experts.plan(12, 2)
    experts.gate.base = experts.up.base
    plan, inputs = experts.plan(12, 2), routing(12, 4, 2)
    assert plan.flops == counted(experts, *inputs)
    assert apart.flops - plan.flops == 12 * 2 * 16 * 32
    assert apart.weight_bytes - plan.weight_bytes == 16 * 32 * 4


@pytest.mark.parametrize("tied", [(3,), (2, 3)])
def test_cores_that_gate_and_up_have_in_common_count_once(tied):
    shared = {"up": {2, 3}, "gate": {2, 3}}
    experts = MPOExperts(4, 16, 32, gated=True, sites=4, shared_sites=shared)
    for projection in (experts.up, experts.gate, experts.down):
        projection.route = "joint"
    apart = experts.plan(12, 2)
    for site in tied:
        experts.gate.set_core(site, experts.up.core_at(site))
    plan, inputs = experts.plan(12, 2), routing(12, 4, 2)
    assert plan.flops == counted(experts, *inputs) < apart.flops
    sizes = sum(experts.up.core_at(site).numel() for site in tied)
    assert apart.weight_bytes - plan.weight_bytes == sizes * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_work_does_not_grow_with_the_experts_of_a_token(layout):
    experts = MPOExperts(4, 16, 32, **LAYOUTS[layout])
    one, four = experts.plan(12, 1), experts.plan(12, 4)
    assert one.flops_per("token") == four.flops_per("token") > 0
    assert 4 * one.flops_per("slot") == four.flops_per("slot") > 0
    assert one.flops == one.flops_per("token") + one.flops_per("slot")


def test_an_ordinary_mixture_computes_everything_once_per_slot():
    plan = DenseExperts(4, 16, 32).plan(12, top_k=2)
    assert plan.flops_per("token") == 0
    assert plan.flops == 12 * 2 * (2 * 2 * 16 * 32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_call_that_reaches_every_expert_reads_every_parameter_once(layout):
    experts = MPOExperts(4, 16, 32, **LAYOUTS[layout])
    stored = sum(each.numel() * each.element_size() for each in experts.parameters())
    assert experts.plan(1, top_k=4).weight_bytes == stored


def test_expected_experts_are_the_mean_over_all_choices():
    torch.manual_seed(0)
    drawn = torch.rand(4000, 3, 8).topk(2).indices.flatten(1)
    seen = torch.tensor([len(set(row)) for row in drawn.tolist()], dtype=torch.float64)
    assert expected_experts(8, tokens=3, top_k=2) == pytest.approx(seen.mean().item(), rel=0.02)
    assert expected_experts(8, tokens=0, top_k=2) == 0
    assert expected_experts(1, tokens=5, top_k=1) == 1


@st.composite
def layers(draw):
    """A plain layer of random shapes and shared sites, on the route ``joint``."""
    sites, experts = draw(st.integers(2, 4)), draw(st.integers(2, 3))
    legs = st.lists(st.integers(1, 3), min_size=sites, max_size=sites)
    hidden, inner = draw(legs), draw(legs)
    owned = st.sets(st.integers(0, sites - 1), min_size=1)
    projections = []
    for out, in_ in ((inner, hidden), (hidden, inner)):
        shared = set(range(sites)) - draw(owned)
        shape = tn.MPOShape(out, in_)
        projections.append(MPOProjection(experts, shape, shared_sites=shared))
        projections[-1].route = "joint"
    return Experts(*projections)


@settings(deadline=None)
@given(layers(), st.integers(1, 5), st.integers(1, 2))
def test_exactly_the_sites_that_can_act_once_per_token_do(experts, tokens, top_k):
    # In up, nothing that experts own may act before a shared core that acts per token; in down,
    # nothing may act after it.
    expected = {}
    for matrix, projection in (("up", experts.up), ("down", experts.down)):
        sites, shared = projection.shape.sites, projection.shared_sites
        order = range(sites - 1, -1, -1) if matrix == "up" else range(sites)
        expected[matrix] = set()
        for site in order:
            if site not in shared:
                break
            expected[matrix].add(site)
        assert once_per_token_sites(sites, shared, matrix) == expected[matrix]
    plan = experts.plan(tokens, top_k)
    per_token = {step.matrix for step in plan.steps if step.per == "token"}
    assert per_token == {matrix for matrix, sites in expected.items() if sites}
    hidden = experts.hidden_size
    index = torch.rand(tokens, experts.num_experts).topk(top_k).indices
    inputs = torch.randn(tokens, hidden), index, torch.rand(tokens, top_k)
    assert plan.flops == counted(experts, *inputs)


def test_a_plan_prints_every_step_with_its_vectors_and_the_totals():
    experts = MPOExperts(4, 16, 32, layout="residual", max_bond=4)
    text = str(experts.plan(12, top_k=2))
    lines = text.splitlines()
    assert lines[0] == "12 tokens, 2 experts each"
    assert [line.split()[0] for line in lines[3:]] == ["up", "up", "down", "down", "all"]
    assert "12 tokens" in lines[3]
    assert "24 slots" in lines[4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 1), "tokens must be"),
        ((3, 0), "top_k must be a positive integer"),
        ((3, 5), "top_k=5 exceeds the number of experts, 4"),
        ((3, 1, "yes"), "training must be"),
    ],
)
def test_impossible_plans_are_refused(arguments, message):
    with pytest.raises(tn.InputError, match=message):
        MPOExperts(4, 16, 32, layout="residual").plan(*arguments)


def test_a_factor_that_residual_experts_share_acts_once_per_token():
    sites = {"up": {1}, "down": {0}}
    experts = MPOExperts(4, 16, 32, layout="residual", max_bond=4, shared_sites=sites)
    steps = experts.plan(1, top_k=2).steps
    assert [(step.matrix, step.what, step.per) for step in steps] == [
        ("up", "shared module", "token"),
        ("up", "shared cores", "token"),
        ("up", "cores of experts", "slot"),
        ("down", "cores of experts", "slot"),
        ("down", "shared cores", "token"),
        ("down", "shared module", "token"),
    ]


def test_one_token_and_one_expert_are_not_plural():
    experts = MPOExperts(4, 16, 32, layout="hidden", group_size=4)
    assert str(experts.plan(1)).splitlines()[0] == "1 token, 1 expert each"


def test_a_residual_projection_with_a_hook_computes_module_and_mpos_once_per_slot():
    experts = MPOExperts(4, 16, 32, layout="residual", max_bond=4)
    seen, experts.up.delta.route = [], "joint"
    experts.up.register_forward_hook(lambda *_: seen.append(1))
    plan = experts.plan(12, top_k=2)
    assert [step.per for step in plan.steps] == ["slot", "slot", "token"]
    assert plan.flops == counted(experts, *routing(12, 4, 2))
    assert seen

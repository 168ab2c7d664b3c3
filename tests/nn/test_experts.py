"""Experts and MoE layers against a plain loop over experts and the dense network they start as."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers.activations import ACT2FN

import tnmoe as tn
from tests.nn.compute.cases import experts as small_experts
from tests.nn.compute.cases import routing
from tnmoe import nn
from tnmoe.errors import InputError
from tnmoe.nn.activations import ACTIVATIONS, resolve_activation
from tnmoe.nn.compute import routes

H, F_, E = 16, 24, 4
SITES = {"interleaved": {"sites": 3}}  # split shapes follow from their groups


def dense_ffn(gated=False, bias=True, dtype=torch.float64, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) / 4

    ffn = {"up": draw(F_, H), "down": draw(H, F_)}
    if gated:
        ffn["gate"] = draw(F_, H)
    if bias:
        ffn |= {"up_bias": draw(F_), "down_bias": draw(H)}
        ffn |= {"gate_bias": draw(F_)} if gated else {}
    return ffn


def run_dense(ffn: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    inner = F.linear(x, ffn["up"], ffn.get("up_bias"))
    if "gate" in ffn:
        inner = F.silu(F.linear(x, ffn["gate"], ffn.get("gate_bias"))) * inner
    else:
        inner = F.silu(inner)
    return F.linear(inner, ffn["down"], ffn.get("down_bias"))


def loop_over_tokens(experts: nn.Experts, x, index, weights) -> torch.Tensor:
    """Apply one matrix at a time, for every token and choice: the definition."""

    def project(projection, expert, vector):
        bias = None if projection.bias is None else projection.bias[expert]
        if isinstance(projection, nn.MPOProjection):
            matrix = projection.to_shared_mpo().expert(expert).to_matrix()
        else:
            matrix = projection.stacked[expert]
        return F.linear(vector, matrix, bias)

    rows = []
    for token, choices, shares in zip(x, index, weights, strict=True):
        total = torch.zeros(x.shape[1], dtype=x.dtype)
        for expert, share in zip(choices.tolist(), shares, strict=True):
            inner = project(experts.up, expert, token)
            if experts.gate is not None:
                inner = F.silu(project(experts.gate, expert, token)) * inner
            else:
                inner = F.silu(inner)
            total = total + share * project(experts.down, expert, inner)
        rows.append(total)
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1])


def make_experts(kind, gated, bias) -> nn.Experts:
    common = {"activation": "silu", "gated": gated, "bias": bias, "dtype": torch.float64}
    torch.manual_seed(0)
    if kind == "dense":
        return nn.DenseExperts(E, H, F_, **common)
    return nn.MPOExperts(E, H, F_, layout=kind, **SITES.get(kind, {}), **common)


@given(
    st.sampled_from(["dense", "interleaved", "split"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 12),
    st.integers(1, E),
    st.integers(0, 1000),
)
def test_layer_equals_a_loop_over_tokens_and_experts(kind, gated, bias, tokens, top_k, seed):
    experts = make_experts(kind, gated, bias)
    torch.manual_seed(seed)
    x = torch.randn(tokens, H, dtype=torch.float64)
    index = torch.rand(tokens, E).argsort(-1)[:, :top_k]
    weights = torch.rand(tokens, top_k, dtype=torch.float64)
    torch.testing.assert_close(
        experts(x, index, weights), loop_over_tokens(experts, x, index, weights)
    )


@pytest.mark.parametrize("kind", ["dense", "interleaved", "split"])
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_equal_those_of_the_loop(kind, gated):
    experts = make_experts(kind, gated, bias=True)
    x = torch.randn(7, H, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 1]] * 7)  # experts 2 and 3 receive nothing
    weights = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    inputs = [x, weights, *experts.parameters()]
    probe = torch.randn(7, H, dtype=torch.float64)
    ours = torch.autograd.grad((experts(x, index, weights) * probe).sum(), inputs)
    loop = torch.autograd.grad(
        (loop_over_tokens(experts, x, index, weights) * probe).sum(), inputs, allow_unused=True
    )
    for one, other in zip(ours, loop, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


@pytest.mark.parametrize("kind", ["dense", "interleaved", "split", "none shared"])
def test_experts_without_tokens_get_zero_gradients_and_not_none(kind):
    if kind == "none shared":
        experts = nn.MPOExperts(E, H, F_, bias=True, sites=3, shared_sites="none").double()
    else:
        experts = make_experts(kind, gated=False, bias=True)
    index = torch.zeros(5, 1, dtype=torch.int64)
    experts(torch.randn(5, H, dtype=torch.float64), index, torch.ones(5, 1)).sum().backward()
    common = {id(each) for each in nn.shared_parameters(experts)}
    owned = [each for each in experts.parameters() if id(each) not in common]
    assert len(owned) == {"dense": 4, "none shared": 8}.get(kind, 6)
    for stack in owned:
        assert (stack.grad[1:] == 0).all()
        assert (stack.grad[0] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["interleaved", "split", "dense"])
@pytest.mark.parametrize("top_k", [1, 2, E])
def test_upcycled_layer_computes_the_dense_network(dtype, gated, bias, layout, top_k):
    ffn = dense_ffn(gated, bias, dtype)
    if layout == "dense":
        experts = nn.DenseExperts.from_dense(**ffn, num_experts=E, activation="silu")
    else:
        experts = nn.MPOExperts.from_dense(
            **ffn, num_experts=E, activation="silu", layout=layout, **SITES.get(layout, {})
        )
    layer = nn.MPOMoE(nn.TopKRouter(H, E, top_k, dtype=dtype), experts)
    x = torch.randn(2, 5, H, dtype=dtype)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(layer(x), run_dense(ffn, x), rtol=tolerance, atol=tolerance)


def test_truncated_experts_have_the_parameters_of_their_shapes():
    ffn = dense_ffn()
    seen = {}
    experts = nn.MPOExperts.from_dense(
        **ffn, num_experts=E, sites=3, max_bond=5, on_matrix=seen.__setitem__
    )
    fresh = nn.MPOExperts(E, H, F_, bias=True, sites=3, max_bond=5, device="meta")
    shapes, fresh_shapes = (
        {name: parameter.shape for name, parameter in module.named_parameters()}
        for module in (experts, fresh)
    )
    assert shapes == fresh_shapes
    assert set(seen) == {"up", "down"}
    error = (experts.up.weight()[0].detach() - ffn["up"]).norm()
    assert float(error) == pytest.approx(seen["up"].error_bound)


def test_parameter_names_are_one_center_and_stacked_aux_per_projection():
    experts = make_experts("interleaved", gated=True, bias=True)
    names = {name for name, _ in experts.named_parameters()}
    assert names == {
        f"{projection}.{part}"
        for projection in ("up", "gate", "down")
        for part in ("center", "aux_0", "aux_1", "bias")
    }


@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize("shared", ["center", "none", (0, 1)])
def test_fresh_weights_have_the_variance_of_a_linear_layer(layout, shared):
    torch.manual_seed(0)
    experts = nn.MPOExperts(
        E, 128, 256, layout=layout, **SITES.get(layout, {}), shared_sites=shared
    )
    for projection in (experts.up, experts.down):
        expected = 1 / (3 * projection.in_features)
        for matrix in projection.weight():
            assert float(matrix.detach().var()) == pytest.approx(expected, rel=0.1)


def test_copies_pickles_and_state_dicts_keep_the_function(tmp_path):
    experts = make_experts("interleaved", gated=True, bias=True)
    x = torch.randn(3, H, dtype=torch.float64)
    index, weights = torch.tensor([[0], [3], [1]]), torch.ones(3, 1, dtype=torch.float64)
    expected = experts(x, index, weights)
    loaded = nn.MPOExperts(E, H, F_, "silu", gated=True, bias=True, sites=3, dtype=torch.float64)
    loaded.load_state_dict(experts.state_dict())
    for twin in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts)), loaded):
        torch.testing.assert_close(twin(x, index, weights), expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["interleaved", "split"])
def test_in_the_identity_gauge_the_centre_is_the_matrix_and_the_rest_identities(layout):
    up, down = torch.randn(32, 16), torch.randn(16, 32)
    experts = nn.MPOExperts.from_dense(
        up, down, num_experts=E, layout=layout, **SITES.get(layout, {})
    )
    for projection, matrix in ((experts.up, up), (experts.down, down)):
        center = projection.center.detach().flatten()
        assert torch.equal(center.sort().values, matrix.flatten().sort().values)
        for stack in projection.aux:
            for core in stack.detach():
                isometry = core.reshape(-1, core.shape[-1]) if core.shape[0] == 1 else core
                isometry = isometry.reshape(isometry.shape[0], -1)
                assert torch.equal(isometry, torch.eye(len(isometry)))


@pytest.mark.parametrize(("gauge", "same"), [("identity", True), ("schmidt", False)])
def test_adam_moves_the_centre_as_the_matrix_in_the_identity_gauge_alone(gauge, same):
    torch.manual_seed(0)
    up, down, x = torch.randn(32, 16), torch.randn(16, 32), torch.randn(50, 16)
    experts = nn.MPOExperts.from_dense(up, down, num_experts=1, sites=3, gauge=gauge)
    dense = [torch.nn.Parameter(each.clone()) for each in (up, down)]
    optimizers = (
        torch.optim.Adam([experts.up.center, experts.down.center], lr=0.1),
        torch.optim.Adam(dense, lr=0.1),
    )
    index, weights = torch.zeros(50, 1, dtype=torch.long), torch.ones(50, 1)
    experts(x, index, weights).square().mean().backward()
    (torch.relu(x @ dense[0].T) @ dense[1].T).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    for projection, matrix in zip((experts.up, experts.down), dense, strict=True):
        difference = (projection.weight()[0] - matrix).abs().max()
        assert (difference < 1e-4) == same


def test_truncated_matrices_are_in_the_schmidt_gauge_either_way():
    up, down = torch.randn(32, 16), torch.randn(16, 32)
    one, other = (
        nn.MPOExperts.from_dense(up, down, num_experts=E, sites=3, max_bond=6, gauge=gauge)
        for gauge in ("identity", "schmidt")
    )
    torch.testing.assert_close(one.up.weight(), other.up.weight())
    with pytest.raises(InputError, match="gauge must be one of identity, schmidt, got 'qr'"):
        nn.MPOExperts.from_dense(up, down, gauge="qr")


def test_noise_makes_experts_differ_around_the_pretrained_network():
    ffn = dense_ffn(bias=False)
    experts = nn.MPOExperts.from_dense(**ffn, num_experts=E, sites=3, noise=0.01, rng=0)
    matrices = experts.up.weight()
    deviations = (matrices - ffn["up"]).flatten(1).norm(dim=1) / ffn["up"].norm()
    assert ((deviations > 1e-3) & (deviations < 0.1)).all()
    assert (matrices[0] != matrices[1]).any()
    # Every projection has its own noise.
    same = nn.MPOExperts.from_dense(
        ffn["up"], ffn["down"], ffn["up"], num_experts=E, sites=3, noise=0.01, rng=0
    )
    assert (same.up.aux[0] != same.gate.aux[0]).any()


def test_noise_on_whole_matrices_is_relative_to_their_size():
    ffn = dense_ffn(bias=False)
    experts = nn.DenseExperts.from_dense(**ffn, num_experts=E, noise=0.01, rng=0)
    noise = experts.down.stacked.detach() - ffn["down"]
    assert float(noise.norm() / noise.numel() ** 0.5) == pytest.approx(
        0.01 * float(ffn["down"].norm() / ffn["down"].numel() ** 0.5), rel=0.1
    )
    assert (noise[0] != noise[1]).all()


@pytest.mark.parametrize("make", [nn.DenseExperts, nn.MPOExperts])
def test_a_common_bias_is_stored_once_and_gets_the_gradients_of_all_experts(make):
    torch.manual_seed(0)
    shared = make(E, H, F_, "silu", gated=True, bias="common", dtype=torch.float64)
    own = make(E, H, F_, "silu", gated=True, bias=True, dtype=torch.float64)
    state = shared.state_dict()
    own.load_state_dict(
        {
            name: each.expand(E, -1) if name.endswith("bias") else each
            for name, each in state.items()
        }
    )
    x = torch.randn(9, H, dtype=torch.float64)
    index = torch.rand(9, E).argsort(-1)[:, :2]
    weights = torch.rand(9, 2, dtype=torch.float64)
    for experts in (shared, own):
        experts(x, index, weights).square().sum().backward()
    torch.testing.assert_close(shared(x, index, weights), own(x, index, weights))
    for name in ("up", "gate", "down"):
        one, each = getattr(shared, name).bias, getattr(own, name).bias
        assert one.shape == (1, each.shape[1])
        torch.testing.assert_close(one.grad, each.grad.sum(0, keepdim=True))


def test_pretrained_biases_can_be_kept_once():
    ffn = dense_ffn(gated=True)
    experts = nn.MPOExperts.from_dense(**ffn, num_experts=E, sites=3, common_bias=True)
    for name in ("up", "gate", "down"):
        assert torch.equal(getattr(experts, name).bias, ffn[f"{name}_bias"][None])


def test_projections_can_have_different_bonds():
    experts = nn.MPOExperts(E, H, F_, gated=True, sites=3, max_bond={"up": 4, "down": 6})
    bonds = {
        name: max(getattr(experts, name).center.shape[0::3]) for name in ("up", "gate", "down")
    }
    assert bonds == {"up": 4, "gate": max(experts.up.shape.bond_dims()), "down": 6}


@pytest.mark.parametrize("matrices", ["up", ("gate", "down"), ["down"]])
def test_matrices_that_are_not_mpos_are_owned_whole_and_train(matrices):
    torch.manual_seed(0)
    up, down, gate = torch.randn(12, 8), torch.randn(8, 12), torch.randn(12, 8)
    made = nn.MPOExperts.from_dense(
        up, down, gate, num_experts=3, sites=2, matrices=matrices, activation="silu"
    )
    fresh = nn.MPOExperts(3, 8, 12, "silu", gated=True, sites=2, matrices=matrices)
    assert {n: p.shape for n, p in made.named_parameters()} == {
        n: p.shape for n, p in fresh.named_parameters()
    }
    names = {matrices} if isinstance(matrices, str) else set(matrices)
    for name in ("up", "gate", "down"):
        kind = nn.MPOProjection if name in names else nn.StackedProjection
        assert type(getattr(made, name)) is kind
    states, index = torch.randn(5, 8), torch.tensor([[0], [1], [2], [0], [2]])
    result = made(states, index, torch.ones(5, 1))
    expected = (torch.nn.functional.silu(states @ gate.T) * (states @ up.T)) @ down.T
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    result.sum().backward()
    assert all(each.grad is not None for each in made.parameters())


def test_every_projection_keeps_its_own_bonds_of_pretrained_matrices():
    up, down, gate = torch.randn(12, 8), torch.randn(8, 12), torch.randn(12, 8)
    made = nn.MPOExperts.from_dense(
        up, down, gate, num_experts=2, sites=2, max_bond={"up": 3, "gate": 2, "down": 5}
    )
    assert [made.up.center.shape[0], made.gate.center.shape[0]] == [3, 2]
    assert made.down.center.shape[0] == 5


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_that_transformers_has_by_that_name(name):
    x = torch.linspace(-8, 8, 101)
    torch.testing.assert_close(resolve_activation(name, gated=False)(x), ACT2FN[name](x))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("swiglu", lambda gate, up: F.silu(gate) * up),
        ("geglu", lambda gate, up: F.gelu(gate) * up),
        ("reglu", lambda gate, up: F.relu(gate) * up),
        (torch.tanh, lambda gate, up: torch.tanh(gate) * up),
    ],
)
def test_gated_units_multiply_the_activated_gate(name, expected):
    gate, up = torch.randn(2, 7)
    torch.testing.assert_close(resolve_activation(name, gated=True)(gate, up), expected(gate, up))


def test_given_shapes_need_no_groups_of_the_layout():
    shapes = {
        "up_shape": tn.MPOShape.for_matrix(9, 15, 3),
        "down_shape": tn.MPOShape.for_matrix(15, 9, 3),
    }
    made = nn.MPOExperts(2, 15, 9, layout="split", **shapes)
    assert (made.up.shape, made.down.shape) == tuple(shapes.values())
    up, down = torch.randn(9, 15), torch.randn(15, 9)
    nn.MPOExperts.from_dense(up, down, num_experts=2, layout="split", **shapes)
    with pytest.raises(tn.InputError, match="layout must be one of"):
        nn.MPOExperts(2, 15, 9, layout="splat", **shapes)


@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize("gauge", ["identity", "schmidt"])
def test_experts_share_no_memory_with_the_network_they_start_from(layout, gauge):
    torch.manual_seed(0)
    up, down = torch.randn(128, 64), torch.randn(64, 128)
    before = up.clone(), down.clone()
    made = [
        nn.MPOExperts.from_dense(up, down, num_experts=count, layout=layout, gauge=gauge)
        for count in (1, 4)
    ]
    made.append(nn.DenseExperts.from_dense(up, down, num_experts=1))
    with torch.no_grad():
        for experts in made:
            for parameter in experts.parameters():
                parameter.zero_()
    torch.testing.assert_close((up, down), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.MPOExperts(0, H, F_), "num_experts must be a positive integer"),
        (
            lambda: nn.MPOExperts(E, H, F_, layout="magic"),
            "layout must be one of interleaved, split",
        ),
        (lambda: nn.MPOExperts(E, H, F_, activation="magic"), "unknown activation 'magic'"),
        (lambda: nn.MPOExperts(E, H, F_, sites=1), "at least 2 sites"),
        (
            lambda: nn.Experts(nn.StackedProjection(2, 4, 3), nn.StackedProjection(2, 5, 4)),
            "does not fit down",
        ),
        (
            lambda: nn.MPOExperts.from_dense(torch.ones(4, 3), torch.ones(4, 3)),
            r"down \(H, F\), got up \(4, 3\), down \(4, 3\)",
        ),
        (
            lambda: nn.MPOExperts.from_dense(
                torch.full((4, 4), torch.nan), torch.ones(4, 4), sites=2
            ),
            "contains NaN or infinity",
        ),
        (lambda: nn.MPOExperts(E, H, F_, bias="some"), "bias must be one of False, True, common"),
        (lambda: nn.MPOExperts(E, H, F_, activation=3), "a name or a function of tensors, got 3"),
        (
            lambda: nn.MPOExperts(E, H, F_, "geglu"),
            "activation 'geglu' is for gated experts: give gated=True",
        ),
        (lambda: nn.ClampedSwiGLU(limit=0), r"limit must be in \(0, inf\], got 0"),
        (
            lambda: nn.MPOExperts(E, H, F_, max_bond={"out": 3}),
            r"max_bond is for up, gate, down, got \['out'\]",
        ),
        (lambda: nn.MPOExperts(E, H, F_, max_bond={"up": 0}), "max_bond must be a positive"),
        (
            lambda: nn.MPOExperts(E, H, F_, shared_sites="aux"),
            "shared_sites must be one of center, none or",
        ),
        (lambda: nn.MPOExperts(E, H, F_, shared_sites=1), "a name or the numbers of sites, got 1"),
        (
            lambda: nn.MPOExperts(E, H, F_, shared_sites={7}),
            "every shared site must be an integer from 0 to 4, got 7",
        ),
        (
            lambda: nn.MPOExperts(E, H, F_, matrices="out"),
            "must be some of up, gate, down, got 'out'",
        ),
        (
            lambda: nn.MPOExperts(E, H, F_, matrices=["gate"]),
            "names no matrix of the network, which has up, down",
        ),
        (
            lambda: nn.MPOExperts.from_dense(
                torch.ones(4, 3), torch.ones(3, 4), matrices=["gate"], sites=2
            ),
            "names no matrix of the network, which has up, down",
        ),
        (lambda: nn.MPOExperts(E, H, F_, matrices=[]), r"must be some of up, gate, down, got \[\]"),
        (
            lambda: nn.MPOExperts(E, 47, 113, layout="split"),
            "no groups for a 113×47 matrix, whose sizes share no divisor with 64",
        ),
        (
            lambda: nn.MPOExperts(E, H, F_, sites=3, shared_sites=range(3)),
            "experts that share all 3 sites would be the same",
        ),
        (
            lambda: nn.DenseExperts.from_dense(
                torch.ones(4, 3), torch.ones(3, 4), num_experts=2, up_bias=torch.ones(3)
            ),
            r"^up_bias must be of shape \(4,\) or \(2, 4\), got \(3,\)",
        ),
        (
            lambda: nn.StackedProjection(2, 4, 3).set_bias(torch.ones(2, 4), common=True),
            r"bias must be of shape \(4,\), got \(2, 4\)",
        ),
        (
            lambda: nn.MPOExperts.from_dense(
                torch.ones(4, 3), torch.ones(3, 4), gate_bias=torch.ones(4)
            ),
            "gate_bias was given without a gate",
        ),
        (
            lambda: nn.MPOProjection.from_mpo(tn.MPO.random(tn.MPOShape((2, 2), (2, 2))), 2),
            "cores must be torch tensors, got ndarray",
        ),
        (
            lambda: nn.MPOProjection.from_shared_mpo(
                tn.SharedMPO.replicate(tn.MPO.random(tn.MPOShape((2, 2), (2, 2))), 2)
            ),
            "cores must be torch tensors, got ndarray",
        ),
        (
            lambda: nn.MPOExperts(E, H, F_)(
                torch.ones(1, H, dtype=torch.int64), torch.zeros(1, 1, dtype=int), torch.ones(1, 1)
            ),
            "hidden_states must be floating-point, got torch.int64",
        ),
        (
            lambda: nn.DenseExperts.from_dense(torch.ones(4, 3), torch.ones(3, 4), rng=-1),
            "rng must be a NumPy Generator or an integer of at least 0, got -1",
        ),
        (
            lambda: nn.MPOExperts(E, H, F_, up_shape=tn.MPOShape((2, 2), (2, 2))),
            rf"up_shape must be for a {F_}×{H} matrix, got MPOShape\(out_dims=\(2, 2\)",
        ),
        (
            lambda: nn.MPOExperts.from_dense(
                torch.ones(4, 3), torch.ones(3, 4), down_shape=tn.MPOShape((2, 2), (3, 1))
            ),
            "down_shape must be for a 3×4 matrix",
        ),
        (
            lambda: nn.MPOExperts(
                4,
                3,
                4,
                layout="x",
                up_shape=tn.MPOShape((2, 2), (3, 1)),
                down_shape=tn.MPOShape((3, 1), (2, 2)),
            ),
            "layout must be one of interleaved, split, hidden, residual, got 'x'",
        ),
        (
            lambda: nn.MPOExperts(4, 16, 24, layout="hidden", sites=3),
            "sites is for layout='interleaved' and 'residual', got sites=3 with layout='hidden'",
        ),
        (
            lambda: nn.MPOExperts(4, 16, 24, layout="residual", group_size=np.array([2, 4])),
            r"group_size is for .*, got group_size=array\(\[2, 4\]\) with layout='residual'",
        ),
        (
            lambda: nn.MPOExperts(4, 16, 24, layout="hidden", group_size=np.array([2, 4])),
            r"group_size must be a positive integer, got array",
        ),
        (
            lambda: nn.MPOExperts(4, 16, 24, layout="hidden", group_size="64"),
            "group_size must be a positive integer, got '64'",
        ),
        (
            lambda: nn.MPOExperts(4, 16, 24, group_size=(2, 4)),
            r"group_size is for .*, got group_size=\(2, 4\) with layout='interleaved'",
        ),
        (
            lambda: nn.DenseExperts.from_dense(torch.ones(4, 3), torch.full((3, 4), torch.inf)),
            r"the \(3, 4\) matrix contains NaN or infinity",
        ),
        (
            lambda: nn.StackedProjection.from_dense(torch.ones(4), 2),
            r"weight must be of shape \(out, in\), got \(4,\)",
        ),
        (
            lambda: nn.DenseExperts.from_dense(torch.ones(4, 3), torch.ones(3, 4), noise=-1.0),
            r"noise must be in \[0, inf\), got -1.0",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make()


def test_experts_one_by_one_compute_what_they_do_together(monkeypatch):
    layer = small_experts("rebuilt")
    states, index, weights = routing()
    index[index == 2] = 0  # an expert without rows, another chosen twice
    with torch.no_grad():
        together = layer(states, index, weights)
        monkeypatch.setattr("tnmoe.nn.compute.slot_sums._LAST_LEVEL_CACHE", 0)
        torch.testing.assert_close(layer(states, index, weights), together)


def test_experts_one_by_one_take_the_route_that_is_planned_for_all_of_them(monkeypatch):
    layer, planned = small_experts(None), []
    plan = routes.plan
    monkeypatch.setattr("tnmoe.nn.compute.slot_sums._LAST_LEVEL_CACHE", 0)
    monkeypatch.setattr(
        routes, "plan", lambda cores, rows, training: planned.append(rows) or
        plan(cores, rows, training)
    )  # fmt: skip
    states, index, weights = routing(tokens=40)
    with torch.no_grad():
        layer(states, index, weights)
    assert set(planned) == {index.numel()}


@pytest.mark.parametrize(
    ("states", "index", "weights", "message"),
    [
        ((3, 8), [[0], [5], [1]], (3, 1), r"experts from 0 to 3, or 4 for none, got 0 to 5"),
        ((3, 8), [[0], [-1], [1]], (3, 1), r"experts from 0 to 3, or 4 for none, got -1 to 1"),
        ((3, 7), [[0], [1], [1]], (3, 1), r"hidden_states \(3, 7\)"),
        ((3, 8), [[0], [1]], (2, 1), r"top_k_index \(2, 1\)"),
        ((3, 8), [[0], [1], [1]], (2, 1), r"top_k_weights \(2, 1\)"),
        ((3, 8), [0, 1, 1], (3, 1), r"top_k_index \(3,\)"),
    ],
)
def test_routing_that_does_not_fit_is_named_and_never_read_from_elsewhere(
    states, index, weights, message
):
    with pytest.raises(tn.InputError, match=message):
        small_experts(None)(torch.randn(states), torch.tensor(index), torch.ones(weights))

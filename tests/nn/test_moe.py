"""MoE layers against transformers' blocks, given the same weights, and their own properties."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
)

import tnmoe as tn
from tnmoe import nn

H, F, E = 8, 12, 4
EAGER = {"experts_implementation": "eager"}


def draw(block):
    torch.manual_seed(0)
    with torch.no_grad():
        for each in block.parameters():
            each.copy_(torch.randn_like(each) / 2)
        for name, each in block.named_buffers():
            if name.endswith("correction_bias"):
                each.copy_(torch.randn_like(each) / 4)
    return block.eval()


def experts_of(matrices, kind, activation, biases=None):
    """Our experts with given stacked matrices (E, out, in) by projection."""
    biases = biases or {}
    gated = "gate" in matrices
    if kind == "dense":
        experts = nn.DenseExperts(E, H, F, activation, gated=gated, bias=bool(biases))
        for name, stack in matrices.items():
            getattr(experts, name).stacked.data.copy_(stack)
    else:
        # Experts that share nothing can have any matrices.
        experts = nn.MPOExperts(
            E, H, F, activation, gated=gated, bias=bool(biases), sites=3, shared_sites="none"
        )
        for name, stack in matrices.items():
            projection = getattr(experts, name)
            mpos = [tn.decompose(each.detach(), projection.shape) for each in stack]
            for site in range(projection.shape.sites):
                cores = torch.stack([mpo.cores[site] for mpo in mpos])
                projection.core_at(site).data.copy_(cores)
    for name, bias in biases.items():
        getattr(experts, name).bias.data.copy_(bias)
    return experts


def halves(block):
    gate, up = block.experts.gate_up_proj.chunk(2, dim=1)
    return {"gate": gate, "up": up, "down": block.experts.down_proj}


def switch(kind):
    config = SwitchTransformersConfig(
        d_model=H, d_ff=F, num_experts=E, expert_capacity=2, router_bias=False
    )
    block = draw(SwitchTransformersSparseMLP(config))
    experts = [block.experts[f"expert_{e}"] for e in range(E)]
    matrices = {
        "up": torch.stack([each.wi.weight for each in experts]),
        "down": torch.stack([each.wo.weight for each in experts]),
    }
    router = nn.TopKRouter(
        H, E, normalize=False, eval_capacity_factor=2 * E / 7, capacity_scope="sequence"
    )
    return block, block.router.classifier, router, experts_of(matrices, kind, "relu"), {}


def mixtral(kind):
    config = MixtralConfig(
        hidden_size=H, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2, **EAGER
    )
    block = draw(MixtralSparseMoeBlock(config))
    experts = experts_of(halves(block), kind, "swiglu")
    return block, block.gate, nn.TopKRouter(H, E, 2), experts, {}


def qwen3(kind):
    config = Qwen3MoeConfig(
        hidden_size=H, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=3,
        norm_topk_prob=False, **EAGER,
    )  # fmt: skip
    block = draw(Qwen3MoeSparseMoeBlock(config))
    experts = experts_of(halves(block), kind, "silu")
    return block, block.gate, nn.TopKRouter(H, E, 3, normalize=False), experts, {}


def qwen2(kind):
    config = Qwen2MoeConfig(
        hidden_size=H, moe_intermediate_size=F, shared_expert_intermediate_size=F, num_experts=E,
        num_experts_per_tok=2, norm_topk_prob=False, **EAGER,
    )  # fmt: skip
    block = draw(Qwen2MoeSparseMoeBlock(config))
    experts = experts_of(halves(block), kind, "silu")
    more = {"shared_expert": copy.deepcopy(block.shared_expert), "shared_gate": True}
    return block, block.gate, nn.TopKRouter(H, E, 2, normalize=False), experts, more


def gpt_oss(kind):
    config = GptOssConfig(
        hidden_size=H, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2, **EAGER
    )
    block = draw(GptOssMLP(config))
    with torch.no_grad():  # far enough for the clamp to bite
        block.experts.gate_up_proj.mul_(8)
    theirs = block.experts
    matrices = {
        "gate": theirs.gate_up_proj[..., ::2].mT,
        "up": theirs.gate_up_proj[..., 1::2].mT,
        "down": theirs.down_proj.mT,
    }
    biases = {
        "gate": theirs.gate_up_proj_bias[..., ::2],
        "up": theirs.gate_up_proj_bias[..., 1::2],
        "down": theirs.down_proj_bias,
    }
    experts = experts_of(matrices, kind, "clamped_swiglu", biases)
    return block, block.router, nn.TopKRouter(H, E, 2, bias=True), experts, {}


def deepseek(kind):
    config = DeepseekV3Config(
        hidden_size=H, moe_intermediate_size=F, n_routed_experts=E, num_experts_per_tok=2,
        n_group=2, topk_group=1, n_shared_experts=2, **EAGER,
    )  # fmt: skip
    block = draw(DeepseekV3MoE(config))
    router = nn.TopKRouter(
        H, E, 2, score_function="sigmoid", load_bias=True, num_groups=2, top_groups=1, scale=2.5
    )
    router.load_bias.value.copy_(block.gate.e_score_correction_bias)
    experts = experts_of(halves(block), kind, "silu")
    more = {"shared_expert": copy.deepcopy(block.shared_experts)}
    return block, block.gate, router, experts, more


def assert_close(ours, theirs):
    """To 1e-5 of the largest entry: sums of many large terms are small by cancellation."""
    scale = theirs.detach().abs().max()
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-5, atol=1e-5)


PEERS = (switch, mixtral, qwen3, qwen2, gpt_oss, deepseek)


@pytest.mark.parametrize("kind", ["dense", "MPO"])
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.__name__)
def test_outputs_and_gradients_are_those_of_transformers_blocks(peer, kind):
    block, their_router, router, experts, more = peer(kind)
    layer = nn.MPOMoE(router, experts, **more).eval()
    with torch.no_grad():
        router.weight.copy_(their_router.weight)
        if router.bias is not None:
            router.bias.copy_(their_router.bias)
        if layer.shared_gate is not None:
            layer.shared_gate.weight.copy_(block.shared_expert_gate.weight)
    x, probe = torch.randn(3, 7, H), torch.randn(3, 7, H)
    results = []
    for module, its_router in ((block, their_router), (layer, router)):
        tokens = x.clone().requires_grad_()
        output = module(tokens)
        output = output[0] if isinstance(output, tuple) else output
        (output * probe).sum().backward()
        results.append([output, tokens.grad, its_router.weight.grad])
    for ours, theirs in zip(*reversed(results), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("peer", [mixtral, gpt_oss], ids=lambda peer: peer.__name__)
def test_gradients_of_experts_matrices_are_those_of_transformers(peer):
    block, their_router, router, experts, _ = peer("dense")
    layer = nn.MPOMoE(router, experts)
    with torch.no_grad():
        router.weight.copy_(their_router.weight)
        if router.bias is not None:
            router.bias.copy_(their_router.bias)
    x = torch.randn(2, 7, H)
    for module in (block, layer):
        output = module(x)
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()
    grads = block.experts.gate_up_proj.grad, block.experts.down_proj.grad
    if peer is gpt_oss:
        expected = {"gate": grads[0][..., ::2].mT, "up": grads[0][..., 1::2].mT}
        expected["down"] = grads[1].mT
        assert_close(experts.down.bias.grad, block.experts.down_proj_bias.grad)
    else:
        gate, up = grads[0].chunk(2, 1)
        expected = {"gate": gate, "up": up, "down": grads[1]}
    for name, grad in expected.items():
        assert_close(getattr(experts, name).stacked.grad, grad)


def dense_ffn(gated, bias, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) / 4

    ffn = {"up": draw(F, H), "down": draw(H, F)} | ({"gate": draw(F, H)} if gated else {})
    return ffn | ({f"{name}_bias": draw(len(each)) for name, each in ffn.items()} if bias else {})


def run_dense(ffn, x):
    linear = torch.nn.functional.linear
    inner = linear(x, ffn["up"], ffn.get("up_bias"))
    if "gate" in ffn:
        gate = linear(x, ffn["gate"], ffn.get("gate_bias"))
        inner = torch.nn.functional.silu(gate) * inner
    else:
        inner = torch.nn.functional.silu(inner)
    return linear(inner, ffn["down"], ffn.get("down_bias"))


def routers(dtype=torch.float64):
    return {
        **{f"top-{k}": nn.TopKRouter(H, E, k, dtype=dtype) for k in range(1, E + 1)},
        "sigmoid": nn.TopKRouter(H, E, 2, score_function="sigmoid", dtype=dtype),
        "groups": nn.TopKRouter(H, E, 2, num_groups=2, top_groups=1, dtype=dtype),
        "load bias": nn.TopKRouter(H, E, 1, score_function="sigmoid", load_bias=True, dtype=dtype),
        "noisy, jitter": nn.TopKRouter(H, E, 2, noisy=True, jitter_noise=0.3, dtype=dtype),
        **{
            f"second expert {policy}": nn.TopKRouter(H, E, 2, second_expert=policy, dtype=dtype)
            for policy in ("none", "threshold", "random")
        },
        "expert choice of all": nn.ExpertChoiceRouter(H, E, E, dtype=dtype),
        "no straight-through": nn.TopKRouter(H, E, straight_through=False, dtype=dtype),
        "capacity for all": nn.TopKRouter(H, E, 2, capacity_factor=E, dtype=dtype),
    }


@pytest.mark.parametrize("name", routers())
@pytest.mark.parametrize("kind", ["interleaved", "split", "none shared", "dense"])
def test_an_upcycled_layer_starts_as_the_dense_network_whatever_the_router(name, kind):
    torch.manual_seed(0)
    router = routers()[name]
    torch.nn.init.normal_(router.weight)
    for gated in (False, True):
        ffn = dense_ffn(gated, bias=True)
        details = {"num_experts": E, "activation": "silu"}
        if kind == "dense":
            experts = nn.DenseExperts.from_dense(**ffn, **details)
        else:
            layout = {"layout": "split"} if kind == "split" else {"sites": 3}
            shared = "none" if kind == "none shared" else "center"
            experts = nn.MPOExperts.from_dense(**ffn, **details, **layout, shared_sites=shared)
        layer, x = nn.MPOMoE(router, experts).train(), torch.randn(5, 6, H, dtype=torch.float64)
        expected = run_dense(ffn, x)
        error = (layer(x) - expected).norm() / expected.norm()
        assert error < 1e-12


@pytest.mark.parametrize(
    "router",
    [
        nn.TopKRouter(H, E, 2, normalize=False, dtype=torch.float64),
        nn.TopKRouter(H, E, 1, normalize=False, dtype=torch.float64),
        nn.TopKRouter(H, E, 2, score_function="sigmoid", scale=2.5, dtype=torch.float64),
    ],
)
def test_what_breaks_the_start_scales_by_the_sum_of_the_weights(router):
    ffn = dense_ffn(False, bias=True)
    experts = nn.MPOExperts.from_dense(**ffn, num_experts=E, activation="silu", sites=3)
    x = torch.randn(9, H, dtype=torch.float64)
    total = router(x)[1].sum(-1, keepdim=True)
    assert (total - 1).abs().min() > 0.1
    torch.testing.assert_close(nn.MPOMoE(router, experts)(x), total * run_dense(ffn, x))


@pytest.mark.parametrize("kind", ["MPO", "dense"])
@pytest.mark.parametrize("training", [True, False])
def test_a_dropped_token_is_the_identity_behind_a_residual(kind, training):
    torch.manual_seed(0)
    router = nn.TopKRouter(H, E, capacity_factor=0.5, eval_capacity_factor=0.5)
    make = nn.DenseExperts if kind == "dense" else nn.MPOExperts
    layer = nn.MPOMoE(router, make(E, H, F, bias=True)).train(training)
    x = torch.randn(16, H)
    dropped = (router(x)[2] == E)[:, 0]
    assert 0 < dropped.sum() < 16
    with torch.set_grad_enabled(training):
        output = x + layer(x)
    assert torch.equal(output[dropped], x[dropped])
    assert (output[~dropped] != x[~dropped]).any(1).all()


@pytest.mark.parametrize(
    ("route", "compiled"),
    [
        *((route, False) for route in ("rebuilt", "joint", "per_expert", "cached", None)),
        *((route, True) for route in ("rebuilt", "joint", "cached", None)),
    ],
)
def test_slots_without_an_expert_give_zero_and_no_gradient_on_every_route(route, compiled):
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = nn.MPOExperts(E, H, F, bias=True, sites=3, dtype=torch.float64)
    for name in ("up", "down"):
        getattr(layer, name).route = route
    function = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    index = torch.tensor([[0, E], [E, E], [3, 1], [E, 2]])
    weights = torch.rand(4, 2, dtype=torch.float64)
    x = torch.randn(4, H, dtype=torch.float64)
    x[1] = float("nan")  # padding may hold anything

    def expected(x):
        rows = torch.zeros_like(x)
        for token, choice in ((0, 0), (2, 0), (2, 1), (3, 1)):
            one = layer(x[token][None], index[token, choice].view(1, 1), torch.ones(1, 1))[0]
            rows[token] = rows[token] + weights[token, choice] * one
        return rows

    with torch.no_grad():
        torch.testing.assert_close(function(x, index, weights), expected(x))
    if route == "cached":
        return
    grads = []
    for way in (lambda x: function(x, index, weights), expected):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        way(leaf)[[0, 2, 3]].square().sum().backward()
        grads.append([leaf.grad[[0, 2, 3]], *(each.grad.clone() for each in layer.parameters())])
    for one, other in zip(*grads, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other)


def test_experts_that_take_turns_leave_zeros_where_there_is_no_expert(monkeypatch):
    monkeypatch.setattr("tnmoe.nn.compute.slot_sums._LAST_LEVEL_CACHE", 0)
    experts = nn.MPOExperts(E, H, F, bias=True, sites=3)
    index = torch.tensor([[0, E], [E, E], [3, 1]])
    x, weights = torch.randn(3, H), torch.rand(3, 2)
    torch.use_deterministic_algorithms(True)  # fills what nobody writes with NaN
    try:
        with torch.no_grad():
            turns = experts(x, index, weights)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(turns, experts(x, index, weights))
    assert (turns[1] == 0).all()


def test_transformed_functions_give_padding_nothing_whatever_it_holds():
    torch.manual_seed(0)
    experts = nn.MPOExperts(E, H, F, bias=True, sites=3, dropout=0.5)
    x, index = torch.randn(4, H), torch.tensor([[0, E], [E, E], [3, 1], [E, 2]])
    x[1] = float("inf")
    weights = torch.rand(4, 2)

    def total(parameters):
        return torch.func.functional_call(experts, parameters, (x, index, weights)).sum()

    experts.eval()
    parameters = {name: each.detach() for name, each in experts.named_parameters()}
    found = torch.func.grad(total)(parameters)
    total(dict(experts.named_parameters())).backward()
    for name, each in experts.named_parameters():
        torch.testing.assert_close(found[name], each.grad)
    experts.train()  # dropout is there, too
    drawn = [torch.func.grad(total)(parameters)["up.center"] for _ in range(2)]
    assert (drawn[0] != drawn[1]).any()


def test_a_gate_of_the_shared_expert_has_the_routers_dtype():
    router = nn.TopKRouter(H, E, dtype=torch.bfloat16)
    experts = nn.DenseExperts(E, H, F, dtype=torch.bfloat16)
    shared = torch.nn.Linear(H, H, dtype=torch.bfloat16)
    layer = nn.MPOMoE(router, experts, shared, shared_gate=True)
    assert layer(torch.randn(3, H).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_can_be_made_in_half_precision(dtype):
    layer = nn.MPOMoE(nn.TopKRouter(H, E, 2, dtype=dtype), nn.MPOExperts(E, H, F, dtype=dtype))
    matrices = layer.experts.up.weight().float()
    assert 0.2 < matrices.var() * 3 * H < 5
    layer(torch.randn(5, H, dtype=dtype)).sum().backward()
    assert all(each.grad.dtype == dtype for each in layer.parameters())


@pytest.mark.parametrize("route", ["rebuilt", "joint", "per_expert", None])
def test_a_layer_in_which_no_token_has_an_expert_gives_zeros_and_zero_gradients(route):
    layer = nn.MPOExperts(E, H, F, bias=True, sites=3)
    layer.up.route = layer.down.route = route
    index, weights = torch.full((5, 2), E), torch.ones(5, 2)
    output = layer(torch.randn(5, H), index, weights)
    assert (output == 0).all()
    output.sum().backward()
    assert all((each.grad == 0).all() for each in layer.parameters())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(sorted(set(routers()) - {"noisy, jitter"})))
def test_permuting_tokens_commutes_with_the_layer_and_batches_split(seed, name):
    torch.manual_seed(seed)
    layer = nn.MPOMoE(routers()[name], nn.MPOExperts(E, H, F, sites=2, dtype=torch.float64)).eval()
    x, order = torch.randn(9, H, dtype=torch.float64), torch.randperm(9)
    torch.testing.assert_close(layer(x[order]), layer(x)[order])
    torch.testing.assert_close(torch.cat([layer(x[:4]), layer(x[4:])]), layer(x))
    torch.testing.assert_close(layer(x.view(3, 3, H)).view(9, H), layer(x))


def test_padding_is_ignored_inside_the_block_and_only_there():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(nn.MPOMoE(nn.TopKRouter(H, E, 2), nn.MPOExperts(E, H, F)) for _ in range(2))
    )
    x, mask = torch.randn(2, 4, H), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    with nn.ignore_padding(model, mask), nn.record_routing(model) as routing:
        output = model(x)
    assert (output[mask == 0] == 0).all()
    for call in routing.calls:
        assert torch.equal(call.token_mask, mask.flatten() == 1)
    torch.testing.assert_close(output[mask == 1], model(x)[mask == 1])
    assert (model(x)[mask == 0] != 0).any(1).all()
    first = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0]])
    with nn.ignore_padding(model, mask):
        with nn.ignore_padding(model, first):
            assert ((model(x) != 0).any(-1) == (first == 1)).all()
        assert ((model(x) != 0).any(-1) == (mask == 1)).all()
        assert ((model[0](x, first) != 0).any(-1) == (first == 1)).all()
        twin = copy.deepcopy(model)
    for each in (model, twin):
        assert (each(x) != 0).any(-1).all()
    with (
        nn.ignore_padding(model, mask[:, :3]),
        pytest.raises(tn.InputError, match=r"each of 8 tokens, got shape \(2, 3\)"),
    ):
        model(x)
    assert (model(x) != 0).any(-1).all()
    with (
        pytest.raises(tn.InputError, match="Linear has no MPOMoE layer"),
        nn.ignore_padding(torch.nn.Linear(2, 2), mask),
    ):
        pass


def test_half_precision_extremes_of_padding_and_dropped_tokens_reach_nobody():
    torch.manual_seed(0)
    router = nn.TopKRouter(H, E, 2, capacity_factor=0.5)
    layer = nn.MPOMoE(router, nn.MPOExperts(E, H, F, bias=True)).half()
    x = torch.randn(2, 6, H).half()
    mask = torch.ones(2, 6)
    mask[0, 3] = 0
    x[0, 3] = float("inf")
    output = layer(x, mask)
    assert torch.isfinite(output).all()
    output.float().sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in layer.parameters())
    x[0, 3] = 0
    x[1, 2] = 6e4  # near the largest number of half precision
    small = nn.MPOExperts(E, H, F).half()
    for each in small.parameters():
        each.data.mul_(1e-2)
    assert torch.isfinite(nn.MPOMoE(router, small)(x)).all()


@pytest.mark.parametrize("gated", [False, True])
def test_layers_survive_copies_pickles_state_dicts_and_compilers(gated):
    torch.compiler.reset()

    def make():
        experts = nn.MPOExperts(
            E, H, F, "silu", gated=gated, bias="common", sites=3, shared_sites={"up": {0, 1}}
        )
        return nn.MPOMoE(
            nn.TopKRouter(H, E, 2, load_bias=True), experts, torch.nn.Linear(H, H), shared_gate=True
        ).eval()

    layer, twin, x = make(), make(), torch.randn(3, 5, H)
    twin.load_state_dict(layer.state_dict())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), twin, compiled):
        torch.testing.assert_close(other(x), layer(x))
        other.zero_grad()
        other(x).sum().backward()
        assert other.experts.up.center.grad is not None


def test_dropout_acts_between_the_projections_and_on_the_output_in_training_only():
    torch.manual_seed(0)
    experts = nn.DenseExperts(E, H, 2000, "linear", dropout=0.25)
    layer = nn.MPOMoE(nn.TopKRouter(H, E), experts, dropout=0.0)
    x = torch.ones(1, H)
    with torch.no_grad():
        for each in (experts.up, experts.down):
            each.stacked.fill_(1.0)
    full = layer.eval()(x)
    assert (full == full[0, 0]).all()
    dropped = layer.train()(x) / full
    # A quarter of the intermediate values is missing, the rest is scaled up by 4/3.
    assert (dropped == dropped[0, 0]).all()
    share = dropped[0, 0].item()
    assert share != 1
    assert abs(share - 1) < 4 * (0.25 * 0.75 / 2000) ** 0.5 / 0.75
    late = nn.MPOMoE(layer.router, copy.deepcopy(experts).eval(), dropout=0.5)
    out = late(x.expand(500, H))
    assert ((out == 0) | (out == 2 * full[0, 0])).all()
    assert abs((out == 0).float().mean() - 0.5) < 0.05
    assert torch.equal(late.eval()(x), full)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.MPOMoE(nn.TopKRouter(H, 3), nn.DenseExperts(E, H, F)),
            "the router is for 3 experts of hidden size 8, the experts are 4 of hidden size 8",
        ),
        (
            lambda: nn.MPOMoE(nn.TopKRouter(H, E), nn.DenseExperts(E, 9, F)),
            "the router is for 4 experts of hidden size 8, the experts are 4 of hidden size 9",
        ),
        (
            lambda: nn.MPOMoE(nn.TopKRouter(H, E), nn.DenseExperts(E, H, F), shared_gate=True),
            "shared_gate=True needs a shared_expert",
        ),
        (
            lambda: nn.MPOMoE(nn.TopKRouter(H, E), nn.DenseExperts(E, H, F), dropout=2.0),
            r"dropout must be in \[0, 1\], got 2.0",
        ),
        (lambda: nn.DenseExperts(E, H, F, dropout=-0.1), r"dropout must be in \[0, 1\], got -0.1"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make()

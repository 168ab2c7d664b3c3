"""Top-k routers against transformers' own, given the same weights, and against definitions."""

from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    NllbMoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersTop1Router,
)

import tnmoe as tn
from tests.nn.routing.kinds import NO_EXPERT, E, H, as_matrix
from tnmoe import nn


def same_weights(ours, theirs):
    with torch.no_grad():
        for one, other in (
            (ours.weight, theirs.weight),
            (ours.bias, getattr(theirs, "bias", None)),
        ):
            if one is not None:
                one.copy_(torch.randn_like(one))
                other.copy_(one)


def mixtral(k):
    config = MixtralConfig(hidden_size=H, num_local_experts=E, num_experts_per_tok=k)
    return MixtralTopKRouter(config), nn.TopKRouter(H, E, k, straight_through=False)


def qwen3(k, normalize):
    config = Qwen3MoeConfig(
        hidden_size=H, num_experts=E, num_experts_per_tok=k, norm_topk_prob=normalize
    )
    return Qwen3MoeTopKRouter(config), nn.TopKRouter(H, E, k, normalize=normalize)


def gpt_oss(k):
    config = GptOssConfig(hidden_size=H, num_local_experts=E, num_experts_per_tok=k)
    return GptOssTopKRouter(config), nn.TopKRouter(H, E, k, bias=True, straight_through=False)


def deepseek_v2(k):
    config = DeepseekV2Config(
        hidden_size=H, n_routed_experts=E, num_experts_per_tok=k, n_group=3, topk_group=2,
        topk_method="group_limited_greedy", routed_scaling_factor=1.0, num_attention_heads=1,
    )  # fmt: skip
    theirs = DeepseekV2TopkRouter(config)
    ours = nn.TopKRouter(H, E, k, normalize=False, num_groups=3, top_groups=2, group_score=1)
    return theirs, ours


def deepseek(k, groups, normalize=True):
    config = DeepseekV3Config(
        hidden_size=H, n_routed_experts=E, num_experts_per_tok=k, n_group=groups,
        topk_group=max(1, groups - 1), norm_topk_prob=normalize, routed_scaling_factor=2.5,
    )  # fmt: skip
    theirs = DeepseekV3TopkRouter(config)
    ours = nn.TopKRouter(
        H, E, k, score_function="sigmoid", normalize=normalize, load_bias=True,
        scale=2.5, num_groups=groups, top_groups=max(1, groups - 1),
    )  # fmt: skip
    # Below zero as well: what a group left out must not win by being 0.
    theirs.e_score_correction_bias.copy_(torch.randn(E) / 4 - 1)
    ours.load_bias.value.copy_(theirs.e_score_correction_bias)
    return theirs, ours


PEERS = {
    "Mixtral, top-1": lambda: mixtral(1),
    "Mixtral, top-2": lambda: mixtral(2),
    "Mixtral, all": lambda: mixtral(E),
    "Qwen3-MoE, top-1": lambda: qwen3(1, False),
    "Qwen3-MoE, top-3": lambda: qwen3(3, False),
    "Qwen3-MoE, top-3, normalised": lambda: qwen3(3, True),
    "gpt-oss, top-1": lambda: gpt_oss(1),
    "gpt-oss, top-4": lambda: gpt_oss(4),
    "DeepSeek-V2": lambda: deepseek_v2(3),
    "DeepSeek-V3, one group": lambda: deepseek(3, 1),
    "DeepSeek-V3, three groups": lambda: deepseek(3, 3),
    "DeepSeek-V3, not normalised": lambda: deepseek(2, 2, normalize=False),
}


@pytest.mark.parametrize("name", PEERS)
def test_weights_and_gradients_are_those_of_transformers_router(name):
    torch.manual_seed(0)
    theirs, ours = PEERS[name]()
    same_weights(ours, theirs)
    x, probe = torch.randn(2, 50, H), torch.randn(100, E)
    gradients = []
    for router in (theirs, ours):
        tokens = x.clone().requires_grad_()
        logits, weights, index = router(tokens.view(100, H))
        found = [logits, as_matrix(weights, index)]
        ((found[1] * probe).sum() + found[0].square().sum()).backward()
        gradients.append([*found, tokens.grad, router.weight.grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capacity", [1, 2, 5, 9])
def test_switch_router_with_its_capacity_and_dropped_tokens(capacity):
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        d_model=H, num_experts=E, expert_capacity=capacity, router_bias=False
    )
    theirs = SwitchTransformersTop1Router(config).eval()
    ours = nn.TopKRouter(
        H, E, normalize=False, eval_capacity_factor=capacity * E / 9, capacity_scope="sequence"
    ).eval()
    with torch.no_grad():
        ours.weight.copy_(torch.randn(E, H))
        theirs.classifier.weight.copy_(ours.weight)
    x, probe = torch.randn(3, 9, H), torch.randn(27, E)
    expected, probabilities, expected_logits = theirs(x.clone())
    expected = (expected * probabilities).view(27, E)
    logits, weights, index = ours(x)
    torch.testing.assert_close(logits, expected_logits.view(27, E))
    torch.testing.assert_close(as_matrix(weights, index), expected)
    assert ((index == NO_EXPERT) == (expected == 0).all(1, keepdim=True)).all()
    assert (index == NO_EXPERT).any() == (capacity < 5)
    (as_matrix(weights, index) * probe).sum().backward()
    (expected * probe).sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.classifier.weight.grad)


@pytest.mark.parametrize("capacity", [1, 3, 20])
def test_top_2_with_a_capacity_is_that_of_nllb_moe(capacity):
    torch.manual_seed(1)
    config = NllbMoeConfig(
        d_model=H, num_experts=E, expert_capacity=capacity, second_expert_policy="all",
        moe_eval_capacity_token_fraction=-1.0, router_bias=False,
    )  # fmt: skip
    theirs = NllbMoeTop2Router(config)
    ours = nn.TopKRouter(H, E, 2, capacity_factor=capacity * E / (2 * 10))
    with torch.no_grad():
        ours.weight.copy_(torch.randn(E, H))
        theirs.classifier.weight.copy_(ours.weight)
    x = torch.randn(10, H)
    _, expected, _ = theirs(x)
    _, weights, index = ours(x)
    torch.testing.assert_close(as_matrix(weights, index), expected)


def test_second_experts_are_followed_by_policy():
    torch.manual_seed(0)
    count = 40_000
    x = torch.randn(count, H)
    routers = {
        policy: nn.TopKRouter(H, E, 2, second_expert=policy, second_threshold=0.4)
        for policy in ("all", "none", "threshold", "random")
    }
    common = torch.randn(E, H) / 3
    for router in routers.values():
        router.weight.data.copy_(common)
    _, weights, index = routers["all"](x)
    share = weights[:, 1]
    followed = {name: router(x)[2][:, 1] != NO_EXPERT for name, router in routers.items()}
    assert followed["all"].all()
    assert not followed["none"].any()
    assert (followed["threshold"] == (share > 0.4)).all()
    expected = (2 * share).clamp(max=1)
    deviation = (expected * (1 - expected)).sum().sqrt()
    assert abs(followed["random"].sum() - expected.sum()) < 4 * deviation
    for name, router in routers.items():
        _, again, chosen = router(x)
        assert (chosen[:, 0] == index[:, 0]).all()
        # Whoever stays alone has the whole weight, so that identical experts change nothing.
        torch.testing.assert_close(again.sum(1), torch.ones(count))
        assert (again[chosen == NO_EXPERT] == 0).all(), name
    assert (routers["random"].eval()(x)[2] != NO_EXPERT).all()


def test_top_one_weight_is_one_and_still_teaches_the_router():
    router = nn.TopKRouter(H, E)
    x = torch.randn(5, H)
    _, weights, index = router(x)
    assert (weights == 1).all()
    weights.sum().backward()
    # The gradient is that of the log-probability of the chosen expert.
    twin = router.weight.detach().clone().requires_grad_()
    chosen = (x @ twin.T).log_softmax(-1).gather(-1, index)
    chosen.sum().backward()
    torch.testing.assert_close(router.weight.grad, twin.grad)
    assert (router.weight.grad != 0).any()
    plain = nn.TopKRouter(H, E, straight_through=False)
    assert not plain(x)[1].requires_grad


def test_noise_of_shazeers_router_has_the_learned_deviation_and_its_gradient():
    torch.manual_seed(0)
    router = nn.TopKRouter(H, E, 2, noisy=True)
    torch.nn.init.normal_(router.noise_weight)
    x = torch.randn(1, H).expand(4000, H)
    logits = router(x)[0]
    torch.testing.assert_close(logits.mean(0), x[0] @ router.weight.T, rtol=0, atol=0.15)
    deviation = torch.nn.functional.softplus(x[0] @ router.noise_weight.T)
    torch.testing.assert_close(logits.std(0), deviation, rtol=0.1, atol=0)
    normal = (logits - logits.mean(0)) / logits.std(0)
    assert abs(normal.pow(4).mean() - 3) < 0.3  # a uniform distribution's is 1.8
    router(x)[1][:, 0].sum().backward()
    assert (router.noise_weight.grad != 0).any()
    router.eval()
    torch.testing.assert_close(router(x)[0], x @ router.weight.T)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 3), st.integers(1, 3), st.floats(0.1, 3), st.integers(0, 99)
)
def test_a_capacity_keeps_first_choices_before_second_ones_and_tokens_in_order(
    tokens, sequences, k, factor, seed
):
    torch.manual_seed(seed)
    router = nn.TopKRouter(
        H, E, k, normalize=False, capacity_factor=factor, capacity_scope="sequence"
    )
    x, mask = torch.randn(sequences, tokens, H), torch.rand(sequences, tokens) < 0.8
    logits, weights, index = router(x, mask)
    expected = torch.full((sequences, tokens, k), NO_EXPERT)
    scores, chosen = logits.softmax(-1).view(sequences, tokens, E).topk(k)
    for b in range(sequences):
        capacity = {e: max(1, ceil(factor * k / E * int(mask[b].sum()))) for e in range(E)}
        for choice in range(k):
            for t in range(tokens):
                expert = int(chosen[b, t, choice])
                if mask[b, t] and capacity[expert]:
                    capacity[expert] -= 1
                    expected[b, t, choice] = expert
    assert torch.equal(index.view_as(expected), expected)
    torch.testing.assert_close(weights.view_as(scores), scores * (expected != NO_EXPERT))


def test_a_capacity_counts_in_training_and_only_on_demand_elsewhere():
    x = torch.randn(1, H).expand(12, H)
    router = nn.TopKRouter(H, E, capacity_factor=1.0)
    assert (router(x)[2] != NO_EXPERT).sum() == 2
    assert (router.eval()(x)[2] != NO_EXPERT).all()
    router.eval_capacity_factor = 2.0
    assert (router(x)[2] != NO_EXPERT).sum() == 4


def test_the_capacity_of_an_expert_is_the_documented_number():
    for factor, k, tokens in ((1.1, 1, 500), (1.25, 2, 96), (0.7, 3, 10)):
        router = nn.TopKRouter(H, 10, k, capacity_factor=factor)
        _, _, index = router(torch.randn(1, H).expand(tokens, H))
        counts = torch.bincount(index.flatten(), minlength=11)[:10]
        assert counts.max() == ceil(factor * k * tokens / 10)


def test_resetting_draws_weights_again_and_forgets_the_load_bias():
    router = nn.TopKRouter(H, E, noisy=True, bias=True, load_bias=True)
    before = router.weight.clone()
    for each in (router.bias.data, router.load_bias.value, router.noise_weight.data):
        each.fill_(1.0)
    router(torch.randn(3, H))
    router.reset_parameters()
    assert (router.weight != before).all()
    for each in (router.bias, router.load_bias.value, router.noise_weight, router.load_bias.counts):
        assert (each == 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.TopKRouter(H, 3, top_k=4), "top_k=4 exceeds num_experts=3"),
        (lambda: nn.TopKRouter(H, 3, jitter_noise=1.0), r"jitter_noise must be in \[0, 1\)"),
        (lambda: nn.TopKRouter(H, 3, capacity_factor=0), "capacity_factor must be in .*, got 0"),
        (lambda: nn.TopKRouter(H, 3, capacity_factor="1"), "capacity_factor must be .*, got '1'"),
        (
            lambda: nn.TopKRouter(H, 3, eval_capacity_factor=float("nan")),
            r"eval_capacity_factor must be in \(0, inf\), got nan",
        ),
        (lambda: nn.TopKRouter(H, 3, score_function="relu"), "score_function must be one of soft"),
        (lambda: nn.TopKRouter(H, 3, capacity_scope="token"), "capacity_scope must be one of"),
        (lambda: nn.TopKRouter(H, 3, 2, second_expert="some"), "second_expert must be one of all"),
        (
            lambda: nn.TopKRouter(H, 3, 1, second_expert="none"),
            "second_expert='none' needs top_k=2, got top_k=1",
        ),
        (
            lambda: nn.TopKRouter(H, 3, 2, second_expert="threshold", second_threshold=2),
            r"second_threshold must be in \[0, 1\], got 2",
        ),
        (lambda: nn.TopKRouter(H, 3, scale=0), r"scale must be in \(0, inf\), got 0"),
        (lambda: nn.TopKRouter(H, 6, num_groups=4), "num_groups=4 does not divide"),
        (lambda: nn.TopKRouter(H, 6, num_groups=2, top_groups=3), "top_groups=3 exceeds"),
        (
            lambda: nn.TopKRouter(H, 6, 4, num_groups=2, top_groups=1),
            "top_k=4 exceeds the 3 experts of top_groups=1 of 2 groups",
        ),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make()

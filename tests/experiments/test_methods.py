"""Every method starts, counts parameters and trains as its description says."""

from contextlib import ExitStack

import pytest
import torch
import transformers

from experiments import variants
from experiments.measures import Drift, active_parameters, total_parameters
from experiments.methods import METHODS
from tnmoe import hf
from tnmoe.nn import shared_parameters
from tnmoe.nn.compute.slots import Groups

TRUNCATED = {"mpoe-half", "separate"}
# What begins elsewhere than the dense model on purpose.
ELSEWHERE = TRUNCATED | {"mpoe-noise", "moe-noise", "dense-fresh", "moe-fresh", "mpoe-fresh"}
AS_LARGE_AS_MPOE = ("dense-wide", "separate", "low-rank")

TOKENS = torch.arange(60).view(3, 20) % 50


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=20, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def gated_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("dense", [gpt2, gated_llama])
@pytest.mark.parametrize("name", sorted(set(METHODS) - ELSEWHERE))
def test_a_method_starts_as_the_dense_model(name, dense):
    expected = logits(dense())
    model = METHODS[name].model(dense())
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_the_others_start_elsewhere(name):
    assert (logits(METHODS[name].model(gpt2())) - logits(gpt2())).abs().max() > 1e-3


@pytest.mark.parametrize("dense", [gpt2, gated_llama])
@pytest.mark.parametrize("name", AS_LARGE_AS_MPOE)
def test_what_is_as_large_as_mpoe_misses_it_by_less_than_one_step_of_its_size(name, dense):
    size = {each: total_parameters(METHODS[each].model(dense())) for each in ("mpoe", name)}
    assert 0.93 * size["mpoe"] <= size[name] <= size["mpoe"]


def test_layers_that_are_left_out_are_neither_widened_nor_drawn_anew():
    size = total_parameters(METHODS["mpoe"].model(gpt2(), every=2))
    wide = METHODS["dense-wide"].model(gpt2(), every=2)
    assert 0.93 * size <= total_parameters(wide) <= size
    for model in (wide, METHODS["dense-fresh"].model(gpt2(), every=2)):
        kept, changed = (block.mlp.c_fc.weight for block in model.transformer.h)
        first, second = (block.mlp.c_fc.weight for block in gpt2().transformer.h)
        assert torch.equal(kept, first)
        assert changed.shape != second.shape or not torch.equal(changed, second)


def test_a_fresh_model_keeps_all_but_its_networks():
    fresh, dense = METHODS["dense-fresh"].model(gpt2()), gpt2()
    for (name, one), other in zip(fresh.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(one, other) == (".mlp." not in name or name.endswith("bias"))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_step_moves_what_the_method_trains(name):
    method = METHODS[name]
    model = method.model(gpt2())
    optimizer, drift = method.optimizer(model, 1e-2), Drift(model)
    with ExitStack() as stack:
        mask = method.attach(stack, model, optimizer, seed=0)
        model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    moved = drift.measure(model)
    assert all(core.requires_grad == (method.shared_rate > 0) for core in shared_parameters(model))
    if "shared" in moved:
        masked = method.shared_rate == 0 or (mask is not None and mask.masked_steps == 1)
        assert (moved["shared"] == 0) == masked
        assert moved["owned"] > 0
    assert (mask is not None) == (method.mask > 0)


def test_learning_rates_of_cores_move_them_so_much_less_or_more():
    moved = {}
    for name in ("mpoe", "mpoe-slow-0.1", "mpoe-owned-4"):
        model = METHODS[name].model(gpt2())
        optimizer, drift = METHODS[name].optimizer(model, 1e-2), Drift(model)
        model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        moved[name] = drift.measure(model)
    assert moved["mpoe-slow-0.1"]["shared"] == pytest.approx(
        0.1 * moved["mpoe"]["shared"], rel=0.05
    )
    assert moved["mpoe-slow-0.1"]["owned"] == pytest.approx(moved["mpoe"]["owned"], rel=0.05)


def test_sharing_the_rest_owns_the_central_core():
    model = METHODS["share-rest"].model(gpt2())
    for layer in variants.mixtures(model):
        for projection in (layer.experts.up, layer.experts.down):
            assert projection.shared_sites == frozenset({0, 1, 3, 4})
            assert len(projection.center) == 8
    assert len(shared_parameters(model)) == 2 * 2 * 4


@pytest.mark.parametrize("dense", [gpt2, gated_llama])
@pytest.mark.parametrize(("name", "top_k"), [("moe", 1), ("moe-top2", 2)])
def test_active_parameters_are_those_of_a_mixture_of_top_k_experts(name, top_k, dense):
    large, small = (METHODS[name].model(dense(), **each) for each in ({}, {"num_experts": top_k}))
    routers, own = (
        sum(layer.router.weight.numel() for layer in variants.mixtures(model))
        for model in (large, small)
    )
    assert active_parameters(large) - routers == total_parameters(small) - own


def test_active_parameters_of_mpoe_hold_one_auxiliary_core_of_each_site():
    model = METHODS["mpoe"].model(gpt2())
    dense = hf.parameter_report(gpt2(), hf.MPOEConfig(num_experts=1)).total.mpoe
    routers = sum(layer.router.weight.numel() for layer in variants.mixtures(model))
    assert active_parameters(model) == dense + routers * 7 // 8


def test_low_rank_experts_are_their_matrices():
    torch.manual_seed(0)
    projection = variants.LowRankProjection(torch.randn(6, 5), num_experts=3, rank=2)
    torch.nn.init.normal_(projection.out_of)
    rows, experts = torch.randn(7, 5), torch.tensor([0, 0, 1, 1, 1, 2, 2])
    expected = torch.stack(
        [projection.weight()[e] @ row for e, row in zip(experts, rows, strict=True)]
    )
    actual = projection.multiply(rows, Groups.of(experts, 3))
    torch.testing.assert_close(actual, expected)

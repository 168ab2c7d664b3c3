"""Conversions compute the same whatever modes of torch are on around them."""

import copy
import functools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.test_surroundings import SURROUNDINGS
from tnmoe.hf import MPOEConfig, average_experts, to_moe, upcycle
from tnmoe.nn import MPOExperts


@functools.cache
def dense():
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **small)).eval()


def converted(**settings):
    config = MPOEConfig(num_experts=4, sites=3, **settings)
    return upcycle(copy.deepcopy(dense()), config)


@functools.cache
def mixture():
    return converted()


CONVERSIONS = {
    "interleaved": converted,
    "truncated": lambda: converted(max_bond=8),
    "to_moe": lambda: to_moe(mixture()),
    "average_experts": lambda: average_experts(mixture()),
}


def experts_of(model):
    """Return all tensors except those of routers, which are random."""
    return {name: each for name, each in model.state_dict().items() if "router" not in name}


# Transformers warns of its own.
@pytest.mark.parametrize("surroundings", sorted(SURROUNDINGS.keys() - {"warnings as errors"}))
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_conversion_gives_the_same_in_all_surroundings(conversion, surroundings):
    mixture()  # in plain surroundings
    expected = experts_of(CONVERSIONS[conversion]())
    with SURROUNDINGS[surroundings]():
        result = experts_of(CONVERSIONS[conversion]())
    assert result.keys() == expected.keys()
    for name, each in result.items():
        torch.testing.assert_close(each, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("surroundings", ["autocast to bfloat16", "rough products"])
def test_matrices_of_experts_have_full_precision(surroundings):
    experts = MPOExperts(3, hidden_size=32, intermediate_size=64, sites=3)
    expected = experts.up.weight()
    with SURROUNDINGS[surroundings]():
        torch.testing.assert_close(experts.up.weight(), expected, rtol=0, atol=0)

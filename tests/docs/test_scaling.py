"""The page on many ranks says what its script computes, and the script computes what it should."""

import importlib
import sys
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[2]
PAGE = " ".join((ROOT / "docs/explanation/scaling.md").read_text(encoding="utf-8").split())
MANY_EXPERTS_PER_TOKEN = 8
COSTLIEST = "residual 64"


@pytest.fixture(scope="module")
def scaling():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("scaling")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def break_even(scaling):
    return {
        (size, name, ranks): scaling.break_even(name, size, ranks)
        for size in scaling.SIZES
        for name in scaling.SHARING
        for ranks in {*scaling.RANKS, size.experts}
    }


@pytest.fixture(scope="module")
def speedups(scaling):
    return {
        (size, *setting, tokens): scaling.speedup(
            "residual 16", size, setting[0], tokens, setting[1]
        )
        for size in scaling.SIZES
        for setting in scaling.settings()
        for tokens in scaling.TOKENS
    }


def test_sizes_are_those_of_the_published_configurations(scaling):
    mixtral, qwen3 = transformers.MixtralConfig(), transformers.Qwen3MoeConfig()
    found, other = scaling.MIXTRAL, scaling.QWEN3
    assert (found.hidden, found.intermediate) == (mixtral.hidden_size, mixtral.intermediate_size)
    assert (found.experts, found.top_k) == (mixtral.num_local_experts, mixtral.num_experts_per_tok)
    assert found.layers == mixtral.num_hidden_layers
    assert (other.hidden, other.intermediate) == (qwen3.hidden_size, qwen3.moe_intermediate_size)
    assert (other.experts, other.top_k) == (qwen3.num_experts, qwen3.num_experts_per_tok)
    for size in scaling.SIZES:
        row = f"{size.hidden} × {size.intermediate} | {size.experts} | {size.top_k} | {size.layers}"
        assert row in PAGE


def test_an_ordinary_mixture_sends_rows_and_sums_of_replicas(scaling):
    size, ranks, tokens = scaling.QWEN3, 256, 1000
    (found,) = (
        each
        for each in scaling.costs(scaling.ORDINARY, size, ranks, tokens, size.experts, size.top_k)
        if (each.kind, each.group) == ("spread", 128)
    )
    # Every expert has a rank of its own, so 8 experts are 8 ranks, all but 1/128 of them others.
    pairs = tokens * 8 * 127 / 128
    rows = pairs * (2 * (4 * 2048 + 2 * 8) + 8 * 8) + 8 * 127
    one_expert = 3 * 2048 * 768 * 2
    assert found.sent == pytest.approx(rows + one_expert, rel=1e-12)
    assert found.held == 4 * one_expert


def test_a_layer_that_shares_sums_what_it_shares_and_what_experts_own(scaling):
    size, ranks = scaling.MIXTRAL, 64
    (found,) = (
        each
        for each in scaling.costs("residual 16", size, ranks, 1000, size.experts, size.top_k)
        if (each.kind, each.group) == ("replicated", 1)
    )
    shared = 3 * 4096 * 14336 * 2
    owned = 8 * 3 * 16 * (4096 + 14336) * 2
    assert found.sent == pytest.approx(2 * (1 - 1 / 64) * (shared + owned), rel=1e-12)
    assert found.held == 4 * (shared + owned)


def test_the_shared_part_is_as_large_as_one_expert(scaling):
    assert "The shared part is as large as one expert" in PAGE
    for size in scaling.SIZES:
        one = scaling.owned_bytes(scaling.ORDINARY, size, size.experts) / size.experts
        assert all(scaling.shared_bytes(name, size) == one for name in scaling.SHARING)


def test_many_small_experts_send_less_from_few_tokens_on(scaling, break_even):
    assert "from 50 to 700 tokens per rank and step on" in PAGE
    assert "with large owned cores from 1,600 on" in PAGE
    every = {key[1:]: value for key, value in break_even.items() if key[0] == scaling.QWEN3}
    others = [value for (name, _), value in every.items() if name != COSTLIEST]
    assert 45 < min(others) < 55
    assert 690 < max(others) < 710
    assert max(every.values()) == every[COSTLIEST, 8]
    assert 1550 < every[COSTLIEST, 8] < 1650


def test_few_large_experts_send_less_from_11000_tokens_on(scaling, break_even):
    assert "only from 11,000 on" in PAGE
    assert "unless a rank has more than about 11,000 tokens in a step" in PAGE
    found = [break_even[scaling.MIXTRAL, name, 8] for name in scaling.SHARING]
    assert 10_700 < min(found) < 11_300
    assert max(found) < 12_500


def test_the_pictures_lines_cross_where_its_description_says(scaling, break_even):
    assert "between two hundred and a thousand tokens for Qwen3-30B-A3B" in PAGE
    names = ("hidden", "residual 16", COSTLIEST)
    found = [break_even[scaling.QWEN3, name, 128] for name in names]
    assert 190 < min(found) < max(found) < 1000


def test_break_even_falls_with_the_ranks(scaling, break_even):
    assert "The number falls with the ranks" in PAGE
    for size in scaling.SIZES:
        for name in scaling.SHARING:
            found = [break_even[size, name, ranks] for ranks in scaling.RANKS]
            assert found == sorted(found, reverse=True)


def test_memory_is_as_the_page_says(scaling):
    qwen3, mixtral = scaling.QWEN3, scaling.MIXTRAL
    ordinary = {ranks: scaling.held(scaling.ORDINARY, qwen3, ranks, "spread") for ranks in (8, 256)}
    replicated = {name: scaling.held(name, qwen3, 8, "replicated") for name in scaling.SHARING}
    assert "50 to 591 MB stand against 604" in PAGE
    assert round(min(replicated.values()) / 1e6) == 50
    assert round(max(replicated.values()) / 1e6) == 591
    assert round(ordinary[8] / 1e6) == 604
    assert "`residual 16` more than four times as much" in PAGE
    assert 4 < replicated["residual 16"] / ordinary[256] < 5
    assert "For Mixtral-8x7B this holds from 8 ranks on" in PAGE
    for name in scaling.SHARING:
        least = scaling.held(scaling.ORDINARY, mixtral, 8, "spread")
        assert scaling.held(name, mixtral, 8, "spread") >= least
        assert scaling.held(name, mixtral, 8, "replicated") > least


def test_operations_per_token_are_as_the_page_says(scaling):
    assert "compute four to six and a half times less" in PAGE

    def operations(name):
        every = scaling.costs(name, scaling.QWEN3, 1, 8192, 128, MANY_EXPERTS_PER_TOKEN)
        return min(each.flops for each in every)

    ordinary = operations(scaling.ORDINARY)
    assert ordinary == 3 * 2 * 3 * 2048 * 768 * 8192 * MANY_EXPERTS_PER_TOKEN
    gains = [ordinary / operations(name) for name in ("hidden", "residual 16", "residual 64")]
    assert 4 < min(gains) < max(gains) < 6.6
    assert "`split` computes as much as an ordinary mixture" in PAGE
    assert operations("split") == pytest.approx(ordinary, rel=0.01)


def test_owned_cores_on_every_rank_send_nothing_at_inference(scaling):
    for size in scaling.SIZES:
        plan = scaling.expert_placement(
            scaling.layer_of("residual 16", size, size.experts), size.experts,
            tokens=8192, top_k=size.top_k, bandwidth=1e9, training=False,
        )  # fmt: skip
        replicated, _, spread = plan.placements
        assert replicated.sent_bytes == 0 < spread.sent_bytes


def test_few_large_experts_lose_on_as_many_ranks_with_few_tokens(scaling, speedups):
    assert "it is ten times as fast" in PAGE
    assert round(1 / speedups[scaling.MIXTRAL, 8, "Ethernet", 512]) == 10
    assert speedups[scaling.MIXTRAL, 8, "InfiniBand", 512] < 0.5
    more = [
        value
        for (size, ranks, _, tokens), value in speedups.items()
        if size == scaling.MIXTRAL and ranks > size.experts and tokens == 512
    ]
    assert "With 512 tokens the times differ by 10 % at most" in PAGE
    assert all(0.9 < each < 1.1 for each in more)


def test_many_small_experts_win_in_all_cases_but_two(scaling, speedups):
    assert "in all cases of the table but two, on 8 ranks with 512 tokens" in PAGE
    lost = {key[1:] for key, value in speedups.items() if key[0] == scaling.QWEN3 and value < 1}
    assert lost == {(8, "InfiniBand", 512), (8, "Ethernet", 512)}


def test_many_tokens_win_for_both_sizes(scaling, speedups):
    assert "With 32,768 tokens and large experts it is 2 to 2.6 times as fast" in PAGE
    found = {key: value for key, value in speedups.items() if key[3] == 32_768}
    large = [value for key, value in found.items() if key[0] == scaling.MIXTRAL]
    assert 1.95 < min(large) < max(large) < 2.65
    assert min(found.values()) > 1.95


def test_more_experts_per_token_favour_sharing_and_more_experts_do_not(scaling):
    assert "sharing sends more than three times as much" in PAGE

    def relative(experts, top_k):
        ordinary, own = (
            scaling.cheapest(name, scaling.MIXTRAL, 64, 8192, experts=experts, top_k=top_k).sent
            for name in (scaling.ORDINARY, "residual 16")
        )
        return ordinary / own

    assert relative(512, 1) < 1 / 3
    assert relative(8, 1) < relative(8, 2) < relative(8, 8)
    assert relative(8, 2) > relative(32, 2) > relative(128, 2) > relative(512, 2)

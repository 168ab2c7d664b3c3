"""The router in which experts choose tokens, against its definition."""

from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tnmoe as tn
from tests.nn.routing.kinds import E, H, as_matrix
from tnmoe import nn


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.floats(0.2, E), st.booleans(), st.integers(0, 99))
def test_experts_choose_the_tokens_that_score_highest_for_them(
    tokens, sequences, factor, normalize, seed
):
    torch.manual_seed(seed)
    router = nn.ExpertChoiceRouter(H, E, factor, normalize=normalize, scope="sequence")
    x = torch.randn(sequences, tokens, H)
    logits, weights, index = router(x)
    scores = logits.softmax(-1).view(sequences, tokens, E)
    taken = torch.zeros_like(scores, dtype=torch.bool)
    for b in range(sequences):
        for e in range(E):
            best = scores[b, :, e].topk(min(tokens, ceil(factor / E * tokens))).indices
            taken[b, best, e] = True
    expected = scores * taken
    if normalize:
        expected = expected / expected.sum(-1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(as_matrix(weights, index), expected.view(-1, E))
    assert index.shape[1] == max(1, int(taken.sum(-1).max()))


def test_expert_choice_has_biases_on_its_logits():
    router = nn.ExpertChoiceRouter(H, E, bias=True)
    torch.nn.init.normal_(router.bias)
    x = torch.randn(5, H)
    torch.testing.assert_close(router(x)[0], x @ router.weight.T + router.bias)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.ExpertChoiceRouter(H, 3, 0.0), "capacity_factor must be in .*, got 0.0"),
        (lambda: nn.ExpertChoiceRouter(H, 3, scope="all"), "scope must be one of batch, sequence"),
    ],
)
def test_bad_settings_of_expert_choice_are_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make()

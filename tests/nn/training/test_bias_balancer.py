"""Load biases moved after every step of an optimiser."""

import pytest
import torch

import tnmoe as tn
from tnmoe import nn


def biased(**details):
    return nn.TopKRouter(8, 4, 1, score_function="sigmoid", load_bias=True, **details)


def test_a_bias_moves_by_the_sign_of_what_an_expert_lacks_and_chooses_but_does_not_weigh():
    torch.manual_seed(0)
    router, x = biased(normalize=False), torch.randn(50, 8)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.0)
    counts = torch.bincount(router.eval()(x)[2].flatten(), minlength=4)
    router.train()
    with nn.BiasBalancer(optimizer, router, rate=0.1):
        router(x)
        optimizer.step()
    expected = 0.1 * torch.sign(50 / 4 - counts)
    torch.testing.assert_close(router.load_bias.value, expected)
    logits, weights, index = router(x)
    assert torch.equal(index[:, 0], (logits.sigmoid() + expected).argmax(-1))
    torch.testing.assert_close(weights, logits.sigmoid().gather(-1, index))
    optimizer.step()  # without the balancer nothing moves
    torch.testing.assert_close(router.load_bias.value, expected)


def test_biases_balance_a_skewed_router():
    torch.manual_seed(0)
    router = biased()
    x = torch.randn(400, 8) + 1
    with torch.no_grad():
        router.weight.normal_(std=0.3)
        router.weight[0] += 0.2
    optimizer = torch.optim.SGD(router.parameters(), lr=0.0)
    with nn.BiasBalancer(optimizer, router, rate=0.002):
        for step in range(300):
            with nn.record_routing(router) as routing:
                router(x)
            optimizer.step()
            if step == 0:
                before = nn.routing_statistics(routing)[""].max_violation
    after = nn.routing_statistics(routing)[""].max_violation
    assert before > 1
    assert after < 0.25


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda router, o: nn.BiasBalancer(o, nn.TopKRouter(8, 4)), "no router has load_bias"),
        (
            lambda router, o: nn.BiasBalancer(o, router, -1.0),
            r"rate must be in \[0, inf\), got -1.0",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    router = biased()
    with pytest.raises(tn.InputError, match=message):
        make(router, torch.optim.SGD(router.parameters(), lr=0.1))

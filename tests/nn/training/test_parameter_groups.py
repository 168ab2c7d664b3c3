"""Parameter groups with a learning rate of their own for shared cores."""

import pytest
import torch

import tnmoe as tn
from tests.nn.training.small_layer import backward, make_top2_layer
from tnmoe import nn


def test_parameter_groups_hold_every_trained_parameter_once_and_shared_ones_apart():
    layer = make_top2_layer()
    layer.router.weight.requires_grad_(False)
    own, shared = nn.parameter_groups(layer, lr=0.1, weight_decay=0.01)
    assert own["lr"] == 0.1
    assert shared["lr"] == pytest.approx(0.1 / 4)
    assert own["weight_decay"] == shared["weight_decay"] == 0.01
    assert {id(each) for each in shared["params"]} == {
        id(layer.experts.up.center),
        id(layer.experts.down.center),
    }
    both = [id(each) for each in (*own["params"], *shared["params"])]
    trained = [id(each) for each in layer.parameters() if each.requires_grad]
    assert sorted(both) == sorted(trained)
    optimizer = torch.optim.SGD(nn.parameter_groups(layer, lr=0.1, shared_scale=0.5))
    backward(layer)
    core = layer.experts.up.center
    expected = core.detach() - 0.05 * core.grad
    optimizer.step()
    torch.testing.assert_close(core.detach(), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.parameter_groups(torch.nn.Linear(2, 2), 0.1), "Linear has no core that"),
        (
            lambda: nn.parameter_groups(make_top2_layer(), 0.1, -1.0),
            r"shared_scale must be in \[0, inf\), got -1.0",
        ),
        (
            lambda: nn.parameter_groups(torch.nn.ModuleList(map(make_top2_layer, (4, 2))), 0.1),
            r"give shared_scale: layers have \[2, 4\] experts",
        ),
    ],
)
def test_bad_groups_are_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make()

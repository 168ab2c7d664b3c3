"""Adding, removing and reordering experts, against loops over dense networks."""

import copy

import pytest
import torch

from tests.nn.editing.layers import KINDS, DenseLayer, make, tokens
from tests.nn.layouts import E, H
from tnmoe import nn
from tnmoe.errors import InputError


def outputs_and_gradients(layer, x):
    layer.zero_grad()
    output = layer(x)
    output.sin().sum().backward()
    return output.detach(), {name: each.grad for name, each in layer.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_after_every_change_a_layer_is_the_loop_over_its_dense_experts(kind):
    layer, x = make(kind), tokens()
    dense = DenseLayer.of(layer)
    for change, experts in (
        (lambda: nn.add_experts(layer, 2, like=[3, 0]), [0, 1, 2, 3]),
        (lambda: nn.open_experts(layer), [0, 1, 2, 3, 3, 0]),
        (lambda: nn.reorder_experts(layer, [5, 3, 1, 0, 2, 4]), [0, 3, 1, 0, 2, 3]),
        (lambda: nn.remove_experts(layer, [1, 4, 0]), [1, 0, 3]),
        (lambda: nn.add_experts(layer, 1, like=1), [1, 0, 3]),
        (lambda: nn.remove_experts(layer, [3, 2]), [1, 0]),
    ):
        change()
        torch.testing.assert_close(layer(x), dense.select(experts)(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_added_experts_change_no_bit_of_outputs_and_gradients(kind, dtype, training):
    layer, x = make(kind, dtype=dtype).train(training), tokens(dtype)
    expected, gradients = outputs_and_gradients(layer, x)
    with torch.no_grad():
        without_gradients = layer(x)
    assert nn.add_experts(layer, 3) == [4, 5, 6]
    found, new_gradients = outputs_and_gradients(layer, x)
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(layer(x), without_gradients)
    for name, gradient in gradients.items():
        new = new_gradients[name]
        # Matrices of low rank lie one after the other: the old ones come first.
        assert torch.equal(new[: len(gradient)], gradient), name
        assert not new[len(gradient) :].any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_new_experts_copy_matrices_and_routes_of_those_they_are_like(kind):
    layer = make(kind, noisy=True)
    before = DenseLayer.of(layer)
    nn.add_experts(layer, 2, like=[2, 1])
    after = DenseLayer.of(layer).select([4, 5])
    expected = before.select([2, 1])
    for name, matrix in expected.matrices.items():
        torch.testing.assert_close(after.matrices[name], matrix)
    for name, bias in expected.biases.items():
        torch.testing.assert_close(after.biases[name], bias)
    assert torch.equal(after.router, expected.router)
    assert torch.equal(layer.router.noise_weight[4:], layer.router.noise_weight[[2, 1]])


@pytest.mark.parametrize("kind", ["interleaved", "hidden; biases", "stacked", "low rank"])
def test_by_default_new_experts_copy_the_old_ones_in_turn(kind):
    layer = make(kind)
    before = DenseLayer.of(layer).matrices["up"]
    nn.add_experts(layer, 6)
    after = layer.experts.matrices()["up"]
    torch.testing.assert_close(after, before[[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]])


@pytest.mark.parametrize(
    "kind", ["residual", "residual, three sites", "residual, end shared", "residual; gated, biases"]
)
def test_by_default_residual_experts_start_as_the_base_and_train(kind):
    layer, x = make(kind), tokens()
    new = nn.add_experts(layer, 2)
    for projection in layer.experts.projections().values():
        base = projection.base.weight.expand(2, -1, -1)
        assert torch.equal(projection.weight()[4:], base)
        if projection.bias is not None:
            assert not projection.bias[4:].any()
            assert projection.bias[:4].any()
    nn.open_experts(layer, new)
    nn.close_experts(layer, range(E))
    layer(x).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert (layer.experts.down.delta.weight()[4:].abs().amax((1, 2)) > 0).all()


def test_noise_makes_copies_differ_by_its_share_of_the_root_mean_square():
    layer = make("stacked; biases")
    nn.add_experts(layer, 1, like=2, noise=0.1, rng=0)
    up, router = layer.experts.up, layer.router
    for tensor in (up.stacked, router.weight):
        noise, old = tensor[4] - tensor[2], tensor[2]
        share = noise.square().mean().sqrt() / old.square().mean().sqrt()
        assert 0.02 < share < 0.3
    assert torch.equal(up.bias[4], up.bias[2])
    assert router.bias[4] == router.bias[2]
    again = make("stacked; biases")
    nn.add_experts(again, 1, like=2, noise=0.1, rng=0)
    assert torch.equal(again.router.weight, router.weight)


def test_a_layer_may_shrink_to_one_expert_and_grow_again():
    layer, x = make("interleaved; biases", top_k=1), tokens()
    dense = DenseLayer.of(layer)
    nn.remove_experts(layer, [0, 1, 3])
    torch.testing.assert_close(layer(x), dense.select([2])(x, top_k=1))
    nn.add_experts(layer, 3)
    nn.open_experts(layer)
    torch.testing.assert_close(layer(x), dense.select([2])(x, top_k=1))
    assert layer.experts.up.bias.shape[0] == layer.router.num_experts == 4


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_a_token_that_chose_no_removed_expert_keeps_its_output(score_function):
    layer, x = make("residual", score_function=score_function, num_groups=1), tokens(count=200)
    before, (_, _, index) = layer(x), layer.router(x)
    nn.remove_experts(layer, [1])
    after, stays = layer(x), (index != 1).all(1)
    assert stays.any()
    assert not stays.all()
    torch.testing.assert_close(after[stays], before[stays], rtol=1e-12, atol=1e-12)
    assert (after[~stays] != before[~stays]).any(1).all()


def test_weights_that_do_not_sum_to_one_grow_when_an_expert_leaves():
    layer, x = make("stacked", top_k=1, normalize=False), tokens()
    logits, weights, index = layer.router(x)
    nn.remove_experts(layer, 3)
    stays = index[:, 0] != 3
    share_of_removed = logits.softmax(-1)[:, 3:]
    _, after, _ = layer.router(x)
    torch.testing.assert_close(after[stays], (weights / (1 - share_of_removed))[stays])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_another_order_computes_the_same(kind, training):
    layer, x = make(kind).train(training), tokens()
    expected = layer(x)
    nn.reorder_experts(layer, [2, 0, 3, 1])
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    nn.reorder_experts(layer, [1, 3, 0, 2])
    assert torch.equal(layer(x), expected)


def test_closed_experts_stay_closed_under_other_numbers():
    layer = make("stacked")
    nn.close_experts(layer, [1])
    nn.reorder_experts(layer, [1, 0, 3, 2])
    assert layer.router.open_experts.tolist() == [1, 2, 3]
    nn.remove_experts(layer, [2])
    assert layer.router.open_experts.tolist() == [1, 2]
    nn.remove_experts(layer, [0])
    assert layer.router.open_experts is None


def test_inserted_experts_leave_the_groups_of_a_router_together():
    layer, x = make("stacked", top_k=1, num_groups=2, top_groups=1, group_score=1), tokens()
    before = layer(x)
    nn.add_experts(layer, 2, like=[1, 3])
    nn.reorder_experts(layer, [0, 1, 4, 2, 3, 5])
    assert torch.equal(layer(x), before)
    nn.open_experts(layer)
    # The new experts are copies in the groups of their originals.
    torch.testing.assert_close(layer(x), before)


def test_groups_may_become_smaller_than_the_experts_that_make_their_score():
    layer, x = make("stacked", top_k=1, num_groups=2, top_groups=1, group_score=2), tokens()
    dense = DenseLayer.of(layer)
    nn.remove_experts(layer, [1, 2])
    torch.testing.assert_close(layer(x), dense.select([0, 3])(x, top_k=1))


def test_cores_that_two_projections_have_in_common_change_once():
    layer, x = make("gate and up share ends; gated"), tokens()
    up, gate = layer.experts.up, layer.experts.gate
    gate.set_core(0, up.core_at(0))
    expected = layer(x)
    nn.add_experts(layer, 2)
    assert gate.core_at(0) is up.core_at(0)
    assert len(up.core_at(0)) == 6
    assert torch.equal(layer(x), expected)


def test_gradients_follow_the_experts():
    layer, x = make("interleaved; biases"), tokens()
    layer(x).sin().sum().backward()
    weight, bias = layer.router.weight.grad.clone(), layer.experts.up.bias.grad.clone()
    nn.add_experts(layer)
    nn.reorder_experts(layer, [4, 3, 2, 1, 0])
    assert torch.equal(layer.router.weight.grad[1:], weight[[3, 2, 1, 0]])
    assert torch.equal(layer.experts.up.bias.grad[1:], bias[[3, 2, 1, 0]])
    assert not layer.router.weight.grad[0].any()


class NarrowRouter(nn.TopKRouter):
    """A router of a user, with a tensor of its own."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.temperature = torch.nn.Parameter(torch.linspace(1, 2, self.num_experts))

    def _logits(self, tokens):
        return super()._logits(tokens) / self._of_open(self.temperature)


class KnownRouter(NarrowRouter):
    def expert_rows(self, expert):
        return super().expert_rows(expert) | {"temperature": slice(expert, expert + 1)}


class PlainRouter(nn.Router):
    """A router of a user without tensors of its own: always the best expert, with weight 1."""

    def chosen_experts(self, logits, index):
        return index

    def _route(self, logits, mask, sequences):
        index = logits.argmax(-1, keepdim=True)
        return torch.ones_like(index, dtype=logits.dtype), index


def test_a_router_of_a_user_grows_with_its_layer():
    x = tokens(torch.float32)
    for router in (KnownRouter(H, E, 2), PlainRouter(H, E)):
        torch.nn.init.normal_(router.weight)
        layer = nn.MPOMoE(router, make("stacked", dtype=torch.float32).experts)
        expected = layer(x)
        nn.add_experts(layer, 2)
        nn.reorder_experts(layer, [4, 0, 1, 5, 2, 3])
        torch.testing.assert_close(layer(x), expected)
        nn.open_experts(layer)
        assert layer(x).shape == expected.shape
    assert layer.router(x)[0].shape == (len(x), 6)


def test_a_tensor_of_a_router_that_may_belong_to_experts_is_named():
    layer = nn.MPOMoE(NarrowRouter(H, E, 2), make("stacked", dtype=torch.float32).experts)
    with pytest.raises(InputError, match="NarrowRouter has a tensor 'temperature' of 4 rows"):
        nn.add_experts(layer)


def state_of(layer):
    numbers = {name: each.clone() for name, each in layer.state_dict().items()}
    return numbers, layer.router.num_experts, layer.experts.num_experts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: nn.add_experts(layer, 0), "count must be a positive integer, got 0"),
        (lambda layer: nn.add_experts(layer, 1.5), "count must be a positive integer, got 1.5"),
        (lambda layer: nn.add_experts(layer, like=4), "like must be an integer from 0 to 3, got 4"),
        (lambda layer: nn.add_experts(layer, 2, like=[0]), "one for each of the 2 new ones"),
        (lambda layer: nn.add_experts(layer, 2, like=[0, -1]), "every number in like must be"),
        (lambda layer: nn.add_experts(layer, noise=-1), "noise must be in"),
        (lambda layer: nn.add_experts(layer, 2, noise=1, rng="x"), "rng must be"),
        (lambda layer: nn.remove_experts(layer, []), "experts must be one at least"),
        (lambda layer: nn.remove_experts(layer, [4]), "every expert must be an integer from 0"),
        (lambda layer: nn.remove_experts(layer, "0"), "every expert must be an integer"),
        (lambda layer: nn.remove_experts(layer, [0, 0]), "each given once"),
        (lambda layer: nn.remove_experts(layer, [0, 1, 2]), "top_k=2 exceeds num_experts=1"),
        (lambda layer: nn.remove_experts(layer, range(4)), "a layer needs an expert"),
        (lambda layer: nn.reorder_experts(layer, [0, 1, 2]), "every number from 0 to 3 once"),
        (lambda layer: nn.reorder_experts(layer, [0, 1, 2, 2]), "each given once"),
        (lambda layer: nn.close_experts(layer, [0, 1, 2]), "top_k=2 exceeds num_experts=1"),
        (lambda layer: nn.close_experts(layer, 7), "every expert must be an integer from 0 to 3"),
        (lambda layer: nn.open_experts(layer, [1, 1]), "each given once"),
        (lambda layer: nn.merge_experts(layer, [1]), "merging needs two experts at least"),
        (lambda layer: nn.merge_experts(layer, [0, 1], [1]), "weights must be one per expert"),
        (lambda layer: nn.merge_experts(layer, [0, 1], [1, -1]), "every weight must be in"),
        (lambda layer: nn.merge_experts(layer, [0, 1], [0, 0]), "weights must not all be 0"),
        (lambda layer: nn.merge_experts(layer, [0, 1, 2, 3]), "top_k=2 exceeds num_experts=1"),
    ],
)
def test_wrong_numbers_change_nothing(change, message):
    layer = make("interleaved; biases")
    numbers, *counts = state_of(layer)
    with pytest.raises(InputError, match=message):
        change(layer)
    after, *counts_after = state_of(layer)
    assert counts == counts_after
    assert after.keys() == numbers.keys()
    assert all(torch.equal(after[name], each) for name, each in numbers.items())


def test_groups_of_experts_stay_of_one_size():
    layer = make("stacked", top_k=1, num_groups=2, top_groups=1)
    for change in (
        lambda: nn.add_experts(layer, 1),
        lambda: nn.remove_experts(layer, 0),
        lambda: nn.close_experts(layer, 0),
    ):
        with pytest.raises(InputError, match="num_groups=2 does not divide"):
            change()
    nn.add_experts(layer, 2)
    with pytest.raises(InputError, match="num_groups=2 does not divide the number of experts 5"):
        nn.open_experts(layer, 4)
    nn.open_experts(layer, [4, 5])


def test_something_else_in_place_of_a_layer_is_named():
    layer = make("stacked")
    for wrong, message in (
        (layer.experts, "the layer must be an MPOMoE, got DenseExperts"),
        (torch.nn.Sequential(layer), "the layer must be an MPOMoE, got Sequential"),
    ):
        for change in (nn.add_experts, nn.open_experts):
            with pytest.raises(InputError, match=message):
                change(wrong)
        with pytest.raises(InputError, match=message):
            nn.remove_experts(wrong, 0)
    wrapped = copy.deepcopy(layer)
    wrapped.experts.up = torch.nn.Sequential(wrapped.experts.up)
    with pytest.raises(InputError, match="the layer's up must be a Projection, got Sequential"):
        nn.add_experts(wrapped)


def test_a_parametrized_core_is_named():
    layer = make("interleaved")
    torch.nn.utils.parametrizations.weight_norm(layer.experts.up, "aux_0")
    with pytest.raises(InputError, match=r"experts.up.aux_0 is not a parameter of its own"):
        nn.add_experts(layer)


def test_cores_of_experts_that_another_layer_has_too_are_named():
    layers = [make("interleaved") for _ in range(2)]
    nn.tie_layers(layers, [0])
    with pytest.raises(InputError, match="up has cores of site 0, which experts own, in common"):
        nn.add_experts(layers[1])
    shared = [make("interleaved") for _ in range(2)]
    nn.tie_layers(shared)
    expected = shared[1](tokens())
    nn.add_experts(shared[0])
    assert shared[0].experts.up.center is shared[1].experts.up.center
    assert torch.equal(shared[1](tokens()), expected)


def test_a_layer_keeps_an_open_expert():
    layer = nn.MPOMoE(nn.ExpertChoiceRouter(H, E, dtype=torch.float64), make("stacked").experts)
    with pytest.raises(InputError, match="experts to choose among must be a positive integer"):
        nn.close_experts(layer, range(E))
    nn.close_experts(layer, [0])
    with pytest.raises(InputError, match="experts to choose among must be a positive integer"):
        nn.remove_experts(layer, [1, 2, 3])
    assert layer.experts.num_experts == E

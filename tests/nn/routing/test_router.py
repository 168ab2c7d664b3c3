"""What holds for routers of every kind."""

import copy
import pickle

import pytest
import torch

import tnmoe as tn
from tests.nn.routing.kinds import KINDS, NO_EXPERT, E, H, all_kinds, as_matrix
from tnmoe import nn


@pytest.mark.parametrize(
    "make",
    [
        lambda **d: nn.TopKRouter(H, E, 2, second_expert="none", **d),
        lambda **d: nn.TopKRouter(H, E, 3, score_function="sigmoid", capacity_factor=0.3, **d),
        lambda **d: nn.ExpertChoiceRouter(H, E, 1.5, **d),
    ],
)
def test_a_single_remaining_expert_has_weight_one_and_still_teaches_the_router(make):
    torch.manual_seed(0)
    router, x = make(), torch.randn(60, H)
    logits, weights, index = router(x)
    single = (index < NO_EXPERT).sum(1) == 1
    assert single.sum() > 5
    torch.testing.assert_close(weights[single].sum(1), torch.ones(int(single.sum())))
    (grad,) = torch.autograd.grad(weights[single].sum(), logits, retain_graph=True)
    twin = logits.detach().requires_grad_()
    scores = (
        twin.log_softmax(-1)
        if router.score_function == "softmax"
        else (torch.nn.functional.logsigmoid(twin))
    )
    chosen = scores[single].gather(1, index[single].min(1, keepdim=True).values)
    (expected,) = torch.autograd.grad(chosen.sum(), twin)
    torch.testing.assert_close(grad, expected)
    with torch.no_grad():
        plain = make(straight_through=False)
        plain.load_state_dict(router.state_dict())
        torch.testing.assert_close(plain(x)[1], weights)
    _, weights, index = plain(x)
    weights[(index < NO_EXPERT).sum(1) == 1].sum().backward()
    assert (plain.weight.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_computed_in_single_precision_under_autocast_and_half_models(dtype):
    router = nn.TopKRouter(H, E, top_k=2, noisy=True, bias=True).eval()
    x = torch.randn(5, H)
    expected = router(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router(x)[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    logits, weights, _ = router.to(dtype)(x.to(dtype))
    assert (logits.dtype, weights.dtype) == (torch.float32, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 6e4, -6e4, 6e-8])
def test_no_input_of_half_precision_makes_a_weight_or_gradient_that_is_no_number(kind, value):
    torch.manual_seed(0)
    router = all_kinds()[kind].half()
    with torch.no_grad():
        router.weight.mul_(5e4)
    x = torch.full((7, H), value, dtype=torch.float16)
    x[3] *= -1
    logits, weights, index = router(x)
    assert torch.isfinite(logits).all()
    assert torch.isfinite(weights).all()
    assert ((index >= 0) & (index <= NO_EXPERT)).all()
    weights.float().square().sum().backward()
    assert torch.isfinite(router.weight.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_reaches_no_expert_and_changes_nothing_for_other_tokens(kind):
    torch.manual_seed(0)
    router = all_kinds()[kind].eval()
    if isinstance(router, nn.TopKRouter):
        router.eval_capacity_factor = router.capacity_factor
    x = torch.randn(3, 7, H)
    mask = torch.rand(3, 7) < 0.6
    _, weights, index = router(x, mask)
    _, expected, chosen = router(x[mask])
    padding = ~mask.view(-1)
    assert (index[padding] == NO_EXPERT).all()
    assert (weights[padding] == 0).all()
    torch.testing.assert_close(as_matrix(weights, index)[~padding], as_matrix(expected, chosen))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_without_tokens_give_empty_results(kind):
    router = all_kinds()[kind]
    for x in (torch.zeros(0, H), torch.zeros(2, 0, H), torch.zeros(0, 3, H)):
        logits, weights, index = router(x)
        assert logits.shape == (0, E)
        assert weights.shape == index.shape
        assert len(index) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_routers_survive_copies_pickles_state_dicts_and_compilers(kind):
    torch.compiler.reset()
    router = all_kinds()[kind].eval()
    x = torch.randn(9, H)
    expected = as_matrix(*router(x)[1:])
    twin = all_kinds()[kind].eval()
    twin.load_state_dict(router.state_dict())
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    for other in (copy.deepcopy(router), pickle.loads(pickle.dumps(router)), twin, compiled):
        torch.testing.assert_close(as_matrix(*other(x)[1:]), expected)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"gshard", "shazeer"}))
def test_function_transforms_see_the_router_they_transform(kind):
    torch.manual_seed(0)
    router = all_kinds()[kind]
    x, probe = torch.randn(3, 5, H), torch.randn(15, E)

    def loss(parameters, x):
        _, weights, index = torch.func.functional_call(router, parameters, (x,))
        return (as_matrix(weights, index) * probe).sum()

    parameters = {"weight": router.weight.detach()}
    found = torch.func.grad(loss)(parameters, x)
    loss({"weight": router.weight}, x).backward()
    torch.testing.assert_close(found["weight"], router.weight.grad)
    _, weights, index = torch.func.vmap(router)(x)
    for b in range(3):
        _, expected, chosen = router(x[b])
        torch.testing.assert_close(as_matrix(weights[b], index[b]), as_matrix(expected, chosen))


@pytest.mark.parametrize("make", [nn.TopKRouter, nn.ExpertChoiceRouter])
def test_jitter_multiplies_every_input_by_its_own_number_in_training_only(make):
    torch.manual_seed(0)
    router = make(H, H, jitter_noise=0.5)
    with torch.no_grad():
        router.weight.copy_(torch.eye(H))  # logits are the inputs
    factors = router(torch.ones(2000, H))[0]
    assert factors.min() >= 0.5
    assert factors.max() <= 1.5
    torch.testing.assert_close(factors.mean(), torch.tensor(1.0), rtol=0.02, atol=0)
    torch.testing.assert_close(factors.var(), torch.tensor(1 / 12), rtol=0.05, atol=0)
    assert abs(torch.corrcoef(factors.T) - torch.eye(H)).max() < 0.1
    assert (router.eval()(torch.ones(5, H))[0] == 1).all()


def test_all_axes_but_the_last_two_count_sequences():
    router = nn.TopKRouter(H, E, capacity_factor=0.5, capacity_scope="sequence")
    x = torch.randn(2, 3, 7, H)
    for shape in ((2, 3, 7, H), (6, 7, H)):
        assert torch.equal(router(x.view(shape))[2], router(x.view(6, 7, H))[2])
    assert not torch.equal(router(x)[2], router(x.view(2, 21, H))[2])


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"expert choice", "expert choice, sigmoid"}))
def test_routers_work_out_shapes_on_the_meta_device_and_export_for_any_number_of_tokens(kind):
    router = all_kinds()[kind]
    logits, weights, index = copy.deepcopy(router).to("meta")(torch.zeros(5, H, device="meta"))
    assert logits.shape == (5, E)
    assert weights.shape == index.shape == (5, router.top_k)
    router.eval()
    exported = torch.export.export(
        router, (torch.randn(6, H),), dynamic_shapes=({0: torch.export.Dim("T")},)
    )
    x = torch.randn(11, H)
    for one, other in zip(exported.module()(x), router(x), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.TopKRouter(H, 3)(torch.zeros(2, 5)), r"shape \(..., 8\), got \(2, 5\)"),
        (
            lambda: nn.TopKRouter(H, 3)(torch.zeros(2, H), torch.ones(3)),
            r"an entry for each of 2 tokens, got shape \(3,\)",
        ),
        (lambda: nn.TopKRouter(H, 3)(torch.zeros(2, H), [1, 1]), r"of 2 tokens, got \[1, 1\]"),
        (
            lambda: nn.TopKRouter(H, 3)(torch.zeros(2, H), torch.tensor([0.0, -1e9])),
            "must be 0 where a token is padding, got negative numbers",
        ),
        (
            lambda: nn.TopKRouter(H, 3)(torch.zeros(2, H, dtype=torch.int64)),
            "expected floating-point numbers .* of torch.int64",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(tn.InputError, match=message):
        make()

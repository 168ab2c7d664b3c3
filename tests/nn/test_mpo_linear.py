"""A linear layer as an MPO does what torch.nn.Linear does, with the matrix of its cores."""

import copy

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import tnmoe as tn
from tnmoe import InputError, nn
from tnmoe.nn.compute.cache import weight_cache
from tnmoe.nn.linear import weight_of_linear

IN, OUT = 18, 24
SHAPES = {
    "interleaved": tn.MPOShape((2, 4, 3), (2, 3, 3)),
    "low rank": tn.MPOShape((OUT, 1), (1, IN)),
    "padded": tn.MPOShape((5, 5), (4, 5), OUT, IN),
    "train": tn.MPOShape((4, 6, 1, 1), (1, 1, 3, 6)),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Quantized(torch.nn.Module):
    """A linear module without a matrix of floats: whole numbers and one scale."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("numbers", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.numbers * self.scale, self.bias)


class Halved(torch.Tensor):
    """A weight as quantizers make them: it looks like floats, and only products know its numbers.

    These are twice what it stores.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            x, weight, bias = args
            with torch._C.DisableTorchFunctionSubclass():
                return func(x, 2 * weight.detach().as_subclass(torch.Tensor), bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def halved():
    made = linear()
    weight = torch.nn.Parameter((made.weight.detach() / 2).as_subclass(Halved), requires_grad=False)
    made.weight = weight
    assert type(made.weight) is Halved
    return made


def linear(bias=True, dtype=None, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(IN, OUT, bias=bias, dtype=dtype)


def low_rank(rank=3):
    made = linear()
    with torch.no_grad():
        made.weight.copy_(torch.randn(OUT, rank) @ torch.randn(rank, IN))
    return made


def trained_residual(base, **settings):
    """A layer around a module, whose MPO no longer is zero."""
    layer = nn.MPOLinear.from_linear(base, residual=True, rng=0, **settings)
    with torch.no_grad():
        for core in layer.projection.parameters():
            core += 0.1 * torch.randn_like(core)
    return layer


def conv1d():
    torch.manual_seed(0)
    made = Conv1D(OUT, IN)
    with torch.no_grad():
        made.bias.normal_()
    return made


def contracted(layer):
    """The matrix by one contraction of the cores, which is their definition."""
    matrix = torch.ones(1, 1, 1, dtype=torch.float64)
    for core in layer.to_mpo().cores:
        matrix = torch.einsum("oia,apqb->opiqb", matrix, core.detach().double())
        matrix = matrix.flatten(2, 3).flatten(0, 1)
    return matrix[:OUT, :IN, 0]


@pytest.fixture(params=["plain", "residual"])
def layer(request):
    made = linear()
    if request.param == "plain":
        return nn.MPOLinear.from_linear(made, shape=SHAPES["interleaved"], max_bond=3)
    return trained_residual(made, max_bond=3)


@pytest.mark.parametrize("route", ["joint", "per_expert", "rebuilt", "cached", None])
@pytest.mark.parametrize("name", SHAPES)
def test_every_route_multiplies_by_the_matrix_of_the_cores(name, route):
    torch.manual_seed(0)
    made = nn.MPOLinear(IN, OUT, shape=SHAPES[name], max_bond=3, dtype=torch.float64)
    made.projection.route = route
    x = torch.randn(5, IN, dtype=torch.float64)
    expected = x @ contracted(made).T + made.bias
    with torch.no_grad():
        torch.testing.assert_close(made(x), expected)
    torch.testing.assert_close(made.weight, contracted(made))


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_gradients_are_those_of_the_matrix(rows, layer):
    layer = layer.double()
    x = torch.randn(rows, IN, dtype=torch.float64)
    results = []
    for way in (layer, lambda x: torch.nn.functional.linear(x, layer.weight, layer.bias)):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        way(leaf).square().sum().backward()
        results.append([leaf.grad, *(each.grad.clone() for each in layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "leading", [(), (1,), (4,), (2, 3), (0,), (2, 0, 3), (2, 1, 2, 1)], ids=str
)
def test_any_number_of_leading_axes(leading, layer):
    x = torch.randn(*leading, IN)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_exact_bonds_keep_the_function_in_every_dtype(name, dtype):
    given = linear(dtype=dtype)
    made = nn.MPOLinear.from_linear(given, shape=SHAPES[name])
    x = torch.randn(7, IN, dtype=dtype)
    assert made(x).dtype == made.weight.dtype == dtype
    # Every core rounds once.
    torch.testing.assert_close(made(x), given(x), rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bias", [True, False])
def test_the_error_is_within_what_the_decomposition_reports(bias):
    given = linear(bias, torch.float64)
    for limits in ({"max_bond": 4}, {"rtol": 0.3}, {"max_params": 150}, {"bond_dims": (3, 5)}):
        made, info = nn.MPOLinear.from_linear(
            given, shape=SHAPES["interleaved"], **limits, return_info=True
        )
        error = torch.linalg.norm(made.weight - given.weight).item()
        assert error == pytest.approx(info.error_bound)
        assert 0 < error < torch.linalg.norm(given.weight)
        assert (made.bias is None) == (given.bias is None)
        if "rtol" in limits:
            assert error <= 0.3 * torch.linalg.norm(given.weight)
        if "max_params" in limits:
            assert sum(each.numel() for each in made.projection.parameters()) <= 150


def test_second_moments_of_inputs_make_the_error_of_the_outputs_smaller():
    given = linear(dtype=torch.float64)
    x = torch.randn(500, IN, dtype=torch.float64) * torch.logspace(0, -3, IN)
    settings = {"shape": SHAPES["low rank"], "max_bond": 4}
    plain = nn.MPOLinear.from_linear(given, **settings)
    weighted = nn.MPOLinear.from_linear(given, **settings, weights=x.T @ x / 500)
    errors = [torch.linalg.norm(made(x) - given(x)) for made in (plain, weighted)]
    assert errors[1] < 0.8 * errors[0]


def test_the_module_stays_as_it_was_and_shares_no_memory():
    given = linear()
    before = copy.deepcopy(given.state_dict())
    made = nn.MPOLinear.from_linear(given)
    with torch.no_grad():
        for each in made.parameters():
            each.zero_()
    torch.testing.assert_close(given.state_dict(), before)


def test_cores_of_a_frozen_matrix_are_frozen():
    frozen = linear().requires_grad_(False)
    made = nn.MPOLinear.from_linear(frozen)
    assert not any(each.requires_grad for each in made.parameters())
    assert all(each.requires_grad for each in nn.MPOLinear.from_linear(linear()).parameters())


def test_conv1d_of_transformers_is_decomposed_as_the_matrix_that_it_applies():
    given, x = conv1d(), torch.randn(3, IN)
    made = nn.MPOLinear.from_linear(given)
    torch.testing.assert_close(made(x), given(x))
    torch.testing.assert_close(made.to_linear()(x), given(x))


@pytest.mark.parametrize("make", [linear, conv1d, halved, lambda: Quantized(linear())])
def test_a_residual_layer_starts_as_the_module_itself(make):
    base, x = make(), torch.randn(3, IN)
    made = nn.MPOLinear.from_linear(base, residual=True)
    assert made.base is base
    assert torch.equal(made(x), base(x))
    made(x).sum().backward()
    assert sum(int(each.grad.any()) for each in made.projection.parameters()) == 1


@pytest.mark.parametrize("make", [halved, lambda: Quantized(linear())])
def test_quantized_modules_are_decomposed_by_what_they_compute(make):
    given, x = make(), torch.randn(3, IN)
    made = nn.MPOLinear.from_linear(given)
    torch.testing.assert_close(made(x), given(x))
    assert not any(each.requires_grad for each in made.projection.parameters())


@pytest.mark.parametrize("make", [linear, conv1d, halved, lambda: Quantized(linear())])
@pytest.mark.parametrize("sites", [2, 4])
def test_a_merged_residual_layer_is_one_linear_layer(make, sites):
    made, x = trained_residual(make(), sites=sites, max_bond=2), torch.randn(3, IN)
    merged = made.to_linear()
    assert type(merged) is torch.nn.Linear
    torch.testing.assert_close(merged(x), made(x))
    torch.testing.assert_close(
        merged.weight, weight_of_linear(made.base) + contracted(made).float()
    )
    assert (merged(x) - made.base(x)).norm() > 0.1


def test_a_frozen_base_stays_frozen_and_its_mpo_is_trained():
    base = linear().requires_grad_(False)
    made = nn.MPOLinear.from_linear(base, residual=True)
    trained = {name for name, each in made.named_parameters() if each.requires_grad}
    assert trained == {"projection.center", "projection.aux_0"}
    assert sum(each.numel() for each in made.projection.parameters()) == 16 * (IN + OUT)


def test_the_bias_of_a_residual_layer_is_that_of_its_base_and_stored_once():
    base = linear()
    made = copy.deepcopy(nn.MPOLinear.from_linear(base, residual=True))
    assert made.bias is made.base.bias
    assert {"base.bias"} == {name for name in made.state_dict() if "bias" in name}
    assert nn.MPOLinear.from_linear(linear(bias=False), residual=True).bias is None
    with pytest.raises(AttributeError, match="has no attribute 'biases'"):
        _ = made.biases


def test_two_sites_are_lora():
    made, x = trained_residual(linear(), max_bond=2), torch.randn(3, IN)
    left, right = (core.detach().reshape(-1, 2) if k == 0 else core.detach().reshape(2, -1)
                   for k, core in enumerate(made.to_mpo().cores))  # fmt: skip
    torch.testing.assert_close(made(x), made.base(x) + x @ right.T @ left.T)


def test_draws_follow_the_seed_of_torch():
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(nn.MPOLinear.from_linear(linear(seed=seed), residual=True).state_dict())
    assert all(torch.equal(each, drawn[1][name]) for name, each in drawn[0].items())
    assert not all(torch.equal(each, drawn[2][name]) for name, each in drawn[0].items())


def test_to_linear_owns_its_memory_and_keeps_mode_and_freezing(layer):
    layer = layer.requires_grad_(False).eval()
    merged = layer.to_linear()
    assert not merged.training
    assert not any(each.requires_grad for each in merged.parameters())
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        merged.weight.zero_()
        merged.bias.zero_()
    torch.testing.assert_close(layer.state_dict(), before)


def test_to_linear_rounds_half_precision_once():
    layer = nn.MPOLinear(IN, OUT, shape=SHAPES["train"], dtype=torch.bfloat16)
    expected = contracted(layer)
    error = (layer.to_linear().weight.double() - expected).abs()
    assert (error <= 1.01 * 2**-8 * expected.abs()).all()


def test_to_mpo_shares_memory_and_gradients():
    layer = nn.MPOLinear(IN, OUT, shape=SHAPES["interleaved"])
    mpo, x = layer.to_mpo(), torch.randn(3, IN)
    torch.testing.assert_close(mpo.apply(x) + layer.bias, layer(x))
    assert {core.data_ptr() for core in mpo.cores} == {
        core.data_ptr() for core in layer.projection.parameters()
    }
    mpo.apply(x).sum().backward()
    assert all(each.grad is not None for each in layer.projection.parameters())


def test_an_mpo_becomes_a_layer_and_comes_back():
    mpo = tn.MPO.random(SHAPES["interleaved"], 3, rng=0, like=torch.zeros(()))
    bias = torch.randn(OUT)
    layer = nn.MPOLinear.from_mpo(mpo, bias)
    torch.testing.assert_close(layer(torch.eye(IN)), mpo.to_matrix().T + bias)
    torch.testing.assert_close(layer.to_mpo().to_matrix(), mpo.to_matrix())


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_gives_its_dtype_as_for_torch_linear(layer, enabled):
    x = torch.randn(4, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        expected = layer.to_linear()(x)
        result = layer(x)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)


def test_autocast_leaves_double_precision_alone_as_for_torch_linear(layer):
    layer, x = layer.double(), torch.randn(4, IN, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x), layer.to_linear()(x))


def test_state_dicts_and_copies_keep_the_function(layer):
    x, fresh = torch.randn(4, IN), copy.deepcopy(layer)
    with torch.no_grad():
        for each in fresh.parameters():
            each.zero_()
    assert not fresh(x).any()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


def test_kept_matrices_follow_the_cores():
    layer, x = nn.MPOLinear(IN, OUT, shape=SHAPES["interleaved"]).eval(), torch.randn(400, IN)
    layer.projection.route = "cached"
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with torch.no_grad():
        before = layer(x)
    assert weight_cache.used
    layer.projection.route = None
    layer(x).square().mean().backward()
    optimizer.step()
    layer.projection.route = "cached"
    with torch.no_grad():
        after = layer(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, torch.nn.functional.linear(x, layer.weight, layer.bias))
    weight_cache.clear()


def test_a_compiled_layer_takes_any_number_of_rows(layer):
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for rows in (3, 5, 9):
        x = torch.randn(2, rows, IN)
        torch.testing.assert_close(compiled(x), layer(x))


def test_gradients_per_sample_are_those_of_single_calls(layer):
    values = {name: each.detach() for name, each in layer.named_parameters()}
    x = torch.randn(3, IN)

    def loss(values, row):
        return torch.func.functional_call(layer, values, (row,)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    for number, row in enumerate(x):
        layer.zero_grad()
        layer(row).square().sum().backward()
        for name, each in layer.named_parameters():
            torch.testing.assert_close(together[name][number], each.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("max_bond", [2, None])
def test_new_layers_have_the_variance_of_torch_linear(name, max_bond):
    torch.manual_seed(0)
    layer = nn.MPOLinear(IN, OUT, shape=SHAPES[name], max_bond=max_bond)
    drawn = []
    for _ in range(200):
        layer.reset_parameters()
        drawn.append(layer.weight.detach())
    assert torch.stack(drawn).var().item() * 3 * IN == pytest.approx(1, rel=0.2)
    assert layer.bias.abs().max() <= IN**-0.5


def test_a_residual_layer_drawn_anew_is_its_base():
    layer = trained_residual(linear())
    before = layer.base.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.base.weight, before)
    assert torch.equal(layer(torch.eye(IN)), layer.base(torch.eye(IN)))


def test_layers_on_the_meta_device_get_numbers_later():
    layer = nn.MPOLinear(IN, OUT, device="meta", dtype=torch.float64)
    assert layer(torch.empty(2, IN, device="meta", dtype=torch.float64)).shape == (2, OUT)
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.isfinite(layer(torch.randn(2, IN, dtype=torch.float64))).all()
    residual = nn.MPOLinear.from_linear(torch.nn.Linear(IN, OUT, device="meta"), residual=True)
    assert {each.device.type for each in residual.parameters()} == {"meta"}


def test_only_auxiliary_cores_train_after_train_auxiliary():
    model = torch.nn.Sequential(nn.MPOLinear(IN, OUT, shape=SHAPES["interleaved"]))
    nn.train_auxiliary(model)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trained == {"0.projection.aux_0", "0.projection.aux_1"}


def test_a_layer_serves_as_the_base_of_experts_without_building_its_matrix(monkeypatch):
    base = nn.MPOLinear(IN, OUT)
    delta = nn.MPOProjection(2, SHAPES["low rank"], max_bond=2, shared_sites="none")
    residual = nn.ResidualProjection(base, delta)
    x, groups = torch.randn(4, IN), nn.Groups.of(torch.tensor([0, 0, 1, 1]), 2)
    expected = base(x) + delta(x, groups)
    monkeypatch.setattr(nn.MPOLinear, "weight", property(lambda self: pytest.fail("built")))
    torch.testing.assert_close(residual(x, groups), expected)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_zero_and_extreme_matrices(scale):
    given = linear(dtype=torch.float64)
    with torch.no_grad():
        given.weight *= scale
    made = nn.MPOLinear.from_linear(given, shape=SHAPES["interleaved"], rtol=0.2)
    assert torch.linalg.norm(made.weight - given.weight) <= 0.2 * torch.linalg.norm(given.weight)


def test_one_wide_layers():
    for size in ((1, 1), (1, 7), (7, 1)):
        given = torch.nn.Linear(*size)
        made = nn.MPOLinear.from_linear(given, sites=2)
        x = torch.randn(3, size[0])
        torch.testing.assert_close(made(x), given(x))


def test_layers_print_sizes_shape_and_bonds():
    text = repr(nn.MPOLinear(IN, OUT, shape=SHAPES["interleaved"], max_bond=3, bias=False))
    for part in ("in_features=18, out_features=24, bias=False", "bond_dims=(3, 3)"):
        assert part in text


def test_plans_say_which_route_is_taken():
    layer = nn.MPOLinear(768, 3072, max_bond=16)
    assert layer.plan(1, training=True).route == "per_expert"
    assert layer.plan(2048, training=True).route == "rebuilt"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_features": 0}, "in_features must be a positive integer"),
        ({"out_features": 2.5}, "out_features must be a positive integer"),
        ({"shape": tn.MPOShape((2, 3), (3, 3))}, "shape must be for a 24×18 matrix"),
        ({"shape": tn.MPOShape((OUT,), (IN,))}, "at least 2 sites"),
        ({"shape": (24, 18)}, "shape must be an MPOShape"),
        ({"shape": SHAPES["train"], "sites": 3}, "shape or sites, not both"),
        ({"sites": 1}, "at least 2 sites"),
        ({"sites": 0}, "sites"),
        ({"max_bond": 0}, "max_bond must be a positive integer"),
        ({"sites": 3, "bond_dims": (2,)}, "bond_dims"),
        ({"bias": "yes"}, "bias must be one of"),
        ({"dtype": torch.complex64}, "dtype must be floating-point"),
        ({"dtype": torch.int8}, "dtype must be floating-point"),
    ],
    ids=str,
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        nn.MPOLinear(**({"in_features": IN, "out_features": OUT} | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"residual": True, "rtol": 0.1}, "residual=True decomposes nothing: leave out rtol"),
        ({"residual": True, "return_info": True}, "leave out return_info"),
        ({"residual": 2}, "residual must be one of"),
        ({"residual": True, "sites": 1}, "site"),
        ({"rtol": -1}, "rtol"),
        ({"max_params": 1}, "max_params"),
    ],
    ids=str,
)
def test_bad_arguments_of_a_decomposition_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        nn.MPOLinear.from_linear(linear(), **settings)


def test_modules_that_cannot_be_decomposed_are_named():
    with pytest.raises(InputError, match="must be linear"):
        nn.MPOLinear.from_linear(torch.nn.LayerNorm(4))
    broken = linear()
    with torch.no_grad():
        broken.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        nn.MPOLinear.from_linear(broken)
    with pytest.raises(InputError, match="floating-point"):
        nn.MPOLinear.from_linear(torch.nn.Linear(IN, OUT, dtype=torch.complex64))


@pytest.mark.parametrize(
    "x", [torch.ones(3, IN + 1), torch.ones(()), torch.ones(2, IN, dtype=torch.long)], ids=str
)
def test_bad_inputs_are_named(x, layer):
    with pytest.raises(InputError, match=r"x must be of shape \(\.\.\., 18\)"):
        layer(x)


def test_a_bias_of_another_size_is_named():
    mpo = tn.MPO.random(SHAPES["interleaved"], 3, rng=0, like=torch.zeros(()))
    with pytest.raises(InputError, match=r"bias must be of shape \(24,\)"):
        nn.MPOLinear.from_mpo(mpo, torch.zeros(IN))


class Eight(torch.nn.Module):
    """A linear module with a matrix in floats of 8 bits and a scale, as FP8 checkpoints have."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().to(torch.float8_e4m3fn)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def test_floats_of_8_bits_are_a_base_for_mpos_of_more():
    base, x = Eight(linear()), torch.randn(3, IN, dtype=torch.bfloat16)
    layer = trained_residual(base)
    assert {core.dtype for core in layer.projection.parameters()} == {torch.float32}
    merged = layer.to_linear()
    assert merged.weight.dtype == torch.float32
    torch.testing.assert_close(layer(x).float(), merged(x.float()), rtol=0.03, atol=0.03)

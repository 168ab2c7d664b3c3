"""Configurations read a number of Python, NumPy or torch as the same value."""

import json
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import tnmoe as tn
from tests.hf.families import make, outputs, relative
from tnmoe import hf, nn

INTEGERS = (np.int64, np.int32, np.uint8, np.array, torch.tensor)
FLOATS = (
    int, float, np.float64, np.float32, np.float16, np.int64, np.array, torch.tensor, Fraction,
    Decimal, lambda number: torch.tensor(number, dtype=torch.bfloat16),
)  # fmt: skip
FLAGS = (int, np.bool_, np.array, torch.tensor)

# By field, what makes entries of a number; and numbers that are exact in every spelling.
OF_INTEGERS = {
    "num_experts": lambda n: {"num_experts": n(4)},
    "num_experts_per_tok": lambda n: {"num_experts_per_tok": n(2)},
    "sites": lambda n: {"sites": n(3)},
    "group_size": lambda n: {"group_size": n(8), "layout": "hidden"},
    "group_size of several": lambda n: {"group_size": [n(8), n(2)], "layout": "split"},
    "max_bond": lambda n: {"max_bond": n(8)},
    "max_bond of one": lambda n: {"max_bond": {"up": n(8), "down": None}},
    "shared": lambda n: {"shared_sites": [n(2), n(0)]},
    "shared of one": lambda n: {"shared_sites": {"up": (n(1),), "down": "none"}},
    "layers": lambda n: {"layers": [n(2), n(0)]},
    "every": lambda n: {"every": n(2)},
    "shapes": lambda n: {
        "shapes": {
            (n(7), n(6)): tn.MPOShape((n(2), n(4)), (n(3), n(2)), out_features=n(7))
        }
    },
    "router's": lambda n: {
        "router": {"num_groups": n(4), "top_groups": n(2), "group_score": n(1)}
    },
}  # fmt: skip
OF_FLOATS = {
    "bond_ratio": lambda x: {"bond_ratio": x(2), "layout": "split"},
    "expert_noise": lambda x: {"expert_noise": x(1)},
    "balance_weight": lambda x: {"balance_weight": x(0)},
    "z_weight": lambda x: {"z_weight": x(2)},
    "mask_probability": lambda x: {"mask_probability": x(1)},
    "router's": lambda x: {
        "router": {
            "jitter_noise": x(0), "capacity_factor": x(2), "eval_capacity_factor": x(1),
            "scale": x(1), "second_threshold": x(0),
        }
    },
    "expert choice's": lambda x: {
        "router_kind": "expert_choice", "router": {"capacity_factor": x(2)}
    },
}  # fmt: skip
OF_FLAGS = {
    "common_bias": lambda flag: {"common_bias": flag(True)},
    "router's": lambda flag: {
        "router": {
            "normalize": flag(False), "bias": flag(True), "noisy": flag(True),
            "straight_through": flag(False), "load_bias": flag(True),
        }
    },
}  # fmt: skip
SPELLED = [
    pytest.param(entries, plain, spell, id=f"{field}-{number}")
    for fields, plain, spellings in (
        (OF_INTEGERS, int, INTEGERS), (OF_FLOATS, float, FLOATS), (OF_FLAGS, bool, FLAGS),
    )
    for field, entries in fields.items()
    for number, spell in enumerate(spellings)
    # Arrays and tensors are no keys that could be found again.
    if not (field == "shapes" and spell in (np.array, torch.tensor))
]  # fmt: skip


@pytest.mark.parametrize(("entries", "plain", "spell"), SPELLED)
def test_every_spelling_of_a_number_gives_the_same_configuration(entries, plain, spell):
    expected, config = hf.MPOEConfig(**entries(plain)), hf.MPOEConfig(**entries(spell))
    assert config == expected
    stored = json.dumps(config.to_dict())
    assert stored == json.dumps(expected.to_dict())
    assert json.dumps(hf.MPOEConfig.from_dict(json.loads(stored)).to_dict()) == stored


@pytest.mark.parametrize(
    ("field", "allowed"),
    [
        ("num_experts", int), ("num_experts_per_tok", int), ("sites", int), ("every", int),
        ("max_bond", int), ("bond_ratio", float), ("expert_noise", float),
        ("balance_weight", float), ("z_weight", float),
        ("mask_probability", float),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "value",
    [
        "0.5", b"1", True, np.True_, torch.tensor(True), float("nan"), float("inf"), -1, -0.5,
        -(10**5000), 10**5000, 1j, np.array([1]), np.array("1"), torch.ones(2), [1], None, object(),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_no_such_number_is_told_in_a_line(field, allowed, value):
    is_meant = (field in ("max_bond", "sites") and value is None) or (
        allowed is int and type(value) is int and value > 0
    )
    if is_meant:
        pytest.skip("exact bonds, and integers of any size, are what they say")
    with pytest.raises(tn.InputError) as told:
        hf.MPOEConfig(**{field: value})
    assert str(told.value).startswith(f"{field} must be ")
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 300


@pytest.mark.parametrize("field", ["num_experts", "sites", "every", "max_bond"])
def test_an_integer_is_not_rounded(field):
    with pytest.raises(tn.InputError, match=f"{field} must be a positive integer, got 2.5"):
        hf.MPOEConfig(**{field: 2.5})


SETTINGS = {
    "num_experts": 4, "sites": 3, "every": 1, "max_bond": 64, "expert_noise": 1.0,
    "balance_weight": 0.0, "z_weight": 1.0, "mask_probability": 0.0,
    "router": {"jitter_noise": 0.0, "scale": 2.0, "normalize": True},
}  # fmt: skip


def spelled(entries, integer, float_, flag):
    """Make the same settings with values of other types."""
    spell = {int: integer, float: float_, bool: flag}
    return {
        name: spelled(value, integer, float_, flag)
        if isinstance(value, dict)
        else spell[type(value)](value)
        for name, value in entries.items()
    }


PLAIN, NUMPY, ARRAYS = (int, int, int), (np.int64, np.float32, np.bool_), (np.array,) * 3


@pytest.mark.parametrize(
    ("name", "spellings"),
    [
        *((name, PLAIN) for name in ("llama", "mistral", "qwen2", "qwen3", "t5")),
        ("llama", NUMPY), ("qwen2", ARRAYS),
    ],
)  # fmt: skip
def test_a_conversion_is_the_same_in_other_words_and_so_is_its_export(name, spellings, tmp_path):
    made = {}
    for words, settings in (("usual", SETTINGS), ("other", spelled(SETTINGS, *spellings))):
        torch.manual_seed(0)
        model = hf.upcycle(make(name).eval(), hf.MPOEConfig(**settings))
        model.save_pretrained(tmp_path / words)
        moe = hf.to_moe(hf.from_pretrained(tmp_path / words))
        hf.prepare_export(tmp_path / words, to="moe").run(tmp_path / f"{words}-moe")
        made[words] = outputs(moe, name)
    assert torch.equal(made["other"], made["usual"])
    stored = [
        (tmp_path / folder / "config.json").read_text()
        for folder in ("usual", "other", "usual-moe", "other-moe")
    ]
    assert stored[0] == stored[1]
    assert stored[2] == stored[3]
    auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    exported = auto.from_pretrained(tmp_path / "other-moe").eval()
    assert relative(outputs(exported, name), made["usual"]) < 1e-6


def test_a_setting_that_the_other_class_refuses_is_named():
    model = hf.upcycle(make("llama"), hf.MPOEConfig(num_experts=2, sites=3))
    model.config.attention_dropout = None  # which a Llama may have, and a Mixtral may not
    with pytest.raises(tn.InputError, match=r"MixtralForCausalLM .*attention_dropout") as told:
        hf.to_moe(model)
    assert "\n" not in str(told.value)


NUMBERS_OF_LAYERS = {
    "router": (
        lambda n, x, flag: nn.TopKRouter(
            n(6), n(4), n(2), score_function="softmax", normalize=flag(True), jitter_noise=x(0),
            capacity_factor=x(1), eval_capacity_factor=x(2), noisy=flag(False), bias=flag(True),
            scale=x(1), num_groups=n(2), top_groups=n(1),
            group_score=n(1), second_threshold=x(0), load_bias=flag(True),
        ),
        ("hidden_size", "num_experts", "top_k", "normalize", "jitter_noise", "capacity_factor",
         "eval_capacity_factor", "scale", "num_groups", "top_groups", "group_score",
         "second_threshold", "straight_through"),
    ),
    "expert choice": (
        lambda n, x, flag: nn.ExpertChoiceRouter(n(6), n(4), x(1), normalize=flag(False)),
        ("hidden_size", "num_experts", "capacity_factor", "normalize"),
    ),
    "experts": (
        lambda n, x, flag: nn.MPOExperts(
            n(4), n(6), n(9), gated=flag(True), bias=flag(True), sites=n(3), dropout=x(0),
            max_bond=n(5), shared_sites=[n(0)],
        ),
        ("num_experts", "hidden_size", "intermediate_size", "dropout"),
    ),
    "dense experts": (
        lambda n, x, flag: nn.DenseExperts(n(4), n(6), n(9), gated=flag(True), dropout=x(1)),
        ("num_experts", "hidden_size", "intermediate_size", "dropout"),
    ),
    "clamped": (lambda n, x, flag: nn.ClampedSwiGLU(x(2), x(7)), ("alpha", "limit")),
}  # fmt: skip


@pytest.mark.parametrize("spell", [int, np.int64, np.array, torch.tensor])
@pytest.mark.parametrize("layer", NUMBERS_OF_LAYERS)
def test_a_layer_keeps_numbers_as_pythons_own(layer, spell):
    build, names = NUMBERS_OF_LAYERS[layer]
    expected = build(int, float, bool)
    made = build(spell, spell, lambda flag: spell(int(flag)))
    for name in names:
        value = getattr(made, name)
        assert value == getattr(expected, name)
        assert type(value) is type(getattr(expected, name)), name
    assert repr(made) == repr(expected)
    shapes = {name: each.shape for name, each in expected.state_dict().items()}
    assert {name: each.shape for name, each in made.state_dict().items()} == shapes


@pytest.mark.parametrize("name", ["normalize", "bias", "noisy", "load_bias", "straight_through"])
@pytest.mark.parametrize("value", ["no", 2, None, 0.5])
def test_what_is_neither_true_nor_false_is_named(name, value):
    with pytest.raises(tn.InputError, match=f"{name} must be one of False, True, got {value!r}"):
        nn.TopKRouter(6, 4, **{name: value})


@pytest.mark.parametrize("probability", [2, -0.5, "0.5", True, float("nan"), 10**400])
def test_a_callback_names_a_probability_that_is_none_when_it_is_made(probability):
    with pytest.raises(tn.InputError, match=r"probability must be in \[0, 1\]"):
        hf.GradientMaskCallback(probability)


@pytest.mark.parametrize("spell", [int, np.int64, np.float32, np.array, torch.tensor])
def test_the_state_of_a_mask_and_of_an_optimizer_is_plain_data(spell, tmp_path):
    experts = nn.MPOExperts(4, 6, 9, sites=3)
    groups = nn.parameter_groups(experts, lr=spell(1), shared_scale=spell(0))
    optimizer = torch.optim.SGD(groups)
    mask = nn.GradientMask(optimizer, experts, spell(1), seed=np.int64(3))
    torch.save([mask.state_dict(), optimizer.state_dict()], tmp_path / "state")
    stored = torch.load(tmp_path / "state", weights_only=True)
    assert json.loads(json.dumps(stored[0])) == {**stored[0], "probability": 1.0, "seed": 3}

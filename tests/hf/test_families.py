"""Every family is found, keeps its function when converted, trains, saves and loads."""

import pytest
import torch
import transformers as tf

import tnmoe as tn
from tests.hf.families import (
    GENERATORS,
    IDS,
    LAYOUTS,
    MASK,
    MODELS,
    inputs,
    make,
    outputs,
    relative,
)
from tnmoe import hf, nn

CONFIG = hf.MPOEConfig(num_experts=3, sites=3)


def moes(model):
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.MPOMoE)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("layout", "top_k"),
    [
        *((layout, 2) for layout in LAYOUTS),
        *(
            pytest.param(each, 1, marks=pytest.mark.slow)
            for each in ("interleaved", "hidden", "residual")
        ),
    ],
)
def test_upcycling_preserves_the_function_of_every_family(name, layout, top_k):
    model = make(name)
    expected = outputs(model, name)
    config = hf.MPOEConfig(num_experts=3, num_experts_per_tok=top_k, **LAYOUTS[layout])
    assert hf.upcycle(model, config) is model
    assert len(moes(model)) == MODELS[name][1]
    assert relative(outputs(model, name), expected) < 1e-5


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(
    ("side", "layout"),
    [("left", "interleaved"), ("right", "interleaved"), ("left", "hidden"), ("right", "residual")],
)
def test_generation_with_a_cache_and_padding_on_either_side_is_unchanged(name, side, layout):
    model = make(name)
    mask = MASK.flip(1) if side == "left" else MASK
    batch = {"input_ids": IDS * mask, "attention_mask": mask}
    settings = {
        "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
        "use_cache": True, "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    dense = model.generate(**batch, **settings)
    config = hf.MPOEConfig(num_experts=3, num_experts_per_tok=2, **LAYOUTS[layout])
    converted = hf.upcycle(model, config).generate(**batch, **settings)
    assert torch.equal(converted.sequences, dense.sequences)
    for one, other in zip(converted.logits, dense.logits, strict=True):
        assert relative(one, other) < 1e-4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["interleaved", "hidden", "residual"])
def test_every_converted_family_trains_saves_and_loads(name, layout, tmp_path):
    config = hf.MPOEConfig(num_experts=3, num_experts_per_tok=2, **LAYOUTS[layout])
    model = hf.upcycle(make(name), config).train()
    loss = model(**inputs(name))[0].square().mean()
    loss.backward()
    centers = nn.shared_parameters(model)
    assert len(centers) >= 2 * MODELS[name][1]
    assert all(center.grad is not None for center in centers)
    with torch.no_grad():
        for parameter in model.parameters():  # as after training: experts differ
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.eval().save_pretrained(tmp_path / "saved")
    loaded = hf.from_pretrained(tmp_path / "saved").eval()
    assert type(loaded) is type(model)
    torch.testing.assert_close(outputs(loaded, name), outputs(model, name))


def test_dropout_of_a_network_stays_where_it_was():
    t5 = hf.upcycle(make("t5"), CONFIG)
    gpt2 = hf.upcycle(make("gpt2"), CONFIG)
    rates = {name: (each.experts.dropout, each.dropout) for name, each in moes(t5).items()}
    assert set(rates.values()) == {(0.1, 0.0)}
    assert {(each.experts.dropout, each.dropout) for each in moes(gpt2).values()} == {(0.0, 0.1)}
    bart = make("bart")
    bart.model.decoder.layers[1].activation_dropout = 0.3
    hf.upcycle(bart, CONFIG)
    layer = bart.model.decoder.layers[1]
    assert (layer.fc1.experts.dropout, layer.activation_dropout) == (0.3, 0.0)


def test_dropout_of_other_kinds_of_networks_stays_as_well():
    bloom, wav2vec2 = make("bloom"), make("wav2vec2")
    hf.upcycle(bloom, CONFIG)
    assert {(each.experts.dropout, each.dropout) for each in moes(bloom).values()} == {(0.0, 0.0)}
    assert {layer.mlp.hidden_dropout for layer in bloom.transformer.h} == {0.1}
    hf.upcycle(wav2vec2, CONFIG)
    assert {each.experts.dropout for each in moes(wav2vec2).values()} == {0.1}
    network = wav2vec2.encoder.layers[0].feed_forward
    assert isinstance(network.intermediate_dropout, torch.nn.Identity)
    starcoder = tf.Starcoder2Model(
        tf.Starcoder2Config(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, residual_dropout=0.3,
        )
    )  # fmt: skip
    assert [(ffn.dropout, ffn.output_dropout) for ffn in hf.find_ffns(starcoder)] == [(0.0, 0.3)]
    assert {ffn.dropout for ffn in hf.find_ffns(make("t5gemma"))} == {0.1}


def test_layers_that_share_a_network_share_its_experts_and_count_in_every_call():
    model = hf.upcycle(make("albert"), CONFIG)
    assert len(model(**inputs("albert"), output_router_logits=True)["router_logits"]) == 5
    with nn.record_routing(model) as routing:
        model(**inputs("albert"))
    assert len({call.name for call in routing.calls}) == 2


def test_a_network_that_two_families_know_is_converted_once(monkeypatch):
    model, families = make("distilbert"), dict(hf.families._FAMILIES)
    families["parts"] = hf.in_place("lin1", "lin2", activation="activation")
    monkeypatch.setattr(hf.families, "_FAMILIES", families)
    expected = outputs(model, "distilbert")
    hf.upcycle(model, CONFIG)
    assert len(moes(model)) == 3
    assert relative(outputs(model, "distilbert"), expected) < 1e-5


_TINY = {
    "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
_HYBRID = {
    "num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
}  # fmt: skip


def test_settings_of_routers_and_sharing_reach_every_layer_and_its_checkpoint(tmp_path):
    config = hf.MPOEConfig(
        num_experts=4, num_experts_per_tok=2, sites=3, max_bond={"down": 8},
        shared_sites={"up": (0, 1)}, common_bias=True,
        router={"score_function": "sigmoid", "load_bias": True, "capacity_factor": 1.5},
    )  # fmt: skip
    model = hf.upcycle(make("bert"), config)
    model.save_pretrained(tmp_path)
    for each in (model, hf.from_pretrained(tmp_path)):
        assert len(moes(each)) == 3
        for layer in moes(each).values():
            router, experts = layer.router, layer.experts
            assert (router.top_k, router.score_function, router.capacity_factor) == (
                2, "sigmoid", 1.5,
            )  # fmt: skip
            assert router.load_bias is not None
            assert experts.up.shared_sites == {0, 1}
            assert experts.down.shared_sites == {1}
            assert len(experts.up.bias) == 1
            assert max(experts.down.center.shape[0::3]) == 8
    choosing = hf.MPOEConfig(num_experts=4, num_experts_per_tok=2, router_kind="expert_choice")
    model = hf.upcycle(make("bert"), choosing)
    assert {each.router.capacity_factor for each in moes(model).values()} == {2}


def test_a_family_of_ones_own_is_one_line():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ff = torch.nn.Module()
            self.ff.inner, self.ff.outer = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
            self.ff.act = torch.nn.Tanh()

    model = torch.nn.ModuleList([Layer(), Layer()])
    with pytest.raises(tn.InputError, match="no feed-forward network of a known family"):
        hf.find_ffns(model)
    hf.register_family("mine")(hf.of_module("ff", "inner", "outer"))
    try:
        assert [ffn.name for ffn in hf.find_ffns(model)] == ["0", "1"]
    finally:
        from tnmoe.hf import families

        del families._FAMILIES["mine"]


def test_a_family_of_ones_own_can_be_registered(monkeypatch):
    monkeypatch.setattr("tnmoe.hf.families._FAMILIES", {})

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
            self.ffn = None

        def forward(self, x):
            return self.ffn(x) if self.ffn else self.narrow(torch.relu(self.wide(x)))

    @hf.register_family("mine")
    def find(module):
        if isinstance(module, Block):
            place = hf.Place(module, "ffn")
            return hf.FFN(module.wide, module.narrow, None, torch.relu, (place,))

    block = torch.nn.Sequential(Block())
    assert [ffn.name for ffn in hf.find_ffns(block)] == ["0"]


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: hf.MPOEConfig(every=0), "every must be a positive integer, got 0"),
        (lambda: hf.MPOEConfig(router_kind="hash"), "router_kind must be one of top_k, expert_ch"),
        (
            lambda: hf.MPOEConfig(router={"jiter_noise": 0.1}),
            "router has no settings jiter_noise; known ones are bias, capacity_factor",
        ),
        (lambda: hf.MPOEConfig(router={"top_k": 2}), "router has no settings top_k"),
        (
            lambda: hf.MPOEConfig(router={"capacity_factor": 0}),
            r"capacity_factor must be in \(0, inf\), got 0",
        ),
        (lambda: hf.MPOEConfig(max_bond={"out": 3}), r"max_bond is for up, gate, down, got"),
        (
            lambda: hf.upcycle(make("bert"), hf.MPOEConfig(layers="decoder")),
            "layers='decoder', every=1 select none of the 3 feed-forward networks of BertModel: "
            "encoder.layer.0 … encoder.layer.2",
        ),
        (
            lambda: hf.find_ffns(
                tf.RobertaPreLayerNormModel(tf.RobertaPreLayerNormConfig(**_TINY))
            ),
            "RobertaPreLayerNormModel has no feed-forward network of a known family",
        ),
        (
            lambda: hf.upcycle(tf.ZambaModel(tf.ZambaConfig(**_TINY | _HYBRID)), CONFIG),
            r"ZambaModel ties layers.*feed_forward\.down_proj\.weight by name",
        ),
        (
            lambda: hf.upcycle(make("bert"), hf.MPOEConfig(every=4)),
            "layers=None, every=4 select none of the 3",
        ),
        (
            lambda: hf.upcycle(make("bert"), hf.MPOEConfig(layers="(")),
            r"layers='\(' is not a regular expression",
        ),
    ],
)
def test_bad_input_is_named(make_config, message):
    with pytest.raises(tn.InputError, match=message):
        make_config()

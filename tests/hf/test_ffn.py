"""Halves of fused matrices, and networks that compute more than their names say."""

import pytest
import torch
import transformers as tf
from transformers.models.llama.modeling_llama import LlamaMLP

import tnmoe as tn
from tests.hf.families import make
from tnmoe import hf

CONFIG = hf.MPOEConfig(num_experts=3, sites=3)
_TINY = {
    "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", ["phi3", "modernbert"])
def test_halves_of_a_fused_matrix_are_the_gates_and_the_others_in_place(name):
    model = make(name)
    ffn = hf.find_ffns(model)[1]
    fused = ffn.network.gate_up_proj if name == "phi3" else ffn.network.Wi
    rows = torch.randn(5, 24)
    gate, up = fused(rows).chunk(2, -1)
    for half, expected in ((ffn.gate, gate), (ffn.up, up)):
        torch.testing.assert_close(
            torch.nn.functional.linear(rows, half.weight, half.bias), expected
        )
    with torch.no_grad():
        ffn.up.weight.zero_()
        if fused.bias is not None:
            ffn.up.bias.zero_()
    torch.testing.assert_close(fused(rows), torch.cat([gate, torch.zeros_like(up)], -1))
    assert ffn.num_params == sum(p.numel() for p in ffn.network.parameters())


class Clamped(LlamaMLP):
    """A network whose names and types do not show that it clamps large values."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-7, 7))


def clamped():
    model = tf.LlamaModel(tf.LlamaConfig(**_TINY))
    model.layers[0].mlp = Clamped(model.config)
    return model


@pytest.mark.parametrize(
    "make_model",
    [
        lambda: tf.BitNetModel(tf.BitNetConfig(**_TINY)),  # a norm before the last matrix
        lambda: tf.FalconH1Model(  # fixed factors
            tf.FalconH1Config(**_TINY, mlp_multipliers=[0.5, 2.0], mamba_d_ssm=16, mamba_n_heads=2)
        ),
        lambda: tf.SegformerModel(tf.SegformerConfig()),  # a convolution, of the image's size
        clamped,
    ],
)
def test_a_network_that_does_more_than_its_family_is_refused(make_model):
    model = make_model()
    before = {name: type(each) for name, each in model.named_modules()}
    with pytest.raises(tn.InputError, match=r"feed-forward network of .* does more than its matr"):
        hf.upcycle(model, CONFIG)
    assert before == {name: type(each) for name, each in model.named_modules()}

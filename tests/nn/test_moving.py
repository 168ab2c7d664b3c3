"""Layers survive whatever moves, casts or rearranges the parameters of a whole model."""

import copy

import pytest
import torch
import transformers as tf
from torch.nn.utils import parametrize

from tnmoe import hf, nn

FORMATS = (
    torch.channels_last,
    torch.channels_last_3d,
    torch.contiguous_format,
    torch.preserve_format,
)
KINDS = {
    "shared centre": {"sites": 3},
    "split": {"layout": "split"},
    "owned centre": {"sites": 3, "shared_sites": "none"},
    "shared auxiliary cores": {"sites": 4, "shared_sites": (0, 1)},
    "hidden": {"layout": "hidden", "group_size": (2, 2)},
    "residual": {"layout": "residual", "max_bond": 2},
}


def make(kind):
    torch.manual_seed(0)
    experts = nn.MPOExperts(4, 8, 16, gated=True, bias=True, **KINDS[kind])
    return nn.MPOMoE(nn.TopKRouter(8, 4, top_k=2), experts)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_cores_are_not_taken_for_images(kind, layout):
    layer = make(kind)
    inputs = torch.randn(5, 8)
    expected = layer(inputs)
    expected.sum().backward()
    layer.to(memory_format=layout)
    torch.testing.assert_close(layer(inputs), expected, rtol=0, atol=0)
    for parameter in layer.parameters():
        assert parameter.is_contiguous()
        assert parameter.grad.shape == parameter.shape
    layer.to(torch.float64, memory_format=layout)
    torch.testing.assert_close(layer(inputs.double()), expected.double())


@pytest.mark.parametrize("swaps", [False, True])
def test_parameters_stay_the_same_objects_for_an_optimiser(swaps):
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        layer = make("shared centre")
        parameters = list(layer.parameters())
        layer.to(torch.float64, memory_format=torch.channels_last).float().to("cpu")
        layer.to(memory_format=torch.channels_last_3d)
        assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))
        assert all(each.is_leaf and each._base is None for each in parameters)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_parametrized_cores_are_not_taken_for_images_either():
    layer, inputs = make("shared centre"), torch.randn(5, 8)
    parametrize.register_parametrization(layer.experts.up, "aux_0", torch.nn.Tanh())
    parametrize.register_parametrization(layer.experts.up, "center", torch.nn.Tanh())
    expected = layer(inputs)
    layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(inputs), expected, rtol=0, atol=0)


def test_cores_go_to_shared_memory_and_through_the_meta_device():
    layer = make("shared centre")
    state = copy.deepcopy(layer.state_dict())
    layer.share_memory()
    assert all(each.is_shared() for each in layer.parameters())
    layer.to("meta").to_empty(device="cpu").load_state_dict(state)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["interleaved", "split", "dense"])
def test_a_converted_model_of_images_takes_the_layout_of_images(layout):
    torch.manual_seed(0)
    dense = tf.ViTModel(
        tf.ViTConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            image_size=16, patch_size=8,
        )
    )  # fmt: skip
    model = hf.upcycle(dense.eval(), hf.MPOEConfig(num_experts=4, layout=layout))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(images).last_hidden_state
        model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(images).last_hidden_state, expected)
    kernel = model.embeddings.patch_embeddings.projection.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_a_converted_model_of_videos_takes_the_layout_of_videos():
    torch.manual_seed(0)
    dense = tf.VideoMAEModel(
        tf.VideoMAEConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            image_size=16, patch_size=8, num_frames=4,
        )
    )  # fmt: skip
    model = hf.upcycle(dense.eval(), hf.MPOEConfig(num_experts=4, sites=3))
    videos = torch.randn(2, 4, 3, 16, 16)
    with torch.no_grad():
        expected = model(videos).last_hidden_state
        model.to(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(model(videos).last_hidden_state, expected)

"""Dense feed-forward networks → mixtures of experts, without changing the model's function."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from tnmoe.hf.checks import check_in_memory, check_model, check_unconverted
from tnmoe.hf.config import MPOEConfig, check_config
from tnmoe.hf.ffn import check_formula
from tnmoe.hf.find import find_ffns
from tnmoe.hf.layers import converted_mixture, draw_start
from tnmoe.hf.record import add_records, give_own_configuration
from tnmoe.hf.router_losses import attach_router_losses
from tnmoe.system.memory import explain_memory_error
from tnmoe.truncation.info import TruncationInfo


def upcycle(
    model: PreTrainedModel,
    config: MPOEConfig,
    on_matrix: Callable[[str, TruncationInfo], None] | None = None,
) -> PreTrainedModel:
    """Turn the dense feed-forward networks of a pretrained model into mixtures of experts.

    Every expert starts as the pretrained network. With exact bonds, no expert noise and weights
    that sum to 1 (see :class:`tnmoe.nn.TopKRouter`; the default) the model computes the same as
    before, to rounding.

    Parameters
    ----------
    model : PreTrainedModel
        Converted in place: :class:`tnmoe.nn.MPOMoE` modules replace the networks of a known family
        (:func:`find_ffns`), on their device and in their dtype.
    config : MPOEConfig
        Experts, routing, shapes, and which layers to convert.
    on_matrix : callable, optional
        Called as ``on_matrix(name, info)`` after every decomposition, for progress and spectra; not
        where experts share a matrix as it is, in ``hidden`` and ``residual``. With ``max_bond``
        set, ``info.error_bound`` bounds the error of the truncation.

    Returns
    -------
    PreTrainedModel
        ``model``; ``save_pretrained`` and ``from_pretrained`` work as for any other model. In
        training its loss includes those of its routers (:func:`attach_router_losses`).

    Raises
    ------
    InputError
        If the model has no known feed-forward network, has one that does more than its matrices
        and activation, is already converted or quantized, or holds NaN or infinity.
    TypeError
        If ``model`` is not a model of transformers (a wrapper is not), or ``config`` is not an
        MPOEConfig.

    Notes
    -----
    Routers and expert noise are drawn from torch's global generator: seed it to reproduce them.
    Sparse upcycling: Komatsuzaki et al., arXiv:2212.05055.

    Examples
    --------
    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_layer=1, n_embd=16, n_head=2)).eval()
    >>> tokens = torch.arange(8)[None]
    >>> before = model(tokens).logits
    >>> model = upcycle(model, MPOEConfig(num_experts=4, sites=3))
    >>> bool(torch.allclose(model(tokens).logits, before, atol=1e-4))
    True
    >>> type(model.transformer.h[0].mlp).__name__
    'MPOMoE'
    """
    check_model(model)
    check_config(config)
    check_unconverted(model)
    check_in_memory(model, "tnmoe.hf.prepare_upcycle")
    # Everything is built before anything is replaced: an error leaves the model as it was.
    ffns = find_ffns(model, config.layers, config.every)
    for ffn in ffns:
        check_formula(ffn)
    layers = []
    for number, ffn in enumerate(ffns, start=1):
        with explain_memory_error(f"converting {ffn.name}, network {number} of {len(ffns)}"):
            router, noise_seed = draw_start(ffn, config)
            layers.append(converted_mixture(ffn, config, router, noise_seed, on_matrix))
    for ffn, layer in zip(ffns, layers, strict=True):
        ffn.install(layer.train(model.training))
    give_own_configuration(model)
    _clear_quantization(model)
    add_records(model, config, [ffn.name for ffn in ffns])
    attach_router_losses(model, config)
    return model


def _clear_quantization(model: PreTrainedModel) -> None:
    """Remove the traces of a quantizer that left floats, such as that of GGUF files.

    They would keep Trainer, ``half`` and other code from treating the weights as floats.
    """
    vars(model.config).pop("quantization_config", None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False
    for name in ("is_quantized", "quantization_method", "hf_quantizer"):
        vars(model).pop(name, None)

"""MPOE checkpoints as ordinary Hugging Face folders: config.json and safetensors.

The structure of an MPOE model is stored under ``quantization_config`` in its config.json. That is
transformers' one public place for "rebuild the modules before the weights are loaded"; with
``tnmoe.hf`` imported, every ``from_pretrained`` follows it, sharding, dtype and device maps
included. Nothing is quantized, and a loaded model is not marked as if it were.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from tnmoe.errors import InputError
from tnmoe.hf.config import MPOEConfig
from tnmoe.hf.router_losses import attach_router_losses
from tnmoe.hf.shards import CONFIG, check_folder, read_json
from tnmoe.hf.structure import install_empty

METHOD = "tnmoe"
_VERSION = 1


@register_quantization_config(METHOD)
class StoredConfig(QuantizationConfigMixin):
    """The entry of config.json that describes an MPOE model.

    Parameters
    ----------
    mpoe : dict
        What ``MPOEConfig.to_dict`` gave.
    layout_version : int
        Version of the layout of checkpoints.
    quant_method : str
        Name under which transformers finds this class.
    """

    def __init__(
        self,
        mpoe: dict[str, Any] | None = None,
        layout_version: int = _VERSION,
        quant_method: Any = METHOD,
        **unknown: Any,
    ) -> None:
        if layout_version != _VERSION:
            raise InputError(
                f"this checkpoint has layout version {layout_version}, "
                f"this version of tnmoe reads {_VERSION}"
            )
        if not isinstance(mpoe, dict) or unknown:
            raise InputError(
                "quantization_config of an MPOE checkpoint must hold mpoe, an object, and nothing "
                f"else but layout_version and quant_method; got mpoe={mpoe!r}"
                + "".join(f", {name}" for name in unknown)
            )
        self.quant_method = quant_method
        self.layout_version = layout_version
        self.mpoe = mpoe


def require_mpoe(quantization_config: Any, folder: str | os.PathLike) -> dict[str, Any]:
    """The entry of a folder's config.json, if it is the one of an MPOE model.

    Raises
    ------
    InputError
        If it is not.
    """
    stored = quantization_config
    if not isinstance(stored, dict) or stored.get("quant_method") != METHOD:
        raise InputError(f"{os.fspath(folder)} is not an MPOE checkpoint: its config.json has none")
    return stored


@register_quantizer(METHOD)
class StructureLoader(HfQuantizer):
    """Gives a model on the meta device its experts before the weights are read."""

    quantization_config: StoredConfig

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        install_empty(model, MPOEConfig.from_dict(self.quantization_config.mpoe))

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        unmark_as_quantized(model)
        attach_router_losses(model, MPOEConfig.from_dict(self.quantization_config.mpoe))
        return model


def unmark_as_quantized(model: PreTrainedModel) -> None:
    """Undo the marks that would keep Trainer, ``half`` and others from treating weights as floats.

    For models that came through a quantizer of transformers and are not quantized all the same.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        vars(model).pop(mark, None)


def check_unconverted(model: nn.Module) -> None:
    """Raise an InputError for a model that is converted or quantized already."""
    stored: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    # What was loaded from a GGUF file is in floats again.
    if stored is not None and getattr(stored, "quant_method", None) != QuantizationMethod.GGUF:
        raise InputError(f"{type(model).__name__} is already converted or quantized")


def mark_as_mpoe(model: PreTrainedModel, config: MPOEConfig) -> None:
    """Let ``save_pretrained`` write how to rebuild the model, in a configuration of its own."""
    # A caller may make further models of the one it was given.
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        held = vars(module).get("config")
        if id(held) in copies:
            module.config = copies[id(held)]
    model.config.quantization_config = StoredConfig(config.to_dict())


def config_of(model: PreTrainedModel) -> MPOEConfig:
    """How a model was converted.

    Raises
    ------
    InputError
        If it was not.
    """
    stored: Any = getattr(model.config, "quantization_config", None)
    if getattr(stored, "quant_method", None) != METHOD:
        raise InputError(
            f"{type(model).__name__} is no converted model: it has no experts of tnmoe"
        )
    return MPOEConfig.from_dict(stored.mpoe)


def model_class_named(name: str) -> Any:
    """The class of transformers' models of that name; None if it is none of them."""
    found = getattr(transformers, name, None)
    # A config.json may name anything: what it names is about to be called.
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    return found if is_model else None


def from_pretrained(folder: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """Load an MPOE checkpoint as the class it was saved from.

    With this module imported, ``AutoModelFor….from_pretrained`` loads it as well.

    Parameters
    ----------
    folder : path
        A folder that ``model.save_pretrained`` wrote.
    **kwargs
        For the ``from_pretrained`` of that class: ``dtype``, ``device_map`` and so on.

    Raises
    ------
    InputError
        If there is no such folder, or it holds no MPOE checkpoint of a format this version reads.

    Examples
    --------
    >>> import tempfile
    >>> from tnmoe.hf import MPOEConfig, upcycle
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> folder = tempfile.mkdtemp()
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_layer=1, n_embd=16, n_head=2))
    >>> upcycle(model, MPOEConfig(num_experts=4, sites=3)).save_pretrained(folder)
    >>> type(from_pretrained(folder)).__name__
    'GPT2LMHeadModel'
    """
    check_folder(Path(folder))
    require_mpoe(read_json(Path(folder) / CONFIG).get("quantization_config"), folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    names = config.architectures or ["none"]
    model_class = model_class_named(names[0])
    if model_class is None:
        raise InputError(f"{os.fspath(folder)} names no class of transformers: got {names[0]!r}")
    return model_class.from_pretrained(folder, local_files_only=True, **kwargs)

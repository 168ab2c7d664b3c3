"""Models of transformers on the meta device, where they have shapes but no numbers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tnmoe.errors import InputError, short_repr
from tnmoe.hf.guards import SizeLimits, check_counts, guard_transformers
from tnmoe.hf.record import ENTRY
from tnmoe.hf.trust import no_foreign_code, without_foreign_code

# Changes of names that transformers applies to loaded models only, not to models just built.
_OF_LOADED_MODELS: Any = getattr(loading, "PrefixChange", ())

# Modules of a model without a checkpoint to compare with: the largest dense ones have thousands.
_MAX_MODULES = 30_000

_HINT = (
    "load the model by its own code, add its networks with tnmoe.hf.register_family, "
    "and use tnmoe.hf.upcycle"
)


def config_from_entries(entries: Mapping[str, Any]) -> PreTrainedConfig:
    """Build the configuration that a config.json describes, without code that it may name.

    Raises
    ------
    InputError
        If transformers has no such architecture, or the entries do not suit it.
    """
    kind: Any = entries.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise InputError(
            f"transformers has no architecture with model_type {short_repr(kind)}: {_HINT}"
        )
    check_counts(entries)
    with NamedTemporaryFile("w", encoding="utf-8", suffix=".json") as file:
        # transformers understands infinity and the like, which JSON lacks, in files only.
        json.dump(without_foreign_code(entries), file)
        file.flush()
        with guard_transformers(f"config.json does not suit a model of type {kind!r}"):
            return CONFIG_MAPPING[kind].from_json_file(file.name)


def check_unconverted_entries(entries: Mapping[str, Any], path: Path) -> None:
    """Raise an InputError if a config.json is that of a converted or quantized model."""
    if entries.get("quantization_config") or entries.get(ENTRY):
        raise InputError(f"{path} is already converted or quantized")


def check_unquantized_entries(entries: Mapping[str, Any], path: Path) -> None:
    """Raise an InputError if a config.json is that of a quantized model."""
    if entries.get("quantization_config"):
        raise InputError(
            f"{path} is quantized: load it with dequantized weights, and save those, first"
        )


def model_class_named(name: str) -> Any:
    """Return the model class of transformers that has this name, or None."""
    found = getattr(transformers, name, None)
    # The name comes from a file, and the class is about to be called.
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    return found if is_model else None


def saved_class(config: PreTrainedConfig) -> Any:
    """Return the class whose ``save_pretrained`` wrote a configuration; None if it names none.

    Raises
    ------
    InputError
        If transformers has no such class, the class has another configuration, or none is named
        and transformers has no model of that type.
    """
    names: Any = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"architectures must be a list of names, got {short_repr(names)}")
    if not names:
        # transformers would import every model that it has before it raises.
        if type(config) not in MODEL_MAPPING:
            raise InputError(f"transformers has no model of type {config.model_type!r} by itself")
        return None
    name = names[0]
    found = model_class_named(name)
    if found is None:
        raise InputError(f"transformers has no architecture {short_repr(name)}: {_HINT}")
    # The abstract base classes of a family have no forward of their own.
    is_abstract = found.forward is PreTrainedModel.forward
    if is_abstract or not isinstance(config, found.config_class or ()):
        raise InputError(f"{name} is not a class for a model of type {config.model_type!r}")
    return found


def meta_model(
    config: PreTrainedConfig, max_modules: int = _MAX_MODULES, *, buffers: bool = False
) -> Any:
    """Build the model of a configuration on the meta device.

    Parameters
    ----------
    config : PreTrainedConfig
    max_modules : int
        Largest number of submodules.
    buffers : bool
        Make buffers on the CPU, with their numbers: the model can then run, once its parameters
        have theirs.

    Raises
    ------
    InputError
        If transformers has no such class, the values of the configuration do not suit it, or the
        model has more modules.
    """
    make = saved_class(config) or partial(AutoModel.from_config, trust_remote_code=False)
    problem = f"config.json does not suit a model of type {config.model_type!r}"
    limits = SizeLimits(modules=max_modules)
    place: Any = init_empty_weights(include_buffers=False) if buffers else torch.device("meta")
    with guard_transformers(problem, limits), place, no_foreign_code():
        model = make(config)
    if buffers:
        # accelerate makes a new parameter at every place.
        model.tie_weights()
    # Stored here, or transformers would search all modules for them again for every name.
    model._weight_conversions = [
        conversion
        for conversion in get_model_conversion_mapping(model, add_legacy=False)
        if not isinstance(conversion, _OF_LOADED_MODELS)
    ]
    return model


def stored_name(model: Any, name: str) -> str:
    """Return the name that ``save_pretrained`` gives a tensor; it may differ from the model's.

    Only for tensors that are stored as they are.
    """
    (stored,) = revert_weight_conversion(model, {name: torch.empty(0, device="meta")})
    return stored


def stored_tensors(model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return what ``save_pretrained`` stores for a tensor: itself, or its parts, by name.

    The experts of many mixtures are one tensor in the model, and one per expert in files.
    """
    return revert_weight_conversion(model, {name: tensor})


def merged_tensor(model: Any, parts: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor of a model whose stored parts these are; undo :func:`stored_tensors`."""
    conversions = model._weight_conversions
    renamings = [each for each in conversions if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, loading.WeightConverter)]
    by_pattern = {
        pattern: converter for converter in converters for pattern in converter.source_patterns
    }
    used = None
    for name in sorted(parts, key=loading.dot_natural_key):
        target, pattern = loading.rename_source_key(name, renamings, converters)
        if pattern is None:
            (tensor,) = parts.values()
            return tensor
        if used is None:
            used = copy.deepcopy(by_pattern[pattern])
        part: Any = parts[name]  # annotated as the future of a tensor
        used.add_tensor(target, name, pattern, part)
    assert used is not None, "a tensor has parts"
    ((_, merged),) = used.convert(target, model=model, config=model.config).items()
    return merged[0] if isinstance(merged, list) else merged

"""Models without numbers, of which a part at a time is filled from a checkpoint."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from itertools import chain, count
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import get_ident
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tnmoe.errors import InputError, shown
from tnmoe.hf.config import MPOEConfig
from tnmoe.hf.ffn import FFN
from tnmoe.hf.find import find_ffns
from tnmoe.hf.folders.checkpoint import ADAPTERS, Checkpoint
from tnmoe.hf.record import ENTRY
from tnmoe.hf.trust import no_foreign_code, without_foreign_code

# From a parameter's name in a model to its name in a checkpoint.
Rename = Callable[[str], str]

_FLOATS = ("F64", "F32", "F16", "BF16")

# How a loaded model's names differ, which one that was just built knows nothing of.
_OF_LOADED: Any = getattr(loading, "PrefixChange", ())

# What there are many of, by the names of their numbers; and how many at most. Classes make lists
# of that length before they make a model.
_COUNTS = re.compile("layers?|labels|experts|blocks|depth|stages|heads|codebooks", re.IGNORECASE)
_MOST = 1_000_000

# Modules of a model: the largest dense ones have some thousand, and few for every tensor.
_MOST_MODULES, _PER_TENSOR = 30_000, 20

# Numbers of a model: those beside what is stored, and per byte of that.
_MOST_NUMBERS, _PER_BYTE = 10**9, 20

_OTHERWISE = (
    "load the model by its own code, add its networks with tnmoe.hf.register_family, "
    "and use tnmoe.hf.upcycle"
)


def config_from(entries: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration that a config.json describes, without the code that it may name.

    Raises
    ------
    InputError
        If transformers has no such architecture, or the entries do not suit it.
    """
    kind: Any = entries.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise InputError(
            f"transformers has no architecture with model_type {shown(kind)}: {_OTHERWISE}"
        )
    _check_counts(entries)
    with NamedTemporaryFile("w", encoding="utf-8", suffix=".json") as file:
        # Numbers that JSON does not have, infinity for one, are understood in files only.
        json.dump(without_foreign_code(entries), file)
        file.flush()
        with foreign_values(f"config.json does not suit a model of type {kind!r}"):
            return CONFIG_MAPPING[kind].from_json_file(file.name)


@contextmanager
def foreign_values(
    wrong: str, modules: int = sys.maxsize, numbers: int = sys.maxsize
) -> Iterator[None]:
    """A block in which transformers computes with what a config.json says.

    Every class there trusts its entries, or checks them in its own way: whatever it raises then is
    about the file, but for what this machine lacks. That is so in such blocks and nowhere else.

    Parameters
    ----------
    wrong : str
        What an error means, for the message.
    modules, numbers : int
        How many modules may be put into others, and how many numbers into modules.
    """
    made, filled, thread = count(1), 0, get_ident()

    def see(*_: Any) -> None:
        if get_ident() == thread and next(made) > modules:
            raise InputError(f"{wrong}: it has more than {modules} modules")

    def see_numbers(_: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal filled
        if get_ident() == thread and tensor is not None:
            filled += tensor.numel()
            if filled > numbers:
                shape = tuple(tensor.shape)
                raise InputError(f"{wrong}: its files hold less than {name} of shape {shape}")

    hooks = [
        register_module_module_registration_hook(see),
        register_module_parameter_registration_hook(see_numbers),
        register_module_buffer_registration_hook(see_numbers),
    ]
    try:
        yield
    except (InputError, OSError, ImportError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"{wrong}: {type(error).__name__}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()


def _check_counts(entries: Any, name: str = "") -> None:
    """Refuse counts (of layers, say) that no model has, before a list of that length is made."""
    if isinstance(entries, Mapping):
        for key, value in entries.items():
            _check_counts(value, str(key))
    elif isinstance(entries, list):
        for value in entries:
            _check_counts(value, name)
    elif isinstance(entries, int) and _COUNTS.search(name) and entries > _MOST:
        raise InputError(f"{name} of config.json must be at most {_MOST}, got {shown(entries)}")


def model_class_named(name: str) -> Any:
    """The model class of transformers that has this name; None if there is none."""
    found = getattr(transformers, name, None)
    # A config.json may name anything: what it names is about to be called.
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    return found if is_model else None


def saved_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that a configuration says its model was saved from, if it does.

    Raises
    ------
    InputError
        If there is no such class, it has another configuration, or none is named and there is no
        model of that type.
    """
    names: Any = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise InputError(f"architectures must be a list of names, got {shown(names)}")
    if not names:
        # transformers itself imports every model that it has before it says so.
        if type(config) not in MODEL_MAPPING:
            raise InputError(f"transformers has no model of type {config.model_type!r} by itself")
        return None
    name = names[0]
    found = model_class_named(name)
    if found is None:
        raise InputError(f"transformers has no architecture {shown(name)}: {_OTHERWISE}")
    # Classes that all models of a family are made from have no forward of their own.
    builds = found.forward is not PreTrainedModel.forward
    if not (builds and isinstance(config, found.config_class or ())):
        raise InputError(f"{name} is no class for a model of type {config.model_type!r}")
    return found


def modules_for(source: Checkpoint) -> int:
    """How many modules a model may have for the tensors that there are."""
    return 1000 + _PER_TENSOR * len(source.specs)


def numbers_for(source: Checkpoint) -> int:
    """How many numbers transformers may make room for, all in all, to load those that there are.

    It does so before it compares sizes. Several may come out of a byte, and each is put in its
    module more than once; masks have some of their own.
    """
    return _MOST_NUMBERS + _PER_BYTE * source.num_bytes


def model_without_numbers(config: PreTrainedConfig, modules: int = _MOST_MODULES) -> Any:
    """The model of a configuration, on the meta device.

    Parameters
    ----------
    config : PreTrainedConfig
    modules : int
        How many it may have.

    Raises
    ------
    InputError
        If there is no such class, the values of the configuration do not suit it, or it has more
        modules.
    """
    make = saved_class(config) or partial(AutoModel.from_config, trust_remote_code=False)
    wrong = f"config.json does not suit a model of type {config.model_type!r}"
    with foreign_values(wrong, modules), torch.device("meta"), no_foreign_code():
        model = make(config)
    # Otherwise transformers looks for them in all modules again for every name.
    model._weight_conversions = [
        each
        for each in get_model_conversion_mapping(model, add_legacy=False)
        if not isinstance(each, _OF_LOADED)
    ]
    return model


def stored_name(model: Any, name: str) -> str:
    """What ``save_pretrained`` calls a tensor of a model: some classes have changed since."""
    (stored,) = revert_weight_conversion(model, {name: torch.empty(0, device="meta")})
    return stored


def check_dense(entries: Mapping[str, Any], path: Path) -> None:
    """Raise an InputError if a config.json is of a converted or quantized model."""
    if entries.get("quantization_config") or entries.get(ENTRY):
        raise InputError(f"{path} is already converted or quantized")


def check_once(source: Checkpoint, model: Any) -> None:
    """Refuse what transformers would take for one tensor: names with and without a prefix.

    Parameters
    ----------
    source : Checkpoint
    model : PreTrainedModel or its class
    """
    prefix = f"{model.base_model_prefix}."
    for name in source.specs:
        if (twin := prefix + name) in source.specs:
            raise InputError(f"{source.folder} holds both {name} and {twin}, which are one tensor")


class Skeleton:
    """The model of a checkpoint, on the meta device.

    Parameters
    ----------
    source : Checkpoint
    entries : mapping, optional
        Its config.json, or a changed one.

    Attributes
    ----------
    model : PreTrainedModel
    rename : callable
        From names in the model to names in the checkpoint; see :meth:`match`.
    """

    rename: Rename

    def __init__(self, source: Checkpoint, entries: Mapping[str, Any] | None = None) -> None:
        if (source.folder / ADAPTERS).exists():
            raise InputError(
                f"{source.folder} holds adapters of PEFT beside the model, which would be lost: "
                "load it, merge them and save the result"
            )
        self.source = source
        config = config_from(entries or source.config)
        self.model = model_without_numbers(config, modules_for(source))
        check_once(source, self.model)

    def networks(self, config: MPOEConfig) -> list[tuple[FFN, list[str]]]:
        """The networks to convert with the names of their parameters, which are matched."""
        ffns = find_ffns(self.model, config.layers, config.every)
        names = self.names_of(ffn.parameters for ffn in ffns)
        self.match(chain.from_iterable(names))
        return list(zip(ffns, names, strict=True))

    def names_of(self, parts: Iterable[Iterable[Tensor]]) -> list[list[str]]:
        """Names of the parameters of each part, in the order of the model."""
        named = list(self.model.named_parameters())
        places = {id(each): place for place, (_, each) in enumerate(named)}
        return [
            [named[place][0] for place in sorted({places[id(each)] for each in part})]
            for part in parts
        ]

    def match(self, needed: Iterable[str]) -> None:
        """Find out what the checkpoint calls parameters, and take over their dtypes.

        Parameters
        ----------
        needed : iterable of str
            Those that will be read.

        Raises
        ------
        InputError
            If one of these is not there or holds no floats, or any is of another shape.
        """
        needed = list(needed)
        self.rename = self._naming(needed)
        for name, parameter in self.model.named_parameters():
            spec = self.source.specs.get(self.rename(name))
            if spec is not None and spec.shape != tuple(parameter.shape):
                raise InputError(
                    f"{self.rename(name)} is of shape {spec.shape} in {self.source.folder}, its "
                    f"config.json says {tuple(parameter.shape)}"
                )
        for name in needed:
            dtype = self.source.specs[self.rename(name)].dtype
            if dtype not in _FLOATS:
                raise InputError(
                    f"{self.rename(name)} holds {dtype}: quantized weights are not converted"
                )
        self.give_dtypes(self.model)

    def _naming(self, needed: list[str]) -> Rename:
        prefix = f"{self.model.base_model_prefix}."
        stored: Rename = cache(partial(stored_name, self.model))
        # A model that was loaded from names with a prefix is saved with it: a CLIPTextModel.
        loaded = copy.copy(self.model)
        loaded._weight_conversions = get_model_conversion_mapping(self.model, add_legacy=False)
        renames: list[Rename] = [
            stored,
            cache(partial(stored_name, loaded)),
            lambda name: stored(name).removeprefix(prefix),
            lambda name: prefix + stored(name),
            lambda name: name,
        ]
        missing = [[n for n in needed if rename(n) not in self.source.specs] for rename in renames]
        fewest = min(range(len(renames)), key=lambda i: len(missing[i]))
        if lost := missing[fewest]:
            raise InputError(
                f"{self.source.folder} lacks {len(lost)} of the {len(needed)} tensors that "
                f"{type(self.model).__name__} needs of it: "
                f"{', '.join(map(renames[fewest], lost[:4]))}"
            )
        return renames[fewest]

    def give_dtypes(self, model: nn.Module) -> None:
        """Give the parameters of a model the dtypes that they have in the checkpoint."""
        for name, parameter in model.named_parameters():
            spec = self.source.specs.get(self.rename(name))
            if spec is not None and spec.dtype in _FLOATS:
                parameter.data = parameter.data.to(spec.torch_dtype)

    def filled(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """A block in which these parameters have their numbers."""
        return held(self.model, {name: self.source.load(self.rename(name)) for name in names})


@contextmanager
def held(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """A block in which these tensors are a model's parameters of those names."""
    empty = {}
    try:
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            empty[module, leaf] = module._parameters[leaf]
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        yield
    finally:
        for (module, leaf), parameter in empty.items():
            module._parameters[leaf] = parameter

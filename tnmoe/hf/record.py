"""What a configuration records of a conversion: how it was done, and on which networks.

In memory the record is the attribute ``tnmoe`` of transformers' own configuration, in the form of
:meth:`Record.to_dict`. A configuration inside another one, such as the text model's of CLIP, has a
record of its own, since transformers can load that part alone.

In ``config.json`` an entry of the same name holds it. There, ``model_type`` and ``id2label`` are
replaced by what no version of transformers takes for a value. Without tnmoe the folder is therefore
refused, by Auto classes and by every other class, and its networks never become random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tnmoe.errors import InputError
from tnmoe.hf.config import MPOEConfig

ENTRY = "tnmoe"
_FORMAT = 2

_STOP = "converted by tnmoe: pip install tnmoe[hf], and import tnmoe.hf before loading it"
# The first stops Auto classes with a message about the architecture. The second stops every class,
# whatever arguments it is given: labels must have integers as keys.
_STOPPED = ("model_type", "id2label")


@dataclass(frozen=True)
class Record:
    """How a model was converted.

    Attributes
    ----------
    config : MPOEConfig
    networks : tuple of str
        Names of the layers whose feed-forward networks became mixtures, as in :attr:`FFN.name`.
    """

    config: MPOEConfig
    networks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "format": _FORMAT,
            "config": self.config.to_dict(),
            "networks": list(self.networks),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """The record that :meth:`to_dict` described.

        Raises
        ------
        InputError
            If it is none, or one of another format.
        """
        if not isinstance(data, Mapping):
            raise InputError(f"{ENTRY} must be an object, got {data!r}")
        if data.get("format") != _FORMAT:
            raise InputError(
                f"{ENTRY} has format {data.get('format')!r}, this version of tnmoe reads {_FORMAT}"
            )
        if unknown := sorted(set(data) - {"format", "config", "networks"}):
            raise InputError(f"{ENTRY} has unknown entries {', '.join(map(repr, unknown))}")
        config, networks = data.get("config"), data.get("networks")
        if not isinstance(config, Mapping):
            raise InputError(f"config of {ENTRY} must be an object, got {config!r}")
        if not isinstance(networks, list) or not all(isinstance(each, str) for each in networks):
            raise InputError(f"networks of {ENTRY} must be a list of names, got {networks!r}")
        return cls(MPOEConfig.from_dict(config), tuple(networks))


def record_of(config: Any) -> Record | None:
    """The record of a configuration; None for a model that is not converted.

    Raises
    ------
    InputError
        If there is one, of another form.
    """
    data = getattr(config, ENTRY, None)
    return None if data is None else Record.from_dict(data)


def config_of(model: nn.Module) -> MPOEConfig:
    """Tell how a model was converted.

    Parameters
    ----------
    model : PreTrainedModel

    Returns
    -------
    MPOEConfig
        What :func:`upcycle` or :func:`prepare_upcycle` was given.

    Raises
    ------
    InputError
        If it was not converted.

    Examples
    --------
    >>> from tnmoe.hf import upcycle
    >>> from transformers import GPT2Config, GPT2Model
    >>> model = GPT2Model(GPT2Config(vocab_size=32, n_layer=1, n_embd=16, n_head=2))
    >>> config_of(upcycle(model, MPOEConfig(num_experts=4, sites=3))).num_experts
    4
    """
    return required_record(model).config


def required_record(model: nn.Module) -> Record:
    """The record of a converted model; an InputError for any other."""
    record = record_of(getattr(model, "config", None))
    if record is None:
        raise InputError(
            f"{type(model).__name__} is no converted model: it has no experts of tnmoe"
        )
    return record


def check_unconverted(model: nn.Module) -> None:
    """Raise an InputError for a model that is converted or quantized already."""
    config = getattr(model, "config", None)
    quantized: Any = getattr(config, "quantization_config", None)
    # What was loaded from a GGUF file is in floats again. transformers 5.0 has no such member yet.
    if getattr(quantized, "quant_method", None) == "gguf":
        quantized = None
    if quantized is not None or getattr(config, ENTRY, None) is not None:
        raise InputError(f"{type(model).__name__} is already converted or quantized")


def mark(model: PreTrainedModel, config: MPOEConfig, networks: Iterable[str]) -> None:
    """Record a conversion in the configurations of a model, and of models that it holds.

    Parameters
    ----------
    model : PreTrainedModel
    config : MPOEConfig
    networks : iterable of str
        Names of the layers in the model whose networks are converted.
    """
    names = tuple(networks)
    model.config.tnmoe = Record(config, names).to_dict()
    parts: dict[int, tuple[PreTrainedConfig, list[str]]] = {}
    for path, part in model.named_modules():
        own = getattr(part, "config", None)
        if isinstance(own, PreTrainedConfig) and own is not model.config:
            roots = parts.setdefault(id(own), (own, []))[1]
            # Names count from the outermost module that has this configuration.
            if not any(_is_in(path, root) for root in roots):
                roots.append(path)
    for part_config, roots in parts.values():
        inner = [name[len(root) + 1 :] for root in roots for name in names if _is_in(name, root)]
        if inner:
            part_config.tnmoe = Record(config, tuple(dict.fromkeys(inner))).to_dict()


def _is_in(name: str, root: str) -> bool:
    return name.startswith(f"{root}.")


def own_configuration(model: PreTrainedModel) -> None:
    """Give a model a configuration of its own: callers make further models of the one they gave."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        held = vars(module).get("config")
        if id(held) in copies:
            module.config = copies[id(held)]


def with_records(entries: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Entries of a config.json with the records of the configuration that was made of them."""
    written = dict(entries)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig) and is_marked(part):
            given = written.get(name) or {"model_type": part.model_type}
            written[name] = with_records(given, part)
    record = getattr(config, ENTRY, None)
    return written if record is None else written | {ENTRY: record}


def configs_in(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration, and all that are inside it."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from configs_in(part)


def is_marked(config: PreTrainedConfig) -> bool:
    """Whether a configuration, or one inside it, has a record."""
    return any(getattr(each, ENTRY, None) is not None for each in configs_in(config))


def without_records(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of the configuration of the dense model."""
    return {
        key: without_records(value) if isinstance(value, Mapping) else value
        for key, value in entries.items()
        if key != ENTRY
    }


def unmark(config: PreTrainedConfig) -> None:
    """Take the records out of a configuration and of those inside it."""
    for each in configs_in(config):
        vars(each).pop(ENTRY, None)


def to_file(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries as config.json holds them: transformers alone refuses what has a record.

    Parameters
    ----------
    entries : mapping
        As a configuration's ``to_dict`` gives them.
    """
    written = _each_part(entries, to_file)
    if ENTRY in written:
        stopped = {key: written[key] for key in _STOPPED if key in written}
        written[ENTRY] = written[ENTRY] | {"stopped": stopped}
        written["model_type"] = f"{stopped.get('model_type')}, {_STOP}"
        written["id2label"] = {_STOP: ""}
    return written


def from_file(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a config.json as a configuration takes them; the inverse of :func:`to_file`."""
    read = _each_part(entries, from_file)
    record = read.get(ENTRY)
    if isinstance(record, dict) and isinstance(record.get("stopped"), dict):
        stopped = record["stopped"]
        read[ENTRY] = {key: value for key, value in record.items() if key != "stopped"}
        for key in _STOPPED:
            # What somebody has written there since is meant.
            if _STOP in str(read.get(key)):
                del read[key]
                read |= {key: stopped[key]} if key in stopped else {}
    return read


def _each_part(entries: Mapping[str, Any], change: Any) -> dict[str, Any]:
    return {
        key: change(value) if isinstance(value, dict) and key != ENTRY else value
        for key, value in entries.items()
    }

"""The record of a conversion in a model's configuration: how it was done, and on which networks.

In memory the record is the attribute ``tnmoe`` of transformers' own configuration, in the form of
:meth:`Record.to_dict`. A configuration inside another one, such as that of CLIP's text model, has a
record of its own, since transformers can load that part alone.

In ``config.json`` the record is the entry ``tnmoe``. There, ``model_type`` and ``id2label`` are
replaced by values that every version of transformers refuses. Without tnmoe, neither Auto classes
nor any other class therefore loads the folder, and its networks never become random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tnmoe.errors import InputError, short_repr
from tnmoe.hf.compression import CompressionConfig
from tnmoe.hf.config import MPOEConfig
from tnmoe.nn.structure import ProjectionStructure
from tnmoe.system.tables import listed

ENTRY = "tnmoe"
_FORMAT = 2

# What transformers shows to those who load a converted folder without tnmoe.
_REFUSAL = "converted by tnmoe: pip install tnmoe[hf], and import tnmoe.hf before loading it"
# Entries of config.json that hold the refusal. ``model_type`` stops Auto classes, with a message
# about the architecture. ``id2label`` stops every class, whatever its arguments: labels must have
# integers as keys.
_REPLACED = ("model_type", "id2label")
# Entries of the record.
_PARTS = {"format", "config", "networks", "compression", "linear"}
# Entry of the record in config.json that keeps their values.
_ORIGINALS = "replaced"


@dataclass(frozen=True)
class Compression:
    """The compression of a model.

    Attributes
    ----------
    config : CompressionConfig
    experts : mapping
        From the path of a mixture's experts to the structures of their matrices by name.
    """

    config: CompressionConfig
    experts: Mapping[str, Mapping[str, ProjectionStructure]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "config": self.config.to_dict(),
            "experts": {
                path: {name: structure.to_dict() for name, structure in structures.items()}
                for path, structures in self.experts.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Return the compression that :meth:`to_dict` described.

        Raises
        ------
        InputError
            If the data describe none.
        """
        experts = data.get("experts") if isinstance(data, Mapping) else None
        if not isinstance(experts, Mapping) or not isinstance(data.get("config"), Mapping):
            raise InputError(
                f"compression of {ENTRY} must have a config and experts, got {short_repr(data)}"
            )
        if not all(isinstance(structures, Mapping) for structures in experts.values()):
            raise InputError(f"every entry of compression's experts in {ENTRY} must be an object")
        return cls(
            CompressionConfig.from_dict(data["config"]),
            {
                path: {
                    name: ProjectionStructure.from_dict(structure)
                    for name, structure in structures.items()
                }
                for path, structures in experts.items()
            },
        )

    def inside(self, root: str) -> Self | None:
        """Return the part of the experts inside a module, named from there; None if it has none."""
        experts = {
            path[len(root) + 1 :]: structures
            for path, structures in self.experts.items()
            if _is_inside(path, root)
        }
        return replace(self, experts=experts) if experts else None


@dataclass(frozen=True)
class Record:
    """What tnmoe made of a model.

    Attributes
    ----------
    config : MPOEConfig or None
        None if no network of the model was converted.
    networks : tuple of str
        Names of the layers whose feed-forward networks became mixtures; see :attr:`FFN.name`.
    compression : Compression or None
        What became of ordinary mixtures.
    linear : mapping
        From the paths of linear layers that became MPOs to their structures.
    """

    config: MPOEConfig | None
    networks: tuple[str, ...] = ()
    compression: Compression | None = None
    linear: Mapping[str, ProjectionStructure] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether tnmoe made nothing of the model."""
        return self.config is None and self.compression is None and not self.linear

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        data: dict[str, Any] = {"format": _FORMAT}
        if self.config is not None:
            data |= {"config": self.config.to_dict(), "networks": list(self.networks)}
        if self.compression is not None:
            data["compression"] = self.compression.to_dict()
        if self.linear:
            data["linear"] = {path: each.to_dict() for path, each in self.linear.items()}
        return data

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Return the record that :meth:`to_dict` described.

        Raises
        ------
        InputError
            If the data are not a record, or have another format.
        """
        if not isinstance(data, Mapping):
            raise InputError(f"{ENTRY} must be an object, got {data!r}")
        if data.get("format") != _FORMAT:
            raise InputError(
                f"{ENTRY} has format {data.get('format')!r}, this version of tnmoe reads {_FORMAT}"
            )
        if unknown := sorted(set(data) - _PARTS):
            raise InputError(f"{ENTRY} has unknown entries {', '.join(map(repr, unknown))}")
        compression, linear = None, _linear_from_dict(data.get("linear"))
        if data.get("compression") is not None:
            compression = Compression.from_dict(data["compression"])
        if (compression or linear) and not {"config", "networks"} & set(data):
            return cls(None, (), compression, linear)
        config, networks = data.get("config"), data.get("networks")
        if not isinstance(config, Mapping):
            raise InputError(f"config of {ENTRY} must be an object, got {config!r}")
        if not isinstance(networks, list) or not all(isinstance(name, str) for name in networks):
            raise InputError(f"networks of {ENTRY} must be a list of names, got {networks!r}")
        return cls(MPOEConfig.from_dict(config), tuple(networks), compression, linear)


def _linear_from_dict(data: Any) -> dict[str, ProjectionStructure]:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise InputError(f"linear of {ENTRY} must be an object, got {short_repr(data)}")
    return {path: ProjectionStructure.from_dict(each) for path, each in data.items()}


def record_of(config: Any) -> Record | None:
    """Return the record in a configuration; None if its model is not converted.

    Raises
    ------
    InputError
        If the record is damaged or of another format.
    """
    data = getattr(config, ENTRY, None)
    return None if data is None else Record.from_dict(data)


def config_of(model: nn.Module) -> MPOEConfig:
    """Return the configuration that a model was converted with.

    Parameters
    ----------
    model : PreTrainedModel

    Returns
    -------
    MPOEConfig
        The argument of :func:`upcycle` or :func:`prepare_upcycle`.

    Raises
    ------
    InputError
        If the model was not converted.

    Examples
    --------
    >>> from tnmoe.hf import upcycle
    >>> from transformers import GPT2Config, GPT2Model
    >>> model = GPT2Model(GPT2Config(vocab_size=32, n_layer=1, n_embd=16, n_head=2))
    >>> config_of(upcycle(model, MPOEConfig(num_experts=4, sites=3))).num_experts
    4
    """
    record = required_record(model)
    if record.config is None and record.compression is not None:
        raise InputError(
            f"{type(model).__name__} was compressed and not converted: compression_of returns the "
            "configuration of its compression"
        )
    if record.config is None:
        raise InputError(f"{type(model).__name__} was tensorized and not converted")
    return record.config


def compression_of(model: nn.Module) -> CompressionConfig:
    """Return the configuration that a model was compressed with.

    Parameters
    ----------
    model : PreTrainedModel

    Returns
    -------
    CompressionConfig
        The argument of :func:`compress` or :func:`prepare_compress`.

    Raises
    ------
    InputError
        If the model was not compressed.

    Examples
    --------
    >>> from tnmoe.hf import compress
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> small = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=32)
    >>> more = dict(num_hidden_layers=1, num_key_value_heads=2, num_local_experts=4)
    >>> model = MixtralForCausalLM(MixtralConfig(**small, **more))
    >>> compression_of(compress(model, CompressionConfig(keep=0.6))).keep
    0.6
    """
    record = record_of(getattr(model, "config", None))
    if record is None or record.compression is None:
        raise InputError(f"{type(model).__name__} is not a compressed model")
    return record.compression.config


def record_in_entries(entries: Mapping[str, Any], folder: Any) -> Record:
    """Return the record in the decoded entries of a folder's config.json.

    Raises
    ------
    InputError
        If there is no record, or it is damaged or of another format.
    """
    if ENTRY not in entries:
        raise InputError(f"{folder} is not an MPOE checkpoint: its config.json has no {ENTRY!r}")
    return Record.from_dict(entries[ENTRY])


def required_record(model: nn.Module) -> Record:
    """Return the record of a converted model; raise an InputError for any other model."""
    record = record_of(getattr(model, "config", None))
    if record is None:
        raise InputError(
            f"{type(model).__name__} is not a converted model: it has no experts of tnmoe"
        )
    return record


def check_no_linear(record: Record, what: object, hint: str) -> None:
    """Raise an InputError if linear layers are MPOs, which an export would not write.

    Parameters
    ----------
    record : Record
    what : str or path
        The model or folder, for the message.
    hint : str
        What to do, for the message.
    """
    if record.linear:
        raise InputError(
            f"{what} has linear layers that are MPOs ({listed(record.linear)}): {hint}"
        )


def add_records(model: PreTrainedModel, config: MPOEConfig, networks: Iterable[str]) -> None:
    """Record a conversion in the configurations of a model and of the models inside it.

    Parameters
    ----------
    model : PreTrainedModel
    config : MPOEConfig
    networks : iterable of str
        Names of the layers in the model whose networks are converted.
    """
    names = tuple(networks)
    model.config.tnmoe = Record(config, names).to_dict()
    for part_config, roots in _configurations_inside(model):
        inner = [
            name[len(root) + 1 :] for root in roots for name in names if _is_inside(name, root)
        ]
        if inner:
            part_config.tnmoe = Record(config, tuple(dict.fromkeys(inner))).to_dict()


def add_compression(
    model: PreTrainedModel,
    config: CompressionConfig,
    experts: Mapping[str, Mapping[str, ProjectionStructure]],
) -> None:
    """Record a compression in the configurations of a model and of the models inside it.

    Parameters
    ----------
    model : PreTrainedModel
        A conversion that is on record stays there.
    config : CompressionConfig
    experts : mapping
        From the path of a mixture's experts to the structures of their matrices by name.
    """
    compression = Compression(config, experts)
    _change_record(model.config, compression=compression)
    for part_config, roots in _configurations_inside(model):
        parts = [part for root in roots if (part := compression.inside(root)) is not None]
        if parts:
            inner = {path: each for part in parts for path, each in part.experts.items()}
            _change_record(part_config, compression=Compression(config, inner))


def set_linear_layers(model: PreTrainedModel, linear: Mapping[str, ProjectionStructure]) -> None:
    """Record which linear layers of a model are MPOs, in its configuration and those inside it.

    Parameters
    ----------
    model : PreTrainedModel
        All else that is on record stays there.
    linear : mapping
        From the paths of these layers to their structures; empty if there are none.
    """
    _change_record(model.config, linear=linear)
    for part_config, roots in _configurations_inside(model):
        inner = {
            path[len(root) + 1 :]: each
            for root in roots
            for path, each in linear.items()
            if _is_inside(path, root)
        }
        _change_record(part_config, linear=inner)


def _change_record(config: PreTrainedConfig, **parts: Any) -> None:
    """Replace parts of the record in a configuration; remove a record that has none left."""
    record = replace(record_of(config) or Record(None), **parts)
    if record.is_empty:
        vars(config).pop(ENTRY, None)
    else:
        config.tnmoe = record.to_dict()


def _configurations_inside(
    model: PreTrainedModel,
) -> Iterable[tuple[PreTrainedConfig, list[str]]]:
    """Return configurations other than the model's, each with the paths of its outermost modules.

    Names in the record of a configuration count from there.
    """
    parts: dict[int, tuple[PreTrainedConfig, list[str]]] = {}
    for path, part in model.named_modules():
        part_config = getattr(part, "config", None)
        if isinstance(part_config, PreTrainedConfig) and part_config is not model.config:
            roots = parts.setdefault(id(part_config), (part_config, []))[1]
            if not any(_is_inside(path, root) for root in roots):
                roots.append(path)
    return parts.values()


def _is_inside(name: str, root: str) -> bool:
    return name.startswith(f"{root}.")


def give_own_configuration(model: PreTrainedModel) -> None:
    """Give a model a copy of its configuration, since callers may build more models from it."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        original = vars(module).get("config")
        if id(original) in copies:
            module.config = copies[id(original)]


def configs_in(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Iterate over a configuration and all configurations inside it."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from configs_in(part)


def has_record(config: PreTrainedConfig) -> bool:
    """Check whether a configuration, or one inside it, has a record."""
    return any(getattr(part, ENTRY, None) is not None for part in configs_in(config))


def remove_records(config: PreTrainedConfig) -> None:
    """Remove the records from a configuration and from those inside it."""
    for part in configs_in(config):
        vars(part).pop(ENTRY, None)


def with_records(entries: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Add a configuration's records to the entries of the config.json that it was made from."""
    written = dict(entries)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig) and has_record(part):
            given = written.get(name) or {"model_type": part.model_type}
            written[name] = with_records(given, part)
    record = getattr(config, ENTRY, None)
    return written if record is None else written | {ENTRY: record}


def without_records(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a converted model's configuration that describe the dense model."""
    return {
        key: without_records(value) if isinstance(value, Mapping) else value
        for key, value in entries.items()
        if key != ENTRY
    }


def encode_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's entries as config.json holds them.

    Where there is a record, the result is refused by transformers alone.

    Parameters
    ----------
    entries : mapping
        As a configuration's ``to_dict`` returns them.
    """
    written = _in_every_part(encode_entries, entries)
    if ENTRY in written:
        originals = {key: written[key] for key in _REPLACED if key in written}
        written[ENTRY] = written[ENTRY] | {_ORIGINALS: originals}
        written["model_type"] = f"{originals.get('model_type')}, {_REFUSAL}"
        written["id2label"] = {_REFUSAL: ""}
    return written


def decode_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries of a config.json as a configuration takes them.

    The inverse of :func:`encode_entries`.
    """
    read = _in_every_part(decode_entries, entries)
    record = read.get(ENTRY)
    if isinstance(record, dict) and isinstance(record.get(_ORIGINALS), dict):
        originals = record[_ORIGINALS]
        read[ENTRY] = {key: value for key, value in record.items() if key != _ORIGINALS}
        for key in _REPLACED:
            # A user may have written another value over the refusal: that one stays.
            if _REFUSAL in str(read.get(key)):
                del read[key]
                read |= {key: originals[key]} if key in originals else {}
    return read


def _in_every_part(change: Callable[[Any], Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """Apply a change to the configurations that are entries of another one."""
    return {
        key: change(value) if isinstance(value, dict) and key != ENTRY else value
        for key, value in entries.items()
    }

"""The model of a checkpoint on the meta device, filled with numbers a part at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping

from tnmoe.errors import InputError
from tnmoe.hf.config import MPOEConfig
from tnmoe.hf.ffn import FFN
from tnmoe.hf.files.checkpoint import Checkpoint
from tnmoe.hf.files.folder import ADAPTERS
from tnmoe.hf.files.tensors import FLOATS
from tnmoe.hf.find import find_ffns
from tnmoe.hf.guards import SizeLimits
from tnmoe.hf.meta import (
    config_from_entries,
    merged_tensor,
    meta_model,
    stored_name,
    stored_tensors,
)
from tnmoe.system.tables import listed

Size = tuple[int, ...]


class _Naming:
    """A way in which a checkpoint may name the parameters of a model.

    Parameters
    ----------
    model : PreTrainedModel
        With the conversions between its parameters and what is stored.
    change : callable, optional
        Changes the names that these conversions give.
    """

    def __init__(self, model: Any, change: Callable[[str], str] | None = None) -> None:
        self._model, self._change = model, change or (lambda name: name)
        # From the model's names to the stored ones, as the conversions give them, and shapes.
        self._parts: dict[str, dict[str, Size]] = {}

    def _parts_of(self, name: str) -> dict[str, Size]:
        if name not in self._parts:
            parts = stored_tensors(self._model, name, tensor_named(self._model, name))
            self._parts[name] = {part: tuple(tensor.shape) for part, tensor in parts.items()}
        return self._parts[name]

    def stored(self, name: str) -> dict[str, Size]:
        """Return the shapes of what is stored for a parameter, by the names there."""
        return {self._change(part): size for part, size in self._parts_of(name).items()}

    def rename(self, name: str) -> str:
        """Return the stored name of a tensor, or a module, that is stored as it is."""
        return self._change(stored_name(self._model, name))

    def merge(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a parameter, given what is stored for it."""
        parts = {part: tensors[self._change(part)] for part in self._parts_of(name)}
        return merged_tensor(self._model, parts)


class Skeleton:
    """The model of a checkpoint, on the meta device.

    Parameters
    ----------
    source : Checkpoint
    entries : mapping, optional
        Contents of a config.json, in place of the checkpoint's own.
    buffers : bool
        Make buffers on the CPU, with their numbers, so that the model can run.

    Attributes
    ----------
    model : PreTrainedModel
    """

    _naming: _Naming

    def __init__(
        self,
        source: Checkpoint,
        entries: Mapping[str, Any] | None = None,
        *,
        buffers: bool = False,
    ) -> None:
        if (source.folder / ADAPTERS).exists():
            raise InputError(
                f"{source.folder} holds adapters of PEFT beside the model, which would be lost: "
                "load it, merge them and save the result"
            )
        self.source = source
        config = config_from_entries(entries or source.config)
        limit = SizeLimits.for_checkpoint(source).modules
        self.model = meta_model(config, limit, buffers=buffers)
        source.check_prefix(self.model.base_model_prefix)

    def networks(self, config: MPOEConfig) -> list[tuple[FFN, list[str]]]:
        """Match the networks to convert, and return them with the names of their parameters."""
        ffns = find_ffns(self.model, config.layers, config.every)
        names = self.names_of(ffn.parameters for ffn in ffns)
        self.match(chain.from_iterable(names))
        return list(zip(ffns, names, strict=True))

    def names_of(self, parts: Iterable[Iterable[Tensor]]) -> list[list[str]]:
        """Return the names of the tensors of each part, in the order of the model.

        They are parameters or buffers.
        """
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        positions = {id(parameter): position for position, (_, parameter) in enumerate(named)}
        return [
            [named[position][0] for position in sorted({positions[id(each)] for each in part})]
            for part in parts
        ]

    def match(self, needed: Iterable[str]) -> None:
        """Find the checkpoint's names of all parameters, and adopt their stored dtypes.

        Parameters
        ----------
        needed : iterable of str
            Parameters and buffers that will be read.

        Raises
        ------
        InputError
            If the checkpoint lacks a needed tensor or stores a needed parameter in a dtype other
            than floats, or if any parameter has another shape there.
        """
        needed, parameters = list(needed), dict(self.model.named_parameters())
        self._naming = self._find_naming(needed)
        for name in parameters:
            for stored, size in self.stored(name).items():
                spec = self.source.specs.get(stored)
                if spec is not None and spec.shape != size:
                    raise InputError(
                        f"{stored} is of shape {spec.shape} in {self.source.folder}, its "
                        f"config.json says {size}"
                    )
        read = [name for name in needed if name in parameters]
        for stored in chain.from_iterable(map(self.stored, read)):
            dtype = self.source.specs[stored].dtype
            if dtype not in FLOATS:
                raise InputError(f"{stored} holds {dtype}: quantized weights are not converted")
        self.set_dtypes(self.model)

    def stored(self, name: str) -> dict[str, Size]:
        """Return the shapes of what the checkpoint stores for a parameter, by the names there."""
        return self._naming.stored(name)

    def rename(self, name: str) -> str:
        """Return the checkpoint's name of a tensor, or of a module, that is stored as it is."""
        return self._naming.rename(name)

    def load(self, name: str) -> Tensor:
        """Read a parameter, from its parts if the checkpoint stores it in parts."""
        tensors = {stored: self.source.load(stored) for stored in self.stored(name)}
        return self._naming.merge(name, tensors)

    def _find_naming(self, needed: list[str]) -> _Naming:
        """Return the naming by which the checkpoint holds all needed parameters."""
        prefix = f"{self.model.base_model_prefix}."
        # A model that was loaded from names with a prefix is saved with it: a CLIPTextModel.
        loaded = copy.copy(self.model)
        loaded._weight_conversions = get_model_conversion_mapping(self.model, add_legacy=False)
        unchanged = copy.copy(self.model)
        unchanged._weight_conversions = []
        namings = [
            _Naming(self.model),
            _Naming(loaded),
            _Naming(self.model, lambda name: name.removeprefix(prefix)),
            _Naming(self.model, lambda name: prefix + name),
            _Naming(unchanged),
        ]
        wanted = [list(chain.from_iterable(map(each.stored, needed))) for each in namings]
        missing = [[n for n in names if n not in self.source.specs] for names in wanted]
        best = min(range(len(namings)), key=lambda i: len(missing[i]))
        if lost := missing[best]:
            raise InputError(
                f"{self.source.folder} lacks {len(lost)} of the {len(wanted[best])} tensors that "
                f"{type(self.model).__name__} needs from it: {listed(lost)}"
            )
        return namings[best]

    def set_dtypes(self, model: nn.Module) -> None:
        """Give each parameter of a model the dtype that it has in the checkpoint."""
        for name, parameter in model.named_parameters():
            spec = self.source.specs.get(next(iter(self.stored(name))))
            if spec is not None and spec.dtype in FLOATS:
                parameter.data = parameter.data.to(spec.torch_dtype)

    def first_name(self, parameter: Tensor) -> str:
        """Return the first of a parameter's names in the model, under which it is stored."""
        return next(name for name, each in self.model.named_parameters() if each is parameter)

    def load_buffers(self) -> None:
        """Give buffers that the checkpoint holds their numbers."""
        persistent = self.model.state_dict()
        for name, buffer in self.model.named_buffers():
            stored = self.rename(name) if name in persistent else None
            if stored in self.source.specs:
                path, _, leaf = name.rpartition(".")
                loaded = self.source.load(stored).to(buffer.dtype)
                self.model.get_submodule(path)._buffers[leaf] = loaded

    def filled(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Give parameters and buffers their stored numbers while a block runs."""
        tensors = {name: self.load(name) for name in names}
        return with_tensors(self.model, tensors)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module that a checkpoint holds."""
    return list(module.state_dict(keep_vars=True).values())


def tensor_named(model: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer of a model that has a name."""
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


@contextmanager
def with_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Use tensors as the parameters and buffers of a model with these names in a block."""
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            is_buffer = leaf in module._buffers
            own: dict[str, Any] = module._buffers if is_buffer else module._parameters
            replaced.append((own, leaf, own[leaf]))
            own[leaf] = tensor if is_buffer else nn.Parameter(tensor, requires_grad=False)
        yield
    finally:
        for own, leaf, before in replaced:
            own[leaf] = before

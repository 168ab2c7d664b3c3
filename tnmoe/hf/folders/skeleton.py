"""The model of a checkpoint on the meta device, filled with numbers a part at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
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
from tnmoe.hf.meta import config_from_entries, meta_model, stored_name
from tnmoe.system.tables import listed

# From a parameter's name in a model to its name in a checkpoint.
Rename = Callable[[str], str]


class Skeleton:
    """The model of a checkpoint, on the meta device.

    Parameters
    ----------
    source : Checkpoint
    entries : mapping, optional
        Contents of a config.json, in place of the checkpoint's own.

    Attributes
    ----------
    model : PreTrainedModel
    rename : callable
        From names in the model to names in the checkpoint; set by :meth:`match`.
    """

    rename: Rename

    def __init__(self, source: Checkpoint, entries: Mapping[str, Any] | None = None) -> None:
        if (source.folder / ADAPTERS).exists():
            raise InputError(
                f"{source.folder} holds adapters of PEFT beside the model, which would be lost: "
                "load it, merge them and save the result"
            )
        self.source = source
        config = config_from_entries(entries or source.config)
        self.model = meta_model(config, SizeLimits.for_checkpoint(source).modules)
        source.check_prefix(self.model.base_model_prefix)

    def networks(self, config: MPOEConfig) -> list[tuple[FFN, list[str]]]:
        """Match the networks to convert, and return them with the names of their parameters."""
        ffns = find_ffns(self.model, config.layers, config.every)
        names = self.names_of(ffn.parameters for ffn in ffns)
        self.match(chain.from_iterable(names))
        return list(zip(ffns, names, strict=True))

    def names_of(self, parts: Iterable[Iterable[Tensor]]) -> list[list[str]]:
        """Return the names of each part's parameters, in the order of the model."""
        named = list(self.model.named_parameters())
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
            Parameters that will be read.

        Raises
        ------
        InputError
            If the checkpoint lacks a needed parameter or stores it in a dtype other than floats,
            or if any parameter has another shape there.
        """
        needed = list(needed)
        self.rename = self._find_naming(needed)
        for name, parameter in self.model.named_parameters():
            spec = self.source.specs.get(self.rename(name))
            if spec is not None and spec.shape != tuple(parameter.shape):
                raise InputError(
                    f"{self.rename(name)} is of shape {spec.shape} in {self.source.folder}, its "
                    f"config.json says {tuple(parameter.shape)}"
                )
        for name in needed:
            dtype = self.source.specs[self.rename(name)].dtype
            if dtype not in FLOATS:
                raise InputError(
                    f"{self.rename(name)} holds {dtype}: quantized weights are not converted"
                )
        self.set_dtypes(self.model)

    def _find_naming(self, needed: list[str]) -> Rename:
        """Return the naming by which the checkpoint holds all needed parameters."""
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
        best = min(range(len(renames)), key=lambda i: len(missing[i]))
        if lost := missing[best]:
            raise InputError(
                f"{self.source.folder} lacks {len(lost)} of the {len(needed)} tensors that "
                f"{type(self.model).__name__} needs from it: "
                f"{listed(map(renames[best], lost))}"
            )
        return renames[best]

    def set_dtypes(self, model: nn.Module) -> None:
        """Give each parameter of a model the dtype that it has in the checkpoint."""
        for name, parameter in model.named_parameters():
            spec = self.source.specs.get(self.rename(name))
            if spec is not None and spec.dtype in FLOATS:
                parameter.data = parameter.data.to(spec.torch_dtype)

    def filled(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Give parameters their stored numbers while a block runs."""
        tensors = {name: self.source.load(self.rename(name)) for name in names}
        return with_parameters(self.model, tensors)


@contextmanager
def with_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Use tensors as the parameters of a model that have these names, while a block runs."""
    replaced = {}
    try:
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            replaced[module, leaf] = module._parameters[leaf]
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        yield
    finally:
        for (module, leaf), parameter in replaced.items():
            module._parameters[leaf] = parameter

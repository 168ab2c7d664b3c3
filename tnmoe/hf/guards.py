"""Guards around transformers' classes while they work with values that a config.json gave them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from tnmoe.errors import InputError, short_repr
from tnmoe.hf.files.checkpoint import Checkpoint

# Entries of config.json that count something. Classes make lists of that length before they make
# a model, so a count above the limit is refused first.
_COUNTS = re.compile("layers?|labels|experts|blocks|depth|stages|heads|codebooks", re.IGNORECASE)
_MAX_COUNT = 1_000_000

# Most modules of a model: a base, plus a number for every stored tensor.
_BASE_MODULES, _MODULES_PER_TENSOR = 1000, 20

# Most elements that a model registers: a base, plus a multiple of its stored bytes. A byte may
# hold several elements, an element is registered more than once, and masks add more elements.
_BASE_ELEMENTS, _ELEMENTS_PER_BYTE = 10**9, 20


class SizeLimits(NamedTuple):
    """Limits for the models that transformers may build.

    Attributes
    ----------
    modules : int
        Number of submodules.
    elements : int
        Number of elements of parameters and buffers, counted at every registration.
    """

    modules: int = sys.maxsize
    elements: int = sys.maxsize

    @classmethod
    def for_checkpoint(cls, source: Checkpoint) -> SizeLimits:
        """Return the limits for a model with the tensors of a checkpoint.

        transformers allocates a model before it compares sizes with the stored tensors.
        """
        return cls(
            modules=_BASE_MODULES + _MODULES_PER_TENSOR * len(source.specs),
            elements=_BASE_ELEMENTS + _ELEMENTS_PER_BYTE * source.num_bytes,
        )


NO_LIMITS = SizeLimits()


@contextmanager
def guard_transformers(problem: str, limits: SizeLimits = NO_LIMITS) -> Iterator[None]:
    """Raise an InputError for whatever transformers raises about values of a config.json.

    Every class of transformers trusts the values, or checks them in its own way. What it raises in
    the block is about the file, except for errors about files and packages and for lack of memory,
    which stay the same.

    Parameters
    ----------
    problem : str
        Beginning of the message.
    limits : SizeLimits
        For the models that this thread builds in the block.
    """
    modules, elements, thread = count(1), 0, get_ident()

    def count_module(*_: Any) -> None:
        if get_ident() == thread and next(modules) > limits.modules:
            raise InputError(f"{problem}: it has more than {limits.modules} modules")

    def count_elements(_: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal elements
        if get_ident() == thread and tensor is not None:
            elements += tensor.numel()
            if elements > limits.elements:
                shape = tuple(tensor.shape)
                raise InputError(f"{problem}: its files hold less than {name} of shape {shape}")

    hooks = [
        register_module_module_registration_hook(count_module),
        register_module_parameter_registration_hook(count_elements),
        register_module_buffer_registration_hook(count_elements),
    ]
    try:
        yield
    except (InputError, OSError, ImportError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"{problem}: {type(error).__name__}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()


def check_counts(entries: Any, name: str = "") -> None:
    """Raise an InputError if an entry of a config.json counts more (of layers, say) than any model.

    Parameters
    ----------
    entries : any
        Contents of a config.json, or a part of them.
    name : str
        Name of that part.
    """
    if isinstance(entries, Mapping):
        for key, value in entries.items():
            check_counts(value, str(key))
    elif isinstance(entries, list):
        for value in entries:
            check_counts(value, name)
    elif isinstance(entries, int) and _COUNTS.search(name) and entries > _MAX_COUNT:
        raise InputError(
            f"{name} of config.json must be at most {_MAX_COUNT}, got {short_repr(entries)}"
        )

"""Checks that all ranks of a run have the same model."""

from __future__ import annotations

import hashlib
import re
from itertools import zip_longest
from typing import Any

from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from tnmoe.errors import InputError, short_repr


def check_agreement(model: nn.Module, mesh: DeviceMesh) -> None:
    """Raise an InputError on every rank of a mesh unless all of them have equal models.

    Modules with their settings are compared, and names, shapes and dtypes of parameters, but no
    numbers. Ranks exchange a hash; descriptions follow only if hashes differ.

    Parameters
    ----------
    model : Module
    mesh : DeviceMesh
    """
    described = description(model, mesh)
    digest = hashlib.sha256("\n".join(described).encode()).hexdigest()
    digests = gather_objects(digest, mesh)
    if len(set(digests)) == 1:
        return
    others = gather_objects(described, mesh)
    first = others[0]
    rank = next(number for number, each in enumerate(others) if each != first)
    pairs = zip_longest(first, others[rank], fillvalue="nothing")
    lines = next(pair for pair in pairs if pair[0] != pair[1])
    settings = zip_longest(*map(_settings_in, lines), fillvalue="nothing")
    one, other = next(pair for pair in settings if pair[0] != pair[1])
    raise InputError(
        f"ranks differ in their models: the first one has {short_repr(one)}, number {rank} of the "
        f"mesh has {short_repr(other)}"
    )


def _settings_in(line: str) -> list[str]:
    """Split a line of a module's representation before every ``name=value``."""
    return re.split(r", (?=\w+=)", line.strip())


def description(model: nn.Module, mesh: DeviceMesh) -> list[str]:
    """Describe a model and a mesh, a line for every module and parameter."""
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))
    tensors = [
        f"{name}: {tuple(each.shape)} {each.dtype}" for name, each in model.named_parameters()
    ]
    # Objects lie elsewhere in the memory of every rank.
    modules = re.sub(r"0x[0-9a-f]+", "0x…", repr(model)).splitlines()
    return [f"mesh {sizes}", *modules, *tensors]


def gather_objects(own: Any, mesh: DeviceMesh) -> list[Any]:
    """Return the objects of all ranks of a mesh, in the order of the mesh."""
    found = [own]
    for dim in reversed(range(mesh.ndim)):
        group = mesh.get_group(dim)
        parts: list[Any] = [None] * group.size()
        distributed.all_gather_object(parts, found, group=group)
        found = [each for part in parts for each in part]
    return found

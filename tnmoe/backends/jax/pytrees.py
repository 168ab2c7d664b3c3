"""Operators as pytrees: JAX's transformations take and return them as they do arrays."""

from __future__ import annotations

from functools import partial
from typing import Any

from jax.tree_util import GetAttrKey, register_pytree_with_keys

from tnmoe.pytrees import PYTREES, Attributes


def register_operators() -> None:
    """Register every class of tnmoe that holds arrays, once."""
    for kind, attributes in PYTREES.items():
        register_pytree_with_keys(
            kind,
            partial(_flatten_with_keys, attributes),
            partial(attributes.rebuild, kind),
            attributes.take_apart,
        )


def _flatten_with_keys(attributes: Attributes, obj: Any) -> tuple[list[tuple], tuple]:
    """Return the attributes that hold arrays, under their names, and the static ones."""
    values, static = attributes.take_apart(obj)
    return list(zip(map(GetAttrKey, attributes.arrays), values, strict=True)), static

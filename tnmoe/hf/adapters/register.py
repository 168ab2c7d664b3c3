"""Telling PEFT of the method."""

from __future__ import annotations

from typing import Any

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from tnmoe.hf.adapters.config import MPOEAdapterConfig
from tnmoe.hf.adapters.layer import PREFIX
from tnmoe.hf.adapters.tuner import MPOEAdapterModel

_NAME = "MPOE"


def register() -> None:
    """Register the method with PEFT, unless it is registered."""
    if _NAME in PeftType.__members__:
        return
    _add_member(PeftType, _NAME)
    register_peft_method(
        name=_NAME.lower(),
        config_cls=MPOEAdapterConfig,
        model_cls=MPOEAdapterModel,
        prefix=PREFIX,
    )


def _add_member(enumeration: Any, name: str) -> None:
    """Add a member to an enumeration of strings.

    ``register_peft_method`` takes methods of other packages, but only under names that PEFT's
    enumeration has.
    """
    member: Any = str.__new__(enumeration, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(enumeration)
    enumeration._member_map_[name] = member
    enumeration._member_names_.append(name)
    enumeration._value2member_map_[name] = member
    type.__setattr__(enumeration, name, member)

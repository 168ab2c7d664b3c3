"""Routed experts as an adapter: the method ``MPOE`` of PEFT."""

from __future__ import annotations

from tnmoe.hf.adapters.config import MPOEAdapterConfig
from tnmoe.hf.adapters.loras import from_loras, to_loras
from tnmoe.hf.adapters.register import register

register()

__all__ = ["MPOEAdapterConfig", "from_loras", "to_loras"]

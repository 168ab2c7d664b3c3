"""Routed experts as an adapter: the method ``MPOE`` of PEFT."""

from __future__ import annotations

from tnmoe.hf.adapters.config import MPOEAdapterConfig
from tnmoe.hf.adapters.register import register

register()

__all__ = ["MPOEAdapterConfig"]

"""``tnmoe demo``: conversion, fine-tuning and comparison of a real pretrained model.

This file holds only the settings, so that the command line can show them without importing torch.
The work starts in ``tnmoe.demo.run``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tnmoe.options import Layout


@dataclass(frozen=True)
class DemoOptions:
    """Settings of the demo, with the defaults of ``make demo``."""

    output: Path = Path("demo-output")
    model: Path | None = None
    data: Path | None = None
    steps: int = 80
    num_experts: int = 8
    top_k: int = 1
    layout: Layout = "interleaved"
    sites: int | None = None
    mask_probability: float = 0.0
    balance_weight: float = 0.01
    z_weight: float = 0.001
    batch_size: int = 32
    learning_rate: float = 1e-4
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data for JSON."""
        settings = asdict(self)
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in settings.items()
        }

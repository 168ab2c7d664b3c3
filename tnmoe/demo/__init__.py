"""``tnmoe demo``: the main job, end to end, on a real pretrained model and a real task.

This file holds only the settings, so that the command line can show them without importing torch;
``tnmoe.demo.run`` is where the work starts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tnmoe.options import Layout


@dataclass(frozen=True)
class DemoOptions:
    """Settings of the demo; the defaults are those of ``make demo``."""

    output: Path = Path("demo-output")
    model: Path | None = None
    data: Path | None = None
    steps: int = 80
    num_experts: int = 8
    top_k: int = 1
    layout: Layout = "interleaved"
    sites: int = 5
    mask_probability: float = 0.0
    balance_weight: float = 0.01
    z_weight: float = 0.001
    batch_size: int = 32
    learning_rate: float = 1e-4
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in data.items()}

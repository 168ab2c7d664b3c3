"""Hugging Face: pretrained models in, MPOE models out, saved and loaded as any other model.

Importing this module teaches ``transformers`` to load MPOE checkpoints with ``from_pretrained``.
"""

import tnmoe.nn  # noqa: F401 - names the extra to install where torch is missing
from tnmoe.errors import MissingExtraError

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise MissingExtraError("tnmoe.hf", "transformers", "hf") from error

from tnmoe.hf.checkpoint import from_pretrained
from tnmoe.hf.config import MPOEConfig
from tnmoe.hf.export import average_experts, to_moe
from tnmoe.hf.families import FFN, find_ffns, of_module, register_family
from tnmoe.hf.report import ParameterReport, parameter_report
from tnmoe.hf.router_losses import attach_router_losses
from tnmoe.hf.trainer import GradientMaskCallback
from tnmoe.hf.upcycle import upcycle

__all__ = [
    "FFN",
    "GradientMaskCallback",
    "MPOEConfig",
    "ParameterReport",
    "attach_router_losses",
    "average_experts",
    "find_ffns",
    "from_pretrained",
    "of_module",
    "parameter_report",
    "register_family",
    "to_moe",
    "upcycle",
]

"""Hugging Face: pretrained models converted to MPOE, saved and loaded as any other model.

Once this module is imported, ``transformers`` loads MPOE checkpoints with ``from_pretrained``, and
computes its own mixtures of experts with ``experts_implementation="tnmoe"``.
"""

from tnmoe.system.extras import has_extra, require_extra

require_extra("tnmoe.hf", "hf")

import tnmoe.hf.experts_implementation  # noqa: F401 - registers itself
from tnmoe.hf.compress import compress
from tnmoe.hf.compression import CompressionConfig
from tnmoe.hf.compression_report import CompressionReport, MatrixReport
from tnmoe.hf.config import MPOEConfig
from tnmoe.hf.export import average_experts, to_moe
from tnmoe.hf.families import in_place, of_module, register_family
from tnmoe.hf.ffn import FFN, Place
from tnmoe.hf.find import find_ffns
from tnmoe.hf.folders.compress import CompressingConversion, prepare_compress
from tnmoe.hf.folders.conversion import Conversion
from tnmoe.hf.folders.inspection import Inspection, MatrixInspection, inspect_checkpoint
from tnmoe.hf.folders.prepare import prepare_export, prepare_upcycle
from tnmoe.hf.folders.ranks import Loading, prepare_load, save_spread
from tnmoe.hf.hooks import wrap_transformers
from tnmoe.hf.pretrained import from_pretrained
from tnmoe.hf.record import compression_of, config_of
from tnmoe.hf.report import ParameterCount, ParameterReport, parameter_report
from tnmoe.hf.router_losses import attach_router_losses
from tnmoe.hf.tensorize import tensorize, untensorize
from tnmoe.hf.tensorize_report import TensorizedLayer, TensorizeReport
from tnmoe.hf.trainer import GradientMaskCallback
from tnmoe.hf.upcycle import upcycle

wrap_transformers()

__all__ = [
    "FFN",
    "CompressingConversion",
    "CompressionConfig",
    "CompressionReport",
    "Conversion",
    "GradientMaskCallback",
    "Inspection",
    "Loading",
    "MPOEConfig",
    "MatrixInspection",
    "MatrixReport",
    "ParameterCount",
    "ParameterReport",
    "Place",
    "TensorizeReport",
    "TensorizedLayer",
    "attach_router_losses",
    "average_experts",
    "compress",
    "compression_of",
    "config_of",
    "find_ffns",
    "from_pretrained",
    "in_place",
    "inspect_checkpoint",
    "of_module",
    "parameter_report",
    "prepare_compress",
    "prepare_export",
    "prepare_load",
    "prepare_upcycle",
    "register_family",
    "save_spread",
    "tensorize",
    "to_moe",
    "untensorize",
    "upcycle",
]

if has_extra("peft"):
    from tnmoe.hf.adapters import MPOEAdapterConfig, from_loras, to_loras

    __all__ += ["MPOEAdapterConfig", "from_loras", "to_loras"]


def __getattr__(name: str) -> object:
    if name in {"MPOEAdapterConfig", "from_loras", "to_loras"}:
        require_extra(f"tnmoe.hf.{name}", "peft")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)

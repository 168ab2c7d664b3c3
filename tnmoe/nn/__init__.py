"""PyTorch adapters: experts that share a central tensor, routers, losses, the gradient mask."""

from tnmoe.errors import MissingExtraError

try:
    import torch  # noqa: F401
except ImportError as error:
    raise MissingExtraError("tnmoe.nn", "torch", "torch") from error

from tnmoe.nn.cache import WeightCache, weight_cache
from tnmoe.nn.calibrate import calibrate
from tnmoe.nn.experts import DenseExperts, Experts, MPOExperts
from tnmoe.nn.gradient_mask import GradientMask, central_parameters
from tnmoe.nn.losses import load_balancing_loss, router_z_loss
from tnmoe.nn.moe import MPOMoE, Routing, record_routing
from tnmoe.nn.projection import Projection, SharedProjection, StackedProjection
from tnmoe.nn.router import TopKRouter

__all__ = [
    "DenseExperts",
    "Experts",
    "GradientMask",
    "MPOExperts",
    "MPOMoE",
    "Projection",
    "Routing",
    "SharedProjection",
    "StackedProjection",
    "TopKRouter",
    "WeightCache",
    "calibrate",
    "central_parameters",
    "load_balancing_loss",
    "record_routing",
    "router_z_loss",
    "weight_cache",
]

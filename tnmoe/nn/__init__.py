"""PyTorch adapters: experts that share a central tensor, routers, losses, the gradient mask."""

from tnmoe.extras import require_extra

require_extra("tnmoe.nn", "torch")

import tnmoe.nn.flops  # noqa: F401 - registers formulas with torch
from tnmoe.costs import Rates
from tnmoe.nn.activations import ClampedSwiGLU, Gated
from tnmoe.nn.cache import WeightCache, weight_cache
from tnmoe.nn.calibrate import calibrate
from tnmoe.nn.expert_choice import ExpertChoiceRouter
from tnmoe.nn.experts import DenseExperts, Experts, MPOExperts
from tnmoe.nn.gradient_mask import AutogradMask, GradientMask
from tnmoe.nn.grouped import Groups
from tnmoe.nn.load_bias import BiasBalancer, LoadBias
from tnmoe.nn.losses import load_balancing_loss, router_z_loss
from tnmoe.nn.moe import MPOMoE, ignore_padding
from tnmoe.nn.projection import Projection, SharedProjection, StackedProjection
from tnmoe.nn.router import Router, TopKRouter
from tnmoe.nn.routing import Routing, RoutingCall, record_routing
from tnmoe.nn.shared_tensors import (
    SharedGradientScale,
    freeze_shared,
    parameter_groups,
    shared_parameters,
    tie_layers,
    train_auxiliary,
)
from tnmoe.nn.statistics import (
    RouterCollapseWarning,
    RouterStatistics,
    RoutingHistory,
    routing_statistics,
)

__all__ = [
    "AutogradMask",
    "BiasBalancer",
    "ClampedSwiGLU",
    "DenseExperts",
    "ExpertChoiceRouter",
    "Experts",
    "Gated",
    "GradientMask",
    "Groups",
    "LoadBias",
    "MPOExperts",
    "MPOMoE",
    "Projection",
    "Rates",
    "Router",
    "RouterCollapseWarning",
    "RouterStatistics",
    "Routing",
    "RoutingCall",
    "RoutingHistory",
    "SharedGradientScale",
    "SharedProjection",
    "StackedProjection",
    "TopKRouter",
    "WeightCache",
    "calibrate",
    "freeze_shared",
    "ignore_padding",
    "load_balancing_loss",
    "parameter_groups",
    "record_routing",
    "router_z_loss",
    "routing_statistics",
    "shared_parameters",
    "tie_layers",
    "train_auxiliary",
    "weight_cache",
]


def __dir__() -> list[str]:
    return list(__all__)

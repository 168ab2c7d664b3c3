"""PyTorch layers: experts that share cores, routers, losses, the gradient mask."""

from tnmoe.system.extras import require_extra

require_extra("tnmoe.nn", "torch")

import tnmoe.nn.compute.flops  # noqa: F401 - registers formulas with torch
from tnmoe.contraction.layer_plan import LayerPlan, LayerStep
from tnmoe.contraction.rates import Rates
from tnmoe.nn.activations import ClampedSwiGLU, Gated
from tnmoe.nn.compute.cache import WeightCache, weight_cache
from tnmoe.nn.compute.calibrate import calibrate
from tnmoe.nn.compute.slots import Groups
from tnmoe.nn.dense_experts import DenseExperts
from tnmoe.nn.editing.experts import add_experts, remove_experts, reorder_experts
from tnmoe.nn.editing.merging import MergedExpert, merge_experts
from tnmoe.nn.editing.opening import close_experts, open_experts
from tnmoe.nn.experts import Experts
from tnmoe.nn.hidden_projection import HiddenProjection
from tnmoe.nn.low_rank_projection import LowRankProjection
from tnmoe.nn.moe import MPOMoE, ignore_padding
from tnmoe.nn.mpo_experts import MPOExperts
from tnmoe.nn.mpo_linear import MPOLinear
from tnmoe.nn.mpo_projection import MPOProjection
from tnmoe.nn.projection import Projection, StackedProjection
from tnmoe.nn.residual_projection import ResidualProjection
from tnmoe.nn.routing.expert_choice import ExpertChoiceRouter
from tnmoe.nn.routing.load_bias import LoadBias
from tnmoe.nn.routing.losses import load_balancing_loss, router_z_loss
from tnmoe.nn.routing.record import Routing, RoutingCall, record_routing
from tnmoe.nn.routing.router import Router
from tnmoe.nn.routing.statistics import (
    RouterCollapseWarning,
    RouterStatistics,
    RoutingHistory,
    routing_statistics,
)
from tnmoe.nn.routing.top_k import TopKRouter
from tnmoe.nn.training.autograd_mask import AutogradMask
from tnmoe.nn.training.bias_balancer import BiasBalancer
from tnmoe.nn.training.clipping import clip_grad_norm_
from tnmoe.nn.training.freezing import freeze_shared, train_auxiliary
from tnmoe.nn.training.frozen_experts import FrozenExperts
from tnmoe.nn.training.gradient_mask import GradientMask
from tnmoe.nn.training.gradient_scale import SharedGradientScale
from tnmoe.nn.training.parameter_groups import parameter_groups
from tnmoe.nn.training.shared_cores import shared_parameters
from tnmoe.nn.training.tied_layers import tie_layers

__all__ = [
    "AutogradMask",
    "BiasBalancer",
    "ClampedSwiGLU",
    "DenseExperts",
    "ExpertChoiceRouter",
    "Experts",
    "FrozenExperts",
    "Gated",
    "GradientMask",
    "Groups",
    "HiddenProjection",
    "LayerPlan",
    "LayerStep",
    "LoadBias",
    "LowRankProjection",
    "MPOExperts",
    "MPOLinear",
    "MPOMoE",
    "MPOProjection",
    "MergedExpert",
    "Projection",
    "Rates",
    "ResidualProjection",
    "Router",
    "RouterCollapseWarning",
    "RouterStatistics",
    "Routing",
    "RoutingCall",
    "RoutingHistory",
    "SharedGradientScale",
    "StackedProjection",
    "TopKRouter",
    "WeightCache",
    "add_experts",
    "calibrate",
    "clip_grad_norm_",
    "close_experts",
    "freeze_shared",
    "ignore_padding",
    "load_balancing_loss",
    "merge_experts",
    "open_experts",
    "parameter_groups",
    "record_routing",
    "remove_experts",
    "reorder_experts",
    "router_z_loss",
    "routing_statistics",
    "shared_parameters",
    "tie_layers",
    "train_auxiliary",
    "weight_cache",
]


def __dir__() -> list[str]:
    return list(__all__)

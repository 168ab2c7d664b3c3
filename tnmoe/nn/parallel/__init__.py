"""Mixtures over several ranks, on torch's own meshes, tensors and collectives."""

from tnmoe.nn.parallel.hidden_units import shard_hidden_units
from tnmoe.nn.parallel.placement import Placement, PlacementPlan, expert_placement
from tnmoe.nn.parallel.sharding import shard_experts

__all__ = [
    "Placement",
    "PlacementPlan",
    "expert_placement",
    "shard_experts",
    "shard_hidden_units",
]


def __dir__() -> list[str]:
    return list(__all__)

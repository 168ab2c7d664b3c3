"""tnmoe: tensor-network mixtures of experts."""

from tnmoe.contraction import ContractionPlan, contraction_plan
from tnmoe.decompose import decompose
from tnmoe.errors import InputError, MissingExtraError
from tnmoe.io import load, save
from tnmoe.mpo import MPO, kron
from tnmoe.shapes import MPOShape, factorize
from tnmoe.shared import SharedMPO
from tnmoe.truncation import TruncationInfo

__all__ = [
    "MPO",
    "ContractionPlan",
    "InputError",
    "MPOShape",
    "MissingExtraError",
    "SharedMPO",
    "TruncationInfo",
    "contraction_plan",
    "decompose",
    "factorize",
    "kron",
    "load",
    "save",
]

__version__ = "0.1.0"

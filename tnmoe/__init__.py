"""tnmoe: tensor-network mixtures of experts."""

from tnmoe.combine import add, hadamard, kron, matmul
from tnmoe.contraction.plan import ContractionPlan, contraction_plan
from tnmoe.cross import CrossInfo, cross
from tnmoe.decompose import decompose, decompose_batch
from tnmoe.entanglement import SchmidtDecomposition, mutual_information, operator_schmidt
from tnmoe.errors import InputError, MissingExtraError
from tnmoe.factors import factorize
from tnmoe.fit import FitInfo, fit
from tnmoe.io import load, save
from tnmoe.joint.align import UnitAlignment, align_hidden_units
from tnmoe.joint.aligned import AlignedDecomposition, decompose_aligned
from tnmoe.joint.decompose_shared import decompose_shared
from tnmoe.joint.info import SharedInfo
from tnmoe.joint.order import OrderedDecomposition, decompose_ordered
from tnmoe.mpo import MPO
from tnmoe.shapes import MPOShape
from tnmoe.shared_mpo import SharedMPO
from tnmoe.squeeze import SqueezeResult, SqueezeStep, squeeze
from tnmoe.streamed import decompose_streamed
from tnmoe.truncation.distribute import distribute_budget
from tnmoe.truncation.info import TruncationInfo
from tnmoe.truncation.select import bonds_by_entropy, select_bonds

__all__ = [
    "MPO",
    "AlignedDecomposition",
    "ContractionPlan",
    "CrossInfo",
    "FitInfo",
    "InputError",
    "MPOShape",
    "MissingExtraError",
    "OrderedDecomposition",
    "SchmidtDecomposition",
    "SharedInfo",
    "SharedMPO",
    "SqueezeResult",
    "SqueezeStep",
    "TruncationInfo",
    "UnitAlignment",
    "add",
    "align_hidden_units",
    "bonds_by_entropy",
    "contraction_plan",
    "cross",
    "decompose",
    "decompose_aligned",
    "decompose_batch",
    "decompose_ordered",
    "decompose_shared",
    "decompose_streamed",
    "distribute_budget",
    "factorize",
    "fit",
    "hadamard",
    "kron",
    "load",
    "matmul",
    "mutual_information",
    "operator_schmidt",
    "save",
    "select_bonds",
    "squeeze",
]

__version__ = "0.1.0"


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

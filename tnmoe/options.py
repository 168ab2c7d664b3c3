"""Options whose values are words: their types for editors, and the words that checks allow.

The command line takes its choices from here too, since it must not load torch to show them.
"""

from typing import Literal, get_args

# tnmoe.decompose, tnmoe.add, tnmoe.matmul and tnmoe.hadamard
Method = Literal["auto", "svd", "qr", "eigh", "randomized"]
METHODS = get_args(Method)
AddMethod = Literal["direct", "successive", "randomized"]
ADD_METHODS = get_args(AddMethod)
ProductMethod = Literal["direct", "zipup", "randomized"]
PRODUCT_METHODS = get_args(ProductMethod)

# tnmoe.decompose_shared
ChainForm = Literal["free", "canonical"]
CHAIN_FORMS = get_args(ChainForm)

# Routes from activations to outputs: of a layer of experts, and of one MPO alone
Route = Literal["joint", "per_expert", "rebuilt", "cached"]
ROUTES = get_args(Route)
OperatorRoute = Literal["chain", "rebuilt"]

# Experts
Layout = Literal["interleaved", "split", "hidden", "residual"]
LAYOUTS = get_args(Layout)
Gauge = Literal["identity", "schmidt"]
GAUGES = get_args(Gauge)
Matrix = Literal["up", "gate", "down"]
MATRICES = get_args(Matrix)
# In the order in which a layer computes them. ``gate_up`` holds both matrices of an expert.
ProjectionName = Literal["gate_up", "gate", "up", "down"]
PROJECTIONS = get_args(ProjectionName)
NamedSites = Literal["center", "none"]
StructureKind = Literal["chains", "hidden", "low_rank", "residual", "stacked"]
STRUCTURES = get_args(StructureKind)

# Routers, their losses and their records
ScoreFunction = Literal["softmax", "sigmoid"]
SCORE_FUNCTIONS = get_args(ScoreFunction)
SecondExpert = Literal["all", "none", "threshold", "random"]
SECOND_EXPERT = get_args(SecondExpert)
BatchScope = Literal["batch", "sequence"]
BATCH_SCOPES = get_args(BatchScope)
# Tokens that a router's loss takes together.
LossScope = Literal["batch", "sequence", "ranks"]
LOSS_SCOPES = get_args(LossScope)
BalanceForm = Literal["switch", "gshard"]
BALANCE_FORMS = get_args(BalanceForm)

# Conversions
AnyLayout = Literal[Layout, "dense"]
ANY_LAYOUTS = get_args(AnyLayout)
RouterKind = Literal["top_k", "expert_choice"]
ROUTER_KINDS = get_args(RouterKind)
MaskEngine = Literal["auto", "optimizer", "autograd"]
MASK_ENGINES = get_args(MaskEngine)
ExportFormat = Literal["moe", "dense"]
EXPORT_FORMATS = get_args(ExportFormat)
AdapterLayout = Literal["residual", "hidden"]
ADAPTER_LAYOUTS = get_args(AdapterLayout)
CompressedLayout = Literal["auto", "hidden", "residual", "low_rank"]
COMPRESSED_LAYOUTS = get_args(CompressedLayout)
CalibratedMoments = Literal["expert", "layer"]
CALIBRATED_MOMENTS = get_args(CalibratedMoments)
# torch takes seeds from 0 up to, and without, this number.
SEEDS = 2**64

# Pictures
EntropyAxis = Literal["bond", "layer"]
ENTROPY_AXES = get_args(EntropyAxis)
Statistic = Literal["entropy", "dropped", "untouched", "max_violation"]

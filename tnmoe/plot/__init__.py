"""Pictures of operators, routers, training and sizes.

Every function draws on the axes ``ax`` and returns them. Without ``ax`` it makes a new figure with
pyplot, which notebooks and ``plt.show()`` display; with ``ax`` it does not import pyplot. No
function needs a display. Series differ in colour, marker and line style, and colour-blind readers
can distinguish the colours.
"""

from tnmoe.system.extras import require_extra

require_extra("tnmoe.plot", "plot")

from tnmoe.plot.diagram import network
from tnmoe.plot.parameters import error_against_parameters, parameter_bars
from tnmoe.plot.routing import expert_load, load_history, routing_statistic
from tnmoe.plot.spectra import entropy, schmidt_spectra
from tnmoe.plot.training import core_drift, loss_curves

__all__ = [
    "core_drift",
    "entropy",
    "error_against_parameters",
    "expert_load",
    "load_history",
    "loss_curves",
    "network",
    "parameter_bars",
    "routing_statistic",
    "schmidt_spectra",
]


def __dir__() -> list[str]:
    return list(__all__)

"""The cores of a model that all experts of a layer share.

Every token of a layer updates the shared cores, while only the tokens of an expert update the
cores that it owns. :class:`tnmoe.nn.GradientMask` compensates for that as MPOE does. The other
modules here hold simpler remedies to compare it with: a smaller learning rate, smaller gradients,
or no updates at all.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from tnmoe.errors import InputError
from tnmoe.nn.adapters import modules_in_use
from tnmoe.nn.mpo_projection import MPOProjection


def mpo_projections(model: nn.Module) -> Iterator[MPOProjection]:
    """Iterate over a model's MPO projections, each once."""
    seen: set[nn.Module] = set()
    for module in modules_in_use(model):
        if isinstance(module, MPOProjection) and module not in seen:
            seen.add(module)
            yield module


def shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the cores that all experts of a layer share, each once.

    In MPOE these are the central cores.

    Parameters
    ----------
    model : Module
        With any number of layers of experts; without any, the list is empty.

    Examples
    --------
    >>> from tnmoe.nn import MPOExperts
    >>> experts = MPOExperts(4, 8, 16, sites=3)
    >>> [core is experts.up.center for core in shared_parameters(experts)]
    [True, False]
    """
    cores = {id(core): core for part in mpo_projections(model) for core in part.shared_cores}
    return list(cores.values())


def require_shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return :func:`shared_parameters` of a model; raise an InputError if there are none."""
    if shared := shared_parameters(model):
        return shared
    raise InputError(f"{type(model).__name__} has no core that experts share")

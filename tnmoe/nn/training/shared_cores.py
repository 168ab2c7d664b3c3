"""The parameters of a model that all experts of a layer share.

Every token of a layer updates the shared cores, while only the tokens of an expert update the
cores that it owns. :class:`tnmoe.nn.GradientMask` compensates for that as MPOE does. The other
modules here hold simpler remedies to compare it with: a smaller learning rate, smaller gradients,
or no updates at all.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from tnmoe.errors import InputError
from tnmoe.nn.adapters import modules_in_use, replaced_by_copies
from tnmoe.nn.projection import Projection


def projections(model: nn.Module) -> Iterator[Projection]:
    """Iterate over a model's projections, each once; parts of other projections are among them."""
    seen: set[nn.Module] = set()
    for module in modules_in_use(model):
        if isinstance(module, Projection) and module not in seen:
            seen.add(module)
            yield module


def sharing_projections(model: nn.Module) -> dict[Projection, list[nn.Parameter]]:
    """Return the projections whose experts share parameters, each with these."""
    replaced = replaced_by_copies(model)
    found = {
        projection: [each for each in projection.shared_parameters if id(each) not in replaced]
        for projection in projections(model)
    }
    return {projection: shared for projection, shared in found.items() if shared}


def shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the cores and matrices that all experts of a layer share, each once.

    In MPOE these are the central cores, in the layouts ``hidden`` and ``residual`` the parameters
    of the linear modules, without biases.

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
    parts = sharing_projections(model).values()
    return list({id(each): each for part in parts for each in part}.values())


def require_shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return :func:`shared_parameters` of a model; raise an InputError if there are none."""
    if shared := shared_parameters(model):
        return shared
    raise InputError(f"{type(model).__name__} has no core that experts share")

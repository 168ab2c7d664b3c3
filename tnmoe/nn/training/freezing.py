"""Freezing of parts of a model: of shared cores, or of all but the auxiliary cores."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from tnmoe.errors import InputError
from tnmoe.nn.adapters import replaced_by_copies, warn_of_unsaved
from tnmoe.nn.training.shared_cores import projections, require_shared_parameters


def train_auxiliary(model: nn.Module, also: Iterable[str] = ()) -> int:
    """Train only the cores that experts own: lightweight fine-tuning, as in MPOP.

    Liu et al., arXiv:2106.02205, section 3.2: the central tensors keep what was learned, and the
    small auxiliary cores around them adapt to a task.

    Parameters
    ----------
    model : Module
        All its parameters are frozen, except the cores that experts own and the parameters that
        ``also`` selects.
    also : str or iterable of str
        Train also the parameters whose names contain one of these: ``["router", "classifier"]``.

    Returns
    -------
    int
        How many numbers are trained.

    Raises
    ------
    InputError
        If nothing is shared, or no name contains an entry of ``also``.

    Warns
    -----
    UserWarning
        If the model is one of PEFT, which will not save these cores: it saves its adapters and
        the modules that ``modules_to_save`` names, ``["router", "experts"]`` for instance.

    Examples
    --------
    >>> from tnmoe.nn import MPOExperts, MPOMoE, TopKRouter
    >>> layer = MPOMoE(TopKRouter(64, 4), MPOExperts(4, 64, 256))
    >>> train_auxiliary(layer), sum(each.numel() for each in layer.parameters())
    (16640, 49664)
    """
    require_shared_parameters(model)
    parts = [also] if isinstance(also, str) else list(also)
    named = dict(model.named_parameters())
    if absent := [part for part in parts if not any(part in name for name in named)]:
        raise InputError(f"no parameter has {', '.join(absent)} in its name")
    owned = {id(core) for part in projections(model) for core in part.owned_parameters}
    replaced = replaced_by_copies(model)
    for name, parameter in named.items():
        is_trained = id(parameter) in owned or any(part in name for part in parts)
        parameter.requires_grad_(is_trained and id(parameter) not in replaced)
    warn_of_unsaved(model)
    return sum(parameter.numel() for parameter in named.values() if parameter.requires_grad)


def freeze_shared(model: nn.Module, frozen: bool = True) -> int:
    """Freeze the cores that experts share, and no other parameter.

    The effect is that of a gradient mask of probability 1. It costs less, because the gradients
    are not computed.

    Parameters
    ----------
    model : Module
    frozen : bool
        Whether to freeze the cores; with False they are trained again.

    Returns
    -------
    int
        How many numbers the shared cores hold.

    Raises
    ------
    InputError
        If nothing is shared.

    Examples
    --------
    >>> from tnmoe.nn import MPOExperts
    >>> experts = MPOExperts(4, 8, 16, sites=3)
    >>> freeze_shared(experts) == experts.up.center.numel() + experts.down.center.numel()
    True
    >>> experts.up.center.requires_grad, experts.up.aux[0].requires_grad
    (False, True)
    """
    shared = require_shared_parameters(model)
    for core in shared:
        core.requires_grad_(not frozen)
    if not frozen:
        warn_of_unsaved(model)
    return sum(core.numel() for core in shared)

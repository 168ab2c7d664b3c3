"""Parameter groups for optimisers, with a learning rate of their own for shared cores."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tnmoe.errors import InputError, check_number_in
from tnmoe.nn.training.shared_cores import require_shared_parameters, sharing_projections


def parameter_groups(
    model: nn.Module, lr: float, shared_scale: float | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimiser, with a smaller learning rate for shared cores.

    Parameters
    ----------
    model : Module
        The groups hold its parameters that require gradients.
    lr : float
        Learning rate of all parameters but the shared cores.
    shared_scale : float, optional
        The learning rate of shared cores is ``lr`` times this; by default 1/E, where E is the
        number of experts.
    **options
        Options of both groups: ``weight_decay``, for instance.

    Returns
    -------
    list of dict
        The group of all other parameters, then the group of the shared cores.

    Raises
    ------
    InputError
        If nothing is shared, the scale is negative, or layers differ in E and no scale is given.

    Notes
    -----
    In our experiments a tenth of the learning rate for the central cores made training worse, as
    did the gradient mask: try one rate for all parameters first.

    Examples
    --------
    >>> import torch
    >>> from tnmoe.nn import MPOExperts
    >>> experts = MPOExperts(4, 8, 16, sites=3)
    >>> optimizer = torch.optim.AdamW(parameter_groups(experts, lr=1e-3))
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.001, 0.00025]
    """
    shared = {id(each) for each in require_shared_parameters(model)}
    if shared_scale is None:
        counts = sorted({projection.num_experts for projection in sharing_projections(model)})
        if len(counts) > 1:
            raise InputError(f"give shared_scale: layers have {counts} experts")
        shared_scale = 1 / counts[0]
    shared_scale = check_number_in("shared_scale", shared_scale, "[0, inf)")
    rate = check_number_in("lr", lr, "[0, inf)")
    lr = lr if isinstance(lr, Tensor) else rate  # optimisers also accept a tensor as the rate
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    unshared = [parameter for parameter in trained if id(parameter) not in shared]
    trained_shared = [parameter for parameter in trained if id(parameter) in shared]
    return [
        {"params": unshared, "lr": lr, **options},
        {"params": trained_shared, "lr": lr * shared_scale, **options},
    ]

"""Clipping of gradients, also of tensors that lie on ranks in different ways."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from tnmoe.errors import check_bool, check_number_in


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Clip gradients by the norm of all of them together, on whatever meshes they lie.

    ``torch.nn.utils.clip_grad_norm_`` stacks the norms of all tensors, and fails where some of them
    are spread over ranks, such as owned cores of experts, and others are not, or over others.

    Parameters
    ----------
    parameters : Tensor or iterable of Tensor
        With gradients or without; they may be DTensors.
    max_norm : float
        Largest norm; larger gradients shrink by one factor.
    norm_type : float
        Order of the norm, infinity included.
    error_if_nonfinite : bool
        Whether a norm that is infinite or NaN is an error.

    Returns
    -------
    Tensor
        The norm before clipping, the same on all ranks.

    Raises
    ------
    InputError
        If ``max_norm`` is negative.
    RuntimeError
        If the norm is not finite and that is an error, as in torch's function.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([weight], 1.0), weight.grad
    (tensor(5.), tensor([0.6000, 0.8000]))
    """
    max_norm = check_number_in("max_norm", max_norm, "[0, inf]")
    fails = check_bool("error_if_nonfinite", error_if_nonfinite)
    given = [parameters] if isinstance(parameters, Tensor) else parameters
    gradients = [each.grad for each in given if each.grad is not None]
    if not gradients:
        return torch.zeros(())
    parts = [nn.utils.get_total_norm(each, norm_type) for each in _by_mesh(gradients)]
    norms = [part.full_tensor() if hasattr(part, "full_tensor") else part for part in parts]
    total = torch.linalg.vector_norm(torch.stack([each.to(norms[0]) for each in norms]), norm_type)
    if fails and not torch.isfinite(total):
        raise RuntimeError(f"the norm of the gradients is {total.item()}")
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        local.mul_(factor.to(local.device))
    return total


def _by_mesh(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors of every mesh, and those of none."""
    found: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    yield from found.values()

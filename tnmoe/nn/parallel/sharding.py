"""Experts that are spread over ranks: each rank has the cores of some experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from tnmoe.errors import InputError
from tnmoe.nn.experts import Experts
from tnmoe.nn.owned_rows import check_plain
from tnmoe.nn.parallel.agreement import check_agreement
from tnmoe.nn.parallel.copies import copied
from tnmoe.nn.parallel.exchange import Exchange
from tnmoe.nn.parallel.local_experts import LocalExperts
from tnmoe.nn.projection import Projection


def shard_experts(model: nn.Module, mesh: DeviceMesh, dim: str = "ep") -> list[nn.Parameter]:
    """Spread the experts of a model over the ranks of a mesh: expert parallelism.

    What an expert owns, its cores and biases, lies on one rank of the dimension ``dim``. What
    experts share stays on every rank, as do routers and all other layers. Every rank has tokens of
    its own. In a layer a token goes to the ranks of its experts, once to each, and its output comes
    back; no token is dropped.

    The ranks of all dimensions are data-parallel: a loss is a mean over them. Gradients of owned
    tensors are averaged over these ranks when the backward pass computes them. Wrap the model in
    ``DistributedDataParallel`` or ``fully_shard`` over the same ranks for the gradients of all
    other parameters.

    Parameters
    ----------
    model : Module
        Changed in place. All its :class:`Experts` are spread. An owned tensor becomes a DTensor
        parameter with ``Shard(0)``, of the numbers that the first rank of the mesh has.
    mesh : DeviceMesh
        All ranks that train the model. Experts are replicated over every dimension but ``dim``.
    dim : str
        Name of the dimension over which experts are spread.

    Returns
    -------
    list of Parameter
        The owned tensors, for ``fully_shard(…, ignored_params=set(owned))``.
        ``DistributedDataParallel`` leaves them out by itself if it wraps ``model``.

    Raises
    ------
    InputError
        If the mesh has no such dimension, the model has no experts or spread ones, a number of
        experts is not a multiple of the dimension's size, ranks differ in their models, ranks would
        own different numbers of rows, or a tensor is not a plain parameter.

    Notes
    -----
    Lepikhin et al., arXiv:2006.16668, section 3. Make the optimiser after this call, which
    replaces parameters.

    Examples
    --------
    >>> import torch, tempfile
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> from tnmoe import nn
    >>> from tnmoe.nn.parallel import shard_experts
    >>> meeting = tempfile.mktemp()
    >>> torch.distributed.init_process_group(
    ...     "gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    >>> mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "ep"))
    >>> layer = nn.MPOMoE(nn.TopKRouter(8, 4, top_k=2), nn.MPOExperts(4, 8, 16, sites=2))
    >>> x = torch.randn(3, 8)
    >>> before = layer(x)
    >>> owned = shard_experts(layer, mesh)
    >>> torch.allclose(layer(x), before), type(layer.experts.up.aux_0).__name__
    (True, 'DTensor')
    >>> torch.distributed.destroy_process_group()
    """
    check_dimension(mesh, dim)
    # Whatever else is wrong is wrong on all ranks then, and none waits for another.
    check_agreement(model, mesh)
    layers = _layers_to_spread(model, mesh, dim)
    placements: list[Placement] = [
        Shard(0) if name == dim else Replicate() for name in mesh.mesh_dim_names or ()
    ]
    spread: dict[int, nn.Parameter] = {}
    for layer in layers.values():
        for module, attribute in _owned(layer):
            tensor = getattr(module, attribute)
            if id(tensor) not in spread:
                spread[id(tensor)] = spread_tensor(tensor, mesh, placements)
            module._parameters[attribute] = spread[id(tensor)]
        layer.exchange = ExpertExchange(layer, mesh, dim)
    hide_from_ddp(model, set(map(id, spread.values())))
    return list(spread.values())


class ExpertExchange:
    """The calls of a layer whose experts are spread over ranks.

    Parameters
    ----------
    experts : Experts
        Whose owned tensors are DTensors.
    mesh : DeviceMesh
    dim : str
        Name of the dimension over which experts are spread.
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh, dim: str) -> None:
        self.group = mesh.get_group(dim)
        self.per_rank = experts.num_experts // self.group.size()
        first = self.per_rank * self.group.rank()
        self._local = LocalExperts(experts, range(first, first + self.per_rank), mesh.size())

    def __call__(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute as :meth:`Experts.forward`, with the experts of all ranks."""
        exchange = Exchange.of(index, self.per_rank, self.group)
        arrived = exchange.send(states[exchange.tokens], weights[exchange.tokens], exchange.choices)
        rows, of_rows, choices = arrived
        outputs = exchange.send_back(self._local(rows, choices, of_rows))
        return torch.zeros_like(states).index_add(0, exchange.tokens, outputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertExchange:
        return copied(self, memo, self.group)


def _layers_to_spread(model: nn.Module, mesh: DeviceMesh, dim: str) -> dict[str, Experts]:
    """Return the experts of a model; raise an InputError unless they can be spread."""
    layers = {name: each for name, each in model.named_modules() if isinstance(each, Experts)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no experts to spread")
    ranks = mesh[dim].size()
    for name, layer in layers.items():
        if layer.exchange is not None:
            raise InputError(f"the experts {name or 'given'} are spread over ranks already")
        if layer.num_experts % ranks:
            raise InputError(
                f"{layer.num_experts} experts ({name or 'the given ones'}) cannot be spread over "
                f"{ranks} ranks evenly: their number must be a multiple of the mesh dimension "
                f"{dim!r}"
            )
        for module, attribute in _owned(layer):
            check_plain(f"{name}.{attribute}", module, attribute)
            _check_even(module, attribute, ranks)
    return layers


def _check_even(module: Projection, attribute: str, ranks: int) -> None:
    """Raise an InputError unless the experts of all ranks own the same number of rows."""
    per_rank = module.num_experts // ranks
    rows = [module.expert_rows(expert)[attribute] for expert in range(module.num_experts)]
    sizes = [
        sum(each.stop - each.start for each in rows[first : first + per_rank])
        for first in range(0, module.num_experts, per_rank)
    ]
    if len(set(sizes)) > 1:
        raise InputError(
            f"the experts of a {type(module).__name__} differ in size and would give ranks "
            f"{min(sizes)} to {max(sizes)} rows of {attribute!r}: replicate or fully_shard them, "
            "or compress to the layout hidden or residual"
        )


def check_dimension(mesh: DeviceMesh, dim: str) -> None:
    """Raise an InputError unless a mesh has a dimension of this name."""
    names = mesh.mesh_dim_names or ()
    if dim not in names:
        given = ", ".join(names) or "dimensions without names"
        raise InputError(f"the mesh has no dimension {dim!r}: it has {given}")


def _owned(layer: Experts) -> list[tuple[Projection, str]]:
    """Return the projections of a layer with the names of the tensors that experts own."""
    return [
        (module, attribute)
        for module in layer.modules()
        if isinstance(module, Projection)
        for attribute in module.expert_rows(0)
        if attribute not in module._buffers  # every rank keeps them whole
    ]


def spread_tensor(
    tensor: nn.Parameter, mesh: DeviceMesh, placements: Sequence[Placement]
) -> nn.Parameter:
    """Return a DTensor parameter with the numbers of the first rank of a mesh."""
    rows = distribute_tensor(tensor.detach(), mesh, placements)
    return nn.Parameter(rows, requires_grad=tensor.requires_grad)


def hide_from_ddp(model: nn.Module, spread: set[int]) -> None:
    """Let ``DistributedDataParallel`` leave tensors out; it averages what all ranks have."""
    names = [name for name, each in model.named_parameters() if id(each) in spread]
    hide: Callable = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    hide(model, [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names])

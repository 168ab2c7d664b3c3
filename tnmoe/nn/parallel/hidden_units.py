"""Hidden units that are divided between ranks: each rank computes a part of every expert."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from tnmoe.errors import InputError
from tnmoe.nn.activations import is_repeatable
from tnmoe.nn.experts import Experts
from tnmoe.nn.owned_rows import check_plain
from tnmoe.nn.parallel.agreement import check_agreement
from tnmoe.nn.parallel.divisions import Division, divide
from tnmoe.nn.parallel.local_units import LocalUnits
from tnmoe.nn.parallel.sharding import check_dimension, hide_from_ddp, spread_tensor
from tnmoe.nn.stored_cores import StoredCores
from tnmoe.options import ProjectionName

# The divisions of a layer's projections.
Divisions = Mapping[ProjectionName, Division]


def shard_hidden_units(model: nn.Module, mesh: DeviceMesh, dim: str = "tp") -> list[nn.Parameter]:
    """Divide the hidden units of experts between the ranks of a mesh: tensor parallelism.

    The ranks of the dimension ``dim`` have the same tokens. Every rank computes some hidden units
    of all experts, and what they add to the outputs. A layer sums its outputs over the ranks once
    in the forward pass, and its gradients once in the backward pass, as a dense network does whose
    first matrix is divided by rows and whose second one is divided by columns.

    Of every matrix a rank has the rows or columns of its hidden units; of a chain, its part of the
    core at one site, the largest one that gives all projections of a layer the same units. All
    other cores stay whole on every rank, as do biases, routers and all other layers.

    Parameters
    ----------
    model : Module
        Changed in place. The hidden units of all its :class:`Experts` are divided. A divided tensor
        becomes a DTensor parameter of its full shape, with ``Shard`` along one of its axes. All
        ranks of ``dim`` get the numbers of the first one.
    mesh : DeviceMesh
        All ranks that train the model, or ``mesh["tp"]`` where ``fully_shard`` follows over the
        other dimensions.
    dim : str
        Name of the dimension over which hidden units are divided.

    Returns
    -------
    list of Parameter
        The divided tensors.

    Raises
    ------
    InputError
        If the mesh has no such dimension; if the model has no experts, or some that are spread over
        ranks already; if ranks cannot divide a layer; if it has dropout between its projections, or
        an activation that is not an elementwise function without parameters and random numbers; if
        ranks differ in their models, or a tensor is not a plain parameter.

    Notes
    -----
    Shoeybi et al., arXiv:1909.08053, section 3. Rank r of R has the hidden units j with
    ⌊j / m⌋ mod R = r. The number m follows from the legs: R must divide the leg of a site in every
    projection, and the leg times those after it must be the same in all.

    In ``split`` and ``hidden``, the legs of experts come first on the hidden side of ``up`` and
    ``gate``, and last on that of ``down``. Ranks therefore divide the shared cores on one side
    only, unless the legs of both have the same sizes. In ``hidden`` they also divide the rows of
    the shared modules of ``up`` and ``gate``, whose outputs all ranks need: that takes another
    collective for each of the two. In ``split`` the remaining shared cores stay whole.

    With a mesh of several dimensions, the ranks of the others are data-parallel: a loss is a mean
    over them. They average the gradients of divided tensors when the backward pass computes these.
    ``DistributedDataParallel`` leaves these tensors out; give ``fully_shard`` them as
    ``ignored_params``.

    All ranks of ``dim`` must route alike: give routers that draw random numbers the same seeds.
    Make the optimiser after this call, which replaces parameters.

    Examples
    --------
    >>> import torch, tempfile
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> from tnmoe import nn
    >>> from tnmoe.nn.parallel import shard_hidden_units
    >>> meeting = tempfile.mktemp()
    >>> torch.distributed.init_process_group(
    ...     "gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    >>> mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    >>> layer = nn.MPOMoE(nn.TopKRouter(8, 4, top_k=2), nn.MPOExperts(4, 8, 16, sites=2))
    >>> x = torch.randn(3, 8)
    >>> before = layer(x)
    >>> divided = shard_hidden_units(layer, mesh)
    >>> torch.allclose(layer(x), before), type(layer.experts.up.center).__name__
    (True, 'DTensor')
    >>> torch.distributed.destroy_process_group()
    """
    check_dimension(mesh, dim)
    # Whatever else is wrong is wrong on all ranks then, and none waits for another.
    check_agreement(model, mesh)
    group = mesh.get_group(dim)
    layers = _layers_to_divide(model)
    divisions = {
        name: divide(_described(name), layer, group.size()) for name, layer in layers.items()
    }
    axes = _axes(model, divisions)
    calls = {name: LocalUnits(each, divisions[name], mesh, dim) for name, each in layers.items()}
    for name, layer in layers.items():
        _check_all_taken_over(_described(name), layer, calls[name])
    divided: dict[int, nn.Parameter] = {}
    for (module, attribute), axis in axes.items():
        tensor = getattr(module, attribute)
        if id(tensor) not in divided:
            names = mesh.mesh_dim_names or ()
            placements = [Shard(axis) if name == dim else Replicate() for name in names]
            divided[id(tensor)] = spread_tensor(tensor, mesh, placements)
        module._parameters[attribute] = divided[id(tensor)]
    _copy_from_first_rank(model, group)
    for name, layer in layers.items():
        layer.exchange = calls[name]
    # Where the mesh has no data-parallel ranks, nobody averages gradients over these: then
    # DistributedDataParallel refuses what it must not leave out.
    if mesh.ndim > 1 or mesh.size() == distributed.get_world_size():
        hide_from_ddp(model, set(map(id, divided.values())))
    return list(divided.values())


@torch.no_grad()
def _copy_from_first_rank(model: nn.Module, group: ProcessGroup) -> None:
    """Give all ranks of a group the same numbers in the tensors that stay whole."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if not (isinstance(tensor, DTensor) or tensor.is_meta):
            numbers = tensor.contiguous()
            distributed.broadcast(numbers, group=group, group_src=0)
            tensor.copy_(numbers)


def _layers_to_divide(model: nn.Module) -> dict[str, Experts]:
    """Return the experts of a model; raise an InputError unless ranks can compute parts of them."""
    layers = {name: each for name, each in model.named_modules() if isinstance(each, Experts)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no experts whose hidden units can be divided")
    for name, layer in layers.items():
        what = _described(name)
        for module in layer.modules():
            if isinstance(module, StoredCores) and not module._holds_all_cores:
                raise InputError(f"a core of {what} is not a parameter, but parametrized or pruned")
        if layer.exchange is not None:
            raise InputError(f"{what} are spread over ranks already")
        if layer.dropout:
            raise InputError(
                f"{what} have dropout={layer.dropout} between their projections, which would drop "
                "the same units on all ranks: set it to 0"
            )
        if not _is_elementwise(layer):
            raise InputError(
                f"the activation of {what} must be an elementwise function without parameters and "
                f"random numbers, got {layer.activation}"
            )
    return layers


def _described(name: str) -> str:
    return name or "the experts"


def _is_elementwise(layer: Experts) -> bool:
    """Try whether an activation makes the same of some units as of all."""
    sides, width = (2 if layer.is_gated else 1), layer.intermediate_size
    has_parameters = isinstance(layer.activation, nn.Module) and any(
        True for _ in layer.activation.parameters()
    )
    if has_parameters or not is_repeatable(layer.activation, sides, width):
        return False
    # An activation may change its inputs in place.
    numbers = torch.linspace(-2, 2, width)[None]
    whole = layer.activation(*(numbers.clone() for _ in range(sides)))
    part = layer.activation(*(numbers[:, ::2].clone() for _ in range(sides)))
    return torch.allclose(whole[:, ::2], part, atol=1e-6)


def _axes(model: nn.Module, divisions: Mapping[str, Divisions]) -> dict[tuple[nn.Module, str], int]:
    """Return the axis of every tensor that is divided, by its module and its name there.

    Raises
    ------
    InputError
        If a tensor is not a plain parameter, or another module has it that is not divided alike.
    """
    axes = {
        (module, attribute): axis
        for of_layer in divisions.values()
        for division in of_layer.values()
        for module, attribute, axis in division.tensors
    }
    for module, attribute in axes:
        check_plain(attribute, module, attribute)
    by_tensor = {id(getattr(*place)): axis for place, axis in axes.items()}
    for path, module in model.named_modules(remove_duplicate=False):
        is_inside = any(path.startswith(f"{name}." if name else "") for name in divisions)
        for attribute, tensor in module._parameters.items():
            axis = by_tensor.get(id(tensor))
            if axis is not None and not (is_inside and axes.get((module, attribute)) == axis):
                raise InputError(
                    f"{path}.{attribute} is also a part of experts whose hidden units are to be "
                    "divided, and would not be divided alike: copy it first"
                )
    return axes


def _check_all_taken_over(name: str, layer: Experts, call: LocalUnits) -> None:
    """Raise an InputError if a layer has a parameter that local modules do not know."""
    known = {id(each) for module in call.modules() for each in module._parameters.values()}
    for path, each in layer.named_parameters():
        if each.requires_grad and id(each) not in known:
            raise InputError(
                f"{path} of {name} is trained, but belongs to no module whose hidden units can be "
                "divided: freeze it, or divide the hidden units before it is added"
            )

"""Tensors that all experts of a layer share: found, tied across layers, and updated less.

Every token of a layer updates its shared tensors, while an expert's own cores see only that
expert's tokens. :class:`tnmoe.nn.GradientMask` evens that out as MPOE does; here are the simpler
cures to compare it with: a smaller learning rate, smaller gradients, no updates at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tnmoe.errors import InputError, index_in, number_in
from tnmoe.nn.adapters import modules_in_use, warn_of_unsaved
from tnmoe.nn.experts import Experts
from tnmoe.nn.mpo_projection import MPOProjection
from tnmoe.options import MATRICES


def shared_projections(model: nn.Module) -> Iterator[MPOProjection]:
    """All projections of a model whose experts share cores."""
    seen: set[nn.Module] = set()
    for module in modules_in_use(model):
        if isinstance(module, MPOProjection) and module not in seen:
            seen.add(module)
            yield module


def shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Cores that all experts of a layer share, the central ones in MPOE, each once.

    Parameters
    ----------
    model : Module
        With any number of such layers, or none.

    Examples
    --------
    >>> from tnmoe.nn import MPOExperts
    >>> experts = MPOExperts(4, 8, 16, sites=3)
    >>> [core is experts.up.center for core in shared_parameters(experts)]
    [True, False]
    """
    found = {id(core): core for each in shared_projections(model) for core in each.shared_cores}
    return list(found.values())


def find_shared(model: nn.Module) -> list[nn.Parameter]:
    """As :func:`shared_parameters`; an InputError if there are none."""
    if found := shared_parameters(model):
        return found
    raise InputError(f"{type(model).__name__} has no tensor that experts share")


def tie_layers(
    layers: Iterable[nn.Module], sites: Literal["center"] | Iterable[int] = "center"
) -> None:
    """Let layers share cores as well: one stored tensor, with the gradients of all of them.

    MPOBERT (Liu et al., arXiv:2303.16753, section 3.1) shares the central tensors of all layers.
    The first layer's values stay: do it before training, or expect layers that had been trained
    on their own to compute something else.

    Parameters
    ----------
    layers : iterable of MPOExperts, or of MPOMoE with such experts
        Of the same shapes and bonds. Their up projections are tied to each other,
        their gates, and their down projections.
    sites : {"center"} or iterable of int
        Which sites' cores become one.

    Raises
    ------
    InputError
        If there are fewer than two layers, a site is not there, cores differ in shape, or they
        are sharded or offloaded already. Nothing is tied then.

    Examples
    --------
    >>> from tnmoe.nn import MPOExperts
    >>> first, second = (MPOExperts(4, 8, 16, sites=3) for _ in range(2))
    >>> tie_layers([first, second])
    >>> first.up.center is second.up.center, first.up.aux[0] is second.up.aux[0]
    (True, False)
    """
    layers = [getattr(layer, "experts", layer) for layer in layers]
    if len(layers) < 2:
        raise InputError(f"tying needs at least two layers, got {len(layers)}")
    if odd := [type(layer).__name__ for layer in layers if not isinstance(layer, Experts)]:
        raise InputError(f"layers must be Experts, or an MPOMoE of them, got {', '.join(odd)}")
    if any(_is_elsewhere(each) for layer in layers for each in layer.modules()):
        raise InputError("layers are sharded or offloaded already: tie them before that")
    if sites != "center" and (isinstance(sites, str) or not isinstance(sites, Iterable)):
        raise InputError(f"sites must be 'center' or the numbers of sites, got {sites!r}")
    numbers = None if isinstance(sites, str) else sorted(set(sites))
    if numbers == []:
        raise InputError("sites must name at least one site, got none")
    pairs = []
    for name in MATRICES:
        first, *others = (getattr(layer, name) for layer in layers)
        if first is None and all(other is None for other in others):
            continue
        pairs += [(name, first, other) for other in others]
    for name, first, other in pairs:
        _check_tie(name, first, other, numbers)
    for _, first, other in pairs:
        for site in [first.center_site] if numbers is None else numbers:
            other.set_core(site, first.core_at(site))


def _is_elsewhere(module: nn.Module) -> bool:
    """Whether FSDP or accelerate brings a module's cores only when it is called."""
    return isinstance(module, MPOProjection) and module.is_gathered


def _check_tie(name: str, first: Any, other: Any, sites: list[int] | None) -> None:
    for each in (first, other):
        if not isinstance(each, MPOProjection):
            raise InputError(f"{name} is no MPO in one of the layers: {each}")
    if first.shape != other.shape:
        raise InputError(f"{name} differs in its shape: {first.shape} and {other.shape}")
    if first.center_site != other.center_site:
        raise InputError(
            f"{name} differs in the site of its centre: {first.center_site} and {other.center_site}"
        )
    count = first.shape.sites
    chosen = [first.center_site] if sites is None else sites
    for site in chosen:
        index_in("every site", site, count)
        one, two = (tuple(each.core_at(site).shape) for each in (first, other))
        if one != two:
            raise InputError(f"{name}'s cores of site {site} differ in shape: {one} and {two}")


def parameter_groups(
    model: nn.Module, lr: float, shared_scale: float | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, with a smaller learning rate for shared tensors.

    Parameters
    ----------
    model : Module
        Its parameters that require gradients are taken.
    lr : float
        Learning rate of all others.
    shared_scale : float, optional
        The shared tensors' learning rate is ``lr`` times this; 1/E by default, E being the number
        of experts.
    **options
        For both groups: ``weight_decay``, for instance.

    Raises
    ------
    InputError
        If nothing is shared, the scale is negative, or it is not given and layers differ in E.

    Notes
    -----
    In our experiments a tenth of the learning rate for the central cores made training worse, as
    did the gradient mask: try one rate for all first.

    Examples
    --------
    >>> import torch
    >>> from tnmoe.nn import MPOExperts
    >>> experts = MPOExperts(4, 8, 16, sites=3)
    >>> optimizer = torch.optim.AdamW(parameter_groups(experts, lr=1e-3))
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.001, 0.00025]
    """
    shared = {id(core) for core in find_shared(model)}
    if shared_scale is None:
        counts = sorted({each.num_experts for each in shared_projections(model)})
        if len(counts) > 1:
            raise InputError(f"give shared_scale: layers have {counts} experts")
        shared_scale = 1 / counts[0]
    shared_scale = number_in("shared_scale", shared_scale, "[0, inf)")
    rate = number_in("lr", lr, "[0, inf)")
    lr = lr if isinstance(lr, Tensor) else rate  # optimisers know rates that are tensors
    trained = [each for each in model.parameters() if each.requires_grad]
    return [
        {"params": [each for each in trained if id(each) not in shared], "lr": lr, **options},
        {
            "params": [each for each in trained if id(each) in shared],
            "lr": lr * shared_scale,
            **options,
        },
    ]


class SharedGradientScale:
    """Scale the gradients of shared tensors, until removed.

    Optimisers that divide by the size of past gradients, Adam and its like, undo a constant
    scale; what remains is a smaller part of a norm that is clipped. With SGD it is a smaller
    learning rate.

    Parameters
    ----------
    model : Module
    scale : float, optional
        1/E by default, E being the number of experts of each layer.

    Raises
    ------
    InputError
        If nothing is shared, the scale is negative, or it is not given and layers that share a
        tensor differ in E.

    Notes
    -----
    With ``fully_shard`` or ``FullyShardedDataParallel``, make it afterwards.

    Examples
    --------
    >>> import torch
    >>> from tnmoe.nn import MPOExperts
    >>> experts = MPOExperts(4, 8, 16, sites=3)
    >>> with SharedGradientScale(experts):
    ...     index, weights = torch.zeros(3, 1, dtype=int), torch.ones(3, 1)
    ...     experts(torch.randn(3, 8), index, weights).sum().backward()
    """

    def __init__(self, model: nn.Module, scale: float | None = None) -> None:
        find_shared(model)
        self.scale = scale if scale is None else number_in("scale", scale, "[0, inf)")
        scales = _scales(model, self.scale)
        self._handles: list[Any] = [
            hook_gradient(core, partial(_scaled, by=by), accumulated=False)
            for core, by in scales.values()
        ]
        self._handles += [
            _GatheredScale(each, self.scale, set(scales))
            for each in shared_projections(model)
            if each.is_gathered
        ]

    def __repr__(self) -> str:
        return f"SharedGradientScale(scale={self.scale}, tensors={len(self._handles)})"

    def remove(self) -> None:
        """Leave gradients as they are from now on."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> SharedGradientScale:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _scales(model: nn.Module, scale: float | None) -> dict[int, tuple[nn.Parameter, float]]:
    """Every shared tensor of a model, once, and what its gradient is multiplied by."""
    found: dict[int, tuple[nn.Parameter, float]] = {}
    for each in shared_projections(model):
        by = 1 / each.num_experts if scale is None else scale
        for core in each.shared_cores:
            if found.setdefault(id(core), (core, by))[1] != by:
                raise InputError("give scale: layers that share a tensor differ in their experts")
    return found


def _scaled(gradient: Tensor, by: float) -> Tensor:
    return gradient * by


class _GatheredScale:
    """Scale the gradients of the tensors that FSDP gathers, in the parameters' place.

    Gradients of the parameters never arrive. The tensors are there from the first forward pass on,
    or are others in each.
    """

    def __init__(self, projection: MPOProjection, scale: float | None, others: set[int]) -> None:
        self._by = 1 / projection.num_experts if scale is None else scale
        self._others = others
        # The tensors are held, so that no other gets the identity of one that is gone.
        self._hooked: dict[int, tuple[Tensor, RemovableHandle]] = {}
        self._handle = projection.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, projection: Any, _: Any) -> None:
        cores = [
            core
            for site in projection.shared_sites
            for core in projection.tensors_at(site)
            if core.requires_grad and id(core) not in self._others
        ]
        scaled = partial(_scaled, by=self._by)
        self._hooked = {
            id(core): self._hooked.get(id(core)) or (core, core.register_hook(scaled))
            for core in cores
        }

    def remove(self) -> None:
        for handle in (self._handle, *(handle for _, handle in self._hooked.values())):
            handle.remove()


def hook_gradient(
    parameter: nn.Parameter, hook: Callable[[Tensor], Any], accumulated: bool = True
) -> RemovableHandle:
    """Call a function with a parameter whose gradient is there, or with the gradient before that.

    A frozen parameter takes a hook as well, for the day when it is thawed.
    """
    frozen = not parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        if accumulated:
            return parameter.register_post_accumulate_grad_hook(hook)
        return parameter.register_hook(hook)
    finally:
        parameter.requires_grad_(not frozen)


def train_auxiliary(model: nn.Module, also: Iterable[str] = ()) -> int:
    """Train the auxiliary cores and nothing else: lightweight fine-tuning, as in MPOP.

    Liu et al., arXiv:2106.02205, section 3.2: the central tensors keep what was learned, and the
    small cores around them adapt to a task.

    Parameters
    ----------
    model : Module
        All its parameters are frozen but those that experts own as cores, and what ``also`` says.
    also : str or iterable of str
        Parts of names of parameters to train as well: ``["router", "classifier"]``.

    Returns
    -------
    int
        How many numbers are trained.

    Raises
    ------
    InputError
        If nothing is shared, or a part of ``also`` is in no name.

    Warns
    -----
    UserWarning
        If the model is one of PEFT, which will not save what is trained: it saves its adapters
        and the modules that ``modules_to_save`` names, ``["router", "experts"]`` for instance.

    Examples
    --------
    >>> from tnmoe.nn import MPOExperts, MPOMoE, TopKRouter
    >>> layer = MPOMoE(TopKRouter(64, 4), MPOExperts(4, 64, 256))
    >>> train_auxiliary(layer), sum(each.numel() for each in layer.parameters())
    (16640, 49664)
    """
    find_shared(model)
    parts = [also] if isinstance(also, str) else list(also)
    named = dict(model.named_parameters())
    if absent := [part for part in parts if not any(part in name for name in named)]:
        raise InputError(f"no parameter has {', '.join(absent)} in its name")
    owned = {
        id(core)
        for each in shared_projections(model)
        for site in set(range(each.shape.sites)) - each.shared_sites
        for core in each.parameters_at(site)
    }
    unused = _originals(model)
    for name, each in named.items():
        trained = id(each) in owned or any(part in name for part in parts)
        each.requires_grad_(trained and id(each) not in unused)
    warn_of_unsaved(model)
    return sum(each.numel() for each in named.values() if each.requires_grad)


def _originals(model: nn.Module) -> set[int]:
    """Parameters that PEFT keeps beside those that it trains in their place."""
    used = {id(each) for part in modules_in_use(model) for each in part.parameters(recurse=False)}
    return {id(each) for each in model.parameters()} - used


def freeze_shared(model: nn.Module, frozen: bool = True) -> int:
    """Freeze the cores that experts share, and nothing else; returns how many numbers they hold.

    As a gradient mask of probability 1, at less cost: their gradients are not computed.

    Parameters
    ----------
    model : Module
    frozen : bool
        False thaws them again.

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
    shared = find_shared(model)
    for core in shared:
        core.requires_grad_(not frozen)
    if not frozen:
        warn_of_unsaved(model)
    return sum(core.numel() for core in shared)

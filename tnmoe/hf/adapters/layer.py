"""The modules that an adapter puts into a model: mixtures beside a network that stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from tnmoe.errors import InputError
from tnmoe.hf.adapters.config import MPOEAdapterConfig
from tnmoe.hf.adapters.experts import borrow, new_mixture_beside
from tnmoe.hf.ffn import FFN, Place, linear_modules
from tnmoe.nn.linear import has_matrix, is_transposed
from tnmoe.nn.moe import MPOMoE

PREFIX = "mpoe_"


class RoutedNetwork(nn.Module, BaseTunerLayer):
    """A network of a model, or what of it stands at one place, with mixtures by adapter's name.

    Parameters
    ----------
    base_layer : Module
        What the model called here.
    ffn : FFN
        The network.

    Attributes
    ----------
    mpoe_mixtures : ModuleDict from str to MPOMoE
        Their experts use the network's own matrices, which stay a part of the network alone.
    """

    adapter_layer_names = (f"{PREFIX}mixtures",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, ffn: FFN) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.mpoe_mixtures = nn.ModuleDict()
        self.ffn = ffn
        self.merged_adapters: list[str] = []
        # Module and attribute of every matrix: another adapter, or a quantisation, may replace it.
        self._homes: dict[str, tuple[nn.Module, str]] = {}
        self._unmerged: dict[str, tuple[Tensor, Tensor | None]] = {}

    @classmethod
    def install(cls, ffn: FFN) -> RoutedNetwork:
        """Put a module without adapters into the place of a network."""
        (place,) = ffn.places
        network = cls(getattr(place.owner, place.name), ffn)
        others = _bypass(place, network)
        setattr(place.owner, place.name, network)
        wanted = {id(module): name for name, module in linear_modules(ffn).items()}
        parts: list[Any] = [network, *others]
        for part in parts:
            part.training = place.owner.training  # what is inside keeps its mode
            for owner in part.modules():
                for attribute, child in owner._modules.items():
                    if id(child) in wanted:
                        network._homes[wanted[id(child)]] = owner, attribute
        return network

    def add(self, adapter: str, config: MPOEAdapterConfig) -> None:
        """Add the mixture of an adapter."""
        mixture = new_mixture_beside(self.ffn, self.matrices(), config)
        self.mpoe_mixtures[adapter] = mixture.train(self.training)

    def matrices(self) -> dict[str, nn.Module]:
        """Return the network's linear modules as they are now, by projection."""
        return {name: getattr(owner, each) for name, (owner, each) in self._homes.items()}

    @property
    def mixture(self) -> MPOMoE | None:
        """The mixture of the active adapter; None if it has none here or is disabled."""
        names = [name for name in self.active_adapters if name in self.mpoe_mixtures]
        if self.disable_adapters or self.merged or not names:
            return None
        found = self.mpoe_mixtures[_only(names)]
        assert isinstance(found, MPOMoE)
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the active adapter's mixture, or the network as it was."""
        mixture = self.mixture
        if mixture is None:
            return self.base_layer(*args, **kwargs)
        borrow(mixture.experts, self.matrices())
        return mixture(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the one expert of an adapter to the network's matrices.

        Parameters
        ----------
        safe_merge : bool
            Whether to refuse a result with NaN or infinity.
        adapter_names : list of str, optional
            By default the active one.

        Raises
        ------
        InputError
            See :meth:`check_mergeable`. The network is then unchanged.
        """
        merged = self.check_mergeable(adapter_names, safe_merge)
        for name, (weight, bias) in merged.items():
            module: Any = self.matrices()[name]
            kept = module.weight.data.clone(), bias if bias is None else module.bias.data.clone()
            self._unmerged[name] = kept
            module.weight.data.copy_(weight.mT if is_transposed(module) else weight)
            if bias is not None:
                module.bias.data.copy_(bias)
        self.merged_adapters += [
            name for name in check_adapters_to_merge(self, adapter_names) if merged
        ]

    @torch.no_grad()
    def check_mergeable(
        self, adapter_names: list[str] | None = None, safe: bool = False
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Return the matrices and biases that a merge gives, by projection.

        Parameters
        ----------
        adapter_names : list of str, optional
            By default the active one.
        safe : bool
            Whether to refuse a result with NaN or infinity.

        Raises
        ------
        InputError
            If an adapter has several experts, a matrix is not held as floats, or the result is not
            finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.mpoe_mixtures]
        if not names:
            return {}
        mixture: Any = self.mpoe_mixtures[_only(names)]
        if mixture.experts.num_experts > 1:
            raise InputError(
                f"adapter {names[0]!r} has {mixture.experts.num_experts} experts, which no single "
                "matrix replaces: keep the adapter, or write its experts as LoRA adapters with "
                "tnmoe.hf.to_loras"
            )
        borrow(mixture.experts, self.matrices())
        found = {}
        for name, projection in mixture.experts.projections().items():
            if not has_matrix(projection.base):
                raise InputError(
                    f"{self.ffn.name}: {name} is a {type(projection.base).__name__}, whose matrix "
                    "is not held as floats: load the model unquantised, without other adapters in "
                    "its networks, to merge"
                )
            biases = projection.expert_biases()
            found[name] = projection.weight()[0], None if biases is None else biases[0]
            if safe and not bool(torch.isfinite(found[name][0]).all()):
                raise InputError(f"{self.ffn.name}: {names[0]!r} makes {name} NaN or infinite")
        return found

    def unmerge(self) -> None:
        """Return to the matrices before the merge."""
        for name, (weight, bias) in self._unmerged.items():
            module: Any = self.matrices()[name]
            module.weight.data.copy_(weight)
            if bias is not None:
                module.bias.data.copy_(bias)
        self._unmerged = {}
        self.merged_adapters.clear()


def _only(names: list[str]) -> str:
    """Return the one name of a list; raise an InputError if there are several."""
    if len(names) > 1:
        raise InputError(f"one adapter of routed experts can act at a time, got {', '.join(names)}")
    return names[0]


def _bypass(place: Place, network: RoutedNetwork) -> list[Bypass]:
    """Let the later parts of a network be identities while a mixture takes its place."""
    numbers = [
        (owner, name, float(getattr(owner, name)))
        for owner, name in place.bypassed
        if isinstance(getattr(owner, name), int | float)
    ]
    found: list[Bypass] = []
    for owner, name in place.bypassed:
        if (owner, name) in [number[:2] for number in numbers]:
            setattr(owner, name, 0.0)
            continue
        # A dropout that is a number follows the activation, which comes first.
        found.append(Bypass(getattr(owner, name), network, () if found else tuple(numbers)))
        setattr(owner, name, found[-1])
    return found


class Bypass(nn.Module, BaseTunerLayer):
    """A later part of a network: as it was, or an identity while a mixture takes its place.

    Parameters
    ----------
    base_layer : Module or callable
        What the model called here.
    network : RoutedNetwork
        Where the network begins.
    numbers : tuple of (Module, str, float)
        Probabilities of dropping an output of ``base_layer`` that the model holds as numbers. They
        are 0 there as long as this module stands.
    """

    adapter_layer_names = ()
    other_param_names = ()

    def __init__(
        self,
        base_layer: Callable[..., Any],
        network: RoutedNetwork,
        numbers: tuple[tuple[nn.Module, str, float], ...],
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        # In a tuple it is no submodule.
        self._begin = (network,)
        self._numbers = numbers
        self.merged_adapters: list[str] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the input, or what the model computed here."""
        if self._begin[0].mixture is not None:
            return args[0] if args else next(iter(kwargs.values()))
        output = self.base_layer(*args, **kwargs)
        for _, _, rate in self._numbers:
            output = F.dropout(output, rate, self.training)
        return output

    def put_back(self) -> None:
        """Give the model its probabilities back."""
        for owner, name, value in self._numbers:
            setattr(owner, name, value)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: the network's first module merges all of it."""

    def unmerge(self) -> None:
        """Do nothing: the network's first module merges all of it."""


def routed_networks(model: nn.Module) -> Iterator[tuple[str, RoutedNetwork]]:
    """Iterate over the networks of a model that have adapters, with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, RoutedNetwork):
            yield path, module


def mixtures_of(model: nn.Module, adapter: str) -> dict[str, MPOMoE]:
    """Return the mixtures of an adapter by the paths of the networks."""
    found: dict[str, Any] = {
        path: network.mpoe_mixtures[adapter]
        for path, network in routed_networks(model)
        if adapter in network.mpoe_mixtures
    }
    return found

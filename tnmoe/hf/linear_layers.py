"""The linear layers of a model: which ones are meant, and what stands in their place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tnmoe.errors import InputError, short_repr
from tnmoe.hf.find import possible_names
from tnmoe.nn.experts import Experts
from tnmoe.nn.linear import (
    bias_of_linear,
    device_of_linear,
    dtype_of_linear,
    has_matrix,
    holds_floats,
    is_transposed,
    size_of_linear,
)
from tnmoe.nn.mpo_linear import MPOLinear, torch_seed
from tnmoe.nn.residual_projection import start_at_zero
from tnmoe.nn.routing.router import Router
from tnmoe.nn.structure import ProjectionStructure
from tnmoe.nn.transforms import is_offloaded
from tnmoe.system.tables import listed, shortened

ALL_LINEAR = "all-linear"


class MPOConv1D(MPOLinear):
    """A layer in the place of transformers' Conv1D, whose weight is (in_features, out_features)."""

    @property
    def weight(self) -> Tensor:
        """The transposed matrix, (in_features, out_features), with gradients."""
        return self._matrix().T

    @torch.no_grad()
    def to_linear(self) -> Any:
        """Return a Conv1D of the same function, in memory of its own."""
        linear = super().to_linear()
        conv1d = Conv1D(0, 0)
        conv1d.nf, conv1d.nx = self.out_features, self.in_features
        is_trained = linear.weight.requires_grad
        conv1d.weight = nn.Parameter(linear.weight.T.contiguous(), is_trained)
        conv1d.bias = linear.bias
        return conv1d.train(self.training)


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a model.

    Attributes
    ----------
    name : str
        Its first path in the model.
    module : Module
    places : tuple of (Module, str)
        Every module that holds it, and the attribute there.
    """

    name: str
    module: nn.Module
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return size_of_linear(self.module)

    @property
    def num_params(self) -> int:
        """Entries of the matrix."""
        rows, columns = self.size
        return rows * columns

    @property
    def mpo_class(self) -> type[MPOLinear]:
        """The class of what stands in the place of this layer."""
        return MPOConv1D if is_transposed(self.module) else MPOLinear

    def install(self, module: nn.Module) -> None:
        """Put a module in the place of this one, in its mode."""
        for parent, attribute in self.places:
            setattr(parent, attribute, module.train(self.module.training))


def layers_of(model: nn.Module, is_one: Callable[[nn.Module], bool]) -> list[LinearLayer]:
    """Return the outermost modules of a kind, outside of tnmoe's experts and routers."""
    names: dict[nn.Module, str] = {}
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}

    def search(parent: nn.Module, path: str) -> None:
        # Unlike named_children, this shows a module under all its names.
        for attribute, module in parent._modules.items():
            name = f"{path}.{attribute}" if path else attribute
            if module is None:
                continue
            if is_one(module):
                names.setdefault(module, name)
                if (parent, attribute) not in places.setdefault(module, []):
                    places[module].append((parent, attribute))
            elif not isinstance(module, Experts | Router | MPOLinear):
                search(module, name)

    search(model, "")
    return [LinearLayer(name, module, tuple(places[module])) for module, name in names.items()]


def linear_layers(model: nn.Module) -> list[LinearLayer]:
    """Return the linear layers of a model that are no MPO."""
    return layers_of(model, _is_linear)


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, MPOLinear):
        return False
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return is_transposed(module) or all(isinstance(size, int) for size in sizes)


def tensorized_layers(model: nn.Module) -> list[LinearLayer]:
    """Return the layers of a model that are MPOs, or have one beside them."""
    return layers_of(model, lambda module: isinstance(module, MPOLinear))


def tensorized_in(model: nn.Module) -> dict[str, MPOLinear]:
    """Return the layers of a model that are MPOs, or have one beside them, by their paths."""
    return {path: each for path, each in model.named_modules() if isinstance(each, MPOLinear)}


def find_linear(model: nn.Module, targets: str | Iterable[str]) -> list[LinearLayer]:
    """Find the linear layers of a model that ``targets`` chooses.

    Parameters
    ----------
    model : Module
    targets : str or iterable of str
        As for :func:`tnmoe.hf.tensorize`.

    Raises
    ------
    InputError
        If a target chooses no layer, is malformed, or chooses a layer whose parameters another
        module holds too.
    """
    found, problem = linear_layers(model), _tie_problem(model)
    if isinstance(targets, str) and targets == ALL_LINEAR:
        heads = _output_heads(model)
        chosen = [
            each
            for each in found
            if each.module not in heads
            # The attention around such a layer reads its weight by name, and never calls it.
            and not isinstance(each.module, NonDynamicallyQuantizableLinear)
            and problem(each) is None
        ]
        _check_some(chosen, targets, found, model)
        return chosen
    chosen = _matching(found, targets, model)
    for each in chosen:
        if (text := problem(each)) is not None:
            raise InputError(f"{each.name} {text}: leave it out of targets")
    return chosen


def _matching(
    found: list[LinearLayer], targets: str | Iterable[str], model: nn.Module
) -> list[LinearLayer]:
    """Return layers that a regular expression describes, or whose paths end in given names."""
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(
                f"targets={short_repr(targets)} is not a regular expression: {error}"
            ) from error
        chosen = [each for each in found if pattern.fullmatch(each.name)]
        _check_some(chosen, targets, found, model)
        return chosen
    names = list(targets) if isinstance(targets, Iterable) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"targets must be a string or names of layers, got {short_repr(targets)}")
    for name in names:
        _check_some([each for each in found if _ends_in(each.name, name)], name, found, model)
    return [each for each in found if any(_ends_in(each.name, name) for name in names)]


def _ends_in(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _check_some(
    chosen: list[LinearLayer], target: str, found: list[LinearLayer], model: nn.Module
) -> None:
    if not chosen:
        raise InputError(
            f"the target {short_repr(target)} matches none of the {len(found)} linear layers of "
            f"{type(model).__name__}: {shortened(each.name for each in found)}"
        )


def _output_heads(model: nn.Module) -> set[nn.Module | None]:
    """Return the output heads of all models of transformers that are in a module, or are it."""
    models = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return {part.get_output_embeddings() for part in models}


def _tie_problem(model: nn.Module) -> Callable[[LinearLayer], str | None]:
    """Return a function that says what ties the parameters of a layer; None if nothing does."""
    holders: dict[int, dict[nn.Module, str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            own = f"{path}.{name}" if path else name
            holders.setdefault(id(parameter), {}).setdefault(module, own)
    keys: Any = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {*keys, *keys.values()}

    def problem(layer: LinearLayer) -> str | None:
        for parameter in layer.module.parameters():
            names = set(holders[id(parameter)].values())
            if len(names) > 1 or names & tied:
                own = {name for name in names if name.startswith(f"{layer.name}.")}
                others = (names - own) or own
                return f"has parameters that the model ties ({listed(others)})"
        return None

    return problem


def check_holds_matrix(layer: LinearLayer) -> None:
    """Raise an InputError unless a layer holds its matrix as floats, in memory."""
    module = layer.module
    if is_offloaded(module) or any(each.is_meta for each in module.parameters()):
        raise InputError(f"{layer.name} is not in memory: load the model without offloading")
    # A class of a model's own, such as Falcon's, may compute the same in another way.
    is_own = isinstance(module, nn.Linear) and holds_floats(module.weight)
    if not (has_matrix(module) or is_own):
        raise InputError(
            f"{layer.name}, a {type(module).__name__}, does not hold a matrix of floats alone: "
            "dequantize the model or merge its adapters first, or add to the layer by residual=True"
        )


def structure_of(layer: MPOLinear) -> ProjectionStructure:
    """Return the structure of a layer: of kind ``residual`` beside a base, or ``chains``."""
    chains = ProjectionStructure.of(layer.projection)
    kind: Any = "chains" if layer.base is None else "residual"
    return replace(chains, kind=kind, bias=kind == "chains" and layer.bias is not None)


def new_layer(linear: LinearLayer, structure: ProjectionStructure) -> MPOLinear:
    """Make a layer of a structure, with random numbers, for the place of a linear one.

    Raises
    ------
    InputError
        If the structure is not one for this layer.
    """
    module, shape = linear.module, structure.shape
    has_bias = structure.kind == "chains" and bias_of_linear(module) is not None
    fits = (shape.out_features, shape.in_features) == linear.size and structure.bias == has_bias
    if structure.kind not in ("chains", "residual") or not fits:
        raise InputError(
            f"the model's {linear.name}, a {linear.size[0]}×{linear.size[1]} layer, cannot have "
            f"the structure {short_repr(structure)}"
        )
    place: dict[str, Any] = {"device": device_of_linear(module), "dtype": dtype_of_linear(module)}
    rows, columns = linear.size
    layer = linear.mpo_class(columns, rows, sites=2, max_bond=1, bias=has_bias, **place)
    layer.projection = replace(structure, kind="chains", bias=False).build(1, **place)
    if structure.kind == "residual":
        layer._put_around(module)
        start_at_zero(layer.projection, rng=torch_seed())
    return layer


def layers_named(
    layers: Iterable[LinearLayer], names: Iterable[str], model: nn.Module
) -> Iterator[tuple[str, LinearLayer]]:
    """Find those layers of a model that have one of these names, as a record gives them.

    Yields
    ------
    str
        The name that was given; see :func:`tnmoe.hf.find.ffns_named`.
    LinearLayer
    """
    recorded, names_of = set(names), possible_names(model)
    for each in layers:
        for name in recorded & names_of(each.name):
            yield name, each


def install_tensorized(model: nn.Module, structures: Mapping[str, ProjectionStructure]) -> None:
    """Replace the layers that a record names by new ones of its structures."""
    for name, layer in layers_named(linear_layers(model), structures, model):
        layer.install(new_layer(layer, structures[name]))

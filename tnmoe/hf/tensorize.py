"""Linear layers of a model made into MPOs, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnmoe.decompose import decompose
from tnmoe.errors import (
    InputError,
    check_bool,
    check_number_in,
    check_positive_int,
    short_repr,
)
from tnmoe.hf.linear_layers import (
    LinearLayer,
    check_holds_matrix,
    find_linear,
    structure_of,
    tensorized_in,
    tensorized_layers,
)
from tnmoe.hf.record import give_own_configuration, set_linear_layers
from tnmoe.hf.tensorize_report import TensorizedLayer, TensorizeReport
from tnmoe.nn.linear import weight_of_linear
from tnmoe.nn.mpo_linear import MPOLinear, matrix_shape
from tnmoe.shapes import MPOShape
from tnmoe.system.memory import explain_memory_error
from tnmoe.truncation.distribute import distribute_budget
from tnmoe.truncation.select import select_bonds
from tnmoe.truncation.spectra import squared_loss, squared_tails

# Sizes that a layer can get within a budget of all layers, from the smallest to its own.
_SIZES = 16


def tensorize(
    model: nn.Module,
    targets: str | Iterable[str] = "all-linear",
    *,
    max_bond: int | None = None,
    rtol: float | None = None,
    keep: float | None = None,
    sites: int | None = None,
    shapes: Mapping[tuple[int, int], MPOShape] | None = None,
    residual: bool = False,
) -> TensorizeReport:
    """Make linear layers of a model into :class:`tnmoe.nn.MPOLinear`, in place.

    Parameters
    ----------
    model : Module
        A model of transformers, or any other module. It is changed in place.
    targets : str or iterable of str
        Which layers: names, which match the ends of paths, as ``target_modules`` of PEFT;
        a regular expression for whole paths; or ``"all-linear"``: all linear layers, except the
        output head and layers whose parameters the model ties. Layers inside of tnmoe's experts
        and routers are left out.
    max_bond : int, optional
        Largest bond dimension of every layer; with ``residual`` 16 by default.
    rtol : float, optional
        Largest relative Frobenius error of every matrix. A layer that would not become smaller
        stays as it is.
    keep : float, optional
        Share of the parameters of all chosen matrices together that stays. The bonds of all layers
        are those whose squared relative errors, as predicted from Schmidt values, have the least
        sum. A layer may stay as it is. All Schmidt values of all layers are computed for that,
        which takes a time that grows with the third power of exact bonds.
    sites : int, optional
        Number of sites: 5 by default, with ``residual`` 2, whose legs are (out | in).
    shapes : mapping from (int, int) to MPOShape, optional
        Shapes for matrices (out, in) of these sizes instead.
    residual : bool
        Keep every layer as it stands, frozen or quantized perhaps, and add an MPO that starts at
        zero. It takes no ``rtol`` and no ``keep``.

    Returns
    -------
    TensorizeReport
        Shapes, bonds, parameters and errors of all chosen layers.

    Raises
    ------
    InputError
        If a target matches no layer; if a chosen layer has tied parameters, or holds no matrix of
        floats in memory, or has NaN or infinity in it; or if arguments do not fit each other or
        the layers. The model is then as it was.
    TypeError
        If ``model`` is not a module.

    See Also
    --------
    untensorize : Back to linear layers.
    compress : Experts of mixtures made smaller.

    Notes
    -----
    The configuration of a model of transformers records the structures. ``save_pretrained`` and
    ``from_pretrained`` therefore work as for any other model, with ``tnmoe.hf`` imported. For other
    modules tensorize a new one by the same ``max_bond`` and load the ``state_dict``.

    The budget is a multiple-choice knapsack problem, see :func:`tnmoe.distribute_budget`.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, vocab_size=32)
    >>> model = LlamaForCausalLM(LlamaConfig(**small, num_hidden_layers=1))
    >>> report = tensorize(model, ["up_proj", "gate_proj"], keep=0.5, sites=3)
    >>> report.params_after <= 0.5 * report.params_before
    True
    >>> type(model.model.layers[0].mlp.up_proj).__name__
    'MPOLinear'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__qualname__}")
    limits = _check_limits(check_bool("residual", residual), max_bond, rtol, keep)
    layers = find_linear(model, targets)
    for layer in layers if not residual else ():
        check_holds_matrix(layer)
    layout: Any = "residual" if residual else "interleaved"
    given = _check_shapes(shapes, layers)
    chosen_shapes = [
        matrix_shape(size, given.get(size), None if size in given else sites, layout)
        for size in (layer.size for layer in layers)
    ]
    settings: list[dict[str, Any] | None]
    if keep is not None:
        settings = _within_budget(layers, chosen_shapes, limits["keep"])
    else:
        settings = [{"shape": shape, "residual": residual, **limits} for shape in chosen_shapes]
    # Everything is made before anything is replaced: an error leaves the model as it was.
    made = [_make(layer, own) for layer, own in zip(layers, settings, strict=True)]
    for layer, (module, _) in zip(layers, made, strict=True):
        if module is not None:
            layer.install(module)
    _record(model)
    return TensorizeReport(tuple(report for _, report in made))


def untensorize(model: nn.Module) -> nn.Module:
    """Make all layers that are MPOs, or have one beside them, linear layers again, in place.

    Parameters
    ----------
    model : Module
        With layers that :func:`tensorize` made, or :class:`tnmoe.nn.MPOLinear`. It is changed in
        place: every such layer becomes a ``torch.nn.Linear``, or a Conv1D where one was, of the
        same function.

    Returns
    -------
    Module
        ``model``.

    Raises
    ------
    InputError
        If the model has no such layer.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> report = tensorize(model, max_bond=4, sites=2)
    >>> untensorize(model)
    Sequential(
      (0): Linear(in_features=16, out_features=16, bias=True)
      (1): ReLU()
      (2): Linear(in_features=16, out_features=4, bias=True)
    )
    """
    layers = tensorized_layers(model)
    if not layers:
        raise InputError(f"{type(model).__name__} has no layer that is an MPO")
    made = []
    for layer in layers:
        assert isinstance(layer.module, MPOLinear)
        with explain_memory_error(f"making {layer.name} a linear layer"):
            made.append(layer.module.to_linear())
    for layer, linear in zip(layers, made, strict=True):
        layer.install(linear)
    _record(model)
    return model


def _check_limits(
    residual: bool, max_bond: int | None, rtol: float | None, keep: float | None
) -> dict[str, Any]:
    """Return the limit that was given, if any, checked."""
    limits = {"max_bond": max_bond, "rtol": rtol, "keep": keep}
    given = {name: value for name, value in limits.items() if value is not None}
    shown = ", ".join(f"{name}={short_repr(value)}" for name, value in given.items()) or "none"
    if residual and given.keys() - {"max_bond"}:
        raise InputError(f"residual=True decomposes nothing and takes max_bond alone, got {shown}")
    if not residual and len(given) != 1:
        raise InputError(f"give exactly one of max_bond, rtol and keep, got {shown}")
    if max_bond is not None:
        return {"max_bond": check_positive_int("max_bond", max_bond)}
    if rtol is not None:
        return {"rtol": check_number_in("rtol", rtol, "[0, 1)")}
    return {} if keep is None else {"keep": check_number_in("keep", keep, "(0, 1]")}


def _check_shapes(
    shapes: Mapping[tuple[int, int], MPOShape] | None, layers: list[LinearLayer]
) -> dict[tuple[int, int], MPOShape]:
    """Return the shapes by size; raise an InputError if no layer has a size."""
    if not isinstance(shapes, Mapping | None):
        raise InputError(f"shapes must map (out, in) to an MPOShape, got {short_repr(shapes)}")
    sizes = {layer.size for layer in layers}
    for size in shapes or {}:
        if size not in sizes:
            raise InputError(f"no chosen layer has the size {short_repr(size)} of shapes")
    return dict(shapes or {})


def _within_budget(
    layers: list[LinearLayer], shapes: list[MPOShape], keep: float
) -> list[dict[str, Any] | None]:
    """Choose the bonds of all layers; None for a layer that stays as it is."""
    bonds, tables = [], []
    for layer, shape in zip(layers, shapes, strict=True):
        with explain_memory_error(f"analysing {layer.name}"):
            own = _sizes(layer, shape)
        bonds.append([each for each, _ in own])
        params = [shape.num_params(each) for each, _ in own]
        errors = [error for _, error in own]
        tables.append([*zip(params, errors, strict=True), (layer.num_params, 0.0)])
    full = sum(layer.num_params for layer in layers)
    least = sum(min(params for params, _ in table) for table in tables)
    budget = int(keep * full)
    if budget < least:
        raise InputError(
            f"keep={keep} leaves {budget:,} parameters to the chosen layers, which have {full:,} "
            f"now; they can have {least:,} at least"
        )
    return [
        {"shape": shape, "bond_dims": own[number]} if number < len(own) else None
        for number, own, shape in zip(distribute_budget(tables, budget), bonds, shapes, strict=True)
    ]


def _sizes(layer: LinearLayer, shape: MPOShape) -> list[tuple[tuple[int, ...], float]]:
    """Return bonds that make a layer smaller, each with its squared relative error."""
    _, info = decompose(weight_of_linear(layer.module).detach(), shape, return_info=True)
    tails = [squared_tails(values.cpu().numpy()) for values in info.spectra]
    whole = float(tails[0][0]) or 1.0
    least, full = shape.num_params(1), layer.num_params
    if least >= full:
        return []
    found = {
        select_bonds(info.spectra, shape, max_params=int(size))
        for size in np.geomspace(least, full, _SIZES, endpoint=False).round()
    }
    return [
        (bonds, squared_loss(tails, bonds) / whole)
        for bonds in sorted(found)
        if shape.num_params(bonds) < full
    ]


def _make(
    layer: LinearLayer, settings: dict[str, Any] | None
) -> tuple[MPOLinear | None, TensorizedLayer]:
    """Make what stands in the place of a layer, and its report; None where the layer stays."""
    before = layer.num_params
    stays = TensorizedLayer(layer.name, None, None, before, before, 0.0)
    if settings is None:
        return None, stays
    with explain_memory_error(f"making {layer.name} an MPO"):
        made = layer.mpo_class.from_linear(layer.module, **settings)
    own = sum(core.numel() for core in made.projection.parameters())
    if "rtol" in settings and own >= before:
        return None, stays
    chains = made.projection.shape, made.projection.bond_dims
    if made.base is not None:
        return made, TensorizedLayer(layer.name, *chains, before, before + own, 0.0)
    error = _relative_error(weight_of_linear(layer.module).detach(), made)
    return made, TensorizedLayer(layer.name, *chains, before, own, error)


def _relative_error(matrix: Tensor, made: MPOLinear) -> float:
    with torch.no_grad():
        difference = made.to_mpo().to_matrix().double() - matrix.double()
        norm = torch.linalg.vector_norm(matrix, dtype=torch.float64)
        return float(torch.linalg.vector_norm(difference) / norm) if norm else 0.0


def _record(model: nn.Module) -> None:
    """Record all layers that are MPOs in the configurations of the models of transformers."""
    if isinstance(model, PreTrainedModel):
        give_own_configuration(model)
        structures = {path: structure_of(each) for path, each in tensorized_in(model).items()}
        set_linear_layers(model, structures)
        return
    for part in model.children():
        _record(part)

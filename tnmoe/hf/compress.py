"""Ordinary mixtures made smaller: with low ranks, common bases or a common matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnmoe.errors import check_bool
from tnmoe.hf.calibration import (
    Batch,
    LayerMoments,
    MomentsCollector,
    Needs,
    check_batches,
    check_known,
)
from tnmoe.hf.checks import check_in_memory, check_model
from tnmoe.hf.compression import CompressionConfig, check_compression
from tnmoe.hf.compression_plan import (
    Choice,
    ProjectionOptions,
    choose,
    form_of,
    options_of,
    planned_report,
    written_matrices,
)
from tnmoe.hf.compression_report import CompressionReport, MatrixReport, relative_error
from tnmoe.hf.compression_weights import LayerWeights
from tnmoe.hf.ordinary import OrdinaryExperts, find_ordinary
from tnmoe.hf.record import add_compression, give_own_configuration
from tnmoe.nn.experts import Experts
from tnmoe.nn.low_rank_projection import LowRankProjection
from tnmoe.nn.mpo_experts import MPOExperts
from tnmoe.nn.structure import ProjectionStructure
from tnmoe.options import ProjectionName
from tnmoe.shared_mpo import SharedMPO
from tnmoe.system.memory import explain_memory_error

# Every eighth batch of a calibration measures the loss, and takes no part in the moments.
_HELD_OUT = 8


@overload
def compress(
    model: PreTrainedModel,
    config: CompressionConfig,
    calibration: Iterable[Batch] | None = ...,
    *,
    on_matrix: Callable[[MatrixReport], None] | None = ...,
    return_report: Literal[False] = ...,
) -> PreTrainedModel: ...


@overload
def compress(
    model: PreTrainedModel,
    config: CompressionConfig,
    calibration: Iterable[Batch] | None = ...,
    *,
    on_matrix: Callable[[MatrixReport], None] | None = ...,
    return_report: Literal[True],
) -> tuple[PreTrainedModel, CompressionReport]: ...


def compress(
    model: PreTrainedModel,
    config: CompressionConfig,
    calibration: Iterable[Batch] | None = None,
    *,
    on_matrix: Callable[[MatrixReport], None] | None = None,
    return_report: bool = False,
) -> PreTrainedModel | tuple[PreTrainedModel, CompressionReport]:
    """Make the mixtures of a model smaller by low ranks, common bases or a common matrix.

    Routers, shared experts, biases and everything else stay as they are, and so do the losses that
    the model's class computes for its routers.

    Parameters
    ----------
    model : PreTrainedModel
        With ordinary mixtures: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, GraniteMoE, DeepSeek-V2 and
        -V3, gpt-oss, Switch, any other class whose experts transformers can compute in several
        ways, or a model that :func:`upcycle` made with ``layout="dense"``. It is changed in place.
    config : CompressionConfig
    calibration : iterable of Tensor (B, S), or of mappings, optional
        Batches of tokens, or arguments of the model's call with ``input_ids``. The error is then
        that of the outputs for these inputs, weighed by the routers' weights. Of eight batches, one
        measures the loss before and after instead. The moments of all layers are in memory
        together, four bytes for every H·H + min(F, H)² of every expert; :func:`prepare_compress`
        keeps those of one layer, and ``moments="layer"`` those of one expert per layer.
    on_matrix : callable, optional
        Called with a MatrixReport after every matrix.
    return_report : bool
        Also return the errors and sizes.

    Returns
    -------
    PreTrainedModel
        ``model``; ``save_pretrained`` and ``from_pretrained`` work as for any other model.
    CompressionReport
        Only with ``return_report``.

    Raises
    ------
    InputError
        If the model has no ordinary mixture, shares cores already, is quantized or not in memory;
        if matrices contain NaN or infinity; if the limit is too small; or if the calibration is
        empty or reaches no expert of a layer.
    TypeError
        If ``model`` is not a model of transformers, or ``config`` is not a CompressionConfig.

    See Also
    --------
    to_moe : Back to the ordinary class, for any serving engine.

    Notes
    -----
    ``hidden`` is the truncated SVD of all experts' matrices side by side, ``low_rank`` that of
    every expert's matrix alone, for inputs of the calibration's second moments, and for rows that
    count as much as the outputs depend on them: Kronecker factors of the Gauss-Newton matrix of a
    layer (arXiv:1503.05671). ``residual`` has the form of D²-MoE (arXiv:2502.17298).
    :func:`tnmoe.distribute_budget` chooses layouts, bonds and ranks of all matrices: such that the
    predicted errors of the experts' outputs, relative to the outputs of their layers, are least.

    Examples
    --------
    >>> import torch
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> small = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=32)
    >>> more = dict(num_hidden_layers=1, num_key_value_heads=2, num_local_experts=4)
    >>> model = MixtralForCausalLM(MixtralConfig(**small, **more))
    >>> text = torch.randint(32, (4, 2, 12))
    >>> model, report = compress(model, CompressionConfig(keep=0.6), text, return_report=True)
    >>> report.params_after <= 0.6 * report.params_before
    True
    >>> type(model.model.layers[0].mlp.experts).__name__
    'MPOExperts'
    """
    check_model(model)
    check_compression(config)
    check_bool("return_report", return_report)
    check_in_memory(model, "tnmoe.hf.prepare_compress")
    found = find_ordinary(model, config.layers, config.matrices)
    batches = None if calibration is None else check_batches(calibration)
    check_known(model, [each["input_ids"] for each in batches or () if "input_ids" in each])
    shown, held_out = _split(batches)
    before = loss_of(model, held_out)
    moments = {} if shown is None else collect_moments(model, found, shown, config)
    options = [
        option
        for each in found
        for option in options_of_mixture(each, moments.get(each.name), config)
    ]
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}.values()
    whole = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    itemsize = next(found[0].module.parameters()).itemsize
    budget = budget_of(config, options, whole, itemsize)
    plan = plan_of(choose(options, config, budget))
    reports: list[MatrixReport] = []
    made = []
    # Everything is built before anything is replaced: an error leaves the model as it was.
    for number, each in enumerate(found, start=1):
        with explain_memory_error(f"compressing {each.name}, mixture {number} of {len(found)}"):
            own = moments.get(each.name)
            experts, own_reports = compressed_experts(each, plan[each.name], own, config)
        made.append(experts)
        reports.extend(own_reports)
        if on_matrix is not None:
            for report in own_reports:
                on_matrix(report)
    _install(model, config, list(zip(found, made, strict=True)))
    if not return_report:
        return model
    return model, CompressionReport(tuple(reports), before, loss_of(model, held_out))


def _install(
    model: PreTrainedModel,
    config: CompressionConfig,
    pairs: Iterable[tuple[OrdinaryExperts, MPOExperts]],
) -> None:
    """Replace experts of a model by others, and record it in the model's configuration."""
    structures = {}
    for ordinary, experts in pairs:
        ordinary.install(experts.train(model.training))
        structures[ordinary.name] = structures_of(experts)
    give_own_configuration(model)
    add_compression(model, config, structures)


def plan_of(choices: Iterable[Choice]) -> dict[str, dict[ProjectionName, Choice]]:
    """Sort choices by the path of their experts, and by projection."""
    plan: dict[str, dict[ProjectionName, Choice]] = {}
    for choice in choices:
        plan.setdefault(choice.options.experts, {})[choice.options.projection] = choice
    return plan


def options_of_mixture(
    experts: OrdinaryExperts, moments: LayerMoments | None, config: CompressionConfig
) -> Iterator[ProjectionOptions]:
    """Yield what each chosen projection of a mixture can become.

    Raises
    ------
    InputError
        If a matrix contains NaN or infinity.
    """
    weights = LayerWeights(moments, config.damping)
    for name, matrices in experts.projections(config.matrices).items():
        if name == "gate_up" or name in config.matrices:
            yield options_of(matrices.detach(), experts.name, name, config.layouts, weights)


def budget_of(
    config: CompressionConfig, options: Iterable[ProjectionOptions], num_bytes: int, itemsize: int
) -> int:
    """Return how many parameters the chosen matrices may have.

    Parameters
    ----------
    config : CompressionConfig
    options : iterable of ProjectionOptions
        Of all chosen matrices.
    num_bytes : int
        Size of the whole model.
    itemsize : int
        Bytes of a parameter of the matrices.
    """
    full = sum(option.full for option in options)
    if config.keep is not None:
        return int(config.keep * full)
    if config.num_bytes is None:
        return full
    rest = num_bytes - full * itemsize
    return min(full, (config.num_bytes - rest) // itemsize)


def compressed_experts(
    experts: OrdinaryExperts,
    plan: Mapping[ProjectionName, Choice],
    moments: LayerMoments | None,
    config: CompressionConfig,
) -> tuple[MPOExperts, list[MatrixReport]]:
    """Make the experts that replace those of an ordinary mixture.

    Parameters
    ----------
    experts : OrdinaryExperts
    plan : mapping from str to Choice
        By the name of the projection. Those without an entry stay as they are.
    moments : LayerMoments or None
    config : CompressionConfig

    Returns
    -------
    MPOExperts
    list of MatrixReport
    """
    parts: dict[str, SharedMPO | Tensor | LowRankProjection] = {}
    reports, weights = [], LayerWeights(moments, config.damping)
    for name, given in experts.projections(config.matrices).items():
        matrices = given.detach()
        choice = plan.get(name)
        if choice is None or choice.layout is None or choice.bond is None:
            written: Any = matrices.clone()
        else:
            form = form_of(matrices, name, choice.layout, weights)
            written = written_matrices(form, matrices, choice.bond)
        if choice is not None:
            planned = planned_report(choice, matrices.itemsize, weights.are_known)
            reports.append(replace(planned, error=relative_error(matrices, written)))
        is_low_rank = isinstance(written, list)
        parts[name] = LowRankProjection.from_factors(written) if is_low_rank else written
    biases = experts.projected_biases(config.matrices)
    settings: dict[str, Any] = {
        **parts,
        **{f"{name}_bias": bias for name, bias in biases.items()},
        **experts.settings(),
    }
    made = experts.format.experts_class.from_shared(**settings)
    return made, reports


def structures_of(experts: Experts) -> dict[str, ProjectionStructure]:
    """Return the structures of the projections of experts by name."""
    return {name: ProjectionStructure.of(part) for name, part in experts.projections().items()}


def collect_moments(
    model: PreTrainedModel,
    experts: list[OrdinaryExperts],
    batches: Iterable[dict[str, Any]],
    config: CompressionConfig,
) -> dict[str, LayerMoments]:
    """Run a model on batches, and return the moments of its mixtures by their names."""
    collector = MomentsCollector(model, experts, needs_of(config))
    with _in_evaluation(model), collector.collecting(), torch.no_grad():
        for batch in batches:
            collector.token_mask = batch.get("attention_mask")
            model(**batch)
    return collector.moments()


def needs_of(config: CompressionConfig) -> Needs:
    """Return what of the moments a compression needs."""
    own = config.moments == "expert" and "low_rank" in config.layouts
    down = config.layout != "hidden" and "down" in config.matrices
    return Needs(own, down, base="residual" in config.layouts)


def is_held_out(number: int, count: int) -> bool:
    """Check whether a batch of a calibration measures the loss: every eighth, or the last of few.

    Parameters
    ----------
    number : int
        Of the batch, from 0.
    count : int
        Of all batches.
    """
    if count < _HELD_OUT:
        return 0 < number == count - 1
    return number % _HELD_OUT == _HELD_OUT - 1


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _split(
    batches: list[dict[str, Any]] | None,
) -> tuple[list[dict[str, Any]] | None, list[dict[str, Any]]]:
    """Split batches into those that are calibrated on, and those on which the loss is measured."""
    if batches is None:
        return None, []
    held_out = [is_held_out(number, len(batches)) for number in range(len(batches))]
    pairs = list(zip(batches, held_out, strict=True))
    return [each for each, held in pairs if not held], [each for each, held in pairs if held]


def without_router_loss(model: PreTrainedModel) -> dict[str, bool]:
    """Return the arguments with which a model's loss is that of its tokens alone."""
    has_losses = hasattr(model.config, "output_router_logits")
    return {"output_router_logits": False} if has_losses else {}


@torch.no_grad()
def loss_of(model: PreTrainedModel, batches: Iterable[dict[str, Any]]) -> float | None:
    """Return the mean loss per token of batches; None where the model computes no loss of tokens.

    Without ``labels`` among its arguments, a batch's targets are its own tokens.
    """
    total, count = 0.0, 0
    with _in_evaluation(model):
        for batch in batches:
            labels = batch.get("labels", batch.get("input_ids"))
            if labels is None or not model.can_generate():
                return None
            mask = batch.get("attention_mask")
            if "labels" not in batch and mask is not None:
                labels = labels.masked_fill(mask == 0, -100)
            arguments = {**batch, "labels": labels, **without_router_loss(model)}
            loss = getattr(model(**arguments), "loss", None)
            if loss is None:
                return None
            tokens = int((labels != -100).sum())
            total, count = total + float(loss) * tokens, count + tokens
    return total / count if count else None

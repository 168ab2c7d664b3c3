"""Preparing the compression of a checkpoint from folder to folder, a layer at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnmoe.errors import InputError
from tnmoe.hf.compress import budget_of, compressed_experts, plan_of
from tnmoe.hf.compression import CompressionConfig, check_compression
from tnmoe.hf.compression_plan import (
    Choice,
    choose,
    planned_report,
    structures_of_plan,
)
from tnmoe.hf.compression_report import CompressionReport, MatrixReport
from tnmoe.hf.files.checkpoint import Checkpoint
from tnmoe.hf.files.tensors import TensorSpec
from tnmoe.hf.folders.conversion import Conversion, check_apart
from tnmoe.hf.folders.pieces import Piece, copy_pieces
from tnmoe.hf.folders.skeleton import Skeleton
from tnmoe.hf.folders.survey import (
    Mixtures,
    Steps,
    Survey,
    check_tokens,
    run_survey,
    split_tokens,
    streamed_loss,
)
from tnmoe.hf.layers import install_recorded
from tnmoe.hf.meta import check_unquantized_entries
from tnmoe.hf.ordinary import OrdinaryExperts
from tnmoe.hf.record import (
    add_compression,
    decode_entries,
    encode_entries,
    required_record,
    with_records,
)
from tnmoe.options import ProjectionName
from tnmoe.system.parts import Part

# From the path of a mixture's experts to what its projections become.
Plans = Mapping[str, Mapping[ProjectionName, Choice]]

# Layers that are in memory at a time, unless the caller says another number.
DEFAULT_JOBS = 2


def prepare_compress(
    folder: str | os.PathLike,
    config: CompressionConfig,
    calibration: Tensor | None = None,
    *,
    survey: str | os.PathLike | None = None,
    survey_needed: bool = False,
    jobs: int = DEFAULT_JOBS,
    on_step: Steps | None = None,
) -> CompressingConversion:
    """Prepare the compression of a checkpoint with ordinary mixtures, a layer at a time in memory.

    The call surveys the checkpoint: it runs the calibration through the model, and reads all
    experts once to choose bonds. ``conversion.run(target)`` then makes the target, which holds
    what :func:`compress` and ``save_pretrained`` would make of the loaded model.

    Parameters
    ----------
    folder : path
        A Hugging Face folder with config.json and safetensors files, of any size.
    config : CompressionConfig
    calibration : Tensor of int64, shape (N, S), optional
        Sequences of tokens. Of eight, one measures the loss instead. The longer the text, the
        better the result, up to some hundred thousand tokens.
    survey : path, optional
        A folder that keeps the survey, so that an interrupted compression goes on from there. By
        default it is temporary.
    survey_needed : bool
        Raise an InputError unless ``survey`` holds a finished survey for these settings. Processes
        that make parts with ``conversion.run(target, part=(i, n))`` pass it: the parts have one
        survey in common, which one process makes before.
    jobs : int
        Number of layers that the survey reads at the same time, each on one thread.
    on_step : callable, optional
        Called as ``on_step(what, done, total)`` during the survey.

    Returns
    -------
    CompressingConversion

    Raises
    ------
    InputError
        If the checkpoint is incomplete or damaged, has no ordinary mixture, is compressed or
        quantized; if the limit is too small; if the calibration does not suit the model; if the
        folder of the survey lies in the source or holds other files; or if a needed survey is not
        there.

    Examples
    --------
    >>> import tempfile
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> small = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=32)
    >>> more = dict(num_hidden_layers=1, num_key_value_heads=2, num_local_experts=4)
    >>> folder = tempfile.mkdtemp()
    >>> MixtralForCausalLM(MixtralConfig(**small, **more)).save_pretrained(folder)
    >>> conversion = prepare_compress(folder, CompressionConfig(keep=0.6))
    >>> conversion.num_params < conversion.source.num_params
    True
    >>> [path.name for path in conversion.run(f"{folder}-small")]
    ['model.safetensors']
    >>> [matrix.matrix for matrix in conversion.report.matrices]
    ['gate_up', 'down']
    """
    check_compression(config)
    tokens = check_tokens(calibration)
    source = Checkpoint(folder)
    entries = decode_entries(source.config)
    check_unquantized_entries(entries, source.folder)
    # Before any work, and before a folder is made.
    mixtures = Mixtures.of(source, entries, config)
    place = None if survey is None else Path(survey)
    if place is not None:
        check_apart(place, source.folder)
    kept, found = run_survey(
        mixtures, config, tokens, folder=place, needed=survey_needed, jobs=jobs, on_step=on_step
    )
    budget = budget_of(config, found.options, source.num_bytes, mixtures.itemsize)
    plans = plan_of(choose(found.options, config, budget))
    small = _small_model(mixtures, config, plans)
    pieces = [
        _piece(mixtures.skeleton, small, *pair, partial(_make, pair[0], plans, config, kept))
        for pair in mixtures.pairs
    ]
    replaced = {name for piece in pieces for name in piece.reads}
    copied = copy_pieces(source, {name: name for name in source.specs if name not in replaced})
    written = with_records(entries, small.config) | {"architectures": [type(small).__name__]}
    return CompressingConversion(
        source,
        (*copied, *pieces),
        encode_entries(written),
        {"survey": kept.purpose},
        survey=kept,
        plans=plans,
        loss_before=found.loss,
        held_out=None if tokens is None else split_tokens(tokens)[1],
    )


@dataclass(frozen=True, repr=False)
class CompressingConversion(Conversion):
    """A prepared compression, with a report on it.

    Attributes
    ----------
    source, pieces, config, settings
        As for :class:`Conversion`.
    survey : Survey
        The files that the survey left, and the reports of layers that are made.
    plans : mapping
        From the path of a mixture's experts to what its matrices become.
    loss_before : float or None
        Mean loss per token on the part of the calibration that was held out, in nats.
    held_out : Tensor or None
        That part.

    Examples
    --------
    >>> import tempfile
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> small = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=32)
    >>> more = dict(num_hidden_layers=1, num_key_value_heads=2, num_local_experts=4)
    >>> folder = tempfile.mkdtemp()
    >>> MixtralForCausalLM(MixtralConfig(**small, **more)).save_pretrained(folder)
    >>> conversion = prepare_compress(folder, CompressionConfig(rtol=0.9))
    >>> conversion.report.matrices[0].error is None
    True
    >>> files = conversion.run(f"{folder}-small")
    >>> conversion.report.matrices[0].error <= 0.9
    True
    """

    survey: Survey = field(kw_only=True)
    plans: Plans = field(kw_only=True)
    loss_before: float | None = field(kw_only=True)
    held_out: Tensor | None = field(kw_only=True)

    @property
    def report(self) -> CompressionReport:
        """What the compression does; ``error`` is None for layers that are not made yet."""
        found: list[MatrixReport] = []
        read = next(piece.reads[0] for piece in self.pieces if piece.make)
        item = self.source.specs[read].item_bytes
        for name, plan in self.plans.items():
            planned = [planned_report(each, item, self.is_calibrated) for each in plan.values()]
            made = self.survey.reports(name)
            # A survey may have reports of an earlier run with another limit.
            is_same = [replace(each, error=None) for each in made] == planned
            found.extend(made if is_same else planned)
        return CompressionReport(tuple(found), self.loss_before)

    def _checked(self, part: tuple[int, int]) -> Part:
        if self.survey.is_temporary:
            raise InputError(
                "parts of a compression have a survey in common: give prepare_compress a folder "
                "for it (survey=)"
            )
        return super()._checked(part)

    @property
    def is_calibrated(self) -> bool:
        """Whether errors are those of outputs."""
        return self.held_out is not None

    def report_on(
        self, target: str | os.PathLike, on_step: Steps | None = None
    ) -> CompressionReport:
        """Return the report with the loss of the target on the part of the text held out.

        Parameters
        ----------
        target : path
            What :meth:`Conversion.run` made.
        on_step : callable, optional
            Called as ``on_step(what, done, total)``.
        """
        if self.held_out is None or not len(self.held_out):
            return self.report
        made = Checkpoint(target)
        on_layer = None if on_step is None else partial(on_step, "measuring")
        loss = streamed_loss(made, decode_entries(made.config), self.held_out, on_layer)
        return replace(self.report, loss_after=loss)


def _small_model(
    mixtures: Mixtures,
    config: CompressionConfig,
    plans: Plans,
) -> Any:
    """Return the model of the target, on the meta device."""
    small = Skeleton(mixtures.skeleton.source, mixtures.entries).model
    mixtures.skeleton.set_dtypes(small)
    structures = {
        each.name: structures_of_plan(each, plans[each.name], config.matrices)
        for each, _ in mixtures.pairs
    }
    add_compression(small, config, structures)
    install_recorded(small, required_record(small))
    return small


def _piece(
    skeleton: Skeleton,
    small: Any,
    experts: OrdinaryExperts,
    parameters: list[str],
    make_experts: Callable[[], Any],
) -> Piece:
    """Return the piece that makes the experts of a mixture smaller.

    Parameters
    ----------
    skeleton : Skeleton
        Of the source.
    small : PreTrainedModel
        The model of the target without numbers.
    experts : OrdinaryExperts
        Those of the source.
    parameters : list of str
        Names of their parameters in the model.
    make_experts : callable
        Returns what replaces them, once they have their numbers.
    """

    def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {skeleton.rename(f"{experts.name}.{name}"): each for name, each in tensors.items()}

    @torch.no_grad()
    def make() -> dict[str, Tensor]:
        with skeleton.filled(parameters):
            return stored(make_experts().state_dict())

    reads = tuple(name for parameter in parameters for name in skeleton.stored(parameter))
    empty = stored(small.get_submodule(experts.name).state_dict())
    specs = {name: TensorSpec.of(tensor) for name, tensor in empty.items()}
    return Piece(experts.name, reads, specs, make)


def _make(
    experts: OrdinaryExperts,
    plans: Plans,
    config: CompressionConfig,
    survey: Survey,
) -> Any:
    """Make the experts of a mixture smaller, and keep the report."""
    plan, moments = plans[experts.name], survey.moments(experts.name)
    made, reports = compressed_experts(experts, plan, moments, config)
    survey.write_report(experts.name, reports)
    return made

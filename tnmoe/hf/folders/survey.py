"""What a compression has to know before it begins: moments of inputs, and what every bond costs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast

from tnmoe import __version__
from tnmoe.errors import InputError
from tnmoe.hf.calibration import LayerMoments, MomentsCollector, check_known
from tnmoe.hf.compress import (
    is_held_out,
    needs_of,
    options_of_mixture,
    without_router_loss,
)
from tnmoe.hf.compression import LIMITS, CompressionConfig
from tnmoe.hf.compression_plan import ProjectionOptions
from tnmoe.hf.compression_report import MatrixReport
from tnmoe.hf.files.checkpoint import Checkpoint
from tnmoe.hf.folders.parallel import ordered_results, resolve_jobs
from tnmoe.hf.folders.skeleton import Skeleton
from tnmoe.hf.folders.streaming import streamed
from tnmoe.hf.ordinary import OrdinaryExperts, find_ordinary
from tnmoe.system.durable import sync, write_json
from tnmoe.system.files import read_json
from tnmoe.system.folders import files_in, remove_files

# File that says that a survey is whole, and of what.
_RESULT = "survey.json"

# Numbers of LayerMoments that are no tensors.
_NUMBERS = ("slots", "gates", "inner_squares", "separate", "stream")

# Called with what is being done, the number of steps that are done, and all of them.
Steps = Callable[[str, int, int], None]


class Surveyed(NamedTuple):
    """What a survey found.

    Attributes
    ----------
    options : list of ProjectionOptions
    loss : float or None
        Mean loss per token of the part of the calibration that was held out.
    """

    options: list[ProjectionOptions]
    loss: float | None


class Mixtures(NamedTuple):
    """The ordinary mixtures of a checkpoint that a compression is about.

    Attributes
    ----------
    skeleton : Skeleton
        Matched with the checkpoint's tensors.
    entries : dict
        The checkpoint's config.json, decoded.
    pairs : list of (OrdinaryExperts, list of str)
        The experts in the skeleton, and the names of their parameters there.
    """

    skeleton: Skeleton
    entries: dict[str, Any]
    pairs: list[tuple[OrdinaryExperts, list[str]]]

    @classmethod
    def of(cls, source: Checkpoint, entries: dict[str, Any], config: CompressionConfig) -> Mixtures:
        """Find the mixtures; raise an InputError if there are none, or tensors of them are lost."""
        skeleton = Skeleton(source, entries)
        experts = find_ordinary(skeleton.model, config.layers, config.matrices)
        names = skeleton.names_of(each.module.parameters() for each in experts)
        skeleton.match(name for part in names for name in part)
        return cls(skeleton, entries, list(zip(experts, names, strict=True)))

    @property
    def itemsize(self) -> int:
        """Bytes of a parameter of the experts."""
        return next(self.pairs[0][0].module.parameters()).itemsize


class Survey:
    """The files of a survey, and the reports of the pieces that follow it.

    Parameters
    ----------
    folder : Path, optional
        Where the files are kept; a temporary folder by default.
    purpose : str
        What the survey is of. The files of another one are removed.
    calibrated : bool
        Whether there are moments of every mixture.
    needed : bool
        Whether the survey must be there already.

    Attributes
    ----------
    is_temporary : bool
        Whether the files vanish with this process.

    Raises
    ------
    InputError
        If the folder holds files of something else, or lacks a survey that must be there.
    """

    def __init__(
        self,
        folder: Path | None,
        purpose: str,
        calibrated: bool = False,
        needed: bool = False,
    ) -> None:
        if needed and not _is_whole(folder, purpose):
            raise InputError(
                f"{folder or 'survey=None'} holds no finished survey for these settings, which "
                "parts of a compression have in common: first make it in one process, with the "
                "same call without survey_needed (the same command with --dry-run, without --part)"
            )
        self.is_temporary = folder is None
        if folder is None:
            self._temporary = TemporaryDirectory()
            folder = Path(self._temporary.name)
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.purpose, self._calibrated = purpose, calibrated
        self._begin()

    def _begin(self) -> None:
        """Make sure that all files of the folder are of this survey."""
        files, result = list(files_in(self.folder)), self.folder / _RESULT
        if files and Path(_RESULT) not in files:
            raise InputError(
                f"{self.folder} holds files that are not of a survey: choose another folder"
            )
        if files and read_json(result).get("purpose") == self.purpose:
            return
        remove_files(self.folder, [path for path in files if path != Path(_RESULT)])
        write_json(result, {"purpose": self.purpose})

    def read(self) -> Surveyed | None:
        """Return what an earlier process found; None if it did not finish."""
        found = read_json(self.folder / _RESULT)
        if "options" not in found:
            return None
        options = [ProjectionOptions.from_dict(each) for each in found["options"]]
        return Surveyed(options, found["loss"])

    def write(self, found: Surveyed) -> None:
        """Keep what was found."""
        data = {
            "purpose": self.purpose,
            "options": [asdict(option) for option in found.options],
            "loss": found.loss,
        }
        write_json(self.folder / _RESULT, data)

    def write_moments(self, name: str, moments: LayerMoments) -> None:
        """Keep the moments of a mixture."""
        tensors = {
            each: getattr(moments, each).contiguous()
            for each in ("shares", "inputs", "inner", "own_outputs", "rows", "outputs")
        }
        numbers = torch.tensor([getattr(moments, each) for each in _NUMBERS], dtype=torch.float64)
        path = self._moments_file(name)
        partial = path.with_suffix(".partial")
        # The moments of a large layer have gigabytes: they are not copied to bytes first.
        save_file({**tensors, "numbers": numbers}, partial)
        sync(partial)
        partial.replace(path)

    def moments(self, name: str) -> LayerMoments | None:
        """Return the moments of a mixture; None without a calibration.

        Raises
        ------
        InputError
            If their file is lost or damaged.
        """
        if not self._calibrated:
            return None
        path = self._moments_file(name)
        try:
            tensors: dict[str, Any] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} is lost or damaged ({error}): remove {self.folder} and begin again"
            ) from error
        numbers: dict[str, Any] = dict(zip(_NUMBERS, tensors.pop("numbers").tolist(), strict=True))
        counts = {name: int(numbers[name]) for name in ("slots", "gates")}
        return LayerMoments(**numbers | counts, **tensors)

    def write_report(self, name: str, reports: Sequence[MatrixReport]) -> None:
        """Keep what became of the matrices of a mixture."""
        write_json(self.folder / f"{name}.json", [asdict(report) for report in reports])

    def reports(self, name: str) -> list[MatrixReport]:
        """Return what became of the matrices of a mixture; nothing before it was made."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return []
        return [
            MatrixReport.from_dict(each) for each in json.loads(path.read_text(encoding="utf-8"))
        ]

    def _moments_file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _is_whole(folder: Path | None, purpose: str) -> bool:
    """Check that a folder holds what :meth:`Survey.write` wrote, for this purpose."""
    if folder is None or not (folder / _RESULT).is_file():
        return False
    found = read_json(folder / _RESULT)
    return found.get("purpose") == purpose and "options" in found


def run_survey(
    mixtures: Mixtures,
    config: CompressionConfig,
    calibration: Tensor | None,
    *,
    folder: Path | None,
    needed: bool,
    jobs: int,
    on_step: Steps | None,
) -> tuple[Survey, Surveyed]:
    """Run a survey of a checkpoint, or read what an earlier process found.

    Parameters
    ----------
    mixtures : Mixtures
    config : CompressionConfig
    calibration : Tensor of int64, shape (N, S), or None
        Sequences of tokens.
    folder : Path, optional
        Where the files of the survey are kept.
    needed : bool
        Raise an InputError unless an earlier process has finished.
    jobs : int
        Number of layers that are read at the same time.
    on_step : callable, optional
    """
    jobs = resolve_jobs(jobs)
    if calibration is not None:
        check_known(mixtures.skeleton.model, [calibration])
    purpose = _purpose(mixtures.skeleton.source, config, calibration)
    kept = Survey(folder, purpose, calibrated=calibration is not None, needed=needed)
    found = kept.read()
    if found is not None:
        return kept, found
    loss = None
    if calibration is not None:
        loss = _calibrate(mixtures, config, calibration, kept, on_step)
    found = Surveyed(list(_options(mixtures, config, kept, jobs, on_step)), loss)
    kept.write(found)
    return kept, found


def streamed_loss(
    source: Checkpoint,
    entries: dict[str, Any],
    tokens: Tensor,
    on_layer: Callable[[int, int], None] | None = None,
) -> float | None:
    """Return the mean loss per token of a checkpoint's model, a layer at a time in memory.

    A model without a head for tokens has none.
    """
    with torch.no_grad(), streamed(runnable(source, entries), on_layer) as model:
        if not model.can_generate():
            return None
        arguments: dict[str, Any] = call_of(model, tokens)
        if model.base_model is model:  # an encoder-decoder
            labels = arguments["decoder_input_ids"]
            arguments |= without_router_loss(model)
            return float(model(**arguments, labels=labels, use_cache=False).loss)
        states = model.base_model(**arguments, use_cache=False).last_hidden_state
        # The head sees one sequence at a time: all logits of a text would not fit into memory.
        losses = []
        for own, each in zip(tokens, states, strict=True):
            model.base_model.forward = partial(_same, MoeModelOutputWithPast(each[None]))
            made = model(input_ids=own[None], labels=own[None], **without_router_loss(model))
            losses.append(float(made.loss))
        return sum(losses) / len(losses)


def _same(output: Any, **_: Any) -> Any:
    return output


def split_tokens(calibration: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sequences of a calibration for moments, and those that measure the loss."""
    count = len(calibration)
    held_out = torch.tensor([is_held_out(number, count) for number in range(count)])
    return calibration[~held_out], calibration[held_out]


def call_of(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Return tokens (N, S) as arguments of a model's call.

    An encoder-decoder gets the first half of every sequence for its encoder.
    """
    if not model.config.is_encoder_decoder:
        return {"input_ids": tokens}
    half = tokens.shape[1] // 2
    return {
        "input_ids": tokens[:, :half].contiguous(),
        "decoder_input_ids": tokens[:, half:].contiguous(),
    }


def runnable(source: Checkpoint, entries: dict[str, Any]) -> Skeleton:
    """Return the skeleton of a checkpoint whose model can run once its parameters are filled."""
    skeleton = Skeleton(source, entries, buffers=True)
    skeleton.match(name for name, _ in skeleton.model.named_parameters())
    skeleton.load_buffers()
    return skeleton


def _calibrate(
    mixtures: Mixtures,
    config: CompressionConfig,
    calibration: Tensor,
    kept: Survey,
    on_step: Steps | None,
) -> float | None:
    """Keep the moments of all mixtures; return the loss of what is held out."""
    shown, held_out = split_tokens(calibration)
    source, entries = mixtures.skeleton.source, mixtures.entries
    skeleton = runnable(source, entries)
    experts = find_ordinary(skeleton.model, config.layers)
    collector = MomentsCollector(skeleton.model, experts, needs_of(config))

    def after_layer(done: int, layers: int) -> None:
        for name, moments in collector.take_complete().items():
            kept.write_moments(name, moments)
        _report(on_step, "calibrating", done, layers)

    with torch.no_grad(), streamed(skeleton, after_layer) as model, collector.collecting():
        runner = model if model.config.is_encoder_decoder else model.base_model
        runner(**call_of(model, shown), use_cache=False)
    for name, moments in collector.moments().items():
        kept.write_moments(name, moments)
    if not len(held_out):
        return None
    return streamed_loss(source, entries, held_out, partial(_report, on_step, "measuring"))


def _options(
    mixtures: Mixtures,
    config: CompressionConfig,
    kept: Survey,
    jobs: int,
    on_step: Steps | None,
) -> Iterator[ProjectionOptions]:
    """Yield what every chosen projection of every mixture can become."""

    @torch.no_grad()
    def options_of_one(each: OrdinaryExperts, parameters: list[str]) -> list[ProjectionOptions]:
        with mixtures.skeleton.filled(parameters):
            return list(options_of_mixture(each, kept.moments(each.name), config))

    tasks = [partial(options_of_one, *pair) for pair in mixtures.pairs]
    for number, found in enumerate(ordered_results(tasks, jobs), start=1):
        _report(on_step, "surveying", number, len(tasks))
        yield from found


def _report(on_step: Steps | None, what: str, done: int, total: int) -> None:
    if on_step is not None:
        on_step(what, done, total)


def _purpose(source: Checkpoint, config: CompressionConfig, calibration: Tensor | None) -> str:
    """Return a hash of everything that a survey depends on: not of the limit."""
    tokens, size = b"", list[int]()
    if calibration is not None:
        tokens, size = calibration.contiguous().numpy().tobytes(), list(calibration.shape)
    content = {
        "versions": [__version__, torch.__version__],
        "source": source.fingerprint,
        "config": {name: value for name, value in config.to_dict().items() if name not in LIMITS},
        "calibration": [hashlib.sha256(tokens).hexdigest(), size],
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def check_tokens(calibration: Any) -> Tensor | None:
    """Return a calibration's tokens; raise an InputError for anything else."""
    if calibration is None:
        return None
    if (
        not isinstance(calibration, Tensor)
        or calibration.ndim != 2
        or calibration.is_floating_point()
    ):
        what = (
            f"{calibration.dtype} of shape {tuple(calibration.shape)}"
            if isinstance(calibration, Tensor)
            else type(calibration).__name__
        )
        raise InputError(f"calibration must be tokens of shape (N, S), got {what}")
    if calibration.shape[0] < 1 or calibration.shape[1] < 2:
        raise InputError(
            "calibration must have a sequence of two tokens at least, got shape "
            f"{tuple(calibration.shape)}"
        )
    return calibration.to(torch.int64)

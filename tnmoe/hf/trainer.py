"""The gradient mask in transformers' Trainer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tnmoe.errors import InputError, check_bool, check_int_from_zero, check_one_of
from tnmoe.hf.record import config_of
from tnmoe.nn.training.autograd_mask import AutogradMask
from tnmoe.nn.training.base_mask import Probability, check_probability
from tnmoe.nn.training.gradient_mask import GradientMask
from tnmoe.options import MASK_ENGINES, MaskEngine


class GradientMaskCallback(TrainerCallback):
    """A callback that masks shared cores: ``Trainer(…, callbacks=[GradientMaskCallback(0.5)])``.

    The draw of every step depends on the seed and on Trainer's own count of steps alone. So all
    ranks agree, and a run resumed from a checkpoint continues as if it had not been interrupted.

    Parameters
    ----------
    probability : float or callable, optional
        As for :class:`tnmoe.nn.GradientMask`. By default the ``mask_probability`` of the
        :class:`MPOEConfig` that the model was converted with.
    seed, per_layer
        As for :class:`tnmoe.nn.GradientMask`.
    engine : {"auto", "optimizer", "autograd"}
        How gradients are kept from the optimiser. ``optimizer`` hooks into its step;
        ``autograd`` uses :class:`tnmoe.nn.AutogradMask`, for DeepSpeed, whose optimiser steps
        inside ``backward``. ``auto`` takes ``autograd`` under DeepSpeed, else ``optimizer``.

    Attributes
    ----------
    mask : GradientMask or AutogradMask, or None
        The mask of the current run. ``mask.updates`` counts the updates since training began.

    Raises
    ------
    InputError
        If the probability is not in [0, 1]. When training begins, if no probability was given
        and the model was not converted.

    Notes
    -----
    Trainer clips gradients before the optimiser's step. In a run of one process, masked gradients
    are dropped as they arrive, and do not count in the norm. In distributed runs they count.

    Examples
    --------
    >>> callback = GradientMaskCallback(lambda step: 0.5 if step < 1000 else 0.0, seed=1)
    """

    def __init__(
        self,
        probability: Probability | None = None,
        seed: int = 0,
        per_layer: bool = False,
        engine: MaskEngine = "auto",
    ) -> None:
        check_one_of("engine", engine, MASK_ENGINES)
        self.probability = None if probability is None else check_probability(probability)
        self.seed = check_int_from_zero("seed", seed)
        self.per_layer = check_bool("per_layer", per_layer)
        self.engine = engine
        self.mask: GradientMask | AutogradMask | None = None
        self._step = ExitStack()

    def __repr__(self) -> str:
        return (
            f"GradientMaskCallback(probability={self.probability}, seed={self.seed}, "
            f"per_layer={self.per_layer}, engine={self.engine!r})"
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the run's optimiser, and detach from a run that ended with an exception.

        Raises
        ------
        InputError
            If the engine does not suit the run, or the model shares nothing.
        """
        self._detach()
        model: Any = kwargs["model"]
        probability = self.probability
        if probability is None:
            probability = config_of(model).mask_probability
        settings: dict[str, Any] = {"seed": self.seed, "per_layer": self.per_layer}
        engine = self.engine
        if engine == "auto":
            engine = "autograd" if getattr(args, "deepspeed", None) else "optimizer"
        if engine == "autograd":
            self.mask = AutogradMask(model, probability, **settings)
            return
        if kwargs.get("optimizer") is None:
            raise InputError("Trainer has no optimiser yet: give engine='autograd'")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.mask = GradientMask(
            kwargs["optimizer"], model, probability, zero_in_backward=not distributed, **settings
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the mask of Trainer's current step."""
        assert self.mask is not None
        self.mask.step = state.global_step
        if isinstance(self.mask, AutogradMask):
            self._step.enter_context(self.mask.next_step())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the step."""
        self._step.close()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach from the run's optimiser."""
        self._detach()

    def _detach(self) -> None:
        self._step.close()
        if isinstance(self.mask, GradientMask):
            self.mask.remove()

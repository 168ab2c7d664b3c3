"""Routers' losses in a model's own loss, and their logits in its outputs, its forward untouched."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from inspect import signature
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnmoe.hf.config import MPOEConfig
from tnmoe.nn.adapters import warn_of_unsaved
from tnmoe.nn.routing.record import Routing, RoutingCall, RoutingRecorder
from tnmoe.nn.scopes import ScopedValues

# Labels of tokens that no loss is taken of, in transformers.
_IGNORED = -100


def attach_router_losses(model: PreTrainedModel, config: MPOEConfig) -> None:
    """Let a converted model add its routers' losses to its own.

    In training, where a call has a loss, ``config.balance_weight`` times the balance loss and
    ``config.z_weight`` times the z-loss are added to it, in tuples (``return_dict=False``) as well;
    padding counts in neither. Called with ``output_router_logits=True``, or with that in
    ``model.config``, the model's output has ``router_logits``, one tensor (B · S, E) per layer in
    the order of their calls; in a tuple they come last, as with transformers' own mixtures.

    Parameters
    ----------
    model : PreTrainedModel
        Its calls are wrapped in hooks, and so are those of models in it, such as
        ``model.base_model``; ``model.forward(…)`` does without hooks. Attached again, the new
        weights count.
    config : MPOEConfig

    Warns
    -----
    UserWarning
        Once, if a call in training has no loss to add to: without labels, for instance, which
        Trainer keeps to itself under label smoothing. In a block of
        :func:`tnmoe.nn.record_routing` the caller is expected to add the routers' losses.

    Examples
    --------
    :func:`upcycle` and :func:`from_pretrained` do it; a model put together by hand needs it:

    >>> from tnmoe.hf import MPOEConfig
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_layer=1, n_embd=16, n_head=2))
    >>> attach_router_losses(model, MPOEConfig(balance_weight=0.02))
    """
    hooks = _RouterLosses(config.balance_weight, config.z_weight)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _detach(module)
            # Before those of others, which may fail.
            module.register_forward_pre_hook(hooks.before, with_kwargs=True, prepend=True)
            # Also after a call that fails, so that nothing goes on recording.
            module.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)


def _detach(model: nn.Module) -> None:
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), _RouterLosses):
                del hooks[key]


@dataclass(eq=False)
class _Call:
    """A call of a model that is under way."""

    model: nn.Module
    # Of torch's call of the model; None where that is compiled.
    frame: FrameType | None
    # Whether it is no part of a call of a model around it.
    whole: bool
    shows: bool = False
    # None where there is nothing to show or to learn.
    recording: RoutingRecorder | None = None
    # That of a call around this one, which what happens in here is no part of.
    paused: RoutingRecorder | None = None

    def begin(self, hooks: _RouterLosses) -> None:
        if self.paused is not None:
            self.paused.paused = True
        if self.recording is not None:
            self.recording.start()
        self._entry = {id(hooks): self}
        _calls.add(self._entry)

    def end(self) -> None:
        _calls.remove(self._entry)
        if self.recording is not None:
            self.recording.stop()
        if self.paused is not None:
            self.paused.paused = False


_calls: ScopedValues[_Call] = ScopedValues("_calls")


@dataclass(eq=False)
class _RouterLosses:
    """The hooks of a model and of the models in it."""

    balance_weight: float
    z_weight: float
    _warned: bool = False
    _trains: bool = False

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        asked = kwargs.pop("output_router_logits", None)
        around = self._under_way()
        inner = [call.model for call in _innermost_whole(around)]
        whole = asked is not None or not inner or model in inner
        call = _Call(model, _frame(2), whole)
        if whole:
            default = getattr(model.config, "output_router_logits", False)
            call.shows = bool(default if asked is None else asked)
            call.paused = next((each.recording for each in reversed(around) if each.whole), None)
            if call.shows or self._learns(model):
                call.recording = RoutingRecorder(model)
            self._look_at_adapters(model)
        call.begin(self)
        return args, kwargs

    def after(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        frames = _frame(1), _frame(2)
        calls = _calls.values_for(self)
        mine = [call for call in calls if call.model is model and call.frame in frames]
        if not mine:
            return output  # another hook failed before ours was called
        call = mine[-1]
        for each in reversed(calls[calls.index(call) + 1 :]):
            each.end()
        alone = call.recording is not None and call.recording.is_only_recorder()
        call.end()
        if call.recording is None or not call.recording.routing.calls:
            return output
        return self._complete(call, args, kwargs, output, alone)

    def _under_way(self) -> list[_Call]:
        """Calls of these models in this thread or task, outermost first.

        Without those that KeyboardInterrupt ended, after which torch calls no hook.
        """
        calls = _calls.values_for(self)
        if not calls or torch.compiler.is_compiling():
            return calls
        running = set()
        frame = _frame(1)
        while frame is not None:
            running.add(frame)
            frame = frame.f_back
        for call in reversed(calls):
            if call.frame is not None and call.frame not in running:
                call.end()
        return [call for call in calls if call.frame is None or call.frame in running]

    def _look_at_adapters(self, model: nn.Module) -> None:
        """Once, as training begins: what is trained must be saved, too."""
        if self._trains or not (model.training and torch.is_grad_enabled()):
            return
        if not torch.compiler.is_compiling():
            self._trains = True
            warn_of_unsaved(model, stacklevel=7)  # of who called the model

    def _learns(self, model: nn.Module) -> bool:
        return model.training and (self.balance_weight > 0 or self.z_weight > 0)

    def _complete(self, call: _Call, args: tuple, kwargs: dict, output: Any, alone: bool) -> Any:
        """The output with the routers' losses and, if asked for, logits."""
        assert call.recording is not None
        model, routing = call.model, call.recording.routing
        if call.shows:
            output = _with_logits(output, tuple(each.logits for each in routing.calls))
        if not self._learns(model):
            return output
        loss = _loss_of(output)
        if loss is None:
            if alone and not call.shows and output is not None:
                self._warn(model, routing)
            return output
        given = dict(zip(signature(model.forward).parameters, args, strict=False)) | kwargs
        both = getattr(model.config, "is_encoder_decoder", False)
        share = _share_of_step(model, given)
        return _with_loss(output, loss + share * self._loss(routing, given, both))

    def _loss(self, routing: Routing, given: dict[str, Any], both: bool) -> Tensor | float:
        """Means over all calls, each with the mask of its own tokens."""
        total: Tensor | float = 0.0
        for call in routing.calls:
            alone, mask = Routing([call]), _mask_of(call, given, both)
            if self.balance_weight:
                total = total + self.balance_weight * alone.balance_loss(mask)
            if self.z_weight:
                total = total + self.z_weight * alone.z_loss(mask)
        return total / len(routing.calls)

    def _warn(self, model: nn.Module, routing: Routing) -> None:
        """Once, that a pass which is trained has no loss for the routers'."""
        if self._warned or torch.compiler.is_compiling():
            return
        if any(call.logits.requires_grad for call in routing.calls):
            self._warned = True
            warnings.warn(
                f"{type(model).__name__} returned no loss in training, so its routers' losses "
                "train nothing: pass labels, or add those of a block of tnmoe.nn.record_routing",
                stacklevel=7,  # of who called the model
            )


def _frame(above: int) -> FrameType | None:
    """The frame ``above`` levels up from the caller's; None in compiled code."""
    return None if torch.compiler.is_compiling() else sys._getframe(above + 1)


def _innermost_whole(calls: list[_Call]) -> list[_Call]:
    """The innermost call that is no part of another, and its parts."""
    wholes = [number for number, call in enumerate(calls) if call.whole]
    return calls[wholes[-1] :] if wholes else calls


def _loss_of(output: Any) -> Tensor | None:
    if isinstance(output, dict):  # as a ModelOutput is
        return output.get("loss")
    # Of tuples, a loss is the first entry, and the only one without axes.
    first = output[0] if isinstance(output, tuple) and output else None
    return first if isinstance(first, Tensor) and first.ndim == 0 else None


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output["loss"] = loss
    return output


def _with_logits(output: Any, logits: tuple[Tensor, ...]) -> Any:
    if isinstance(output, tuple):
        return (*output, logits)
    if isinstance(output, dict):
        output["router_logits"] = logits
    return output


def _share_of_step(model: nn.Module, given: dict[str, Any]) -> Tensor | float:
    """Share of a step's targets in this call, where the losses of several calls are added up.

    Trainer tells models how many targets a step has; they then divide their sums by that number.
    """
    items, targets = given.get("num_items_in_batch"), given.get("shift_labels")
    if targets is None:
        targets = given.get("labels")
        if targets is not None and getattr(model, "loss_type", None) == "ForCausalLM":
            targets = targets[..., 1:]
    if items is None or targets is None:
        return 1.0
    count = (targets != _IGNORED).sum()
    return count / (items.to(count.device) if isinstance(items, Tensor) else items)


def _mask_of(call: RoutingCall, given: dict[str, Any], encoder_decoder: bool) -> Tensor | None:
    """Which of a call's tokens count, as the model's arguments say."""
    if encoder_decoder and "decoder" in call.name.split("."):
        mask, labels = given.get("decoder_attention_mask"), given.get("labels")
        if mask is None and labels is not None:
            mask = labels != _IGNORED
    else:
        mask = given.get("attention_mask")
    return mask if mask is not None and mask.numel() == len(call.logits) else None

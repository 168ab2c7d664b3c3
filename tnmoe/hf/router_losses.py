"""Routers' losses in a model's own loss, and their logits in its outputs.

Hooks add both; a model's ``forward`` stays as it is. Hooks come in pairs, one before a call and one
after it, but torch does not always call both. After a KeyboardInterrupt it does not call the
second. If another pre-hook fails first, it calls the second alone. Neither the values of a scope
nor the arguments of hooks tell these cases apart. The frame of torch's own call of the model does:
it ends with that call, however the call ends.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from inspect import signature
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnmoe.nn.adapters import warn_of_unsaved
from tnmoe.nn.routing.record import Routing, RoutingCall, RoutingRecorder
from tnmoe.nn.scopes import ScopedValues

# Label that transformers leaves out of every loss.
_IGNORED = -100

# From a warning in a function that a hook calls, through the hook and three functions of torch, to
# the code that called the model.
_CALLER = 7


class LossWeights(Protocol):
    """Settings with the weights of routers' losses."""

    @property
    def balance_weight(self) -> float: ...

    @property
    def z_weight(self) -> float: ...


def attach_router_losses(model: PreTrainedModel, config: LossWeights) -> None:
    """Let a converted model add its routers' losses to its own.

    In training, if a call computes a loss, ``config.balance_weight`` times the balance loss and
    ``config.z_weight`` times the z-loss are added to it, in tuples (``return_dict=False``) as well.
    Padding counts in neither. With ``output_router_logits=True`` in the call or in
    ``model.config``, the model's output has ``router_logits``: one tensor (B · S, E) per layer, in
    the order of their calls. In a tuple they come last, as in transformers' own mixtures.

    Parameters
    ----------
    model : PreTrainedModel
        Its calls get hooks, and so do those of models inside it, such as ``model.base_model``.
        ``model.forward(…)`` runs no hooks. If they are attached again, the new weights count.
    config : MPOEConfig
        Or other settings with ``balance_weight`` and ``z_weight``.

    Warns
    -----
    UserWarning
        Once, if a call in training has no loss to add to. That is so without labels, which Trainer
        keeps to itself under label smoothing. In a block of :func:`tnmoe.nn.record_routing` the
        caller is expected to add the routers' losses, and there is no warning.

    Examples
    --------
    :func:`upcycle` and :func:`from_pretrained` attach them. A model built by hand needs it:

    >>> from tnmoe.hf import MPOEConfig
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_layer=1, n_embd=16, n_head=2))
    >>> attach_router_losses(model, MPOEConfig(balance_weight=0.02))
    """
    hooks = _LossHooks(config.balance_weight, config.z_weight)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _detach(module)
            # Ahead of other hooks, which may fail.
            module.register_forward_pre_hook(hooks.before, with_kwargs=True, prepend=True)
            # Also after a call that fails, so that its recording stops.
            module.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)


def detach_router_losses(model: nn.Module) -> None:
    """Undo :func:`attach_router_losses`."""
    for module in model.modules():
        _detach(module)


def _detach(model: nn.Module) -> None:
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), _LossHooks):
                del hooks[key]


@dataclass(eq=False)
class _Call:
    """A call of a model that is running.

    Attributes
    ----------
    model : Module
    frame : frame or None
        Of torch's call of the model; None in compiled code.
    is_outer : bool
        Whether it completes its own output. A part of a call around it does not.
    shows_logits : bool
    recording : RoutingRecorder, optional
        None if there are neither logits to show nor losses to add.
    suspended : RoutingRecorder, optional
        That of the call around an outer call. It pauses: this call is not part of it.
    """

    model: nn.Module
    frame: FrameType | None
    is_outer: bool
    shows_logits: bool = False
    recording: RoutingRecorder | None = None
    suspended: RoutingRecorder | None = None

    def begin(self, hooks: _LossHooks) -> None:
        if self.suspended is not None:
            self.suspended.paused = True
        if self.recording is not None:
            self.recording.start()
        self._entry = {id(hooks): self}
        _calls.add(self._entry)

    def end(self) -> None:
        _calls.remove(self._entry)
        if self.recording is not None:
            self.recording.stop()
        if self.suspended is not None:
            self.suspended.paused = False


# Calls that are running, outermost first, by the hooks of their models.
_calls: ScopedValues[_Call] = ScopedValues("_calls")


@dataclass(eq=False)
class _LossHooks:
    """The hooks of a model and of the models inside it."""

    balance_weight: float
    z_weight: float
    _warned_of_no_loss: bool = False
    _checked_adapters: bool = False

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Start a call: begin to record what it will need."""
        requested = kwargs.pop("output_router_logits", None)
        running = self._running_calls()
        parts = [call.model for call in _last_outer_call(running)]
        # A model asked for its logits completes its own output, wherever it is called; so does the
        # outermost model, and a model that is called again from inside its own call.
        call = _Call(model, _frame_of_call(), requested is not None or not parts or model in parts)
        if call.is_outer:
            default = getattr(model.config, "output_router_logits", False)
            call.shows_logits = bool(default if requested is None else requested)
            around = [other.recording for other in reversed(running) if other.is_outer]
            call.suspended = around[0] if around else None
            if call.shows_logits or self._adds_losses(model):
                call.recording = RoutingRecorder(model)
            self._check_adapters(model)
        call.begin(self)
        return args, kwargs

    def after(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """End a call, and complete its output."""
        frame, calls = _frame_of_call(), _calls.values_for(self)
        matching = [call for call in calls if call.model is model and call.frame is frame]
        if not matching:
            return output  # another pre-hook failed before ours was called
        call = matching[-1]
        for inner in reversed(calls[calls.index(call) + 1 :]):
            inner.end()
        alone = call.recording is not None and call.recording.is_only_recorder()
        call.end()
        if call.recording is None or not call.recording.routing.calls:
            return output
        return self._complete(call, args, kwargs, output, alone)

    def _running_calls(self) -> list[_Call]:
        """Return the running calls of these models in this thread or task, outermost first.

        Calls that a KeyboardInterrupt ended are ended here, since torch called no hook after them.
        """
        calls = _calls.values_for(self)
        if not calls or torch.compiler.is_compiling():
            return calls
        frames = set()
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            frames.add(frame)
            frame = frame.f_back
        for call in reversed(calls):
            if call.frame is not None and call.frame not in frames:
                call.end()
        return [call for call in calls if call.frame is None or call.frame in frames]

    def _check_adapters(self, model: nn.Module) -> None:
        """Warn once, when training begins, if adapters are trained that will not be saved."""
        if self._checked_adapters or not (model.training and torch.is_grad_enabled()):
            return
        if not torch.compiler.is_compiling():
            self._checked_adapters = True
            warn_of_unsaved(model, stacklevel=_CALLER)

    def _adds_losses(self, model: nn.Module) -> bool:
        return model.training and (self.balance_weight > 0 or self.z_weight > 0)

    def _complete(self, call: _Call, args: tuple, kwargs: dict, output: Any, alone: bool) -> Any:
        """Return the output with the routers' losses and, if it shows them, logits.

        ``alone`` says that nobody else recorded the call.
        """
        assert call.recording is not None
        model, routing = call.model, call.recording.routing
        if call.shows_logits:
            output = _with_logits(output, tuple(routed.logits for routed in routing.calls))
        if not self._adds_losses(model):
            return output
        loss = _loss_of(output)
        if loss is None:
            if alone and not call.shows_logits and output is not None:
                self._warn_of_no_loss(model, routing)
            return output
        arguments = dict(zip(signature(model.forward).parameters, args, strict=False)) | kwargs
        encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
        share = _share_of_step(model, arguments)
        added = self._weighted_losses(routing, arguments, encoder_decoder)
        return _with_loss(output, loss + share * added)

    def _weighted_losses(
        self, routing: Routing, arguments: dict[str, Any], encoder_decoder: bool
    ) -> Tensor | float:
        """Return the mean over all routers' calls, each with the mask of its own tokens."""
        total: Tensor | float = 0.0
        for call in routing.calls:
            single, mask = Routing([call]), _mask_of(call, arguments, encoder_decoder)
            if self.balance_weight:
                total = total + self.balance_weight * single.balance_loss(mask)
            if self.z_weight:
                total = total + self.z_weight * single.z_loss(mask)
        return total / len(routing.calls)

    def _warn_of_no_loss(self, model: nn.Module, routing: Routing) -> None:
        """Warn once that a training pass has no loss to add those of the routers to."""
        if self._warned_of_no_loss or torch.compiler.is_compiling():
            return
        if any(call.logits.requires_grad for call in routing.calls):
            self._warned_of_no_loss = True
            warnings.warn(
                f"{type(model).__name__} returned no loss in training, so its routers' losses "
                "train nothing: pass labels, or add those of a block of tnmoe.nn.record_routing",
                stacklevel=_CALLER,
            )


def _frame_of_call() -> FrameType | None:
    """Return the frame of torch's call of the module whose hook runs; None in compiled code."""
    if torch.compiler.is_compiling():
        return None
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        frame = frame.f_back
    return frame


def _last_outer_call(calls: list[_Call]) -> list[_Call]:
    """Return the innermost outer call and its parts."""
    outer = [number for number, call in enumerate(calls) if call.is_outer]
    return calls[outer[-1] :] if outer else calls


def _loss_of(output: Any) -> Tensor | None:
    if isinstance(output, dict):  # every ModelOutput is one
        return output.get("loss")
    # In a tuple the loss comes first, and no other entry is a scalar.
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


def _share_of_step(model: nn.Module, arguments: dict[str, Any]) -> Tensor | float:
    """Return a call's share of the targets of a step that adds up the losses of several calls.

    Trainer passes models the number of targets in a step, and they divide their sums by it.
    """
    items, targets = arguments.get("num_items_in_batch"), arguments.get("shift_labels")
    if targets is None:
        targets = arguments.get("labels")
        if targets is not None and getattr(model, "loss_type", None) == "ForCausalLM":
            targets = targets[..., 1:]
    if items is None or targets is None:
        return 1.0
    count = (targets != _IGNORED).sum()
    return count / (items.to(count.device) if isinstance(items, Tensor) else items)


def _mask_of(call: RoutingCall, arguments: dict[str, Any], encoder_decoder: bool) -> Tensor | None:
    """Return the mask of a call's tokens among the model's arguments; None if there is none."""
    if encoder_decoder and "decoder" in call.name.split("."):
        mask, labels = arguments.get("decoder_attention_mask"), arguments.get("labels")
        if mask is None and labels is not None:
            mask = labels != _IGNORED
    else:
        mask = arguments.get("attention_mask")
    return mask if mask is not None and mask.numel() == len(call.logits) else None

"""Routers' losses in a model's own loss, and their logits in its outputs, its forward untouched."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from tnmoe.hf.config import MPOEConfig
from tnmoe.nn.routing import Routing, RoutingCall, record_routing

# Labels of tokens that no loss is taken of, in transformers.
_IGNORED = -100


def attach_router_losses(model: PreTrainedModel, config: MPOEConfig) -> None:
    """Let a converted model add its routers' losses to its own.

    In training, where a call has a loss, ``config.balance_weight`` times the balance loss and
    ``config.z_weight`` times the z-loss are added to it; padding counts in neither. Called with
    ``output_router_logits=True``, or with that in ``model.config``, the model's output has
    ``router_logits``, one tensor (B · S, E) per layer in the order of their calls.

    Parameters
    ----------
    model : PreTrainedModel
        Its ``forward`` is wrapped in hooks.
    config : MPOEConfig

    Examples
    --------
    :func:`upcycle` and :func:`from_pretrained` do it; a model put together by hand needs it:

    >>> from tnmoe.hf import MPOEConfig
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_layer=1, n_embd=16, n_head=2))
    >>> attach_router_losses(model, MPOEConfig(balance_weight=0.02))
    """
    detach_router_losses(model)
    hooks = _RouterLosses(config.balance_weight, config.z_weight)
    model.register_forward_pre_hook(hooks.before, with_kwargs=True)
    # Also after a call that fails, so that nothing goes on recording.
    model.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)


def detach_router_losses(model: nn.Module) -> None:
    """Take the hooks of :func:`attach_router_losses` from a model and from those that it holds.

    A model around a converted one has the losses of all routers, and nothing counts twice.
    """
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            own = [
                key
                for key, hook in hooks.items()
                if isinstance(getattr(hook, "__self__", None), _RouterLosses)
            ]
            for key in own:
                del hooks[key]


@dataclass
class _RouterLosses:
    balance_weight: float
    z_weight: float
    # Calls under way, the innermost last.
    _calls: list[_Call] = field(default_factory=list)

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        default = getattr(model.config, "output_router_logits", False)
        shows = bool(kwargs.pop("output_router_logits", default))
        learns = model.training and (self.balance_weight > 0 or self.z_weight > 0)
        call = _Call(shows)
        if shows or learns:
            call.routing = call.stack.enter_context(record_routing(model))
        self._calls.append(call)
        return args, kwargs

    def after(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        call = self._calls.pop()
        call.stack.close()
        if call.routing is None or not call.routing.calls or not isinstance(output, ModelOutput):
            return output
        if call.shows:
            output["router_logits"] = tuple(each.logits for each in call.routing.calls)
        if model.training and output.get("loss") is not None:
            given = signature(model.forward).bind_partial(*args, **kwargs).arguments
            both = getattr(model.config, "is_encoder_decoder", False)
            share = _share_of_step(model, kwargs | given)
            output["loss"] = output["loss"] + share * self._loss(call.routing, given, both)
        return output

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


@dataclass
class _Call:
    """One call of the model."""

    shows: bool
    routing: Routing | None = None
    stack: ExitStack = field(default_factory=ExitStack)


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

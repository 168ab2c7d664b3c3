"""Second moments of what the experts of a model compute, on a few batches of text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tnmoe.errors import InputError
from tnmoe.hf.ordinary import OrdinaryExperts
from tnmoe.nn.activations import resolve_activation
from tnmoe.options import Matrix

# A batch of a calibration: tokens (B, S), or the arguments of a call of the model.
Batch = Tensor | Mapping[str, Any]

# Rows of an expert that are multiplied at a time.
_ROWS = 4096


@dataclass(frozen=True)
class LayerMoments:
    """What the experts of one layer met and computed, each slot weighed by its router's weight.

    Attributes
    ----------
    slots : int
        Number of pairs of a token and one of its experts.
    shares : Tensor, shape (E,)
        Share of every expert in ``inputs``.
    inputs : Tensor, shape (H, H)
        Σ p² x xᵀ over all slots, with the token x and the weight p.
    inner : Tensor, shape (F, F)
        Σ p² h hᵀ with the activated intermediate values h; empty where nothing needs them.
    outputs : Tensor, shape (H, H)
        Σ z zᵀ over all tokens, with the sum z of the outputs p·y of a token's experts, without
        biases.
    separate : float
        Σ p² ‖y‖² over all slots: what the trace of ``outputs`` would be if the outputs of a token's
        experts were orthogonal.
    stream : float
        Σ ‖s‖² over all tokens, with the output s of the layer around the mixture, in which z is a
        summand.
    """

    slots: int
    shares: Tensor
    inputs: Tensor
    inner: Tensor
    outputs: Tensor
    separate: float
    stream: float

    def __repr__(self) -> str:
        return f"LayerMoments(slots={self.slots}, experts={len(self.shares)})"

    @property
    def energy(self) -> float:
        """Share of the experts' outputs in the output of the layer around them, in squares."""
        return float(self.outputs.trace()) / self.stream if self.stream else 1.0

    @property
    def independence(self) -> float:
        """What independent errors of a token's experts count beside errors that they share.

        Experts with a common basis lose the same directions, so their errors add up as their
        outputs do. Independent errors add up in squares.
        """
        together = float(self.outputs.trace())
        return min(1.0, self.separate / together) if together else 1.0


class MomentsCollector:
    """Hooks that add up the moments of mixtures while their model runs.

    Parameters
    ----------
    model : Module
    experts : sequence of OrdinaryExperts
    with_inner : bool
        Whether ``inner`` is needed.
    """

    def __init__(
        self, model: nn.Module, experts: Sequence[OrdinaryExperts], with_inner: bool
    ) -> None:
        self._model, self._experts, self._with_inner = model, experts, with_inner
        self._sums: dict[str, dict[str, Any]] = {}
        self._taken: set[str] = set()
        self.token_mask: Tensor | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect in the block."""
        handles = []
        try:
            for each in self._experts:
                hook = self._hook_of(each)
                handles.append(each.module.register_forward_pre_hook(hook, with_kwargs=True))
                layer = self._model.get_submodule(layer_around(each.name))
                handles.append(layer.register_forward_hook(self._stream_hook_of(each)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def moments(self) -> dict[str, LayerMoments]:
        """Return the moments of every mixture by its name.

        Raises
        ------
        InputError
            If a mixture met no token, or its numbers are not finite.
        """
        known = {*self._sums, *self._taken}
        idle = [each.name for each in self._experts if each.name not in known]
        if idle:
            raise InputError(f"the calibration's text never reached {idle[0]}: give more of it")
        return {name: _moments_of(name, sums) for name, sums in self._sums.items()}

    def take_complete(self) -> dict[str, LayerMoments]:
        """Return, and forget, the moments of mixtures whose layers have run."""
        complete = [name for name, sums in self._sums.items() if sums["stream"]]
        self._taken.update(complete)
        return {name: _moments_of(name, self._sums.pop(name)) for name in complete}

    def _hook_of(self, experts: OrdinaryExperts) -> Any:
        def collect(_: nn.Module, arguments: tuple, named: dict[str, Tensor]) -> None:
            states, index, weights = experts.format.choices(*arguments, *named.values())
            states = states.reshape(-1, states.shape[-1])
            mask = self.token_mask
            if mask is not None and mask.numel() == len(states):
                known = mask.reshape(-1).to(device=states.device, dtype=torch.bool)
                states, index, weights = states[known], index[known], weights[known]
            self._add(experts, states, index, weights)

        return collect

    def _stream_hook_of(self, experts: OrdinaryExperts) -> Any:
        def collect(_: nn.Module, __: tuple, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if isinstance(states, Tensor) and experts.name in self._sums:
                self._sums[experts.name]["stream"] += float(states.double().square().sum())

        return collect

    @torch.no_grad()
    def _add(
        self, experts: OrdinaryExperts, states: Tensor, index: Tensor, weights: Tensor
    ) -> None:
        matrices = experts.matrices
        activation = resolve_activation(
            experts.format.activation(experts.module), gated="gate" in matrices
        )
        sums = self._sums.setdefault(experts.name, _zeros(matrices, self._with_inner))
        biases = experts.biases
        outputs = torch.zeros_like(states, dtype=sums["outputs"].dtype)
        for expert in range(len(matrices["up"])):
            tokens, choice = torch.where(index == expert)
            own = {name: each[expert] for name, each in matrices.items()}
            shifts = {name: each[expert] for name, each in biases.items()}
            for part in torch.split(torch.arange(len(tokens), device=tokens.device), _ROWS):
                rows = states[tokens[part]]
                scale = weights[tokens[part], choice[part]].to(rows.dtype)[:, None]
                inner = activation(
                    *(
                        nn.functional.linear(rows, own[name], shifts.get(name))
                        for name in ("gate", "up")
                        if name in own
                    )
                )
                made = _add_rows(sums, expert, rows * scale, inner * scale, own["down"])
                outputs.index_add_(0, tokens[part], made)
        sums["outputs"] += outputs.T @ outputs


def _add_rows(
    sums: dict[str, Any], expert: int, rows: Tensor, inner: Tensor, down: Tensor
) -> Tensor:
    """Add the moments of rows of one expert, already weighed, and return their outputs."""
    sums["slots"] += len(rows)
    sums["shares"][expert] += rows.double().square().sum()
    rows, inner = rows.to(sums["inputs"].dtype), inner.to(sums["inputs"].dtype)
    sums["inputs"] += rows.T @ rows
    outputs = nn.functional.linear(inner, down.to(inner.dtype))
    sums["separate"] += float(outputs.double().square().sum())
    if len(sums["inner"]):
        sums["inner"] += inner.T @ inner
    return outputs


def _zeros(matrices: Mapping[Matrix, Tensor], with_inner: bool) -> dict[str, Any]:
    up = matrices["up"]
    inner, hidden = up.shape[1:]
    like = torch.zeros((), device=up.device, dtype=torch.promote_types(up.dtype, torch.float32))
    size = inner if with_inner else 0
    return {
        "slots": 0,
        "shares": like.new_zeros(len(up), dtype=torch.float64),
        "inputs": like.new_zeros(hidden, hidden),
        "inner": like.new_zeros(size, size),
        "outputs": like.new_zeros(hidden, hidden),
        "separate": 0.0,
        "stream": 0.0,
    }


def _moments_of(name: str, sums: dict[str, Any]) -> LayerMoments:
    if not all(sums[each].isfinite().all() for each in ("inputs", "inner", "outputs")):
        raise InputError(
            f"{name} has inputs or outputs that are NaN or infinite on the calibration's text"
        )
    total = sums["shares"].sum()
    return LayerMoments(**sums | {"shares": sums["shares"] / total.clamp_min(1e-300)})


def layer_around(name: str) -> str:
    """Return the path of the layer that holds a module: up to the first number in its path."""
    found = re.match(r"(.*?\.\d+)(\.|$)", name)
    return found[1] if found else name.rpartition(".")[0]


def check_known(model: Any, batches: Iterable[Tensor]) -> None:
    """Raise an InputError if a model has no embedding for a token of a batch."""
    size = model.get_input_embeddings().num_embeddings
    for tokens in batches:
        for found in (int(tokens.min()), int(tokens.max())):
            if not 0 <= found < size:
                raise InputError(
                    f"{type(model).__name__} has tokens from 0 to {size - 1}, the calibration has "
                    f"{found}: does the tokenizer belong to the model?"
                )


def check_batches(batches: Iterable[Batch]) -> list[dict[str, Any]]:
    """Return batches as arguments of calls of a model.

    Raises
    ------
    InputError
        If there is none, or one is neither tokens (B, S) nor a mapping with them.
    """
    checked = []
    for number, batch in enumerate(batches):
        call = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        tokens = call.get("input_ids", call.get("inputs_embeds"))
        if not isinstance(tokens, Tensor) or tokens.ndim < 2:
            what = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(batch).__name__
            raise InputError(
                f"batch {number} of the calibration must be tokens of shape (B, S), or a mapping "
                f"with input_ids of that shape, got {what}"
            )
        checked.append(call)
    if not checked:
        raise InputError("the calibration has no batches")
    return checked

"""Second moments of what the experts of a model compute, on a few batches of text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tnmoe.errors import InputError
from tnmoe.hf.ordinary import OrdinaryExperts
from tnmoe.nn.activations import resolve_activation
from tnmoe.nn.transforms import without_autocast
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
    inputs : Tensor, shape (E, H, H) or (1, H, H)
        Σ p² x xᵀ over the slots of every expert, or over all slots, with the token x and the weight
        p.
    inner : Tensor, shape (E, F, F) or (1, F, F)
        Σ p² h hᵀ with the activated intermediate values h; empty where nothing needs them.
    own_outputs : Tensor, shape (E, H, H)
        Σ p² y yᵀ over the slots of every expert, with the output y without bias; empty where
        nothing needs them. Where F exceeds H, these are smaller than ``inner`` and say as much.
    inner_squares : float
        Σ p² ‖h‖² over all slots.
    rows : Tensor, shape (E, 2F) or (E, F)
        How much the outputs depend on every row of ``gate`` and ``up``, in this order, or of ``up``
        alone: the mean of ‖∂y/∂u‖² over slots, with the product u of the row and the output y.
    gates : int
        Number of rows of ``gate``, F or 0.
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
    own_outputs: Tensor
    inner_squares: float
    rows: Tensor
    gates: int
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


class Needs(NamedTuple):
    """What of the moments a compression needs.

    Attributes
    ----------
    own : bool
        Whether every expert has moments of its own.
    down : bool
        Whether moments between ``up`` and ``down`` are needed.
    base : bool
        Whether experts may come to share a matrix, which takes the moments of all its inputs.
    """

    own: bool
    down: bool
    base: bool


class MomentsCollector:
    """Hooks that add up the moments of mixtures while their model runs.

    Parameters
    ----------
    model : Module
    experts : sequence of OrdinaryExperts
    needs : Needs
    """

    def __init__(self, model: nn.Module, experts: Sequence[OrdinaryExperts], needs: Needs) -> None:
        self._model, self._experts, self._needs = model, experts, needs
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
            states, index, weights = self._without_padding(states, index, weights)
            with without_autocast(states.device):
                self._add(experts, states, index, weights)

        return collect

    def _stream_hook_of(self, experts: OrdinaryExperts) -> Any:
        def collect(_: nn.Module, __: tuple, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if isinstance(states, Tensor) and experts.name in self._sums:
                (states,) = self._without_padding(states.reshape(-1, states.shape[-1]))
                self._sums[experts.name]["stream"] += float(states.double().square().sum())

        return collect

    def _without_padding(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the rows (T, n) of tokens that a batch does not mask."""
        mask, first = self.token_mask, tensors[0]
        if mask is None or mask.numel() != len(first):
            return tensors
        known = mask.reshape(-1).to(device=first.device, dtype=torch.bool)
        return tuple(each[known] for each in tensors)

    @torch.no_grad()
    def _add(
        self, experts: OrdinaryExperts, states: Tensor, index: Tensor, weights: Tensor
    ) -> None:
        matrices = experts.matrices
        # Autocast may have changed it.
        states = states.to(matrices["up"].dtype)
        activation = resolve_activation(
            experts.format.activation(experts.module), gated="gate" in matrices
        )
        sums = self._sums.setdefault(experts.name, _zeros(matrices, self._needs))
        biases = experts.biases
        outputs = torch.zeros_like(states, dtype=sums["outputs"].dtype)
        for expert in range(len(matrices["up"])):
            tokens, choice = torch.where(index == expert)
            own = {name: each[expert] for name, each in matrices.items()}
            shifts = {name: each[expert] for name, each in biases.items()}
            for part in torch.split(torch.arange(len(tokens), device=tokens.device), _ROWS):
                rows = states[tokens[part]]
                scale = weights[tokens[part], choice[part]].to(rows.dtype)[:, None]
                sides = [
                    nn.functional.linear(rows, own[name], shifts.get(name))
                    for name in ("gate", "up")
                    if name in own
                ]
                inner, slopes = _with_slopes(activation, sides)
                _add_slopes(sums, expert, slopes * scale, own["down"])
                made = _add_rows(sums, expert, rows * scale, inner * scale, own["down"])
                outputs.index_add_(0, tokens[part], made)
                sums["weights"][expert] += scale.double().square().sum()
        sums["outputs"] += outputs.T @ outputs


def _with_slopes(
    activation: Callable[..., Tensor], sides: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return activated values (N, F), and their derivatives by all sides, one beside the other."""
    with torch.inference_mode(False), torch.enable_grad():
        # A tensor of inference mode has no gradient, but its copy has one.
        leaves = [side.clone().requires_grad_() for side in sides]
        # An activation may change its inputs in place, which a leaf forbids.
        inner = activation(*(leaf.clone() for leaf in leaves))
        slopes = torch.autograd.grad(inner.sum(), leaves)
    return inner.detach(), torch.cat(slopes, dim=1)


def _add_slopes(sums: dict[str, Any], expert: int, slopes: Tensor, down: Tensor) -> None:
    """Add what the slopes of slots of one expert, already weighed, say about its rows."""
    norms = torch.linalg.vector_norm(down, dim=0, dtype=torch.float64).square()
    sides = slopes.shape[1] // len(norms)
    sums["rows"][expert] += slopes.double().square().sum(0) * norms.repeat(sides)


def _add_rows(
    sums: dict[str, Any], expert: int, rows: Tensor, inner: Tensor, down: Tensor
) -> Tensor:
    """Add the moments of rows of one expert, already weighed, and return their outputs."""
    sums["slots"] += len(rows)
    sums["shares"][expert] += rows.double().square().sum()
    rows, inner = rows.to(sums["inputs"].dtype), inner.to(sums["inputs"].dtype)
    sums["inputs"][expert % len(sums["inputs"])] += rows.T @ rows
    outputs = nn.functional.linear(inner, down.to(inner.dtype))
    sums["separate"] += float(outputs.double().square().sum())
    sums["inner_squares"] += float(inner.double().square().sum())
    if sums["inner"].numel():
        sums["inner"][expert % len(sums["inner"])] += inner.T @ inner
    if sums["own_outputs"].numel():
        sums["own_outputs"][expert] += outputs.T @ outputs
    return outputs


def _zeros(matrices: Mapping[Matrix, Tensor], needs: Needs) -> dict[str, Any]:
    up = matrices["up"]
    experts, inner, hidden = up.shape
    like = torch.zeros((), device=up.device, dtype=torch.promote_types(up.dtype, torch.float32))
    writes = needs.down and needs.own and inner > hidden
    has_inner = needs.down and (needs.base or not writes)
    count, size = 1 if writes or not needs.own else experts, inner if has_inner else 0
    return {
        "slots": 0,
        "weights": like.new_zeros(experts, dtype=torch.float64),
        "shares": like.new_zeros(experts, dtype=torch.float64),
        "inputs": like.new_zeros(experts if needs.own else 1, hidden, hidden),
        "inner": like.new_zeros(count, size, size),
        "own_outputs": like.new_zeros(experts, *2 * (hidden if writes else 0,)),
        "inner_squares": 0.0,
        "rows": like.new_zeros(experts, inner * (len(matrices) - 1), dtype=torch.float64),
        "gates": inner if "gate" in matrices else 0,
        "outputs": like.new_zeros(hidden, hidden),
        "separate": 0.0,
        "stream": 0.0,
    }


def _moments_of(name: str, sums: dict[str, Any]) -> LayerMoments:
    checked = ("inputs", "inner", "own_outputs", "rows", "outputs")
    if not all(sums[each].isfinite().all() for each in checked):
        raise InputError(
            f"{name} has inputs or outputs that are NaN or infinite on the calibration's text"
        )
    given = dict(sums)
    weights, total = given.pop("weights"), sums["shares"].sum()
    given["rows"] = _means(sums["rows"], weights)
    given["shares"] = sums["shares"] / total.clamp_min(1e-300)
    return LayerMoments(**given)


def _means(sums: Tensor, weights: Tensor) -> Tensor:
    """Divide sums (E, n) by weights (E,); an expert without slots gets the mean of the others."""
    means = sums / weights.clamp_min(1e-300)[:, None]
    met = weights > 0
    return torch.where(met[:, None], means, means[met].mean(0)) if met.any() else means


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

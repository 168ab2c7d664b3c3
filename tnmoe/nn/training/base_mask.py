"""The base of gradient masks: which tensors skip which steps, and how often."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from tnmoe.errors import InputError, check_bool, check_int_from_zero, check_number_in
from tnmoe.nn.experts import Experts
from tnmoe.nn.projection import Projection
from tnmoe.nn.training.shared_cores import require_shared_parameters, shared_parameters

Probability = float | Callable[[int], float]

# A message names at most this many tensors.
_NAMES_SHOWN = 4


def check_probability(probability: Probability) -> Probability:
    """Return a schedule unchanged, a number as a float; raise an InputError outside [0, 1]."""
    if callable(probability):
        return probability
    return check_number_in("probability", probability, "[0, 1]")


class BaseMask:
    """A rule that lets tensors skip steps, as a function of (seed, step), with its statistics.

    Parameters
    ----------
    parameters_or_model, probability, seed, per_layer
        As for :class:`GradientMask`.

    Attributes
    ----------
    step : int
        Number of the coming step.
    masked_steps : int
        Steps so far that at least one tensor skipped.
    updates : dict from str to int
        How many updates each tensor has received. Keys are the names in the model, or the numbers
        of tensors that were given without a model.
    """

    def __init__(
        self,
        parameters_or_model: nn.Module | Iterable[nn.Parameter],
        probability: Probability,
        seed: int,
        per_layer: bool,
    ) -> None:
        self._model = parameters_or_model if isinstance(parameters_or_model, nn.Module) else None
        if isinstance(parameters_or_model, nn.Module):
            self._tensors = _named_shared(parameters_or_model)
            layer_of = _layer_numbers(parameters_or_model)
        else:
            self._tensors = {str(i): tensor for i, tensor in enumerate(parameters_or_model)}
            layer_of = {id(tensor): i for i, tensor in enumerate(self._tensors.values())}
        if not self._tensors:
            raise InputError("there is nothing to mask: no tensor was given")
        self.per_layer = check_bool("per_layer", per_layer)
        self._layer = {
            name: layer_of[id(tensor)] if self.per_layer else 0
            for name, tensor in self._tensors.items()
        }
        self.probability = check_probability(probability)
        self.seed = check_int_from_zero("seed", seed)
        self.step = 0
        self.masked_steps = 0
        self.updates = dict.fromkeys(self._tensors, 0)
        self.probability_at(0)  # raises early

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(probability={self.probability}, seed={self.seed}, "
            f"per_layer={self.per_layer}, tensors={len(self._tensors)}, step={self.step}, "
            f"masked_steps={self.masked_steps})"
        )

    def probability_at(self, step: int) -> float:
        """Return the probability with which a tensor skips a step.

        Raises
        ------
        InputError
            If it is not in [0, 1].
        """
        if not callable(self.probability):
            return check_number_in("probability", self.probability, "[0, 1]")
        return check_number_in(f"probability at step {step}", self.probability(step), "[0, 1]")

    def masks(self, step: int) -> dict[str, bool]:
        """Return whether each tensor skips a step, by the tensors' names."""
        draws = np.random.default_rng((self.seed, step)).random(1 + max(self._layer.values()))
        is_masked = draws < self.probability_at(step)
        return {name: bool(is_masked[layer]) for name, layer in self._layer.items()}

    def _masked_tensors(self) -> list[nn.Parameter]:
        """Return the tensors that skip the coming step."""
        masks = self.masks(self.step)
        return [tensor for name, tensor in self._tensors.items() if masks[name]]

    def _finish_step(self, is_updated: Callable[[Tensor], bool]) -> None:
        """Count the step that was made, and move to the next one."""
        masks = self.masks(self.step)
        for name, tensor in self._tensors.items():
            self.updates[name] += not masks[name] and is_updated(tensor)
        self.masked_steps += any(masks.values())
        self.step += 1

    def _check_tensors_in(self, parameters: Iterable[Tensor], failure: str) -> None:
        """Raise an InputError unless all tensors to mask are among the parameters."""
        present = {id(parameter) for parameter in parameters}
        missing = [name for name, tensor in self._tensors.items() if id(tensor) not in present]
        if missing:
            names = ", ".join(missing[:_NAMES_SHOWN]) + ", …" * (len(missing) > _NAMES_SHOWN)
            raise InputError(
                f"{failure} {len(missing)} of the {len(self._tensors)} tensors to mask: "
                f"{names}; wrapping or copying a model replaces its parameters: make the optimizer "
                "and then the mask from the model that you train"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which :meth:`load_state_dict` continues the sequence of draws.

        A schedule of probabilities is a function; the state does not contain it.
        """
        return {
            "seed": self.seed,
            "step": self.step,
            "masked_steps": self.masked_steps,
            "probability": None if callable(self.probability) else self.probability_at(self.step),
            "per_layer": self.per_layer,
            "updates": dict(self.updates),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the sequence of draws of a stored state.

        Raises
        ------
        InputError
            If the state belongs to a mask of other tensors or settings, lacks an entry, or holds
            impossible values. Nothing changes then.
        """
        self._check_same_mask(state)
        counts = {
            name: check_int_from_zero(f"the state's {name}", state[name])
            for name in ("seed", "step", "masked_steps")
        }
        updates = {
            name: check_int_from_zero(f"the state's updates of {name}", count)
            for name, count in state["updates"].items()
        }
        probability = state["probability"]
        if not callable(self.probability) and probability is not None:
            self.probability = check_number_in("the state's probability", probability, "[0, 1]")
        self.seed, self.step, self.masked_steps = counts.values()
        self.updates = updates

    def _check_same_mask(self, state: dict[str, Any]) -> None:
        if missing := sorted(set(BaseMask.state_dict(self)) - set(state)):
            raise InputError(f"the state of a mask lacks {', '.join(missing)}")
        if not isinstance(state["updates"], Mapping) or set(state["updates"]) != set(self.updates):
            raise InputError(
                f"the state is of a mask of {_sorted_names(state['updates'])}, "
                f"this one is of {_sorted_names(self.updates)}"
            )
        if state["per_layer"] != self.per_layer:
            raise InputError(
                f"the state is of a mask with per_layer={state['per_layer']}, "
                f"this one has per_layer={self.per_layer}"
            )


def _sorted_names(updates: Any) -> Any:
    return sorted(updates) if isinstance(updates, Mapping) else updates


def _named_shared(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the shared cores of a model by their names."""
    shared = {id(core) for core in require_shared_parameters(model)}
    return {name: core for name, core in model.named_parameters() if id(core) in shared}


def _layer_numbers(model: nn.Module) -> dict[int, int]:
    """Return the number of the first layer of experts that uses each shared core, by id."""
    numbers: dict[int, int] = {}
    layers = [part for part in model.modules() if isinstance(part, Experts | Projection)]
    for number, layer in enumerate(layers):
        for core in shared_parameters(layer):
            numbers.setdefault(id(core), number)
    return numbers

"""The experts of ordinary mixtures: where models keep them, and how they store their matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tnmoe.errors import InputError
from tnmoe.hf.find import chosen_layers, mixtures_in, possible_names
from tnmoe.nn.activations import ClampedSwiGLU, resolve_activation
from tnmoe.nn.dense_experts import DenseExperts
from tnmoe.nn.experts import Experts
from tnmoe.nn.mpo_experts import MPOExperts
from tnmoe.nn.settings import check_matrices
from tnmoe.options import MATRICES, Matrix, ProjectionName


class OneHotExperts(MPOExperts):
    """Experts that are called as those of Switch Transformers are: with a mask of choices.

    A token beyond an expert's capacity has no choice, and its output is 0.
    """

    def forward(self, hidden_states: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
        """Send every token through its expert.

        Parameters
        ----------
        hidden_states : Tensor, shape (T, H)
        selected : Tensor of integers, shape (T, 1, E)
            1 for the expert of a token, 0 for all others.
        weights : Tensor, shape (T, 1)

        Returns
        -------
        Tensor, shape (T, H)
        """
        return super().forward(hidden_states, _index_of(selected), weights)


class ExpertsFormat(ABC):
    """How a class of experts stores its matrices, and what it computes with them."""

    # What replaces experts of the class.
    experts_class: type[MPOExperts] = MPOExperts

    @abstractmethod
    def recognises(self, module: nn.Module) -> bool:
        """Check whether a module stores its experts in this format."""

    @abstractmethod
    def matrices(self, module: Any) -> dict[Matrix, Tensor]:
        """Return ``up``, ``down`` and perhaps ``gate`` of all experts, each (E, out, in)."""

    def gate_up(self, module: Any) -> Tensor:
        """Return gates and ups of all experts, one below the other, (E, 2F, H)."""
        matrices = self.matrices(module)
        return torch.cat([matrices["gate"], matrices["up"]], dim=1)

    @abstractmethod
    def biases(self, module: Any) -> dict[Matrix, Tensor]:
        """Return the biases of all experts, (E, out), by the name of their matrix."""

    @abstractmethod
    def activation(self, module: Any) -> Any:
        """Return the activation between the matrices, as for :class:`Experts`."""

    @abstractmethod
    def tensors(self, module: Any, experts: Experts) -> dict[str, Tensor]:
        """Return the tensors that a module needs to compute what ``experts`` compute, by name."""

    def choices(self, states: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """Return tokens (T, H), the experts that they chose (T, k) and their weights (T, k).

        Parameters
        ----------
        states, index, weights
            What the module is called with.
        """
        return states, index, weights

    def dropout(self, module: Any) -> float:
        """Return the probability of dropout between the matrices."""
        return 0.0

    def problem(self, module: Any) -> str | None:
        """Return what the module does that :class:`Experts` cannot; None if there is nothing."""
        return None


class StackedFormat(ExpertsFormat):
    """Experts of transformers with several implementations: Mixtral, Qwen-MoE, gpt-oss, and more.

    ``gate_up_proj`` holds gates and ups one below the other, or by turns; ``down_proj`` the rest.
    """

    def recognises(self, module: nn.Module) -> bool:
        needed = ("has_gate", "has_bias", "is_transposed", "down_proj")
        return all(hasattr(module, name) for name in needed)

    def matrices(self, module: Any) -> dict[Matrix, Tensor]:
        down, inner = module.down_proj, self._inner(module, "")
        if module.is_transposed:
            down, inner = down.mT, inner.mT
        return {**self._halves(module, inner), "down": down}

    def gate_up(self, module: Any) -> Tensor:
        if not module.is_concatenated:
            return super().gate_up(module)
        inner = self._inner(module, "")
        return inner.mT if module.is_transposed else inner

    def biases(self, module: Any) -> dict[Matrix, Tensor]:
        if not module.has_bias:
            return {}
        halves = self._halves(module, self._inner(module, "_bias"))
        return {**halves, "down": module.down_proj_bias}

    def activation(self, module: Any) -> Any:
        if not module.has_gate:
            return module.act_fn
        if _is_default_gate(module):
            return resolve_activation(module.act_fn, gated=True)
        return ClampedSwiGLU(module.alpha, module.limit)

    def tensors(self, module: Any, experts: Experts) -> dict[str, Tensor]:
        name, matrices = "gate_up_proj" if module.has_gate else "up_proj", experts.matrices()
        inner, down = self._joined(module, matrices), matrices["down"]
        if module.is_transposed:
            inner, down = inner.mT, down.mT
        found = {name: inner, "down_proj": down}
        if module.has_bias:
            biases = experts.biases()
            found[f"{name}_bias"] = self._joined(module, biases)
            found["down_proj_bias"] = biases["down"]
        return found

    def problem(self, module: Any) -> str | None:
        if getattr(module, "has_post_expert_norm", False):
            return "a norm after every expert"
        if module.has_gate and not _is_default_gate(module) and not _is_clamped_swiglu(module):
            return f"the gate of {type(module).__name__}"
        return None

    def _inner(self, module: Any, suffix: str) -> Tensor:
        return getattr(module, ("gate_up_proj" if module.has_gate else "up_proj") + suffix)

    def _halves(self, module: Any, inner: Tensor) -> dict[Matrix, Tensor]:
        """Split the axis after that of the experts into gates and ups."""
        if not module.has_gate:
            return {"up": inner}
        if module.is_concatenated:
            gate, up = inner.chunk(2, dim=1)
        else:
            gate, up = inner[:, ::2], inner[:, 1::2]
        return {"gate": gate, "up": up}

    def _joined(self, module: Any, parts: Mapping[str, Tensor]) -> Tensor:
        """Join gates and ups along the axis after that of the experts."""
        if not module.has_gate:
            return parts["up"]
        sides = parts["gate"], parts["up"]
        if module.is_concatenated:
            return torch.cat(sides, dim=1)
        return torch.stack(sides, dim=2).flatten(1, 2)


class SwitchFormat(ExpertsFormat):
    """Experts of Switch Transformers: one module per expert, with ``wi`` and ``wo``."""

    experts_class = OneHotExperts

    def recognises(self, module: nn.Module) -> bool:
        return type(module).__name__ == "SwitchTransformersExperts"

    def matrices(self, module: Any) -> dict[Matrix, Tensor]:
        experts = list(module.values())
        return {
            "up": torch.stack([expert.wi.weight for expert in experts]),
            "down": torch.stack([expert.wo.weight for expert in experts]),
        }

    def biases(self, module: Any) -> dict[Matrix, Tensor]:
        return {}

    def activation(self, module: Any) -> Any:
        return next(iter(module.values())).act

    def tensors(self, module: Any, experts: Experts) -> dict[str, Tensor]:
        matrices = experts.matrices()
        return {
            f"{name}.{part}.weight": matrix
            for part, stack in (("wi", matrices["up"]), ("wo", matrices["down"]))
            for name, matrix in zip(module, stack, strict=True)
        }

    def choices(self, states: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return states, _index_of(index), weights

    def dropout(self, module: Any) -> float:
        return next(iter(module.values())).dropout.p


class DenseFormat(ExpertsFormat):
    """Experts of tnmoe's own ordinary mixtures."""

    def recognises(self, module: nn.Module) -> bool:
        return isinstance(module, DenseExperts)

    def matrices(self, module: Any) -> dict[Matrix, Tensor]:
        return module.matrices()

    def biases(self, module: Any) -> dict[Matrix, Tensor]:
        return module.biases()

    def activation(self, module: Any) -> Any:
        return module.activation

    def tensors(self, module: Any, experts: Experts) -> dict[str, Tensor]:
        matrices, biases = experts.matrices(), experts.biases()
        found = {}
        for name, part in module.projections().items():
            found[f"{name}.stacked"] = matrices[name]
            if part.bias is not None:
                found[f"{name}.bias"] = biases[name][: len(part.bias)]
        return found

    def dropout(self, module: Any) -> float:
        return module.dropout


_FORMATS: tuple[ExpertsFormat, ...] = (DenseFormat(), SwitchFormat(), StackedFormat())


@dataclass(frozen=True)
class OrdinaryExperts:
    """The experts of one ordinary mixture in a model.

    Attributes
    ----------
    name : str
        Path of the module that holds them.
    module : Module
    format : ExpertsFormat
    parent : Module
        The module whose attribute they are.
    """

    name: str
    module: nn.Module
    format: ExpertsFormat
    parent: nn.Module

    @property
    def matrices(self) -> dict[Matrix, Tensor]:
        """``up``, ``down`` and perhaps ``gate`` of all experts, each (E, out, in)."""
        return self.format.matrices(self.module)

    @property
    def biases(self) -> dict[Matrix, Tensor]:
        """The biases of all experts, (E, out), by the name of their matrix."""
        return self.format.biases(self.module)

    def projections(self, chosen: Collection[Matrix] = MATRICES) -> dict[ProjectionName, Tensor]:
        """Return the matrices by the projection that they are in once they are smaller.

        Parameters
        ----------
        chosen : collection of "up", "gate", "down"
            Matrices that become smaller. ``gate`` and ``up`` are one, ``gate_up`` (E, 2F, H), if
            both are among them.
        """
        matrices: dict[Any, Tensor] = self.matrices
        if not {"gate", "up"} <= {*matrices} & {*chosen}:
            return matrices
        return {"gate_up": self.format.gate_up(self.module), "down": matrices["down"]}

    def projected_biases(self, chosen: Collection[Matrix] = MATRICES) -> dict[str, Tensor]:
        """Return the biases by the name of their projection, as :meth:`projections` has them."""
        biases: dict[Any, Tensor] = self.biases
        if not biases or "gate_up" not in self.projections(chosen):
            return biases
        both = torch.cat([biases["gate"], biases["up"]], dim=1)
        return {"gate_up": both, "down": biases["down"]}

    @property
    def num_params(self) -> int:
        """Number of parameters of matrices and biases."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def settings(self) -> dict[str, Any]:
        """Return the activation and the dropout, as arguments of :class:`Experts`."""
        return {
            "activation": self.format.activation(self.module),
            "dropout": self.format.dropout(self.module),
        }

    def install(self, experts: nn.Module) -> None:
        """Put other experts in the place of these."""
        # Some blocks draw the numbers of their experts. With others in their place, they cannot.
        self.parent._is_hf_initialized = True  # type: ignore[assignment]
        setattr(self.parent, self.name.rpartition(".")[2], experts)

    def check(self) -> None:
        """Raise an InputError if these do more than :class:`Experts` can."""
        if problem := self.format.problem(self.module):
            raise InputError(f"{self.name} has {problem}, which tnmoe's experts lack")


def ordinary_experts(model: nn.Module) -> Iterator[OrdinaryExperts]:
    """Find the experts of all ordinary mixtures of a model, in the order of its modules."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        for format_ in _FORMATS:
            if name and format_.recognises(module):
                parent = modules[name.rpartition(".")[0]]
                yield OrdinaryExperts(name, module, format_, parent)
                break


def compressed_in(model: nn.Module) -> dict[str, MPOExperts]:
    """Return experts that share cores, outside of tnmoe's mixtures, by their paths."""
    mixtures = tuple(f"{path}." for path in mixtures_in(model))
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, MPOExperts) and not path.startswith(mixtures)
    }


def ordinary_named(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, OrdinaryExperts]]:
    """Find the experts of those ordinary mixtures that have one of these names.

    A name may count from another module, as for :func:`tnmoe.hf.find.ffns_named`.

    Yields
    ------
    str
        The name that was given.
    OrdinaryExperts
    """
    recorded, names_of = set(names), possible_names(model)
    for each in list(ordinary_experts(model)):
        for name in recorded & names_of(each.name):
            yield name, each


def find_ordinary(
    model: nn.Module,
    layers: Sequence[int] | str | None = None,
    matrices: Iterable[Matrix] = MATRICES,
) -> list[OrdinaryExperts]:
    """Find the experts of those ordinary mixtures of a model that ``layers`` chooses.

    Parameters
    ----------
    model : Module
    layers : sequence of int, or str, optional
        Positions among the mixtures, from 0; or a regular expression to search for in the names of
        their experts. All by default.
    matrices : iterable of "up", "gate", "down"
        Matrices of which every mixture must have one.

    Raises
    ------
    InputError
        If the model has no ordinary mixture, shares cores already or is quantized; if ``layers``
        chooses none, or one that is not there; if a mixture has none of the matrices; or if experts
        do more than tnmoe's can.
    """
    name = type(model).__name__
    shared = [path for path, module in model.named_modules() if isinstance(module, MPOExperts)]
    if shared:
        raise InputError(f"the experts of {shared[0]} of this {name} are made of cores already")
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise InputError(f"{name} is quantized: load it with dequantized weights first")
    found = list(ordinary_experts(model))
    if not found:
        raise InputError(
            f"{name} has no ordinary mixture of experts that tnmoe knows; tnmoe.hf.upcycle makes "
            "mixtures of a dense model"
        )
    chosen = chosen_layers(found, layers, name)
    if not chosen:
        raise InputError(
            f"layers={layers!r} selects none of the {len(found)} mixtures of {name}: "
            f"{found[0].name} … {found[-1].name}"
        )
    for each in chosen:
        each.check()
        check_matrices(matrices, each.matrices)
    return chosen


def _index_of(selected: Tensor) -> Tensor:
    """Return the experts that a mask (T, 1, E) selects, (T, 1); E where it selects none."""
    return selected.argmax(-1).masked_fill(selected.sum(-1) == 0, selected.shape[-1])


def _is_default_gate(module: Any) -> bool:
    return type(module)._apply_gate.__name__ == "_default_apply_gate"


def _is_clamped_swiglu(module: Any) -> bool:
    """Check on a few numbers whether a gate is that of gpt-oss."""
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    if not isinstance(alpha, float) or not isinstance(limit, int | float):
        return False
    gate, up = torch.linspace(-9, 9, 7), torch.linspace(12, -12, 7)
    both = torch.cat([gate, up]) if module.is_concatenated else torch.stack([gate, up], 1).flatten()
    expected = module._apply_gate(both)
    return torch.allclose(ClampedSwiGLU(alpha, limit)(gate, up), expected)

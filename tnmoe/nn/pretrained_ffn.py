"""A pretrained feed-forward network as tensors or linear modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from tnmoe.errors import InputError
from tnmoe.nn.linear import bias_of_linear, weight_of_linear

# A pretrained matrix, or the linear module that holds it.
Source = Tensor | nn.Module


@dataclass(frozen=True)
class PretrainedFFN:
    """The matrices of a pretrained feed-forward network, by name: up, down and perhaps gate.

    Attributes
    ----------
    sources : dict from str to Tensor or linear Module
        As the caller gave them.
    weights : dict from str to Tensor
        The matrices, (out, in).
    biases : dict from str to Tensor or None
        Given ones, and those of modules.
    """

    sources: dict[str, Source]
    weights: dict[str, Tensor]
    biases: dict[str, Tensor | None]

    @classmethod
    def of(
        cls, sources: Mapping[str, Source | None], biases: Mapping[str, Tensor | None]
    ) -> PretrainedFFN:
        """Read matrices and biases, and check that they fit each other.

        Raises
        ------
        InputError
            If a matrix is neither a Tensor nor a linear module, shapes do not fit, or a bias comes
            without its matrix or beside a module, which has its own.
        """
        present = {name: source for name, source in sources.items() if source is not None}
        weights, found = {}, dict(biases)
        for name, source in present.items():
            if isinstance(source, nn.Module):
                weights[name] = weight_of_linear(source)
                if biases[name] is not None:
                    raise InputError(
                        f"{name}_bias was given beside a module, which has its own: {source}"
                    )
                found[name] = bias_of_linear(source)
            elif isinstance(source, Tensor):
                weights[name] = source
            else:
                raise InputError(
                    f"{name} must be a Tensor or a linear Module, got a {type(source).__name__}"
                )
        if "gate" not in present and biases["gate"] is not None:
            raise InputError("gate_bias was given without a gate")
        _check_shapes(weights)
        return cls(present, weights, found)


def _check_shapes(matrices: Mapping[str, Tensor]) -> None:
    up = matrices["up"]
    fits = up.ndim == 2 and all(
        matrix.shape == (up.shape[::-1] if name == "down" else up.shape)
        for name, matrix in matrices.items()
    )
    if not fits:
        given = ", ".join(f"{name} {tuple(matrix.shape)}" for name, matrix in matrices.items())
        raise InputError(f"up and gate must be (F, H) and down (H, F), got {given}")

"""What a compression did to every matrix, and to the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from tnmoe.joint.low_rank import LowRankFactors
from tnmoe.options import ProjectionName
from tnmoe.shared_mpo import SharedMPO
from tnmoe.system.tables import format_table

# A bond dimension, or the rank of every expert.
Bond = int | tuple[int, ...]


@dataclass(frozen=True)
class MatrixReport:
    """What became of one matrix of all experts of a layer, or of ``gate`` and ``up`` together.

    Attributes
    ----------
    layer : str
        Path of the experts in the model.
    matrix : {"gate_up", "gate", "up", "down"}
    layout : str or None
        Layout; None for a matrix that stays as it is.
    bond : int, tuple of int, or None
        Bond dimension; in ``low_rank`` the rank of every expert; None for a matrix that stays as it
        is.
    params_before, params_after : int
    itemsize : int
        Bytes of a parameter.
    error : float or None
        Frobenius error of all experts together, relative to their norm; None before the matrix is
        made.
    weighted_error : float or None
        Error for the inputs of the calibration, relative to the matrices' products with these; the
        rows of ``gate`` and ``up`` count as much as the outputs depend on them. None without a
        calibration.

    Examples
    --------
    >>> matrix = MatrixReport("layers.0.experts", "up", "hidden", 8, 1000, 400, 4, 0.1, 0.05)
    >>> matrix.params_after / matrix.params_before
    0.4
    """

    layer: str
    matrix: ProjectionName
    layout: str | None
    bond: Bond | None
    params_before: int
    params_after: int
    itemsize: int
    error: float | None
    weighted_error: float | None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the report whose attributes, with lists for tuples, are ``data``."""
        return cls(**{name: as_tuples(value) for name, value in data.items()})


@dataclass(frozen=True)
class CompressionReport:
    """What a compression did.

    Attributes
    ----------
    matrices : tuple of MatrixReport
    loss_before, loss_after : float or None
        Mean loss per token on the part of the calibration that was held out, in nats.

    Examples
    --------
    >>> matrix = MatrixReport("layers.0.experts", "up", "hidden", 8, 1000, 400, 4, 0.1, 0.05)
    >>> report = CompressionReport((matrix,), 2.0, 2.1)
    >>> report.params_after, round(report.perplexity_after, 2)
    (400, 8.17)
    """

    matrices: tuple[MatrixReport, ...]
    loss_before: float | None = None
    loss_after: float | None = None

    @property
    def params_before(self) -> int:
        """Parameters of the chosen matrices before."""
        return sum(matrix.params_before for matrix in self.matrices)

    @property
    def params_after(self) -> int:
        """Parameters of the chosen matrices now."""
        return sum(matrix.params_after for matrix in self.matrices)

    @property
    def perplexity_before(self) -> float | None:
        """Perplexity of the held-out part before."""
        return None if self.loss_before is None else math.exp(self.loss_before)

    @property
    def perplexity_after(self) -> float | None:
        """Perplexity of the held-out part now."""
        return None if self.loss_after is None else math.exp(self.loss_after)

    def __repr__(self) -> str:
        return (
            f"CompressionReport(matrices={len(self.matrices)}, params={self.params_before:,} → "
            f"{self.params_after:,}, loss={_short(self.loss_before)} → {_short(self.loss_after)})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "matrices": [asdict(matrix) for matrix in self.matrices],
            "params": {"before": self.params_before, "after": self.params_after},
            "loss": {"before": self.loss_before, "after": self.loss_after},
            "perplexity": {"before": self.perplexity_before, "after": self.perplexity_after},
        }

    def __str__(self) -> str:
        headers = [
            "experts", "matrix", "layout", "bond", "before", "after", "error", "weighted error",
        ]  # fmt: skip
        rows = [
            [
                each.layer,
                each.matrix,
                each.layout or "as it was",
                _bond_text(each.bond),
                each.params_before,
                each.params_after,
                _short(each.error),
                _short(each.weighted_error),
            ]
            for each in self.matrices
        ]
        rows.append(["all", "", "", "", self.params_before, self.params_after, "", ""])
        lines = [format_table(headers, rows)]
        if self.perplexity_before is not None:
            lines.append(
                f"perplexity of held-out text: {self.perplexity_before:.4g} before, "
                f"{_short(self.perplexity_after)} after"
            )
        return "\n".join(lines)


def relative_error(
    matrices: Tensor, written: SharedMPO | Sequence[LowRankFactors] | Tensor
) -> float:
    """Return the Frobenius error of all experts' matrices together, relative to their norm."""
    if isinstance(written, Tensor):
        return 0.0
    # One expert is built at a time.
    errors = [_norm(matrix - _matrix_of(written, number)) for number, matrix in enumerate(matrices)]
    norm = math.hypot(*map(_norm, matrices))
    return math.hypot(*errors) / norm if norm else 0.0


def _matrix_of(written: SharedMPO | Sequence[LowRankFactors], number: int) -> Tensor:
    if not isinstance(written, SharedMPO):
        return written[number].matrix()
    own = [core[number : number + 1] if core.ndim == 5 else core for core in written.cores]
    return SharedMPO(own, written.shape, written.center_site, written.base).to_matrices()[0]


def as_tuples(value: Any) -> Any:
    """Return lists from JSON as tuples, those inside of lists too; other values as they are."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def _bond_text(bond: Bond | None) -> str:
    if isinstance(bond, tuple):
        return str(bond[0]) if len(set(bond)) == 1 else f"{min(bond)}…{max(bond)}"
    return "" if bond is None else str(bond)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"

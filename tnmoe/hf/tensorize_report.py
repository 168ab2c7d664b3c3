"""What became of the linear layers of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tnmoe.shapes import MPOShape
from tnmoe.system.tables import format_table


@dataclass(frozen=True)
class TensorizedLayer:
    """What became of one linear layer.

    Attributes
    ----------
    name : str
        Path in the model.
    shape : MPOShape or None
        Legs of the MPO; None for a layer that stays as it is.
    bond_dims : tuple of int or None
    params_before, params_after : int
        Entries of the matrix, and of what stands for it: the cores, with ``residual`` beside the
        matrix. Biases are left out.
    error : float
        Frobenius error of the matrix, relative to its norm.

    Examples
    --------
    >>> layer = TensorizedLayer("fc", MPOShape((4, 1), (1, 4)), (1,), 16, 8, 0.5)
    >>> layer.params_after / layer.params_before
    0.5
    """

    name: str
    shape: MPOShape | None
    bond_dims: tuple[int, ...] | None
    params_before: int
    params_after: int
    error: float


@dataclass(frozen=True)
class TensorizeReport:
    """What became of the chosen layers of a model; ``print`` shows a table.

    Attributes
    ----------
    layers : tuple of TensorizedLayer

    Examples
    --------
    >>> layer = TensorizedLayer("fc", MPOShape((4, 1), (1, 4)), (1,), 16, 8, 0.5)
    >>> print(TensorizeReport((layer,)))
    layer    out     in  bonds  before  after  error
    -----  -----  -----  -----  ------  -----  -----
    fc     4 · 1  1 · 4      1      16      8    0.5
    all                             16      8
    """

    layers: tuple[TensorizedLayer, ...]

    @property
    def params_before(self) -> int:
        """Entries of the matrices of all chosen layers before."""
        return sum(layer.params_before for layer in self.layers)

    @property
    def params_after(self) -> int:
        """Entries of what stands for these matrices now."""
        return sum(layer.params_after for layer in self.layers)

    def __repr__(self) -> str:
        return (
            f"TensorizeReport(layers={len(self.layers)}, params={self.params_before:,} → "
            f"{self.params_after:,})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "params": {"before": self.params_before, "after": self.params_after},
        }

    def __str__(self) -> str:
        rows: list[list[object]] = [
            [
                layer.name,
                *_legs_and_bonds(layer),
                layer.params_before,
                layer.params_after,
                f"{layer.error:.3g}",
            ]
            for layer in self.layers
        ]
        rows.append(["all", "", "", "", self.params_before, self.params_after, ""])
        return format_table(["layer", "out", "in", "bonds", "before", "after", "error"], rows)


def _legs_and_bonds(layer: TensorizedLayer) -> list[str]:
    if layer.shape is None or layer.bond_dims is None:
        return ["as it was", "", ""]
    parts = (layer.shape.out_dims, layer.shape.in_dims, layer.bond_dims)
    return [" · ".join(map(str, part)) for part in parts]

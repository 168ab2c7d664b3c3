"""What an upcycled model looks like: enough to rebuild its structure from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tnmoe.errors import InputError, number_in, one_of
from tnmoe.nn.experts import LAYOUTS, layout_shape
from tnmoe.shapes import MPOShape, positive_int

Size = tuple[int, int]


@dataclass(frozen=True)
class MPOEConfig:
    """How feed-forward networks become mixtures of experts.

    Parameters
    ----------
    num_experts : int
        Experts per layer.
    num_experts_per_tok : int
        Experts per token.
    layout : {"interleaved", "split", "dense"}
        How matrices split over sites (:func:`tnmoe.nn.experts.layout_shape`); ``dense`` shares
        nothing: an ordinary mixture, for comparison.
    sites : int
        Sites of interleaved shapes.
    max_bond : int, optional
        Largest bond dimension. The default, exact bonds, preserves the model's function;
        pretrained matrices compress badly.
    layers : sequence of int, optional
        Which of the feed-forward networks to convert, counted as ``find_ffns`` lists them; all by
        default.
    shapes : mapping from (out, in) to MPOShape
        Shapes for matrices of these sizes instead of the layout's.
    expert_noise : float
        Noise on every expert's auxiliary cores at the start, relative to each core's size. 0
        keeps the model's function exactly; experts then differ once their tokens do.
    normalize_router, jitter_noise
        As in :class:`tnmoe.nn.TopKRouter`.
    mask_probability : float
        Probability with which a training step leaves the central tensors alone, for
        :class:`tnmoe.nn.GradientMask`.

    Raises
    ------
    InputError
        If a value is out of range.
    """

    num_experts: int = 8
    num_experts_per_tok: int = 1
    layout: str = "interleaved"
    sites: int = 5
    max_bond: int | None = None
    layers: Sequence[int] | None = None
    shapes: Mapping[Size, MPOShape] = field(default_factory=dict)
    expert_noise: float = 0.0
    normalize_router: bool = True
    jitter_noise: float = 0.0
    mask_probability: float = 0.0

    def __post_init__(self) -> None:
        positive_int("num_experts", self.num_experts)
        positive_int("num_experts_per_tok", self.num_experts_per_tok)
        positive_int("sites", self.sites)
        if self.max_bond is not None:
            positive_int("max_bond", self.max_bond)
        if self.num_experts_per_tok > self.num_experts:
            raise InputError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds "
                f"num_experts={self.num_experts}"
            )
        one_of("layout", self.layout, (*LAYOUTS, "dense"))
        number_in("mask_probability", self.mask_probability, "[0, 1]")
        number_in("expert_noise", self.expert_noise, "[0, inf)")
        for size, shape in self.shapes.items():
            if tuple(size) != (shape.out_features, shape.in_features):
                raise InputError(f"shapes[{size}] is for another matrix: {shape}")

    def shape_for(self, out_features: int, in_features: int) -> MPOShape:
        """Shape of a matrix of this size."""
        given = self.shapes.get((out_features, in_features))
        return given or layout_shape(self.layout, out_features, in_features, self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self) | {"layers": None if self.layers is None else list(self.layers)}
        data["shapes"] = [asdict(shape) for shape in self.shapes.values()]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MPOEConfig:
        """The configuration that :meth:`to_dict` described.

        Raises
        ------
        InputError
            If an entry is unknown or out of range.
        """
        known = {entry.name for entry in fields(cls)}
        if unknown := set(data) - known:
            raise InputError(f"unknown entries in an MPOE configuration: {sorted(unknown)}")
        shapes = [MPOShape(**shape) for shape in data.get("shapes", ())]
        by_size = {(shape.out_features, shape.in_features): shape for shape in shapes}
        return cls(**{**data, "shapes": by_size})

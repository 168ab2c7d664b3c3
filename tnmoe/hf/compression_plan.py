"""Which bonds the matrices of a model get, and the matrices that have them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Self

import torch
from torch import Tensor

from tnmoe.errors import InputError
from tnmoe.hf.compression import CompressionConfig
from tnmoe.hf.compression_report import Bond, MatrixReport, as_tuples
from tnmoe.hf.compression_weights import LayerWeights
from tnmoe.hf.ordinary import OrdinaryExperts
from tnmoe.joint.basis import SharedBasis, column_basis, row_basis
from tnmoe.joint.low_rank import LowRank, LowRankFactors, low_rank
from tnmoe.joint.residual import Residual, residual
from tnmoe.nn.structure import ProjectionStructure
from tnmoe.options import Matrix, ProjectionName
from tnmoe.shapes import MPOShape
from tnmoe.shared_mpo import SharedMPO
from tnmoe.truncation.distribute import distribute_budget

# Bonds of large matrices are multiples of this: kernels want aligned sizes.
_STEP = 8
# Up to this size a matrix may have any bond.
_SMALL = 64


@dataclass(frozen=True)
class ProjectionOptions:
    """What one projection of a layer's experts can become.

    Attributes
    ----------
    experts : str
        Path of the experts in the model.
    projection : {"gate_up", "gate", "up", "down"}
    size : (int, int, int)
        Experts, rows and columns.
    layouts : tuple of str
        Layout of every option.
    bonds : tuple of int, or of tuple of int
        Bond of every option; for ``low_rank`` the rank of every expert. All options have fewer
        parameters than the matrices as they are.
    params : tuple of int
        Number of parameters of every option.
    errors : tuple of float
        Predicted relative error of every option.
    losses : tuple of float
        What the error of every option costs the model.
    """

    experts: str
    projection: ProjectionName
    size: tuple[int, int, int]
    layouts: tuple[str, ...]
    bonds: tuple[Bond, ...]
    params: tuple[int, ...]
    errors: tuple[float, ...]
    losses: tuple[float, ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the options whose attributes, with lists for tuples, are ``data``."""
        return cls(**{name: as_tuples(value) for name, value in data.items()})

    @property
    def full(self) -> int:
        """Number of parameters as it is."""
        count, rows, columns = self.size
        return count * rows * columns

    def smallest_within(self, rtol: float) -> int | None:
        """Return the smallest option whose error is at most ``rtol``; None if there is none."""
        fitting = [
            (params, number)
            for number, (params, error) in enumerate(zip(self.params, self.errors, strict=True))
            if error <= rtol
        ]
        return min(fitting)[1] if fitting else None

    @property
    def table(self) -> list[tuple[int, float]]:
        """Parameters and cost of every option, and of the matrices as they are."""
        return [*zip(self.params, self.losses, strict=True), (self.full, 0.0)]


@dataclass(frozen=True)
class Choice:
    """What a matrix can become, and what it does become.

    Attributes
    ----------
    options : ProjectionOptions
    number : int or None
        Of the option; None for a matrix that stays as it is.
    """

    options: ProjectionOptions
    number: int | None

    @property
    def layout(self) -> str | None:
        """The layout; None for a matrix that stays as it is."""
        return None if self.number is None else self.options.layouts[self.number]

    @property
    def bond(self) -> Bond | None:
        """The bond, or the ranks of all experts; None for what stays as it is."""
        return None if self.number is None else self.options.bonds[self.number]

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return self.options.full if self.number is None else self.options.params[self.number]

    @property
    def error(self) -> float:
        """Predicted relative error."""
        return 0.0 if self.number is None else self.options.errors[self.number]


def planned_report(choice: Choice, itemsize: int, weighted: bool) -> MatrixReport:
    """Return the report on a matrix that is not made yet.

    Parameters
    ----------
    choice : Choice
    itemsize : int
        Bytes of a parameter.
    weighted : bool
        Whether there is a calibration.
    """
    options = choice.options
    return MatrixReport(
        layer=options.experts,
        matrix=options.projection,
        layout=choice.layout,
        bond=choice.bond,
        params_before=options.full,
        params_after=choice.num_params,
        itemsize=itemsize,
        error=None,
        weighted_error=choice.error if weighted else None,
    )


def structures_of_plan(
    experts: OrdinaryExperts, plan: Mapping[ProjectionName, Choice], chosen: Collection[Matrix]
) -> dict[str, ProjectionStructure]:
    """Return the structures that the projections of a mixture will have, by their names.

    Parameters
    ----------
    experts : OrdinaryExperts
        On any device, the meta device included.
    plan : mapping from str to Choice
        Projections without an entry stay as they are.
    chosen : collection of "up", "gate", "down"
        Matrices that become smaller.
    """
    biases = experts.biases
    return {
        name: _structure(matrices.shape, name, plan.get(name), bool(biases))
        for name, matrices in experts.projections(chosen).items()
    }


def _structure(
    size: Sequence[int], name: ProjectionName, choice: Choice | None, bias: bool
) -> ProjectionStructure:
    _, rows, columns = size
    whole = MPOShape((rows,), (columns,))
    if choice is None or choice.bond is None:
        return ProjectionStructure("stacked", whole, bias=bias)
    if isinstance(choice.bond, tuple):
        return ProjectionStructure("low_rank", whole, ranks=choice.bond, bias=bias)
    shape, bonds = MPOShape((rows, 1), (1, columns)), (choice.bond,)
    if choice.layout == "hidden":
        center = 0 if name == "down" else 1
        return ProjectionStructure("hidden", shape, bonds, center, (center,), bias)
    return ProjectionStructure("residual", shape, bonds, shape.center_site, (), bias)


def choose(
    options: Sequence[ProjectionOptions], config: CompressionConfig, budget: int
) -> list[Choice]:
    """Choose what every projection becomes.

    Parameters
    ----------
    options : sequence of ProjectionOptions
    config : CompressionConfig
    budget : int
        Largest number of parameters of all, if no ``rtol`` is set.

    Raises
    ------
    InputError
        If the budget is too small for the smallest bonds.
    """
    if config.rtol is not None:
        return [Choice(each, each.smallest_within(config.rtol)) for each in options]
    tables = [each.table for each in options]
    least = sum(min(params for params, _ in table) for table in tables)
    if budget < least:
        raise InputError(
            f"the limit leaves {max(budget, 0):,} parameters to the matrices of experts, which "
            f"have {sum(each.full for each in options):,} now; they can have {least:,} at least"
        )
    chosen = distribute_budget(tables, budget)
    return [
        Choice(each, number if number < len(each.bonds) else None)
        for each, number in zip(options, chosen, strict=True)
    ]


Form = SharedBasis | Residual | LowRank


def form_of(matrices: Tensor, name: ProjectionName, layout: str, weights: LayerWeights) -> Form:
    """Analyse the matrices of a layer's experts in a layout, for any bond.

    Parameters
    ----------
    matrices : Tensor, shape (E, out, in)
    name : {"gate_up", "gate", "up", "down"}
    layout : {"hidden", "residual", "low_rank"}
    weights : LayerWeights
    """
    rows = weights.rows(name)
    if layout == "low_rank":
        places = _index_numbers(matrices)
        if weights.are_own:
            return low_rank(matrices, moments=weights.own(name), rows=rows, index_numbers=places)
        shares, moments = weights.shares(matrices), weights.common(name)
        return low_rank(matrices, moments=moments, rows=rows, shares=shares, index_numbers=places)
    shares = weights.shares(matrices)
    if layout == "residual":
        return residual(matrices, moments=weights.common(name), rows=rows, shares=shares)
    if name == "down":
        return column_basis(matrices, shares=shares, outputs=weights.outputs(matrices))
    return row_basis(matrices, moments=weights.common(name), rows=rows, shares=shares)


def options_of(
    matrices: Tensor,
    experts: str,
    name: ProjectionName,
    layouts: Iterable[str],
    weights: LayerWeights,
) -> ProjectionOptions:
    """Return what one projection of a layer's experts can become.

    Parameters
    ----------
    matrices : Tensor, shape (E, out, in)
    experts : str
        Path of the experts in the model.
    name : {"gate_up", "gate", "up", "down"}
    layouts : iterable of str
        Layouts that are allowed.
    weights : LayerWeights

    Raises
    ------
    InputError
        If the matrices contain NaN or infinity.
    """
    if not torch.isfinite(matrices).all():
        raise InputError(f"the {name} matrices of {experts} contain NaN or infinity")
    found: list[tuple[str, Bond, int, float, float]] = []
    for layout in layouts:
        form, loss = form_of(matrices, name, layout, weights), weights.loss(layout)
        for bond, params, square in _sizes(form, matrices):
            if params < matrices.numel():
                found.append((layout, bond, params, sqrt(square), loss * square))
    columns_of: Any = [tuple(each) for each in zip(*found, strict=True)] or [()] * 5
    count, rows, columns = matrices.shape
    return ProjectionOptions(experts, name, (count, rows, columns), *columns_of)


def _sizes(form: Form, matrices: Tensor) -> Iterator[tuple[Bond, int, float]]:
    """Yield bonds with their numbers of parameters and their squared relative errors."""
    if isinstance(form, LowRank):
        whole = sum(errors[0] for errors in form.squared_errors) or 1.0
        for each in form.frontier(_step(min(matrices.shape[1:]))):
            yield each.ranks, each.num_params, each.error / whole
        return
    errors = form.squared_errors
    # Without any bond, a basis leaves nothing of the matrices, and a residual form their mean.
    whole = form.squared_norm if isinstance(form, Residual) else errors[0]
    step = _step(len(errors) - 1)
    for bond in range(step, len(errors), step):
        yield bond, form.num_params(matrices, bond), errors[bond] / (whole or 1.0)


def _step(largest: int) -> int:
    return 1 if largest <= _SMALL else _STEP


def _index_numbers(matrices: Tensor) -> int:
    """Return how many parameters have the size of the index of a column."""
    return -(-torch.int32.itemsize // matrices.itemsize)


def written_matrices(form: Form, matrices: Tensor, bond: Bond) -> SharedMPO | list[LowRankFactors]:
    """Write matrices in a form, at a bond that :func:`options_of` found."""
    if isinstance(form, LowRank):
        assert isinstance(bond, tuple)
        return form.decompose(matrices, bond)
    assert isinstance(bond, int)
    return form.decompose(matrices, bond)

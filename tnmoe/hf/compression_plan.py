"""Which bonds the matrices of a model get, and the matrices that have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Any, Self

import torch
from torch import Tensor

from tnmoe.errors import InputError
from tnmoe.hf.calibration import LayerMoments
from tnmoe.hf.compression import CompressionConfig
from tnmoe.hf.compression_report import MatrixReport
from tnmoe.hf.ordinary import OrdinaryExperts
from tnmoe.joint.basis import SharedBasis, column_basis, column_gram, row_basis
from tnmoe.joint.input_moments import InputMoments
from tnmoe.joint.low_rank import LowRank, low_rank
from tnmoe.nn.structure import ProjectionStructure
from tnmoe.options import Matrix, StructureKind
from tnmoe.shapes import MPOShape
from tnmoe.truncation.distribute import distribute_budget

# Bonds of large matrices are multiples of this: kernels want aligned sizes.
_STEP = 8
# Up to this size a matrix may have any bond.
_SMALL = 64


@dataclass(frozen=True)
class MatrixOptions:
    """What one matrix of all experts of a layer can become.

    Attributes
    ----------
    experts : str
        Path of the experts in the model.
    matrix : {"up", "gate", "down"}
    size : (int, int, int)
        Experts, rows and columns.
    layouts : tuple of str
        Layout of every option.
    bonds : tuple of int
        Bond of every option. All have fewer parameters than the matrix as it is.
    params : tuple of int
        Number of parameters of every option.
    errors : tuple of float
        Predicted relative error of every option.
    """

    experts: str
    matrix: Matrix
    size: tuple[int, int, int]
    layouts: tuple[str, ...]
    bonds: tuple[int, ...]
    params: tuple[int, ...]
    errors: tuple[float, ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the options whose attributes, with lists for tuples, are ``data``."""
        entries: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return cls(**entries)

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

    def table(self, energy: float) -> list[tuple[int, float]]:
        """Return parameters and squared error of every option, and of the matrix as it is."""
        errors = [energy * error**2 for error in self.errors]
        return [*zip(self.params, errors, strict=True), (self.full, 0.0)]


@dataclass(frozen=True)
class Choice:
    """What a matrix can become, and what it does become.

    Attributes
    ----------
    options : MatrixOptions
    number : int or None
        Of the option; None for a matrix that stays as it is.
    """

    options: MatrixOptions
    number: int | None

    @property
    def layout(self) -> str | None:
        """The layout; None for a matrix that stays as it is."""
        return None if self.number is None else self.options.layouts[self.number]

    @property
    def bond(self) -> int | None:
        """The bond; None for a matrix that stays as it is."""
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
        matrix=options.matrix,
        layout=choice.layout,
        bond=choice.bond,
        params_before=options.full,
        params_after=choice.num_params,
        itemsize=itemsize,
        error=None,
        weighted_error=choice.error if weighted else None,
    )


def structures_of_plan(
    experts: OrdinaryExperts, plan: Mapping[Matrix, Choice]
) -> dict[str, ProjectionStructure]:
    """Return the structures that the matrices of a mixture will have, by their names.

    Parameters
    ----------
    experts : OrdinaryExperts
        On any device, the meta device included.
    plan : mapping from str to Choice
        Matrices without an entry stay as they are.
    """
    biases = experts.biases
    return {
        name: _structure(matrices.shape, name, plan.get(name), name in biases)
        for name, matrices in experts.matrices.items()
    }


def _structure(
    size: Sequence[int], matrix: Matrix, choice: Choice | None, bias: bool
) -> ProjectionStructure:
    _, rows, columns = size
    if choice is None or choice.bond is None:
        return ProjectionStructure("stacked", MPOShape((rows,), (columns,)), bias=bias)
    shape, bonds = MPOShape((rows, 1), (1, columns)), (choice.bond,)
    if choice.layout == "hidden":
        center = 0 if matrix == "down" else 1
        return ProjectionStructure("hidden", shape, bonds, center, (center,), bias)
    kind: StructureKind = "residual" if choice.layout == "residual" else "chains"
    return ProjectionStructure(kind, shape, bonds, shape.center_site, (), bias)


def choose(
    options: Sequence[MatrixOptions],
    energies: Sequence[float],
    config: CompressionConfig,
    budget: int,
) -> list[Choice]:
    """Choose what every matrix becomes.

    Parameters
    ----------
    options : sequence of MatrixOptions
    energies : sequence of float
        For each of them, what its squared relative error counts.
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
    tables = [each.table(energy) for each, energy in zip(options, energies, strict=True)]
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


class LayerWeights:
    """What errors of the matrices of one layer count, and to what they are relative.

    Roots of moments are found once for all matrices and layouts that need them.

    Parameters
    ----------
    moments : LayerMoments or None
        None without a calibration.
    damping : float
        As for :class:`CompressionConfig`.
    """

    def __init__(self, moments: LayerMoments | None, damping: float) -> None:
        self._moments, self._damping = moments, damping

    @property
    def are_known(self) -> bool:
        """Whether there is a calibration."""
        return self._moments is not None

    def shares(self, matrices: Tensor) -> list[float]:
        """Return how much every expert counts; without a calibration all count alike."""
        if self._moments is not None:
            return self._moments.shares.tolist()
        norms = [float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in matrices]
        return [1 / (norm or 1.0) ** 2 for norm in norms]

    def inputs(self, matrix: Matrix) -> InputMoments | None:
        """Return the damped moments of a matrix' inputs."""
        return self._inner if matrix == "down" else self._inputs

    @cached_property
    def _inputs(self) -> InputMoments | None:
        if self._moments is None:
            return None
        return InputMoments.of(_damped(self._moments.inputs, self._damping))

    @cached_property
    def _inner(self) -> InputMoments | None:
        if self._moments is None:
            return None
        return InputMoments.of(_damped(self._moments.inner, self._damping))

    def outputs(self, matrices: Tensor) -> Tensor | None:
        """Return the damped moments of the outputs of ``down`` matrices."""
        if self._moments is None:
            return None
        return _damped(self._moments.outputs, self._damping, column_gram(matrices))

    def factor(self, layout: str) -> float:
        """Return what squared errors of a layout count beside those of a common basis."""
        return 1.0 if self._moments is None or layout == "hidden" else self._moments.independence


def form_of(
    matrices: Tensor, matrix: Matrix, layout: str, weights: LayerWeights
) -> SharedBasis | LowRank:
    """Analyse one matrix of all experts of a layer in a layout, for any bond.

    Parameters
    ----------
    matrices : Tensor, shape (E, out, in)
    matrix : {"up", "gate", "down"}
    layout : {"hidden", "residual", "low_rank"}
    weights : LayerWeights
    """
    shares = weights.shares(matrices)
    if layout != "hidden":
        base = layout == "residual"
        return low_rank(matrices, base=base, shares=shares, moments=weights.inputs(matrix))
    if matrix == "down":
        return column_basis(matrices, shares=shares, outputs=weights.outputs(matrices))
    return row_basis(matrices, shares=shares, moments=weights.inputs(matrix))


def options_of(
    matrices: Tensor,
    experts: str,
    matrix: Matrix,
    layouts: Iterable[str],
    weights: LayerWeights,
) -> MatrixOptions:
    """Return what one matrix of all experts of a layer can become.

    Parameters
    ----------
    matrices : Tensor, shape (E, out, in)
    experts : str
        Path of the experts in the model.
    matrix : {"up", "gate", "down"}
    layouts : iterable of str
        Layouts that are allowed.
    weights : LayerWeights

    Raises
    ------
    InputError
        If the matrices contain NaN or infinity.
    """
    if not torch.isfinite(matrices).all():
        raise InputError(f"the {matrix} matrices of {experts} contain NaN or infinity")
    count, rows, columns = matrices.shape
    found: list[tuple[str, int, int, float]] = []
    for layout in layouts:
        form, factor = form_of(matrices, matrix, layout, weights), weights.factor(layout)
        errors = form.squared_errors
        for bond in _candidates(len(errors) - 1):
            params = form.num_params(matrices, bond)
            if params < matrices.numel():
                relative = sqrt(factor * errors[bond] / (errors[0] or 1.0))
                found.append((layout, bond, params, relative))
    columns_of = [tuple(each) for each in zip(*found, strict=True)] or [()] * 4
    return MatrixOptions(experts, matrix, (count, rows, columns), *columns_of)


def _candidates(largest: int) -> list[int]:
    """Return the bonds that a matrix may have, given the largest that makes sense."""
    step = 1 if largest <= _SMALL else _STEP
    return list(range(step, largest + 1, step))


def _damped(moments: Tensor, damping: float, identity: Tensor | None = None) -> Tensor:
    """Bring moments to mean eigenvalue 1, and add the share of the identity.

    Parameters
    ----------
    moments : Tensor, shape (n, n)
    damping : float
    identity : Tensor, optional
        What takes the place of the identity.
    """
    moments = moments.double()
    size = len(moments)
    if identity is None:
        identity = torch.eye(size, dtype=moments.dtype, device=moments.device)
    both = (moments, identity.double())
    scaled = [each * (size / each.trace().clamp_min(1e-300)) for each in both]
    return (1 - damping) * scaled[0] + damping * scaled[1]

"""Which bonds the matrices of a model get, and the matrices that have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from tnmoe.joint.common_part import CommonPart, common_part
from tnmoe.nn.structure import ProjectionStructure
from tnmoe.options import Matrix
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
    bonds : tuple of int
        Bonds with which it has fewer parameters than as it is.
    params : tuple of int
        Number of parameters with each bond.
    errors : tuple of float
        Predicted relative error with each bond.
    """

    experts: str
    matrix: Matrix
    size: tuple[int, int, int]
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

    def params_with(self, bond: int | None) -> int:
        """Return the number of parameters with a bond; None stands for the matrix as it is."""
        return self.full if bond is None else self.params[self.bonds.index(bond)]

    def error_with(self, bond: int | None) -> float:
        """Return the predicted relative error with a bond."""
        return 0.0 if bond is None else self.errors[self.bonds.index(bond)]

    def smallest_within(self, rtol: float) -> int | None:
        """Return the smallest bond whose error is at most ``rtol``; None to leave it as it is."""
        pairs = zip(self.bonds, self.errors, strict=True)
        return next((bond for bond, error in pairs if error <= rtol), None)

    def table(self, energy: float) -> list[tuple[int, float]]:
        """Return parameters and squared error of every bond, and of the matrix as it is."""
        errors = [energy * error**2 for error in self.errors]
        return [*zip(self.params, errors, strict=True), (self.full, 0.0)]


# What a matrix can become, and the bond that was chosen; None for a matrix that stays as it is.
Choice = tuple[MatrixOptions, int | None]


def planned_report(choice: Choice, itemsize: int, weighted: bool) -> MatrixReport:
    """Return the report on a matrix that is not made yet.

    Parameters
    ----------
    choice : (MatrixOptions, int or None)
    itemsize : int
        Bytes of a parameter.
    weighted : bool
        Whether there is a calibration.
    """
    option, bond = choice
    return MatrixReport(
        layer=option.experts,
        matrix=option.matrix,
        bond=bond,
        params_before=option.full,
        params_after=option.params_with(bond),
        itemsize=itemsize,
        error=None,
        weighted_error=option.error_with(bond) if weighted else None,
    )


def structures_of_plan(
    experts: OrdinaryExperts, plan: Mapping[str, Choice], config: CompressionConfig
) -> dict[str, ProjectionStructure]:
    """Return the structures that the matrices of a mixture will have, by their names.

    Parameters
    ----------
    experts : OrdinaryExperts
        On any device, the meta device included.
    plan : mapping from str to (MatrixOptions, int or None)
        Matrices without an entry stay as they are.
    config : CompressionConfig
    """
    biases = experts.biases
    return {
        name: _structure(
            matrices.shape, name, plan[name][1] if name in plan else None, config, name in biases
        )
        for name, matrices in experts.matrices.items()
    }


def _structure(
    size: Sequence[int], matrix: str, bond: int | None, config: CompressionConfig, bias: bool
) -> ProjectionStructure:
    _, rows, columns = size
    if bond is None:
        return ProjectionStructure("stacked", MPOShape((rows,), (columns,)), bias=bias)
    shape = MPOShape((rows, 1), (1, columns))
    if config.layout == "residual":
        return ProjectionStructure("residual", shape, (bond,), shape.center_site, (), bias)
    center = 0 if matrix == "down" else 1
    return ProjectionStructure("hidden", shape, (bond,), center, (center,), bias)


def choose_bonds(
    options: Sequence[MatrixOptions],
    energies: Sequence[float],
    config: CompressionConfig,
    budget: int,
) -> list[int | None]:
    """Choose the bond of every matrix; None leaves a matrix as it is.

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
        return [each.smallest_within(config.rtol) for each in options]
    tables = [each.table(energy) for each, energy in zip(options, energies, strict=True)]
    least = sum(min(params for params, _ in table) for table in tables)
    if budget < least:
        raise InputError(
            f"the limit leaves {max(budget, 0):,} parameters to the matrices of experts, which "
            f"have {sum(each.full for each in options):,} now; they can have {least:,} at least"
        )
    chosen = distribute_budget(tables, budget)
    return [
        each.bonds[number] if number < len(each.bonds) else None
        for each, number in zip(options, chosen, strict=True)
    ]


def form_of(
    matrices: Tensor, matrix: Matrix, moments: LayerMoments | None, config: CompressionConfig
) -> SharedBasis | CommonPart:
    """Analyse one matrix of all experts of a layer, for any bond.

    Parameters
    ----------
    matrices : Tensor, shape (E, out, in)
    matrix : {"up", "gate", "down"}
    moments : LayerMoments or None
    config : CompressionConfig

    Raises
    ------
    InputError
        If the matrices contain NaN or infinity.
    """
    if not torch.isfinite(matrices).all():
        raise InputError(f"the {matrix} matrices contain NaN or infinity")
    # Without a calibration every expert counts alike, whatever its scale.
    norms = [float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in matrices]
    shares = [1 / (norm or 1.0) ** 2 for norm in norms]
    if moments is not None:
        shares = moments.shares.tolist()
    if config.layout == "hidden" and matrix == "down":
        outputs = None
        if moments is not None:
            outputs = _damped(moments.outputs, config.damping, column_gram(matrices))
        return column_basis(matrices, shares=shares, outputs=outputs)
    inputs = None
    if moments is not None:
        inputs = _damped(moments.inner if matrix == "down" else moments.inputs, config.damping)
    make = row_basis if config.layout == "hidden" else common_part
    return make(matrices, shares=shares, moments=inputs)


def options_of(
    matrices: Tensor, experts: str, matrix: Matrix, form: SharedBasis | CommonPart
) -> MatrixOptions:
    """Return what one matrix of all experts of a layer can become.

    Parameters
    ----------
    matrices : Tensor, shape (E, out, in)
    experts : str
        Path of the experts in the model.
    matrix : {"up", "gate", "down"}
    form : SharedBasis or CommonPart
        What :func:`form_of` found.
    """
    count, rows, columns = matrices.shape
    errors = form.squared_errors
    bonds = [
        bond
        for bond in _candidates(len(errors) - 1)
        if form.num_params(matrices, bond) < matrices.numel()
    ]
    total = errors[0] or 1.0
    return MatrixOptions(
        experts,
        matrix,
        (count, rows, columns),
        tuple(bonds),
        tuple(form.num_params(matrices, bond) for bond in bonds),
        tuple(sqrt(errors[bond] / total) for bond in bonds),
    )


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

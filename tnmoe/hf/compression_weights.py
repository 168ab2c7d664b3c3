"""What errors of the matrices of a mixture count: what a calibration says, or nothing."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from tnmoe.hf.calibration import LayerMoments
from tnmoe.joint.basis import column_gram, sum_of
from tnmoe.joint.input_moments import InputMoments
from tnmoe.joint.output_moments import OutputMoments
from tnmoe.options import ProjectionName

# Least damping of moments of single experts, which may have met fewer tokens than inputs.
_LEAST = 1e-6


class LayerWeights:
    """What errors of the matrices of one layer count, and to what they are relative.

    Moments are damped, and their roots are found, once for all layouts that need them.

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

    @property
    def are_own(self) -> bool:
        """Whether every expert has moments of its own."""
        return self._moments is not None and len(self._moments.inputs) > 1

    def shares(self, matrices: Tensor) -> list[float]:
        """Return how much every expert counts; without a calibration all count alike."""
        if self._moments is not None:
            # An expert that the calibration did not reach must not be free, either.
            given = self._moments.shares
            return ((1 - self._damping) * given + self._damping / len(given)).tolist()
        norms = [float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in matrices]
        return [1 / (norm or 1.0) ** 2 for norm in norms]

    def common(self, projection: ProjectionName) -> InputMoments | None:
        """Return the moments of the inputs of all experts together."""
        return self._common_inner if projection == "down" else self._common_inputs

    def own(self, projection: ProjectionName) -> InputMoments | OutputMoments | None:
        """Return the moments of every expert, of its inputs or its outputs.

        They say how much the expert counts, too.
        """
        if self._moments is None:
            return None
        damping, outputs = max(self._damping, _LEAST), self._moments.own_outputs
        if projection == "down" and outputs.numel():
            units = self._moments.rows.shape[1] - self._moments.gates
            scale = self._moments.inner_squares / (len(outputs) * units)
            return OutputMoments(outputs, scale, damping)
        moments = self._moments.inner if projection == "down" else self._moments.inputs
        return InputMoments.of(moments, damping)

    def rows(self, projection: ProjectionName) -> Tensor | None:
        """Return what every row counts, (E, out), with mean 1; None where all count alike."""
        given = self._rows(projection)
        if given is None:
            return None
        mean = given.mean().clamp_min(1e-300)
        return (1 - self._damping) * given / mean + self._damping

    def outputs(self, matrices: Tensor) -> Tensor | None:
        """Return the damped moments of the outputs of ``down`` matrices."""
        if self._moments is None:
            return None
        return _damped(self._moments.outputs, self._damping, column_gram(matrices))

    def loss(self, layout: str) -> float:
        """Return what a relative error of 1 costs: a share of the output of the layer, in squares.

        Experts with a common basis lose the same directions, so their errors add up as their
        outputs do. Independent errors add up in squares.
        """
        if self._moments is None:
            return 1.0
        together = 1.0 if layout == "hidden" else self._moments.independence
        return together * self._moments.energy

    def _rows(self, projection: ProjectionName) -> Tensor | None:
        if self._moments is None or projection == "down":
            return None
        rows, gates = self._moments.rows, self._moments.gates
        if projection == "gate_up":
            return rows
        return rows[:, :gates] if projection == "gate" else rows[:, gates:]

    @cached_property
    def _common_inputs(self) -> InputMoments | None:
        if self._moments is None:
            return None
        return InputMoments.of(_total(self._moments.inputs), self._damping)

    @cached_property
    def _common_inner(self) -> InputMoments | None:
        if self._moments is None:
            return None
        return InputMoments.of(_total(self._moments.inner), self._damping)


def _total(moments: Tensor) -> Tensor:
    """Add the moments of all experts up, in double precision, one in memory at a time."""
    return sum_of(each.double() for each in moments)


def _damped(moments: Tensor, damping: float, other: Tensor) -> Tensor:
    """Bring moments (n, n) to mean eigenvalue 1, and add a share of others that have it, too."""
    scaled = [
        each.double() * (len(each) / each.double().trace().clamp_min(1e-300))
        for each in (moments, other)
    ]
    return (1 - damping) * scaled[0] + damping * scaled[1]

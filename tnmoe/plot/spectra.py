"""Pictures of bonds: Schmidt values and entanglement entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tnmoe.errors import InputError, check_one_of
from tnmoe.mpo import MPO
from tnmoe.options import ENTROPY_AXES, EntropyAxis
from tnmoe.plot.data import check_mapping, check_numbers
from tnmoe.plot.style import (
    GREY,
    add_legend,
    decade_below,
    distinct_labels,
    line_style,
    log_axis_with_zero,
    new_axes,
    start_at_zero,
)
from tnmoe.shared_mpo import SharedMPO
from tnmoe.truncation.info import TruncationInfo
from tnmoe.truncation.spectra import entanglement_entropy

# An axis has space for this many names, and for this many letters of horizontal names.
_MAX_TICKS, _MAX_LETTERS = 40, 50
# Schmidt values below this share of the largest are rounding, in every precision.
_ROUNDING = float(np.finfo(np.float64).eps)
# The axis reaches down to this value at least, even where all values are equal.
_AXIS_END = 0.1


def schmidt_spectra(
    operators: MPO | SharedMPO | TruncationInfo | Mapping[str, Any], ax: Axes | None = None
) -> Axes:
    """Plot Schmidt values, relative to the largest, against index / bond dimension.

    The axis of the values is logarithmic. Zero lies at its lower end, together with values below
    2e-16 of the largest, which are rounding.

    Parameters
    ----------
    operators : MPO, SharedMPO, TruncationInfo, or mapping from str to these or to array
        One operator, or the record of its truncation (``return_info=True``): every bond is drawn,
        of a SharedMPO every expert's. Or several of these by name, or the Schmidt values of single
        bonds by name.
    ax : Axes, optional

    Raises
    ------
    InputError
        If there is no bond, or a value is negative or not finite.

    Notes
    -----
    ``ax.set_yscale("linear")`` shows differences between the largest values.

    Examples
    --------
    >>> from tnmoe import MPO, MPOShape
    >>> mpo = MPO.random(MPOShape((2, 2, 2), (2, 2, 2)), rng=0)
    >>> ax = schmidt_spectra(mpo)
    >>> [line.get_label() for line in ax.lines]
    ['bond 0 (dimension 4)', 'bond 1 (dimension 4)']
    >>> ax = schmidt_spectra({"mine": mpo.schmidt_values(0), "first": [1.0, 0.1, 0.01]})
    >>> [line.get_label() for line in ax.lines]
    ['mine (dimension 4)', 'first (dimension 3)']
    """
    arrays = _spectra_by_name(operators)
    ax = new_axes(ax)
    labels, common = distinct_labels(arrays)
    relative = [values / (values.max() or 1.0) for values in arrays.values()]
    for index, (label, values) in enumerate(zip(labels, relative, strict=True)):
        share = (np.arange(len(values)) + 1) / len(values)
        label = f"{label} (dimension {len(values)})"
        ax.plot(share, values, label=label, **line_style(index, len(values)))
    ax.set(
        xlabel="index / bond dimension", ylabel="Schmidt value / largest", title="Schmidt spectra"
    )
    _scale(ax, np.concatenate(relative))
    add_legend(ax, common)
    return ax


def _spectra_by_name(operators: Any) -> dict[str, np.ndarray]:
    """Return the Schmidt values of every bond to draw, by label."""
    if isinstance(operators, (MPO, TruncationInfo)):
        return _bonds("operators", operators)
    arrays: dict[str, np.ndarray] = {}
    for name, operator in _by_name(operators).items():
        what = f"operators[{name!r}]"
        if isinstance(operator, (MPO, TruncationInfo)):
            bonds = _bonds(what, operator)
            arrays |= {f"{name}, {bond}": values for bond, values in bonds.items()}
        else:
            arrays[name] = check_numbers(what, operator, lowest=0)
    return arrays


def _by_name(operators: Any) -> dict[str, Any]:
    """Return operators by name, every expert of a SharedMPO as one of its own."""
    if isinstance(operators, SharedMPO):
        return _experts(operators)
    named: dict[str, Any] = {}
    for name, operator in check_mapping("operators", operators).items():
        if isinstance(operator, SharedMPO):
            named |= {f"{name}, {each}": mpo for each, mpo in _experts(operator).items()}
        else:
            named[name] = operator
    return named


def _experts(shared: SharedMPO) -> dict[str, MPO]:
    return {f"expert {index}": shared.expert(index) for index in range(shared.num_experts)}


def _bonds(what: str, operator: MPO | TruncationInfo) -> dict[str, np.ndarray]:
    """Return the Schmidt values of an operator's bonds, or those that a truncation recorded."""
    if isinstance(operator, MPO):
        spectra = [operator.schmidt_values(bond) for bond in range(operator.shape.sites - 1)]
    else:
        spectra = list(operator.spectra)
    if not spectra:
        raise InputError(f"{what} must have a bond, got {operator!r}")
    return {
        f"bond {bond}": check_numbers(f"{what}, bond {bond}", values, lowest=0)
        for bond, values in enumerate(spectra)
    }


def _scale(ax: Axes, values: np.ndarray) -> None:
    """Make the axis logarithmic from 1 to the smallest value, or to zero if some are rounding."""
    lowest = values[values >= _ROUNDING].min(initial=_AXIS_END)
    if values.min() < _ROUNDING:
        log_axis_with_zero(ax, lowest, 1.0)
    else:
        # Whole decades, with space for a marker on the lowest.
        ax.set(yscale="log", ylim=(0.7 * decade_below(lowest), None))
    ax.set(xlim=(0, 1.03), ylim=(None, 1.5))


def entropy(
    operators: MPO | SharedMPO | TruncationInfo | Mapping[str, Any],
    ax: Axes | None = None,
    against: EntropyAxis = "bond",
    bond_dims: Sequence[int] | None = None,
) -> Axes:
    """Plot the entanglement entropy of bonds below its upper limit, log(bond dimension).

    Parameters
    ----------
    operators : MPO, SharedMPO, TruncationInfo, or mapping from str to these or to sequence of float
        One operator, or several by name (of layers, for example). An operator is an MPO, the
        record of a truncation (``return_info=True``), or a sequence with the entropy of every
        bond, in nats. Every expert of a SharedMPO is an operator.
    ax : Axes, optional
    against : {"bond", "layer"}
        The horizontal axis: "bond" draws a line per operator, "layer" a line per bond, which is
        easier to read for many operators.
    bond_dims : sequence of int, optional
        Bond dimensions of operators that are given as entropies. Without them, the picture shows
        no limits for these operators.

    Raises
    ------
    InputError
        If there is no operator, an operator has no bonds, an entropy is negative or not finite, or
        numbers of bonds differ with ``against="layer"``.

    Examples
    --------
    >>> from tnmoe import MPO, MPOShape
    >>> mpo = MPO.random(MPOShape((2, 2, 2), (2, 2, 2)), rng=0)
    >>> ax = entropy({"first": mpo, "second": [0.3, 0.9]}, bond_dims=(4, 4))
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('bond', 'entanglement entropy (nats)')
    """
    check_one_of("against", against, ENTROPY_AXES)
    single = isinstance(operators, (MPO, TruncationInfo))
    given = {"operator": operators} if single else _by_name(operators)
    lines = {name: _entropies(name, operator, bond_dims) for name, operator in given.items()}
    names, common = distinct_labels(lines)
    bonds = max(len(values) for values, _ in lines.values())
    if against == "layer":
        lines = _by_bond(lines)
    ax = new_axes(ax)
    labels = names if against == "bond" else list(lines)
    for index, (label, (values, _)) in enumerate(zip(labels, lines.values(), strict=True)):
        ax.plot(values, label=label, **line_style(index, 0))
    limits = [point for _, most in lines.values() for point in enumerate(most)]
    if np.isfinite(limits).all(1).any():
        ax.plot(
            *zip(*limits, strict=True), "_", color=GREY, markersize=14, markeredgewidth=2, zorder=1,
            label="upper limit: log(bond dimension)",
        )  # fmt: skip
    ax.set(xlabel=against, ylabel="entanglement entropy (nats)", title="Entanglement entropy")
    start_at_zero(ax)
    if against == "bond":
        ax.set_xticks(range(bonds))
        add_legend(ax, common)
    else:
        _name_layers(ax, names, common)
        add_legend(ax)
    return ax


def _entropies(
    name: str, operator: Any, bond_dims: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the entropies of an operator's bonds, and their limits; an unknown limit is NaN."""
    what = f"operators[{name!r}]"
    if isinstance(operator, (MPO, TruncationInfo)):
        spectra = _bonds(what, operator).values()
        # A bond may be larger than the number of Schmidt values that it carries.
        bond_dims = [len(values) for values in spectra]
        if isinstance(operator, MPO):
            bond_dims = list(operator.bond_dims)
        operator = [entanglement_entropy(values) for values in spectra]
    values = check_numbers(what, operator, lowest=0)
    if bond_dims is None:
        return values, np.full(len(values), np.nan)
    most = np.log(check_numbers("bond_dims", bond_dims, lowest=1))
    if len(most) != len(values):
        raise InputError(
            f"{what} needs one entropy for each of {len(most)} bonds, got {len(values)}"
        )
    return values, most


def _name_layers(ax: Axes, names: Sequence[str], common: str | None) -> None:
    """Write the names of layers along the x-axis, as many as fit."""
    ticks = range(0, len(names), -(-len(names) // _MAX_TICKS))
    upright = sum(map(len, names)) > _MAX_LETTERS
    ax.set_xticks(
        ticks, [names[layer] for layer in ticks], rotation=90 if upright else 0,
        fontsize="small" if upright else None,
    )  # fmt: skip
    if common is not None:
        ax.set_xlabel(f"layer ({common})")


def _by_bond(
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Regroup the values of all operators by bond."""
    counts = {name: len(values) for name, (values, _) in lines.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f'against="layer" needs equal numbers of bonds, got {counts}')
    values, most = np.transpose(list(lines.values()), (1, 2, 0))
    return {f"bond {bond}": pair for bond, pair in enumerate(zip(values, most, strict=True))}

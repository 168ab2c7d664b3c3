"""What the bonds of operators carry: Schmidt values and their entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tnmoe.errors import InputError, one_of
from tnmoe.mpo import MPO
from tnmoe.options import ENTROPY_AXES, EntropyAxis
from tnmoe.plot.data import named, numbers
from tnmoe.plot.style import (
    GREY,
    add_legend,
    decade_below,
    decades_and_zero,
    from_zero,
    line_style,
    new_axes,
    shown_apart,
)
from tnmoe.truncation.info import TruncationInfo
from tnmoe.truncation.spectra import entanglement_entropy

# So many names fit along an axis, and so many letters if they lie flat.
_MOST_TICKS, _MOST_LETTERS = 40, 50
# Relative to the largest, smaller Schmidt values are rounding in every precision.
_ROUNDING = float(np.finfo(np.float64).eps)
# The axis reaches down to here, even where all values are equal.
_LEAST = 0.1


def schmidt_spectra(
    operators: MPO | TruncationInfo | Mapping[str, Any], ax: Axes | None = None
) -> Axes:
    """Schmidt values, relative to the largest, against their share of the bond.

    The axis of the values is logarithmic. Zero lies at its lower end, and so do values that are
    nothing but rounding, below 2e-16 of the largest.

    Parameters
    ----------
    operators : MPO, TruncationInfo, or mapping from str to MPO, TruncationInfo or array
        One operator, or what a truncation saw of it (``return_info=True``), whose bonds are all
        drawn. Or several by name, or the Schmidt values of single bonds by name.
    ax : Axes, optional

    Raises
    ------
    InputError
        If there is no bond, or values are not finite numbers of at least 0.

    Notes
    -----
    ``ax.set_yscale("linear")`` compares the largest values.

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
    labels, common = shown_apart(arrays)
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
    """Schmidt values of every bond that is to be drawn."""
    if isinstance(operators, (MPO, TruncationInfo)):
        return _bonds("operators", operators)
    arrays: dict[str, np.ndarray] = {}
    for name, each in named("operators", operators).items():
        what = f"operators[{name!r}]"
        if isinstance(each, (MPO, TruncationInfo)):
            bonds = _bonds(what, each)
            arrays |= {f"{name}, {bond}": values for bond, values in bonds.items()}
        else:
            arrays[name] = numbers(what, each, lowest=0)
    return arrays


def _bonds(what: str, operator: MPO | TruncationInfo) -> dict[str, np.ndarray]:
    """Schmidt values of an operator's bonds, or of those that a truncation saw."""
    if isinstance(operator, MPO):
        spectra = [operator.schmidt_values(bond) for bond in range(operator.shape.sites - 1)]
    else:
        spectra = list(operator.spectra)
    if not spectra:
        raise InputError(f"{what} must have a bond, got {operator}")
    return {
        f"bond {bond}": numbers(f"{what}, bond {bond}", values, lowest=0)
        for bond, values in enumerate(spectra)
    }


def _scale(ax: Axes, values: np.ndarray) -> None:
    """A logarithmic axis from 1 down to the least value, or to zero if values are nothing more."""
    lowest = values[values >= _ROUNDING].min(initial=_LEAST)
    if values.min() < _ROUNDING:
        decades_and_zero(ax, lowest, 1.0)
    else:
        # Whole decades, and room for a marker on the lowest.
        ax.set(yscale="log", ylim=(0.7 * decade_below(lowest), None))
    ax.set(xlim=(0, 1.03), ylim=(None, 1.5))


def entropy(
    operators: MPO | TruncationInfo | Mapping[str, Any],
    ax: Axes | None = None,
    against: EntropyAxis = "bond",
    bond_dims: Sequence[int] | None = None,
) -> Axes:
    """Entanglement entropy of bonds, under the most that they can have: log(bond dimension).

    Parameters
    ----------
    operators : MPO, TruncationInfo, or mapping from str to these or to sequence of float
        One operator, or several by name (layers, say); each an MPO, what a truncation saw of it
        (``return_info=True``), or its entropies bond by bond, in nats.
    ax : Axes, optional
    against : {"bond", "layer"}
        What runs along the picture: the bonds, with a line per operator; or the operators, with
        a line per bond, which shows many of them better.
    bond_dims : sequence of int, optional
        Dimensions of the bonds of operators that are given as entropies; without, they are drawn
        without the most they can have.

    Raises
    ------
    InputError
        If there is no operator or one without bonds, an entropy is negative or not finite, or
        the numbers of bonds differ where they must not.

    Examples
    --------
    >>> from tnmoe import MPO, MPOShape
    >>> mpo = MPO.random(MPOShape((2, 2, 2), (2, 2, 2)), rng=0)
    >>> ax = entropy({"first": mpo, "second": [0.3, 0.9]}, bond_dims=(4, 4))
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('bond', 'entanglement entropy (nats)')
    """
    one_of("against", against, ENTROPY_AXES)
    single = isinstance(operators, (MPO, TruncationInfo))
    given = {"operator": operators} if single else named("operators", operators)
    lines = {name: _entropies(name, each, bond_dims) for name, each in given.items()}
    names, common = shown_apart(lines)
    bonds = max(len(values) for values, _ in lines.values())
    if against == "layer":
        lines = _by_bond(lines)
    ax = new_axes(ax)
    labels = names if against == "bond" else list(lines)
    for index, (label, (values, _)) in enumerate(zip(labels, lines.values(), strict=True)):
        ax.plot(values, label=label, **line_style(index, 0))
    limits = [(place, limit) for _, most in lines.values() for place, limit in enumerate(most)]
    if np.isfinite(limits).all(1).any():
        ax.plot(
            *zip(*limits, strict=True), "_", color=GREY, markersize=14, markeredgewidth=2, zorder=1,
            label="most possible: log(bond dimension)",
        )  # fmt: skip
    ax.set(xlabel=against, ylabel="entanglement entropy (nats)", title="Entanglement entropy")
    from_zero(ax)
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
    """Entropies of an operator's bonds and the most they can be, NaN where that is not known."""
    what = f"operators[{name!r}]"
    if isinstance(operator, (MPO, TruncationInfo)):
        spectra = _bonds(what, operator).values()
        # An operator's bond may be larger than what it carries.
        bond_dims = [len(values) for values in spectra]
        if isinstance(operator, MPO):
            bond_dims = list(operator.bond_dims)
        operator = [entanglement_entropy(values) for values in spectra]
    values = numbers(what, operator, lowest=0)
    if bond_dims is None:
        return values, np.full(len(values), np.nan)
    most = np.log(numbers("bond_dims", bond_dims, lowest=1))
    if len(most) != len(values):
        raise InputError(
            f"{what} needs one entropy for each of {len(most)} bonds, got {len(values)}"
        )
    return values, most


def _name_layers(ax: Axes, names: Sequence[str], common: str | None) -> None:
    """Layers' names along the x-axis, as many as have room."""
    shown = range(0, len(names), -(-len(names) // _MOST_TICKS))
    upright = sum(map(len, names)) > _MOST_LETTERS
    ax.set_xticks(
        shown, [names[layer] for layer in shown], rotation=90 if upright else 0,
        fontsize="small" if upright else None,
    )  # fmt: skip
    if common is not None:
        ax.set_xlabel(f"layer ({common})")


def _by_bond(
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per bond, the values of all operators."""
    counts = {name: len(values) for name, (values, _) in lines.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f'against="layer" needs operators of as many bonds each, got {counts}')
    values, most = np.transpose(list(lines.values()), (1, 2, 0))
    return {f"bond {bond}": pair for bond, pair in enumerate(zip(values, most, strict=True))}

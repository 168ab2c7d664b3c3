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
from tnmoe.plot.style import GREY, add_legend, from_zero, line_style, new_axes, shown_apart

# So many names fit along an axis, and so many letters if they lie flat.
_MOST_TICKS, _MOST_LETTERS = 40, 50


def schmidt_spectra(spectra: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Schmidt values, relative to the largest, against their share of the bond.

    Parameters
    ----------
    spectra : mapping from str to array
        Descending Schmidt values, per bond.
    ax : Axes, optional

    Raises
    ------
    InputError
        If there is no bond, or values are not finite numbers of at least 0.

    Notes
    -----
    ``ax.set_yscale("log")`` shows spectra that fall by orders of magnitude.

    Examples
    --------
    >>> from tnmoe import MPO, MPOShape
    >>> mpo = MPO.random(MPOShape((2, 2, 2), (2, 2, 2)), rng=0)
    >>> ax = schmidt_spectra({f"bond {bond}": mpo.schmidt_values(bond) for bond in range(2)})
    >>> [line.get_label() for line in ax.lines]
    ['bond 0 (dimension 4)', 'bond 1 (dimension 4)']
    """
    arrays = {
        name: numbers(f"spectra[{name!r}]", values, lowest=0)
        for name, values in named("spectra", spectra).items()
    }
    ax = new_axes(ax)
    labels, common = shown_apart(arrays)
    for index, (label, values) in enumerate(zip(labels, arrays.values(), strict=True)):
        share = (np.arange(len(values)) + 1) / len(values)
        label = f"{label} (dimension {len(values)})"
        relative = values / (values.max() or 1.0)
        ax.plot(share, relative, label=label, **line_style(index, len(values)))
    ax.set(
        xlabel="index / bond dimension",
        ylabel="Schmidt value / largest",
        ylim=(0, 1.05),
        title="Schmidt spectra",
    )
    add_legend(ax, common)
    return ax


def entropy(
    operators: MPO | Mapping[str, Any],
    ax: Axes | None = None,
    against: EntropyAxis = "bond",
    bond_dims: Sequence[int] | None = None,
) -> Axes:
    """Entanglement entropy of bonds, under the most that they can have: log(bond dimension).

    Parameters
    ----------
    operators : MPO, or mapping from str to MPO or sequence of float
        One operator, or several by name (layers, say); each an MPO or its entropies bond by bond,
        in nats.
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
    given = {"operator": operators} if isinstance(operators, MPO) else named("operators", operators)
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
    if isinstance(operator, MPO):
        if operator.shape.sites == 1:
            raise InputError(f"{what} must have a bond, got {operator}")
        bond_dims = operator.bond_dims
        operator = [operator.entropy(bond) for bond in range(len(bond_dims))]
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

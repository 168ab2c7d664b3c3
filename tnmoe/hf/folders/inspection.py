"""Reports on a conversion in advance: sizes from a configuration, spectra from the weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from tnmoe.decompose import decompose
from tnmoe.errors import InputError, check_positive_int
from tnmoe.hf.config import MPOEConfig, check_config
from tnmoe.hf.ffn import FFN, weight_of
from tnmoe.hf.files.checkpoint import Checkpoint
from tnmoe.hf.files.folder import read_config
from tnmoe.hf.find import find_ffns
from tnmoe.hf.folders.parallel import ordered_results
from tnmoe.hf.folders.skeleton import Skeleton
from tnmoe.hf.layers import mpo_settings_of
from tnmoe.hf.meta import check_unconverted_entries, config_from_entries, meta_model
from tnmoe.hf.report import ParameterReport, parameter_report
from tnmoe.shapes import MPOShape
from tnmoe.system.memory import explain_memory_error
from tnmoe.system.tables import format_table
from tnmoe.truncation.info import TruncationInfo
from tnmoe.truncation.spectra import entanglement_entropy, squared_loss, squared_tails

# Layouts in which no conversion cuts a bond of a pretrained matrix.
_UNCUT = ("residual", "dense")


@dataclass(frozen=True)
class MatrixInspection:
    """A matrix of a feed-forward network, as the MPO that a conversion would make of it.

    In the layout ``residual`` shape and bonds are those of the MPO that every expert adds to the
    matrix. The matrix itself is not decomposed, so there are no entropies and no errors.

    Attributes
    ----------
    name, family : str
    shape : MPOShape
    bond_dims : tuple of int
    entropies : tuple of float, or None
        Entropy of the Schmidt values at every bond, in nats; None if no weights were read.
    errors : dict from int to float, or None
        Bound of the relative Frobenius error, by largest bond dimension; None if no weights were
        read.

    Examples
    --------
    >>> import tempfile
    >>> from transformers import GPT2Config
    >>> folder = tempfile.mkdtemp()
    >>> GPT2Config(n_layer=1, n_embd=16, n_head=2).save_pretrained(folder)
    >>> config = MPOEConfig(num_experts=4, sites=3)
    >>> matrix = inspect_checkpoint(folder, config, weights=False).matrices[0]
    >>> matrix.family, matrix.bond_dims
    ('GPT-2', (8, 8))
    """

    name: str
    family: str
    shape: MPOShape
    bond_dims: tuple[int, ...]
    entropies: tuple[float, ...] | None = None
    errors: dict[int, float] | None = None


@dataclass(frozen=True)
class Inspection:
    """A report on what a conversion would find in a model and make of it.

    Attributes
    ----------
    architecture : str
    parameters : ParameterReport
    matrices : tuple of MatrixInspection

    Examples
    --------
    >>> import tempfile
    >>> from transformers import GPT2Config
    >>> folder = tempfile.mkdtemp()
    >>> GPT2Config(n_layer=1, n_embd=16, n_head=2).save_pretrained(folder)
    >>> found = inspect_checkpoint(folder, MPOEConfig(num_experts=4, sites=3), weights=False)
    >>> found.matrices[0].name, found.to_dict()["parameters"]["num_experts"]
    ('h.0.up', 4)
    """

    architecture: str
    parameters: ParameterReport
    matrices: tuple[MatrixInspection, ...]

    def __repr__(self) -> str:
        return (
            f"Inspection({self.architecture!r}, matrices={len(self.matrices)}, "
            f"parameters={self.parameters!r})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return {
            "architecture": self.architecture,
            "parameters": self.parameters.to_dict(),
            "matrices": [asdict(matrix) for matrix in self.matrices],
        }

    def __str__(self) -> str:
        if not self.matrices:
            return f"{self.architecture}\n\n{self.parameters}"
        first = self.matrices[0]
        headers = ["matrix", "family", "legs", "bonds"]
        if first.errors is not None:
            headers += ["entropies", *(f"error at {bond}" for bond in first.errors)]
        table = format_table(headers, [_row(matrix) for matrix in self.matrices])
        return f"{self.architecture}\n\n{table}\n\n{self.parameters}"


def inspect_checkpoint(
    path: str | os.PathLike,
    config: MPOEConfig,
    bonds: Sequence[int] | None = None,
    *,
    weights: bool = True,
    jobs: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Inspect a dense checkpoint, or a configuration alone.

    Parameters
    ----------
    path : path
        A Hugging Face folder, or a config.json alone. The counts need only a config.json.
    config : MPOEConfig
        Settings of the conversion.
    bonds : sequence of int, optional
        Largest bond dimensions to predict errors for; by default a quarter and half of the
        largest bond of all matrices.
    weights : bool
        Read the weights of a folder, a network at a time. The layouts ``residual`` and ``dense``
        cut no bond, so that there is nothing to predict, and no weights are read.
    jobs : int, optional
        Number of networks that are read at the same time; the number of CPUs by default.
    on_progress : callable, optional
        Called with the number of networks that are done, and with the number of all.

    Returns
    -------
    Inspection

    Raises
    ------
    InputError
        If the checkpoint is incomplete or damaged, its tensors do not suit its config.json,
        nothing in it can be converted, or it is converted or quantized already; or if ``bonds`` are
        given for a layout that cuts none.

    Notes
    -----
    A predicted error comes from the Schmidt values s of the bonds. If every bond is cut to r, the
    error is at most sqrt(Σ over bonds, Σ_{i > r} s_i²) (Oseledets, SIAM J. Sci. Comput. 33, 2295
    (2011), theorem 2.2). It never exceeds the norm of the matrix, since truncation projects.

    Examples
    --------
    >>> import tempfile
    >>> from transformers import GPT2Config, GPT2Model
    >>> folder = tempfile.mkdtemp()
    >>> GPT2Model(GPT2Config(n_layer=1, n_embd=16, n_head=2)).save_pretrained(folder)
    >>> found = inspect_checkpoint(folder, MPOEConfig(num_experts=4, sites=3), bonds=[4, 8])
    >>> [(matrix.name, matrix.bond_dims) for matrix in found.matrices]
    [('h.0.up', (8, 8)), ('h.0.down', (8, 8))]
    >>> found.matrices[0].errors[4] > 0.1 > found.matrices[0].errors[8]
    True
    """
    check_config(config)
    path = Path(path).absolute()
    entries = read_config(path)
    check_unconverted_entries(entries, path)
    bonds = None if bonds is None else [check_positive_int("every bond", bond) for bond in bonds]
    cuts_bonds = config.layout not in _UNCUT
    if bonds is not None and not cuts_bonds:
        raise InputError(
            f"bonds are for layouts that may cut some, got bonds={bonds} with "
            f"layout={config.layout!r}"
        )
    if path.is_file() or not weights or not cuts_bonds:
        model = meta_model(config_from_entries(entries))
        ffns = find_ffns(model, config.layers, config.every)
        matrices = [matrix for ffn in ffns for matrix in _describe(ffn, config)]
    else:
        skeleton = Skeleton(Checkpoint(path))
        model = skeleton.model
        matrices = list(_measure(skeleton, config, bonds, jobs, on_progress))
    return Inspection(type(model).__name__, parameter_report(model, config), tuple(matrices))


def _describe(ffn: FFN, config: MPOEConfig) -> Iterator[MatrixInspection]:
    """Describe the matrices of a network that become MPOs, by their sizes."""
    for name, settings in mpo_settings_of(ffn, config).items():
        yield MatrixInspection(f"{ffn.name}.{name}", ffn.family, settings.shape, settings.bond_dims)


def _measure(
    skeleton: Skeleton,
    config: MPOEConfig,
    bonds: list[int] | None,
    jobs: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[MatrixInspection]:
    """Describe the matrices of all networks, with the spectra of their weights."""
    networks = skeleton.networks(config)
    if bonds is None:
        shapes = [matrix.shape for ffn, _ in networks for matrix in _describe(ffn, config)]
        largest = max(max(shape.bond_dims()) for shape in shapes)
        bonds = sorted({max(1, largest // 4), max(1, largest // 2)})
    tasks = [
        partial(_measure_network, skeleton, ffn, names, config, bonds) for ffn, names in networks
    ]
    for done, matrices in enumerate(ordered_results(tasks, jobs), start=1):
        if on_progress is not None:
            on_progress(done, len(networks))
        yield from matrices


@torch.no_grad()
def _measure_network(
    skeleton: Skeleton, ffn: FFN, names: list[str], config: MPOEConfig, bonds: list[int]
) -> list[MatrixInspection]:
    """Describe the matrices of a network, with the spectra of their weights."""
    found = []
    purpose = f"measuring {ffn.name}: fewer networks at a time (--jobs) take less"
    with explain_memory_error(purpose), skeleton.filled(names):
        for described in _describe(ffn, config):
            weight = weight_of(ffn.matrices[described.name.rpartition(".")[2]])
            info = decompose(weight, described.shape, method="eigh", return_info=True)[1]
            found.append(_with_spectra(described, info, bonds))
    return found


def _with_spectra(
    described: MatrixInspection, info: TruncationInfo, bonds: list[int]
) -> MatrixInspection:
    spectra = [spectrum.numpy() for spectrum in info.spectra]
    tails = [squared_tails(spectrum) for spectrum in spectra]
    squared_norm = max(tail[0] for tail in tails) or 1.0  # the error of a matrix of zeros is zero
    errors = {
        bond: min(1.0, sqrt(squared_loss(tails, [bond] * len(tails)) / squared_norm))
        for bond in bonds
    }
    entropies = tuple(entanglement_entropy(spectrum) for spectrum in spectra)
    return replace(described, entropies=entropies, errors=errors)


def _row(matrix: MatrixInspection) -> list[str]:
    legs = (matrix.shape.out_dims, matrix.shape.in_dims)
    row = [
        matrix.name,
        matrix.family,
        " × ".join("·".join(map(str, dims)) for dims in legs),
        " ".join(map(str, matrix.bond_dims)),
    ]
    if matrix.entropies is not None and matrix.errors is not None:
        row.append(" ".join(f"{entropy:.2f}" for entropy in matrix.entropies))
        row += [f"{error:.4f}" for error in matrix.errors.values()]
    return row

"""Ways to make the experts of a mixture smaller, written afresh from the papers' descriptions.

A method takes the layers of a model and the share of the experts' numbers to keep, and returns
compressed experts. A method sees the calibration tokens of ``Layer`` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import numpy as np
import tensorly
import torch
from compression_calibration import Layer, damped, roots
from compression_forms import (
    Basis,
    Chain,
    Experts,
    Product,
    Sum,
    Together,
    Transposed,
    Whole,
    balanced,
    experts_of,
)  # fmt: skip
from compression_product import product
from compression_rounding import quantised
from scipy.cluster.hierarchy import fcluster, linkage
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn

from tnmoe import MPOShape, decompose_batch, decompose_shared

Method = Callable[[Sequence[Layer], float], list[Experts]]
NAMES = ("up", "gate", "down")


def each_layer(method: Callable[..., Experts]) -> Callable[..., list[Experts]]:
    """Apply a method to all layers alike."""

    @wraps(method)
    def apply(layers: Sequence[Layer], share: float, **options: Any) -> list[Experts]:
        return [method(layer, share, **options) for layer in layers]

    return apply


def each_matrix(method: Callable[..., nn.Module]) -> Callable[..., list[Experts]]:
    """Apply a method to all stacks of matrices alike."""

    @wraps(method)
    def apply(layer: Layer, share: float, **options: Any) -> Experts:
        return experts_of({name: method(layer, name, share, **options) for name in NAMES})

    return each_layer(apply)


@each_matrix
def truncated(layer: Layer, name: str, share: float, *, whitened: bool = False) -> nn.Module:
    """Truncate the singular values of every matrix; whitened this is SVD-LLM (2403.07378)."""
    matrices = getattr(layer, name).double()
    rows, columns = matrices.shape[1:]
    rank = max(1, int(share * rows * columns / (rows + columns)))
    root = inverse = torch.eye(columns, dtype=torch.float64)
    if whitened:
        root, inverse = roots(layer.moments(name))
    u, s, v = torch.linalg.svd(matrices @ root, full_matrices=False)
    first, second = u[..., :rank] * s[:, None, :rank], v[:, :rank] @ inverse
    return Product(*map(Whole, balanced(first, second)))


@each_matrix
def separate_mpo(layer: Layer, name: str, share: float) -> nn.Module:
    """Decompose every matrix into an MPO of its own (arXiv:1509.06569)."""
    matrices = getattr(layer, name).double()
    rows, columns = matrices.shape[1:]
    shape = MPOShape.for_matrix(rows, columns, sites=3)
    mpos = decompose_batch(matrices, shape, max_params=int(share * rows * columns))
    # The experts differ in their bonds.
    return Together([
        Chain([Whole(core) for core in mpo.cores], 1, rows, columns) for mpo in mpos
    ])  # fmt: skip


@each_matrix
def joint_mpo(layer: Layer, name: str, share: float, *, weighed: bool = False) -> nn.Module:
    """Share the central core of interleaved MPOs, with bonds as large as the budget allows."""
    matrices = getattr(layer, name).double()
    count, rows, columns = matrices.shape
    shape = MPOShape.for_matrix(rows, columns, sites=3)
    weights = layer.moments(name).double() if weighed else None
    shared = decompose_shared(
        matrices, shape, max_params=int(share * matrices.numel()), max_sweeps=20, weights=weights
    )
    return Chain([Whole(core) for core in shared.cores], count, rows, columns)


def _rank_beside_base(matrices: Tensor, share: float) -> int:
    count, rows, columns = matrices.shape
    rest = share * matrices.numel() - rows * columns
    return min(int(rest // (count * (rows + columns))), rows, columns)


def _base_alone(matrices: Tensor) -> nn.Module:
    return Product(Whole(matrices.mean(0, keepdim=True)), Whole(torch.eye(matrices.shape[2])[None]))


@each_matrix
def delta_decomposition(layer: Layer, name: str, share: float) -> nn.Module:
    """Merge by Fisher information, and keep what is left at low rank (D²-MoE, arXiv:2502.17298).

    The deltas are whitened by activations, as there. The paper's pruning of the base is left out.
    """
    matrices = getattr(layer, name).double()
    rank = _rank_beside_base(matrices, share)
    if rank < 1:
        return _base_alone(matrices)
    # The paper has one number per expert: the mean over the matrix.
    shares = layer.fisher[name].double()[:, None, None] + 1e-12
    base = (shares * matrices).sum(0, keepdim=True) / shares.sum()
    root, inverse = roots(layer.moments(name))
    u, s, v = torch.linalg.svd((matrices - base) @ root, full_matrices=False)
    first, second = balanced(u[..., :rank] * s[:, None, :rank], v[:, :rank] @ inverse)
    return Sum(Whole(base), Product(Whole(first), Whole(second)))


@each_matrix
def basis_combinations(layer: Layer, name: str, share: float, *, steps: int = 400) -> nn.Module:
    """Combine few matrices that experts share, W_e = A_e tanh(Σ_j α_ej B_j) (MoBE, 2508.05257).

    A_e is square on the smaller side, as in the paper, and narrower where the budget asks for it.
    Adam fits all factors to normalised matrices. The paper leaves ``down`` as it is; here the
    budget covers all three matrices.
    """
    matrices = getattr(layer, name).float()
    flip = matrices.shape[1] > matrices.shape[2]
    targets = matrices.mT if flip else matrices
    count, small, large = targets.shape
    budget = share * matrices.numel()
    rank, bases = _basis_sizes(count, small, large, budget)
    draw = torch.Generator().manual_seed(0)
    scale = targets.std()
    form = Product(
        Whole(torch.randn(count, small, rank, generator=draw) * rank**-0.5),
        Basis(
            torch.randn(count, bases, generator=draw) * bases**-0.5,
            torch.randn(bases, rank, large, generator=draw),
        ),
    )
    optimizer = torch.optim.Adam(form.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = (form() - targets / scale).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    first = form.factors[0]
    assert isinstance(first, Whole)
    first.value.data *= scale
    return Transposed(form) if flip else form


def _basis_sizes(count: int, small: int, large: int, budget: float) -> tuple[int, int]:
    """Return the rank and the number of bases: half of the budget for A at most, as it fits."""
    rank = min(small, int(0.6 * budget // (count * small)))
    bases = int((budget - count * small * rank) // (rank * large + count))
    return rank, max(1, min(bases, count))


@each_matrix
def tucker(layer: Layer, name: str, share: float) -> nn.Module:
    """Write all matrices as one tensor with common bases of rows and columns (tensorly)."""
    tensorly.set_backend("numpy")
    matrices = getattr(layer, name).double()
    count, rows, columns = matrices.shape
    budget = share * matrices.numel()
    fits = [
        (p, q)
        for p, q in ((round(t * rows), round(t * columns)) for t in np.linspace(0.05, 1, 300))
        if count * p * q + rows * p + columns * q <= budget
    ]
    p, q = fits[-1]
    (core, (first, second)), _ = partial_tucker(
        matrices.numpy(), rank=[p, q], modes=[1, 2], n_iter_max=30
    )
    core, first, second = (torch.from_numpy(np.ascontiguousarray(x)) for x in (core, first, second))
    return Product(Whole(first[None]), Whole(core), Whole(second.mT[None]))


@each_layer
def prune_experts(layer: Layer, share: float) -> Experts:
    """Keep the experts with the largest router-weighted activation (REAP, arXiv:2510.13999)."""
    keep = max(2, int(share * len(layer.up) + 1e-9))
    score = layer.activation / layer.slots.clamp_min(1)
    kept = sorted(score.argsort(descending=True)[:keep].tolist())
    return Experts(*(Whole(getattr(layer, name)[kept]) for name in NAMES), kept=kept)


@each_layer
def merge_experts(layer: Layer, share: float) -> Experts:
    """Average experts whose mean outputs are near, by frequency (HC-SMoE, arXiv:2410.08589)."""
    keep = max(1, int(share * len(layer.up) + 1e-9))
    tree = linkage(layer.mean_outputs.double().numpy(), method="average")
    owner = fcluster(tree, keep, criterion="maxclust") - 1
    slots = layer.slots.clamp_min(1)
    merged = []
    for name in NAMES:
        matrices = getattr(layer, name)
        groups = [torch.from_numpy(owner == number) for number in range(owner.max() + 1)]
        merged.append(torch.stack([
            (matrices[group] * slots[group, None, None]).sum(0) / slots[group].sum()
            for group in groups
        ]))  # fmt: skip
    return Experts(*map(Whole, merged), owner=owner.tolist())


def prune_units(layers: Sequence[Layer], share: float, *, spread: bool = False) -> list[Experts]:
    """Keep the hidden units that the loss needs most, and let ``down`` make up for the others.

    Without a unit the outputs lose ‖column of down‖² / (S⁻¹)_uu, if the other columns change such
    that they lose least (optimal brain surgeon, Hassibi and Stork, NIPS 1992); the norm is weighed
    by the derivatives of the loss. With ``spread``, units compete over the whole model.
    """
    scores = torch.stack([_unit_scores(layer) for layer in layers])
    if spread:
        scores = scores.reshape(1, 1, -1)
    count = max(1, int(share * scores.shape[-1]))
    kept = torch.zeros_like(scores).scatter(-1, scores.topk(count, dim=-1).indices, 1.0).bool()
    kept = kept.reshape(len(layers), *layers[0].up.shape[:2])
    return [_with_units(layer, mask) for layer, mask in zip(layers, kept, strict=True)]


def _unit_scores(layer: Layer) -> Tensor:
    """Return what the loss of every unit costs, (E, F)."""
    outputs = layer.gradients.double() / layer.slots.clamp_min(1)[:, None, None]
    energy = torch.einsum("ehf,ehk,ekf->ef", layer.down.double(), outputs, layer.down.double())
    return energy / torch.linalg.inv(damped(layer.hidden)).diagonal(dim1=1, dim2=2)


def _with_units(layer: Layer, kept: Tensor) -> Experts:
    """Set the units outside a mask (E, F) to zero, where training leaves them; none is stored."""
    moments, down = damped(layer.hidden), torch.zeros_like(layer.down)
    for expert, mask in enumerate(kept):
        inner = moments[expert][mask][:, mask]
        cross = layer.down[expert].double() @ moments[expert][:, mask]
        down[expert][:, mask] = torch.linalg.solve(inner, cross.mT).mT.float()
    free = int((~kept).sum()) * layer.up.shape[2]
    rows = kept[..., None].float()
    return Experts(Whole(layer.up * rows, free), Whole(layer.gate * rows, free), Whole(down, free))


def unchanged(layers: Sequence[Layer], share: float) -> list[Experts]:
    """Keep all matrices."""
    return [Experts(*(Whole(getattr(layer, name)) for name in NAMES)) for layer in layers]


METHODS: dict[str, Method] = {
    "SVD": truncated,
    "SVD, whitened": partial(truncated, whitened=True),
    "MPO": separate_mpo,
    "D²-MoE": delta_decomposition,
    "MoBE": basis_combinations,
    "Tucker": tucker,
    "REAP": prune_experts,
    "HC-SMoE": merge_experts,
    "unit pruning": partial(prune_units, spread=True),
    "tnmoe": product,
    "tnmoe hidden": partial(product, layout="hidden"),
    "tnmoe residual": partial(product, layout="residual"),
    "tnmoe interleaved": joint_mpo,
}

# Methods whose stored numbers are rounded, and the shares of numbers at which they run.
QUANTISED: dict[str, tuple[Method, tuple[float, ...]]] = {
    **{
        f"{name}{bits}": (
            partial(quantised, method=unchanged, bits=bits, calibrated=calibrated), (1.0,)
        )
        for name, calibrated in (("int", False), ("GPTQ ", True))
        for bits in (8, 4, 3, 2)
    },
    **{
        f"{name}, GPTQ {bits}": (
            partial(quantised, method=method, bits=bits, calibrated=True),
            (0.9, 0.75, 0.6, 0.5, 0.4),
        )
        for name, method in (
            ("tnmoe", partial(product, gauge=False)),
            ("unit pruning", METHODS["unit pruning"]),
        )
        for bits in (4, 3)
    },
}  # fmt: skip

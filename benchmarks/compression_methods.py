"""Ways to make the experts of a mixture smaller, written afresh from the papers' descriptions.

A method takes the layers of a model and the share of the experts' numbers to keep, and returns
compressed experts. A method sees the calibration tokens of ``Layer`` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import numpy as np
import tensorly
import torch
from compression_calibration import Layer, damped, roots
from compression_families import (
    JOINT,
    SEPARATE,
    Family,
    Metric,
    Stack,
    balanced,
    basis_and_own,
    distributed,
    owned_family,
    shared_family,
    stack,
    take,
    tall_stack,
    uniform,
)  # fmt: skip
from compression_forms import (
    Basis,
    Chain,
    Experts,
    Product,
    Sum,
    Together,
    Transposed,
    Whole,
    experts_of,
)  # fmt: skip
from compression_mixed import ranks_and_bits
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


def low_rank(
    layers: Sequence[Layer],
    share: float,
    *,
    family: Callable[..., Family],
    metric: Metric,
    spend: Callable[..., list[list[nn.Module]]] = uniform,
    groups: Sequence[tuple[str, ...]] = SEPARATE,
    stacked: Callable[..., Stack] = stack,
    apart: bool = False,
) -> list[Experts]:
    """Take a form of low rank for every stack, or with ``apart`` for every single matrix."""
    stacks = [[stacked(layer, names, metric) for names in groups] for layer in layers]
    families = [
        [family(each) for whole in layer for each in (whole.apart() if apart else [whole])]
        for layer in stacks
    ]
    results = []
    for layer, given, forms in zip(layers, stacks, spend(families, share), strict=True):
        parts: dict[str, nn.Module] = {}
        left = iter(forms)
        for whole in given:
            form = Together([next(left) for _ in whole.matrices]) if apart else next(left)
            parts |= take(form, whole, layer)
        results.append(experts_of(parts))
    return results


@each_layer
def basis_with_own(layer: Layer, share: float, *, own_share: float) -> Experts:
    """Add low-rank matrices of experts' own to a shared basis."""
    parts: dict[str, nn.Module] = {}
    for names in JOINT:
        given = stack(layer, names, "both")
        parts |= take(basis_and_own(given, own_share, share), given, layer)
    return experts_of(parts)


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


@each_layer
def hidden(
    layer: Layer, share: float, *, metric: Metric, joint: bool = False, relative: bool = False
) -> Experts:
    """Share one basis per stack by ``tnmoe.decompose_shared``: two sites, of which one is owned.

    Errors count absolutely, by the importance of experts, or with ``relative`` as shares of each
    expert's own outputs.
    """
    parts: dict[str, nn.Module] = {}
    for names in JOINT if joint else SEPARATE:
        given = stack(layer, names, metric)
        mirrored = names == ("down",)
        outputs = given.outputs.mean(0, keepdim=True) if mirrored else given.outputs
        root, inverse = roots(outputs)
        matrices = root @ given.matrices
        sizes = torch.einsum("eoi,eij,eoj->e", matrices, damped(given.inputs), matrices)
        count, rows, columns = matrices.shape
        cost = rows + count * columns if mirrored else count * rows + columns
        exact = rows if mirrored else columns
        shared = decompose_shared(
            matrices,
            MPOShape((rows, 1), (1, columns)),
            max_bond=min(exact, max(1, int(share * matrices.numel()) // cost)),
            shared_sites=[0 if mirrored else 1],
            weights=None if metric == "plain" else given.inputs,
            importance=None if relative else sizes.tolist(),
        )
        parts |= take(_two_sites(shared.cores, inverse), given, layer)
    return experts_of(parts)


def _two_sites(cores: Sequence[Tensor], outputs: Tensor | None = None) -> nn.Module:
    """Return the product of two cores (…, 1, out, 1, r) and (…, r, 1, in, 1).

    ``outputs`` multiplies the first one from the left.
    """
    first, second = cores
    first, second = first[..., 0, :, 0, :], second[..., 0, :, 0]
    first = first if first.ndim == 3 else first[None]
    second = second if second.ndim == 3 else second[None]
    if outputs is not None:
        first = outputs @ first
    return Product(Whole(first), Whole(second))


@each_matrix
def residual(layer: Layer, name: str, share: float, *, weighed: bool) -> nn.Module:
    """Add chains of two sites to a common matrix by ``tnmoe.decompose_shared``."""
    matrices = getattr(layer, name).double()
    rank = _rank_beside_base(matrices, share)
    if rank < 1:
        return _base_alone(matrices)
    weights = layer.moments(name).double() if weighed else None
    shared = decompose_shared(
        matrices, residual=True, max_bond=rank, weights=weights, max_sweeps=20
    )
    assert shared.base is not None
    return Sum(Whole(shared.base.cores[0][0, :, :, 0][None]), _two_sites(shared.cores))


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
    fisher = layer.fisher[name].double() + 1e-12
    # The paper has one number per expert: the mean over the matrix.
    shares = fisher.mean((1, 2), keepdim=True)
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
    outputs = layer.gradients["down"].double() / layer.slots.clamp_min(1)[:, None, None]
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


def units_and_basis(layers: Sequence[Layer], share: float, *, balance: float) -> list[Experts]:
    """Remove hidden units first, and share a basis between what is left.

    ``balance`` is the part of the saving, on a logarithmic scale, that units bring.
    """
    pruned = prune_units(layers, share**balance, spread=False)
    smaller = [_only_units(layer, experts) for layer, experts in zip(layers, pruned, strict=True)]
    return low_rank(
        smaller, share ** (1 - balance), family=shared_family, metric="both", groups=JOINT
    )


def _only_units(layer: Layer, pruned: Experts) -> Layer:
    """Return a layer with as many units as each expert has left."""
    with torch.no_grad():
        up, gate, down = pruned.matrices()
    units = (up.abs().sum(2) > 0).float().topk(int((up[0].abs().sum(1) > 0).sum()), dim=1).indices
    units = units.sort(dim=1).values
    rows = torch.arange(len(up))[:, None]
    square = units[:, :, None], units[:, None, :]
    gradients = {
        name: each[(rows[..., None], *square)] if name != "down" else each
        for name, each in layer.gradients.items()
    }
    return replace(
        layer, up=up[rows, units], gate=gate[rows, units],
        down=down.mT[rows, units].mT, hidden=layer.hidden[(rows[..., None], *square)],
        gradients=gradients,
    )  # fmt: skip


def unchanged(layers: Sequence[Layer], share: float) -> list[Experts]:
    """Keep all matrices."""
    return [Experts(*(Whole(getattr(layer, name)) for name in NAMES)) for layer in layers]


def _low_rank(family: Callable[..., Family], metric: Metric, **options: Any) -> Method:
    return partial(low_rank, family=family, metric=metric, **options)


METHODS: dict[str, Method] = {
    "SVD": _low_rank(owned_family, "plain"),
    "SVD, whitened": _low_rank(owned_family, "inputs"),
    "SVD, whitened, gauge": _low_rank(partial(owned_family, gauge=True), "inputs"),
    "MPO": separate_mpo,
    "D²-MoE": delta_decomposition,
    "MoBE": basis_combinations,
    "Tucker": tucker,
    "REAP": prune_experts,
    "HC-SMoE": merge_experts,
    "unit pruning": prune_units,
    "unit pruning, spread": partial(prune_units, spread=True),
    "units and basis": partial(units_and_basis, balance=0.5),
    "tnmoe interleaved": joint_mpo,
    "tnmoe residual": partial(residual, weighed=False),
    "tnmoe residual, moments": partial(residual, weighed=True),
    "tnmoe hidden": partial(hidden, metric="plain", relative=True),
    "tnmoe hidden, moments": partial(hidden, metric="inputs", relative=True),
    "tnmoe hidden, moments, importance": partial(hidden, metric="inputs"),
    "tnmoe hidden, moments, importance, joint": partial(hidden, metric="inputs", joint=True),
    "tnmoe hidden, both, importance, joint": partial(hidden, metric="both", joint=True),
    "basis, moments": _low_rank(shared_family, "inputs"),
    "basis, both": _low_rank(shared_family, "both"),
    "basis, both, joint": _low_rank(shared_family, "both", groups=JOINT),
    "basis, both, spread": _low_rank(shared_family, "both", spend=distributed),
    "basis, both, joint, spread": _low_rank(shared_family, "both", groups=JOINT, spend=distributed),
    "SVD, both, gauge, by expert": _low_rank(
        partial(owned_family, gauge=True), "both", spend=distributed, apart=True
    ),
    "pair, both, gauge": _low_rank(
        partial(owned_family, gauge=True), "both", groups=JOINT, stacked=tall_stack
    ),
    "pair, both, gauge, by expert": _low_rank(
        partial(owned_family, gauge=True),
        "both",
        groups=JOINT,
        stacked=tall_stack,
        spend=distributed,
        apart=True,
    ),
    "SVD, inputs, gauge, by expert": _low_rank(
        partial(owned_family, gauge=True), "inputs", spend=distributed, apart=True
    ),
    "basis, both, joint, own 20 %": partial(basis_with_own, own_share=0.2),
    "SVD, both, gauge": _low_rank(partial(owned_family, gauge=True), "both"),
    "SVD, both, gauge, spread": _low_rank(
        partial(owned_family, gauge=True), "both", spend=distributed
    ),
}

# Shares of the bytes at which methods run that choose bits.
_BYTES = (0.266, 0.203, 0.141, 0.1)
# Methods whose stored numbers are rounded, and the shares of numbers at which they run.
QUANTISED: dict[str, tuple[Method, tuple[float, ...]]] = {
    **{
        f"int{bits}": (partial(quantised, method=unchanged, bits=bits), (1.0,))
        for bits in (8, 4, 3, 2)
    },
    **{
        f"GPTQ {bits}": (partial(quantised, method=unchanged, bits=bits, calibrated=True), (1.0,))
        for bits in (8, 4, 3, 2)
    },
    **{
        f"{name}, int{bits}": (partial(quantised, method=METHODS[name], bits=bits), shares)
        for name in (
            "tnmoe hidden, both, importance, joint",
            "basis, both, joint, spread",
            "unit pruning, spread",
            "SVD, both, gauge, by expert",
            "pair, both, gauge, by expert",
        )
        for bits, shares in ((8, (0.75, 0.5)), (4, (0.9, 0.75, 0.5)))
    },
    **{
        f"{name}, GPTQ {bits}": (
            partial(quantised, method=METHODS[name], bits=bits, calibrated=True),
            (0.9, 0.75, 0.5),
        )
        for name in ("SVD, both, gauge, by expert", "pair, both, gauge, by expert")
        for bits in (4, 3)
    },
    "bits by matrix": (partial(ranks_and_bits, ranks=False), _BYTES),
    "ranks and bits": (ranks_and_bits, _BYTES),
    "bits by matrix, GPTQ": (partial(ranks_and_bits, ranks=False, calibrated=True), _BYTES),
    "ranks and bits, GPTQ": (partial(ranks_and_bits, calibrated=True), _BYTES),
}

"""Chains that a joint decomposition starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

from tnmoe.backends import Array, Backend, get_backend
from tnmoe.chains.canonical import canonicalize
from tnmoe.chains.interleave import interleave
from tnmoe.chains.shared_fit import inverse_root
from tnmoe.decompose import decompose, decompose_batch
from tnmoe.mpo import MPO
from tnmoe.options import Method
from tnmoe.shapes import MPOShape, joint_shape

# Rows of a Gram matrix beyond which random projections pay, if they look for fewer vectors than a
# part of these rows.
_LARGE_GRAM = 2048
_FEW = 8

# Rounds in which the central cores of all experts turn towards their mean.
_ROUNDS = 10


def joint_matrix(xp: Backend, matrices: Array, shape: MPOShape, site: int) -> Array:
    """Write the matrices of all experts as one matrix with the legs of :func:`joint_shape`."""
    if tuple(matrices.shape[1:]) != (shape.padded_out, shape.padded_in):
        matrices = xp.pad(matrices, shape.padded_out, shape.padded_in)
    before, after = prod(shape.out_dims[:site]), prod(shape.out_dims[site:])
    rows = xp.permute(matrices.reshape(-1, before, after, shape.padded_in), (1, 0, 2, 3))
    return rows.reshape(-1, shape.padded_in)


def split_experts(xp: Backend, core: Array, num_experts: int) -> Array:
    """Split the core of the site that tells experts apart: (D, E · out, in, D') → (E, D, …)."""
    bond, rows, in_, after = core.shape
    split = core.reshape(bond, num_experts, rows // num_experts, in_, after)
    return xp.permute(split, (1, 0, 2, 3, 4))


def joint_sweep(
    matrices: Array, shape: MPOShape, site: int, center_site: int, **limits: Any
) -> list[Array]:
    """Decompose all matrices as one whose rows a site tells apart; the experts share the others.

    Parameters
    ----------
    matrices, shape, center_site
        As for :func:`tnmoe.decompose_shared`.
    site : int
        Whose cores experts own.
    **limits
        Limits and method of :func:`tnmoe.decompose`.

    Returns
    -------
    list of array, shapes (1, D, out, in, D'), and (E, D, out, in, D') at the site
    """
    xp = get_backend(matrices)
    whole = joint_shape(shape, site, matrices.shape[0])
    joint = joint_matrix(xp, matrices, shape, site)
    if limits.get("method") == "auto" and _pays_to_project(whole, limits):
        limits["method"] = "randomized"
    mpo = decompose(joint, whole, center_site=center_site, **limits)
    cores = [core[None] for core in mpo.cores]
    cores[site] = split_experts(xp, mpo.cores[site], matrices.shape[0])
    return cores


def with_best_owned(
    matrices: Array, cores: Sequence[Array], shape: MPOShape, site: int
) -> list[Array]:
    """Replace the cores of the one site that experts own by the best ones beside the others.

    The other cores become isometries towards the site, onto which every matrix is projected.

    Parameters
    ----------
    matrices : array, shape (E, out_features, in_features)
    cores : sequence of array, shapes (1, D, out, in, D'), and (E, D, out, in, D') at the site
    shape : MPOShape
        Legs of the chains.
    site : int
        Whose cores experts own.
    """
    xp, count = get_backend(matrices), matrices.shape[0]
    _, _, out, in_, _ = cores[site].shape
    # The first expert's core stands at the site: its numbers do not matter.
    common = list(canonicalize(xp, [core[0] for core in cores], None, site))
    before, after = xp.eye(1, like=common[0]), xp.eye(1, like=common[0])
    for core in common[:site]:
        before = (before @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[-1])
    for core in common[:site:-1]:
        after = (core.reshape(-1, core.shape[-1]) @ after).reshape(core.shape[0], -1)
    tensor = interleave(xp, matrices, shape, site)
    tensor = xp.adjoint(before) @ tensor.reshape(count, tensor.shape[1], -1)
    tensor = tensor.reshape(count, before.shape[1] * out * in_, -1) @ xp.adjoint(after)
    found = [core[None] for core in common]
    found[site] = tensor.reshape(count, before.shape[1], out, in_, after.shape[0])
    return found


def _pays_to_project(whole: MPOShape, limits: Mapping[str, Any]) -> bool:
    """Return whether random projections find a few of many Schmidt vectors sooner.

    Otherwise a Gram matrix with a row for every leg of every expert would be diagonalised.
    """
    sizes = limits.get("bonds") or limits.get("max_bond")
    if sizes is None or limits.get("rtol") is not None or limits.get("max_params") is not None:
        return False
    pairs = zip(whole.bond_dims(), whole.bond_dims(sizes), strict=True)
    return any(exact > _LARGE_GRAM and exact >= _FEW * bond for exact, bond in pairs)


def starts(
    matrices: Array,
    shape: MPOShape,
    owned: Sequence[int],
    bonds: Sequence[int],
    center_site: int,
    *,
    method: Method,
) -> Iterator[tuple[str, list[Array]]]:
    """Yield chains to start from, and what they are.

    Some are optimal where the experts own a single site: that site tells the experts apart, and the
    others have their cores in common. The last one has the cores of every expert's own sweep,
    turned towards each other.

    Yields
    ------
    str
        Name of the start.
    list of array, shapes (E, D, out, in, D') or (1, D, out, in, D')
        With the given bonds.
    """
    xp, shared = get_backend(matrices), set(range(shape.sites)) - set(owned)
    if not shared or matrices.shape[0] == 1:
        mpos = decompose_batch(
            matrices, shape, max_bond=list(bonds), center_site=center_site, method=method
        )
        cores = [xp.stack(each) for each in zip(*(mpo.cores for mpo in mpos), strict=True)]
        yield "own sweeps", _with_owners(xp, cores, owned, bonds, matrices.shape[0])
        return
    for site in owned:
        cores = joint_sweep(matrices, shape, site, center_site, max_bond=list(bonds), method=method)
        yield (
            f"joint sweep at site {site}",
            _with_owners(xp, cores, owned, bonds, matrices.shape[0]),
        )
    if shared == {center_site}:
        sizes = shape.bond_dims(list(bonds))
        mpos = decompose_batch(
            matrices, shape, max_bond=sizes, center_site=center_site, method=method
        )
        cores = _aligned(xp, mpos, center_site)
        yield "aligned sweeps", _with_owners(xp, cores, owned, bonds, matrices.shape[0])


def _with_owners(
    xp: Backend, cores: Sequence[Array], owned: Sequence[int], bonds: Sequence[int], experts: int
) -> list[Array]:
    """Copy common cores that experts own, and fill the bonds up with zeros."""
    filled = []
    for site, (core, (left, right)) in enumerate(zip(cores, pairwise((1, *bonds, 1)), strict=True)):
        if site in owned and core.shape[0] == 1:
            core = xp.concatenate([core] * experts, 0)
        count, before, out, in_, after = core.shape
        core = xp.pad(core.reshape(count, before, -1), left, out * in_ * after)
        core = xp.pad(core.reshape(count, left * out * in_, after), left * out * in_, right)
        filled.append(core.reshape(count, left, out, in_, right))
    return filled


def _aligned(xp: Backend, mpos: Sequence[MPO], center_site: int) -> list[Array]:
    """Turn the bonds around the central cores such that these cores resemble each other.

    The central cores are first brought to their higher-order SVD (De Lathauwer, De Moor,
    Vandewalle, SIAM J. Matrix Anal. Appl. 21, 1253 (2000)), which is unique up to signs where the
    singular values differ, and get the signs of the first one. Then every core turns towards the
    mean of all, left and right by turns (orthogonal Procrustes problems).

    Returns
    -------
    list of array
        The mean of the central cores, (1, D, out, in, D'), between the others, (E, D, out, in, D').
    """
    cores = [xp.stack(each) for each in zip(*(mpo.cores for mpo in mpos), strict=True)]
    count, left, out, in_, right = cores[center_site].shape
    center = cores[center_site].reshape(count, left, out * in_ * right)
    turn_left = xp.adjoint(xp.eigh(center @ xp.adjoint(center))[1])
    center = (turn_left @ center).reshape(count, left * out * in_, right)
    turn_right = xp.eigh(xp.adjoint(center) @ center)[1]
    center = center @ turn_right
    signs = _signs(xp, center.reshape(count, left, out * in_, right))
    turn_left, turn_right = xp.conj(signs[0]) * turn_left, turn_right * signs[1]
    center = center.reshape(count, left, -1) * xp.conj(signs[0])
    center = center.reshape(count, left * out * in_, right) * signs[1]
    mean = center[:1]
    for _ in range(_ROUNDS):
        rows = center.reshape(count, left, out * in_ * right)
        turn = _polar(xp, mean.reshape(1, left, -1) @ xp.adjoint(rows))
        center = (turn @ rows).reshape(count, left * out * in_, right)
        turn_left = turn @ turn_left
        turn = _polar(xp, xp.adjoint(center) @ mean.reshape(1, left * out * in_, right))
        center, turn_right = center @ turn, turn_right @ turn
        ones = xp.zeros((1, count), like=center) + 1.0 / count
        mean = (ones @ center.reshape(count, -1)).reshape(1, left * out * in_, right)
    cores[center_site] = mean.reshape(1, left, out, in_, right)
    if center_site:
        before = cores[center_site - 1]
        matrix = before.reshape(count, -1, left) @ xp.adjoint(turn_left)
        cores[center_site - 1] = matrix.reshape(before.shape)
    if center_site + 1 < len(cores):
        after = cores[center_site + 1]
        matrix = xp.adjoint(turn_right) @ after.reshape(count, right, -1)
        cores[center_site + 1] = matrix.reshape(after.shape)
    return cores


def _signs(xp: Backend, centers: Array) -> tuple[Array, Array]:
    """Return signs or phases, (E, D, 1) and (E, 1, D'), by which cores differ from the first one.

    If the cores (D, legs, D') are s_a · C[a, :, b] · t_b*, their products with C, summed over the
    legs, are s_a · t_b* times positive numbers. The leading singular vectors then have the signs.
    """
    count, left, _, right = centers.shape
    ordered = xp.permute(centers, (0, 1, 3, 2))
    rows = ordered.reshape(count, left * right, 1, -1)
    columns = xp.conj(ordered[:1]).reshape(1, left * right, -1, 1)
    products = (rows @ columns).reshape(count, left, right)
    leading = xp.left_svd(products)[0][..., :1]
    return _phases(xp, leading), _phases(xp, xp.transpose(xp.adjoint(products) @ leading))


def _phases(xp: Backend, array: Array) -> Array:
    """Divide numbers by their absolute values; 1 for zeros."""
    squares = (array * xp.conj(array)).real
    return array / (squares + (squares == 0)) ** 0.5 + (squares == 0)


def _polar(xp: Backend, matrices: Array) -> Array:
    """Return the partial isometry of the polar decomposition: the nearest turn."""
    return matrices @ inverse_root(xp, xp.adjoint(matrices) @ matrices)

"""Many matrices → chains of cores, some of which all of them share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np

from tnmoe.backends import Array, get_backend
from tnmoe.chains.moments import damped_moments
from tnmoe.decompose import check_matrix
from tnmoe.errors import (
    InputError,
    check_bool,
    check_number_in,
    check_one_of,
    check_positive_int,
    short_repr,
)
from tnmoe.joint.finder import ChainFinder
from tnmoe.joint.info import SharedInfo
from tnmoe.joint.limits import SharedLimits
from tnmoe.joint.search import Experts
from tnmoe.options import CHAIN_FORMS, METHODS, ChainForm, Method
from tnmoe.shapes import MPOShape, SharedSites, resolve_center_site, resolve_shared_sites
from tnmoe.shared_mpo import SharedMPO


@overload
def decompose_shared(
    matrices: Array,
    shape: MPOShape | None = ...,
    *,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    rtol: float | None = ...,
    max_params: int | None = ...,
    center_site: int | None = ...,
    shared_sites: SharedSites | None = ...,
    residual: bool = ...,
    form: ChainForm = ...,
    importance: Sequence[float] | Array | None = ...,
    weights: Array | None = ...,
    damping: float = ...,
    method: Method = ...,
    max_sweeps: int = ...,
    tol: float = ...,
    return_info: Literal[False] = ...,
) -> SharedMPO: ...


@overload
def decompose_shared(
    matrices: Array,
    shape: MPOShape | None = ...,
    *,
    max_bond: int | Sequence[int] | None = ...,
    bonds: Sequence[int] | None = ...,
    rtol: float | None = ...,
    max_params: int | None = ...,
    center_site: int | None = ...,
    shared_sites: SharedSites | None = ...,
    residual: bool = ...,
    form: ChainForm = ...,
    importance: Sequence[float] | Array | None = ...,
    weights: Array | None = ...,
    damping: float = ...,
    method: Method = ...,
    max_sweeps: int = ...,
    tol: float = ...,
    return_info: Literal[True],
) -> tuple[SharedMPO, SharedInfo]: ...


def decompose_shared(
    matrices: Array,
    shape: MPOShape | None = None,
    *,
    max_bond: int | Sequence[int] | None = None,
    bonds: Sequence[int] | None = None,
    rtol: float | None = None,
    max_params: int | None = None,
    center_site: int | None = None,
    shared_sites: SharedSites | None = None,
    residual: bool = False,
    form: ChainForm = "free",
    importance: Sequence[float] | Array | None = None,
    weights: Array | None = None,
    damping: float = 0.01,
    method: Method = "auto",
    max_sweeps: int = 50,
    tol: float = 1e-5,
    return_info: bool = False,
) -> SharedMPO | tuple[SharedMPO, SharedInfo]:
    """Decompose matrices into chains that share some cores, such that their errors are small.

    The function minimises Σ_e importance_e · ‖W_e − chain_e‖² / ‖W_e‖². By default every expert
    counts alike.

    Bonds between owned and shared cores may be larger than a single matrix needs, up to E times.
    They lead from experts that share everything they can to experts that share nothing, and the
    error falls to zero.

    Parameters
    ----------
    matrices : array, shape (E, out_features, in_features)
        NumPy array or torch tensor, floating-point or complex.
    shape : MPOShape, optional
        Legs of the chains; by default ``MPOShape.for_matrix(out_features, in_features)``, with
        ``residual`` two sites with the legs (out | in).
    max_bond : int or sequence of int, optional
        Largest bond dimension, for all bonds or one per bond.
    bonds : sequence of int, optional
        Exact bond dimensions, one per bond.
    rtol : float, optional
        Largest relative Frobenius error of every expert. Importances do not loosen it.
    max_params : int, optional
        Largest number of stored parameters: those of shared cores and of the base once, those of
        owned cores per expert.
    center_site : int, optional
        Site of the central core; by default ``shape.center_site``.
    shared_sites : {"center", "none"} or iterable of int, optional
        Sites whose cores all experts share; not all of them. By default the central one, with
        ``residual`` none.
    residual : bool
        Add a matrix that all experts share, the *base*: W_e ≈ base + chain_e. With two sites the
        chains are matrices of low rank.
    form : {"free", "canonical"}
        In *canonical* form every expert's chain is in canonical form around ``center_site``: all
        cores but the centre are isometries. A shared centre then carries the norm that all chains
        have in common. Of two matrices whose norms differ by a factor f, one then misses by
        (f − 1) / (f + 1) at least. Unless experts own the centre alone, bonds are no larger than a
        single matrix needs, and the result is not exact without limits.
    importance : sequence of E float, optional
        How much the error of every expert counts: how often a router chooses it, say. Only ratios
        matter. Less than √ε of the largest counts as √ε, where ε is the rounding of the dtype; so
        an expert of importance 0 bends no shared core, and its own cores make the best of them.
    weights : array, shape (E, in_features, in_features) or (in_features, in_features), optional
        Second moments E[x xᴴ] of the inputs x that every expert meets, or all experts meet. The
        function then minimises the errors of the outputs, E‖(W_e − chain_e) x‖², relative to
        E‖W_e x‖², and ``rtol`` limits their square roots.
    damping : float
        Share of the identity in the moments, whose mean eigenvalue is brought to 1 first. It keeps
        inputs that a short calibration did not show from being free.
    method : {"auto", "qr", "eigh", "svd", "randomized"}
        How to find isometries, as for :func:`decompose`. With given bonds, ``auto`` takes
        ``randomized`` where the experts together have thousands of legs.
    max_sweeps : int
        Largest number of sweeps of alternating least squares, or of changes of the base.
    tol : float
        Stop when a sweep changes the root mean square of the experts' relative errors, weighted by
        their importances, by less.
    return_info : bool
        Also return the errors.

    Returns
    -------
    SharedMPO
        In the matrices' library, dtype and device. Without any limit it is exact, in free form.
    SharedInfo
        Only with ``return_info``.

    Raises
    ------
    InputError
        If the matrices are not of the shape's size, are not floating-point or complex, or hold
        NaN or infinity; if an argument is out of range or contradicts another.
    TypeError
        If the matrices belong to no supported library, or ``shape`` is not an MPOShape.

    Warns
    -----
    UserWarning
        If another limit keeps experts from their ``rtol``; the warning names them.

    See Also
    --------
    decompose_batch : Decompose matrices that share no core.

    Notes
    -----
    Where experts own the core of a single site, the matrices are one matrix whose rows that site
    tells apart, and a sweep of truncated decompositions finds all cores (:func:`decompose`). With
    two sites this is the best decomposition there is (Eckart and Young, Psychometrika 1, 211
    (1936)). Otherwise alternating least squares starts from such sweeps, and from the experts' own
    sweeps turned towards each other, and goes on from the best.

    With ``residual`` base and chains take turns. The base is the weighted mean of what the chains
    leave, and the chains decompose what the base leaves. With two sites no turn raises the error.
    The form is that of D²-MoE (Gu et al., arXiv:2502.17298), whose base is a mean of the experts,
    weighted by Fisher information.

    With ``weights`` the sweeps go over whitened matrices, as in :func:`decompose`. Where all input
    legs stand at one site, and experts own that site or have their moments in common, plain errors
    of whitened matrices are the weighted errors, and all that is said above holds for them.
    Otherwise least squares meet the moments that whitening leaves. They take longer.

    Gradients take the norms of the matrices, by which errors are weighed, for constants.

    With N numbers in all matrices, a sweep of least squares takes about 8·Σ D·N operations, and
    memory for three to five copies of the matrices.

    Examples
    --------
    >>> import numpy as np
    >>> from tnmoe import MPOShape, decompose_shared
    >>> rng = np.random.default_rng(0)
    >>> base, own = rng.normal(size=(16, 8)), rng.normal(size=(4, 16, 8))
    >>> shape = MPOShape((4, 4, 1), (1, 2, 4))
    >>> experts = base + 0.1 * own  # 512 numbers
    >>> shared, info = decompose_shared(experts, shape, max_bond=4, return_info=True)
    >>> shared.num_params, max(info.relative_errors) < 0.1
    (256, True)
    >>> shared = decompose_shared(experts, residual=True, max_bond=1)
    >>> shared.num_params
    224
    """
    xp, residual = get_backend(matrices), check_bool("residual", residual)
    if residual and shape is None and matrices.ndim == 3:
        shape = MPOShape((matrices.shape[1], 1), (1, matrices.shape[2]))
    shape = check_matrix(matrices, shape, axes=3)
    center_site = resolve_center_site(shape, center_site)
    if shared_sites is None:
        shared_sites = "none" if residual else "center"
    shared = resolve_shared_sites(shared_sites, shape.sites, center_site)
    check_one_of("method", method, METHODS)
    check_one_of("form", form, CHAIN_FORMS)
    shares = _check_importance(importance, int(matrices.shape[0]))
    finder = ChainFinder(
        xp=xp,
        shape=shape,
        owned=sorted(set(range(shape.sites)) - shared),
        num_experts=int(matrices.shape[0]),
        center_site=center_site,
        method=method,
        max_sweeps=check_positive_int("max_sweeps", max_sweeps),
        tol=check_number_in("tol", tol, "[0, inf)"),
        form=form,
        refits_owned=bool((shares != shares[0]).any()),
    )
    limits = SharedLimits(
        shape,
        finder.owned,
        finder.num_experts,
        max_bond=max_bond,
        bonds=bonds,
        rtol=rtol,
        max_params=max_params,
        base_params=shape.out_features * shape.in_features if residual else 0,
        enlarges=not finder.needs_isometries,
    )
    with xp.full_precision(matrices):
        moments = None if weights is None else damped_moments(xp, weights, matrices, damping)
        experts = Experts.of(finder, matrices, moments, shares)
        if weights is not None and form == "canonical" and not experts.keeps_isometries(finder):
            raise InputError(
                "form='canonical' takes weights only if all input legs stand at "
                f"center_site={center_site} and, where experts share it, one matrix of weights "
                f"for all of them: got {shape} and weights of shape {tuple(weights.shape)}"
            )
        found = experts.search(finder, limits, residual)
    if found.missed:
        warnings.warn(
            f"rtol={limits.rtol} needs more than the other limits allow: the relative errors of "
            f"the experts {short_repr(found.missed)} are up to "
            f"{max(found.info.limited_errors):.3g}",
            stacklevel=2,
        )
    return (found.shared, found.info) if return_info else found.shared


def _check_importance(importance: Any, num_experts: int) -> np.ndarray:
    """Return one number per expert; raise an InputError unless some number is positive."""
    if importance is None:
        return np.ones(num_experts)
    try:
        numbers = [check_number_in("every importance", each, "[0, inf)") for each in importance]
    except TypeError:
        numbers = []
    if len(numbers) != num_experts:
        raise InputError(
            f"importance must hold one number for each of {num_experts} experts, got "
            f"{short_repr(importance)}"
        )
    if not any(numbers):
        raise InputError(f"importance must hold a positive number, got {short_repr(importance)}")
    return np.array(numbers)

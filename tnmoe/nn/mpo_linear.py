"""Linear layers whose matrix is an MPO, alone or added to a given linear module."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any, Literal, Self, overload

import numpy as np
import torch
from torch import Tensor, nn

from tnmoe.contraction.plan import ContractionPlan
from tnmoe.decompose import decompose
from tnmoe.errors import InputError, check_bool, check_positive_int, short_repr
from tnmoe.mpo import MPO
from tnmoe.nn.compute.half_precision import sum_dtype
from tnmoe.nn.compute.matrices import exact_matrices
from tnmoe.nn.compute.slots import Groups
from tnmoe.nn.linear import (
    as_linear,
    bias_of_linear,
    call_linear,
    device_of_linear,
    dtype_of_linear,
    parameters_of_linear,
    reset_linear,
    size_of_linear,
    weight_of_linear,
)
from tnmoe.nn.mpo_projection import MPOProjection
from tnmoe.nn.residual_projection import start_at_zero
from tnmoe.nn.settings import RESIDUAL_BOND, layout_shape
from tnmoe.nn.transforms import autocast_dtype, cast
from tnmoe.shapes import MPOShape
from tnmoe.truncation.info import TruncationInfo


class MPOLinear(nn.Module):
    """A layer like ``torch.nn.Linear`` whose matrix is an MPO, or a linear module plus an MPO.

    Every call takes the fastest planned route for its number of rows: through the cores, or by the
    matrix, which is built for the call, or kept in :data:`tnmoe.nn.weight_cache` where no
    gradients are needed.

    Parameters
    ----------
    in_features, out_features : int
        Sizes, in the order of ``torch.nn.Linear``.
    shape : MPOShape, optional
        Legs of the MPO, at least two sites; by default
        ``MPOShape.for_matrix(out_features, in_features, sites)``.
    sites : int, optional
        Number of sites instead; 5 by default.
    max_bond : int, optional
        Largest bond dimension; exact bonds by default.
    bond_dims : sequence of int, optional
        Inner bond dimensions instead.
    bias : bool
        Whether the layer adds a bias.
    device, dtype
        Device and dtype of the parameters, as for torch's own layers.

    Attributes
    ----------
    projection : MPOProjection
        The MPO, as the matrix of a single expert. Its parameters are ``center`` and ``aux_0``,
        ``aux_1``, … Its attribute ``route`` sets a route for all calls.
    bias : Parameter of shape (out_features,), or None
        That of the layer, or of its base.
    base : Module or None
        The linear module that the MPO is added to, of :meth:`from_linear` with ``residual``.

    Raises
    ------
    InputError
        If sizes, bonds, sites or dtype do not fit, or the shape has a single site.

    Notes
    -----
    Matrices in this form are those of "Tensorizing neural networks" (arXiv:1509.06569). To train
    only the auxiliary cores (arXiv:2106.02205), call :func:`tnmoe.nn.train_auxiliary`. The central
    core counts as a shared one there, and for :class:`tnmoe.nn.GradientMask`.

    Examples
    --------
    >>> layer = MPOLinear(768, 3072, max_bond=16)
    >>> layer(torch.randn(2, 10, 768)).shape
    torch.Size([2, 10, 3072])
    >>> sum(each.numel() for each in layer.parameters()), 768 * 3072 + 3072
    (20880, 2362368)
    """

    bias: Tensor | None
    base: nn.Module | None
    # For call_linear, which would read, and so build, the weight of a module to see its dtype.
    _casts_inputs = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        shape: MPOShape | None = None,
        sites: int | None = None,
        max_bond: int | None = None,
        bond_dims: Sequence[int] | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_positive_int("in_features", in_features)
        self.out_features = check_positive_int("out_features", out_features)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        _check_real("dtype", dtype or torch.get_default_dtype())
        self.base = None
        self.projection = MPOProjection(
            1,
            matrix_shape((self.out_features, self.in_features), shape, sites),
            max_bond=max_bond,
            bond_dims=bond_dims,
            **place,
        )
        empty = torch.empty(self.out_features, **place) if check_bool("bias", bias) else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))
        self._draw_bias()

    @classmethod
    def from_mpo(cls, mpo: MPO, bias: Tensor | None = None) -> Self:
        """Make a layer of an MPO of torch tensors.

        Parameters
        ----------
        mpo : MPO
            The matrix, of at least two sites, with any bonds and centre.
        bias : Tensor, shape (out_features,), optional
            Its numbers are copied.

        Raises
        ------
        InputError
            If the cores are no real torch tensors, the bias does not fit, or there is one site.

        Examples
        --------
        >>> import tnmoe
        >>> mpo = tnmoe.decompose(torch.eye(16), tnmoe.MPOShape((4, 4), (4, 4)), rtol=1e-6)
        >>> MPOLinear.from_mpo(mpo)(torch.ones(16)).sum().round().item()
        16.0
        """
        rows, columns = mpo.shape.out_features, mpo.shape.in_features
        if bias is not None and tuple(bias.shape) != (rows,):
            raise InputError(f"bias must be of shape ({rows},), got {tuple(bias.shape)}")
        layer = cls(columns, rows, shape=mpo.shape, max_bond=1, bias=False, device="meta")
        layer.projection = MPOProjection.from_mpo(mpo, num_experts=1)
        _check_real("the cores' dtype", layer.projection.last_core.dtype)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return layer

    @overload
    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        shape: MPOShape | None = ...,
        sites: int | None = ...,
        max_bond: int | None = ...,
        bond_dims: Sequence[int] | None = ...,
        rtol: float | None = ...,
        max_params: int | None = ...,
        weights: Tensor | None = ...,
        residual: bool = ...,
        rng: np.random.Generator | int | None = ...,
        return_info: Literal[False] = ...,
    ) -> Self: ...

    @overload
    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        shape: MPOShape | None = ...,
        sites: int | None = ...,
        max_bond: int | None = ...,
        bond_dims: Sequence[int] | None = ...,
        rtol: float | None = ...,
        max_params: int | None = ...,
        weights: Tensor | None = ...,
        residual: bool = ...,
        rng: np.random.Generator | int | None = ...,
        return_info: Literal[True],
    ) -> tuple[Self, TruncationInfo]: ...

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        shape: MPOShape | None = None,
        sites: int | None = None,
        max_bond: int | None = None,
        bond_dims: Sequence[int] | None = None,
        rtol: float | None = None,
        max_params: int | None = None,
        weights: Tensor | None = None,
        residual: bool = False,
        rng: np.random.Generator | int | None = None,
        return_info: bool = False,
    ) -> Self | tuple[Self, TruncationInfo]:
        """Decompose the matrix of a linear module, or keep the module and add an MPO to it.

        Parameters
        ----------
        linear : Module
            A ``torch.nn.Linear``, transformers' Conv1D, or another module with ``in_features`` and
            ``out_features``, quantized for instance. It is not changed.
        shape, sites
            As for the class. With ``residual`` there are two sites by default, with the legs
            (out | in): the MPO is then of low rank.
        max_bond, bond_dims, rtol, max_params, weights
            Limits of the bonds, and second moments of the inputs: as ``max_bond``, ``bonds``,
            ``rtol``, ``max_params`` and ``weights`` of :func:`tnmoe.decompose`. With ``residual``
            only the first two, and 16 is the default of ``max_bond``.
        residual : bool
            Keep ``linear`` as it stands, as ``base``, and add an MPO that starts at zero:
            LoRA (arXiv:2106.09685) at two sites, and a tensor train at more.
        rng : numpy Generator or int, optional
            Source of the numbers of a ``residual`` MPO; by default a seed from torch's generator.
        return_info : bool
            Also return what the decomposition cut, not with ``residual``.

        Returns
        -------
        MPOLinear
            With parameters in the module's dtype, in memory of their own. The cores require
            gradients if the module's matrix does, those of a ``residual`` MPO always.
        TruncationInfo
            Only with ``return_info``; ``error_bound`` bounds the Frobenius norm of the error.

        Raises
        ------
        InputError
            If the module is not linear, its matrix contains NaN or infinity, or arguments do not
            fit it or each other.

        Examples
        --------
        >>> linear = nn.Linear(64, 64)
        >>> layer, info = MPOLinear.from_linear(linear, rtol=0.3, return_info=True)
        >>> error = torch.linalg.norm(layer.weight - linear.weight)
        >>> bool(error < 0.3 * torch.linalg.norm(linear.weight))
        True
        >>> adapted = MPOLinear.from_linear(linear.requires_grad_(False), residual=True)
        >>> [name for name, each in adapted.named_parameters() if each.requires_grad]
        ['projection.center', 'projection.aux_0']
        """
        limits: Any = {"rtol": rtol, "max_params": max_params, "weights": weights}
        if check_bool("residual", residual):
            given = limits | {"return_info": return_info or None}
            if refused := [name for name, value in given.items() if value is not None]:
                raise InputError(
                    f"residual=True decomposes nothing: leave out {', '.join(refused)}"
                )
            layer = cls._around(linear, shape, sites, max_bond, bond_dims, rng)
            return layer.train(linear.training)
        with torch.no_grad():
            matrix = weight_of_linear(linear)
        result: Any = decompose(  # type: ignore[call-overload]
            matrix.detach(),
            matrix_shape(size_of_linear(linear), shape, sites),
            max_bond=max_bond,
            bonds=bond_dims,
            **limits,
            return_info=return_info,  # which takes time
        )
        mpo = result[0] if return_info else result
        layer = cls.from_mpo(mpo, bias_of_linear(linear)).train(linear.training)
        is_trained = any(each.requires_grad for each in parameters_of_linear(linear))
        layer.projection.requires_grad_(is_trained)
        return (layer, result[1]) if return_info else layer

    @classmethod
    def _around(
        cls,
        linear: nn.Module,
        shape: MPOShape | None,
        sites: int | None,
        max_bond: int | None,
        bond_dims: Sequence[int] | None,
        rng: np.random.Generator | int | None,
    ) -> Self:
        """Make a layer that adds an MPO to a module, which starts at zero."""
        rows, columns = size_of_linear(linear)
        layer = cls(columns, rows, sites=2, max_bond=1, bias=False, device="meta")
        layer._put_around(linear)
        layer.projection = MPOProjection(
            1,
            matrix_shape((rows, columns), shape, sites, layout="residual"),
            max_bond=RESIDUAL_BOND if max_bond is None and bond_dims is None else max_bond,
            bond_dims=bond_dims,
            shared_sites="none",
            device=device_of_linear(linear),
            dtype=dtype_of_linear(linear),
        )
        start_at_zero(layer.projection, rng=torch_seed() if rng is None else rng)
        return layer

    def __getattr__(self, name: str) -> Any:
        """Return what torch keeps under a name; as ``bias``, that of a base."""
        base = vars(self).get("_modules", {}).get("base")
        if name == "bias" and base is not None:
            return bias_of_linear(base)
        return super().__getattr__(name)

    def _put_around(self, base: nn.Module) -> None:
        """Add the MPO to a linear module, whose bias takes the place of this layer's.

        Parameters
        ----------
        base : Module
            Of the same size.
        """
        self.base = base
        del self._parameters["bias"]

    @property
    def weight(self) -> Tensor:
        """The matrix, (out_features, in_features), with gradients; of a base and MPO, their sum.

        It is no parameter: every access builds it.
        """
        return self._matrix()

    def _matrix(self) -> Tensor:
        # Half precision would be rounded once per core.
        cores, dtype = self.projection.cores, self.projection.cores.dtype
        matrix = exact_matrices(cores.to(sum_dtype(dtype)))[0]
        if self.base is not None:
            base = weight_of_linear(self.base)
            matrix, dtype = base.to(matrix.dtype) + matrix, base.dtype
        return matrix.to(dtype)

    def to_mpo(self) -> MPO:
        """Return the MPO, which shares memory and gradients with this module; without the base."""
        return self.projection.expert(0)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """Return a ``torch.nn.Linear`` of the same function, in memory of its own.

        A base and the MPO become one matrix. A quantized base is dequantized. The new parameters
        require gradients if any of this layer's do.
        """
        linear = as_linear(
            self._matrix().clone(memory_format=torch.contiguous_format),
            None if self.bias is None else self.bias.clone(),
        )
        is_trained = any(each.requires_grad for each in self.parameters())
        return linear.requires_grad_(is_trained).train(self.training)

    def plan(self, rows: int, training: bool = False) -> ContractionPlan:
        """Plan a call; ``print`` the plan to see what every route would cost.

        Parameters
        ----------
        rows : int
            Vectors of the call, over all leading axes.
        training : bool
            Whether a backward pass follows, for which no matrix is kept.

        Returns
        -------
        ContractionPlan
            Of the MPO; a base is called beside it.
        """
        return self.projection.plan(rows, training)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer along the last axis.

        Parameters
        ----------
        x : Tensor, shape (..., in_features)
            Floating-point, with any number of leading axes, of any sizes. The cores are cast to
            its dtype, or to that of ``torch.autocast``.

        Returns
        -------
        Tensor, shape (..., out_features)

        Raises
        ------
        InputError
            If ``x`` is of another size along its last axis, or not floating-point.
        """
        if x.ndim == 0 or x.shape[-1] != self.in_features or not x.is_floating_point():
            raise InputError(
                f"x must be of shape (..., {self.in_features}) and floating-point, got shape "
                f"{tuple(x.shape)} and {x.dtype}"
            )
        # As in torch's own layers, autocast leaves double precision alone.
        dtype = autocast_dtype(x) if x.dtype != torch.float64 else None
        # Sizes are spelled out: -1 is ambiguous where there are no rows.
        leading = x.shape[:-1]
        rows = cast(x, dtype or x.dtype).reshape(prod(leading), self.in_features)
        product = self.projection(rows, Groups.of_one_expert(rows.shape[0], rows.device))
        if self.base is None and self.bias is not None:
            product = product + cast(self.bias, product.dtype)
        product = product.reshape(*leading, self.out_features)
        return product if self.base is None else call_linear(self.base, x) + product

    def reset_parameters(self) -> None:
        """Draw all parameters anew, with the variance of ``torch.nn.Linear``'s.

        Beside a base, which is drawn anew as well, the MPO starts at zero.

        Raises
        ------
        InputError
            If the base does not hold its matrix as floats.
        """
        if self.base is None:
            self.projection.reset_parameters()
        else:
            reset_linear(self.base)
            start_at_zero(self.projection, rng=torch_seed())
        self._draw_bias()

    @torch.no_grad()
    def _draw_bias(self) -> None:
        if self.base is None and self.bias is not None:
            bound = 1 / sqrt(self.in_features)
            self.bias.uniform_(-bound, bound)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


def matrix_shape(
    size: tuple[int, int],
    shape: MPOShape | None,
    sites: int | None,
    layout: Literal["interleaved", "residual"] = "interleaved",
) -> MPOShape:
    """Return the shape of a linear layer's MPO: the given one, or that of a number of sites.

    Parameters
    ----------
    size : (int, int)
        Rows and columns of the matrix.
    shape, sites
        As for :class:`MPOLinear`.
    layout : {"interleaved", "residual"}
        What a number of sites gives.

    Raises
    ------
    InputError
        If both are given, or the shape is for another size or has a single site.
    """
    if shape is not None and sites is not None:
        raise InputError(f"give shape or sites, not both: got {shape} and sites={sites}")
    if shape is None:
        shape = layout_shape(layout, "up", size, sites=sites)
    if not isinstance(shape, MPOShape):
        raise InputError(f"shape must be an MPOShape, got {short_repr(shape)}")
    if (shape.out_features, shape.in_features) != size:
        raise InputError(f"shape must be for a {size[0]}×{size[1]} matrix, got {shape}")
    if shape.sites < 2:
        raise InputError(f"an MPOLinear needs at least 2 sites, got {shape}: use torch.nn.Linear")
    return shape


def _check_real(name: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise InputError(f"{name} must be floating-point, got {dtype}")


def torch_seed() -> int:
    """Draw a seed for NumPy from torch's global generator."""
    return int(torch.randint(2**62, (), device="cpu"))

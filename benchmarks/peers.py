"""One small class per library: the best documented call for each operation of the benchmark.

Libraries with faster but less accurate algorithms appear again. "… fast" uses Gram matrices instead
of SVDs (quimb, tntorch) and zip-up products (quimb). "… random" uses randomized SVDs (tensorly,
quimb) and successive randomized compression (quimb), for fixed bonds only.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any, Unpack

import numpy as np
import quimb.tensor as qtn
import tensorly as tl
import tntorch
import torch
from library import Cores, Library, Limits, OnTorch, Tnmoe, TnmoeTorch, Unsupported
from tensorly.decomposition import tensor_train_matrix
from tensorly.tt_matrix import TTMatrix

import tnmoe as tn
from tnmoe import interop

with warnings.catch_warnings():
    # torchTT warns five times that its C++ solvers, which the benchmark does not use, are missing.
    warnings.simplefilter("ignore")
    import torchtt


class Tensorly(Library):
    """Fixed ranks only; tensorly decomposes operators and rebuilds matrices, and no more."""

    name, package, svd = "tensorly", "tensorly", "truncated_svd"

    def operator(self, cores: Cores) -> TTMatrix:
        return TTMatrix(list(cores))

    def cores(self, operator: Any, shape: tn.MPOShape) -> list[np.ndarray]:
        return list(operator)

    def decompose(self, matrix: Any, shape: tn.MPOShape, **limits: Unpack[Limits]) -> TTMatrix:
        if "rtol" in limits:
            raise Unsupported("no rtol")
        tensor = matrix.reshape(*shape.out_dims, *shape.in_dims)
        ranks = (1, *shape.bond_dims(limits.get("max_bond")), 1)
        return tensor_train_matrix(tensor, rank=ranks, svd=self.svd)

    def apply(self, operator: TTMatrix, x: Any) -> Any:
        # Its only way is to build the matrix.
        return tl.dot(x, tl.transpose(operator.to_matrix()))


class TensorlyRandom(Tensorly):
    """Randomized SVDs: ``symeig_svd`` forms the longer side's Gram matrix, which takes minutes."""

    name, svd = "tensorly random", "randomized_svd"
    only = ("decompose",)

    def decompose(self, matrix: Any, shape: tn.MPOShape, **limits: Unpack[Limits]) -> TTMatrix:
        require_bond(limits)
        return super().decompose(matrix, shape, **limits)


class Quimb(Library):
    """A ``MatrixProductState`` of paired legs: operators ``from_dense`` must have equal legs."""

    name, package, split, product = "quimb", "quimb", "svd", "direct"

    def operator(self, cores: Cores) -> qtn.MatrixProductOperator:
        return interop.to_quimb(tn.MPO([self.array(core) for core in cores]))

    def cores(self, operator: Any, shape: tn.MPOShape) -> list[np.ndarray]:
        if isinstance(operator, qtn.MatrixProductOperator):
            return [self.to_numpy(core) for core in interop.from_quimb(operator).cores]
        arrays = []
        for site, (out, in_) in enumerate(zip(shape.out_dims, shape.in_dims, strict=True)):
            left = [operator.bond(site - 1, site)] if site else []
            right = [operator.bond(site, site + 1)] if site < shape.sites - 1 else []
            tensor = operator[site].transpose(*left, operator.site_ind(site), *right)
            array = self.to_numpy(tensor.data)
            sizes = array.shape
            arrays.append(
                array.reshape(sizes[0] if left else 1, out, in_, sizes[-1] if right else 1)
            )
        return arrays

    def decompose(
        self, matrix: Any, shape: tn.MPOShape, **limits: Unpack[Limits]
    ) -> qtn.MatrixProductState:
        tensor = pair_legs(matrix, shape)
        if not limits and self.split == "svd":
            # Without truncation, the cheaper QR decomposition is enough.
            options: dict[str, Any] = {"method": "qr"}
        else:
            options = {"method": self.split, **_quimb_limits(shape.sites, limits)}
        return qtn.MatrixProductState.from_dense(tensor, tensor.shape, **options)

    def round_sum(self, operators: Sequence[Any], **limits: Unpack[Limits]) -> Any:
        total = reduce(lambda a, b: a.add_MPO(b), operators)
        total.compress(method=self.split, **_quimb_limits(total.L, limits))
        return total

    def round_product(self, a: Any, b: Any, max_bond: int) -> Any:
        if self.product == "direct":
            return a.apply(b, compress=True, max_bond=max_bond, cutoff=0.0)
        layers = a.apply(b, contract=False)
        return qtn.tensor_network_1d_compress(
            layers, max_bond=max_bond, cutoff=0.0, method=self.product
        )

    def apply(self, operator: Any, x: Any) -> Any:
        sites = range(operator.L)
        lower = [operator.lower_ind(site) for site in sites]
        sizes = [operator.ind_size(index) for index in lower]
        vectors = qtn.Tensor(x.reshape(len(x), *sizes), inds=["batch", *lower])
        upper = [operator.upper_ind(site) for site in sites]
        network = operator | vectors
        result = network.contract(output_inds=["batch", *upper], optimize="auto-hq")
        return result.data.reshape(len(x), -1)

    def norm(self, operator: Any) -> Any:
        return operator.norm()

    def inner(self, a: Any, b: Any) -> Any:
        return b.overlap(a)


class QuimbFast(OnTorch, Quimb):
    """On torch tensors: quimb 1.15 cannot compile ``svd:eig`` for NumPy's float32."""

    name, split, product = "quimb fast", "svd:eig", "zipup"


class QuimbRandom(Quimb):
    name, split, product = "quimb random", "svd:rand", "src"
    only = ("decompose", "round_sum", "round_product")

    def decompose(
        self, matrix: Any, shape: tn.MPOShape, **limits: Unpack[Limits]
    ) -> qtn.MatrixProductState:
        require_bond(limits)
        return super().decompose(matrix, shape, **limits)

    def round_sum(self, operators: Sequence[Any], **limits: Unpack[Limits]) -> Any:
        require_bond(limits)
        return super().round_sum(operators, **limits)


class TorchTT(OnTorch):
    name, package = "torchTT", "torchTT"

    def operator(self, cores: Cores) -> Any:
        return torchtt.TT([self.array(core) for core in cores])

    def decompose(self, matrix: Any, shape: tn.MPOShape, **limits: Unpack[Limits]) -> Any:
        legs = list(zip(shape.out_dims, shape.in_dims, strict=True))
        return torchtt.TT(matrix, shape=legs, **_torchtt_limits(limits))

    def round_sum(self, operators: Sequence[Any], **limits: Unpack[Limits]) -> Any:
        return reduce(add, operators).round(**_torchtt_limits(limits))

    def round_product(self, a: Any, b: Any, max_bond: int) -> Any:
        return (a @ b).round(**_torchtt_limits({"max_bond": max_bond}))

    def apply(self, operator: Any, x: Any) -> Any:
        return (operator @ x.reshape(len(x), *operator.N)).reshape(len(x), -1)

    def norm(self, operator: Any) -> Any:
        return operator.norm()

    def inner(self, a: Any, b: Any) -> Any:
        # Its dot takes tensors only, so the two legs of a core count as one.
        return torchtt.dot(_as_tensor(a), _as_tensor(b))


class Tntorch(OnTorch):
    """Tensors with paired legs for all but ``apply``; tntorch's operators have no product."""

    name, package, algorithm = "tntorch", "tntorch", "svd"

    def operator(self, cores: Cores) -> Any:
        # tntorch multiplies rows of inputs from the left: its operator is our transpose.
        swapped = [self.array(np.ascontiguousarray(core.swapaxes(1, 2))) for core in cores]
        ranks = [core.shape[-1] for core in cores[:-1]]
        legs = [[core.shape[axis] for core in cores] for axis in (2, 1)]
        return tntorch.TTMatrix(swapped, ranks, *legs)

    def cores(self, operator: Any, shape: tn.MPOShape) -> list[np.ndarray]:
        if operator.transposed:
            swapped = tn.MPOShape(shape.in_dims, shape.out_dims)
            return [core.swapaxes(1, 2) for core in super().cores(operator, swapped)]
        return super().cores(operator, shape)

    def decompose(self, matrix: Any, shape: tn.MPOShape, **limits: Unpack[Limits]) -> Any:
        tensor = pair_legs(matrix, shape)
        result = tntorch.Tensor(tensor)
        ranks = list(shape.bond_dims(limits.get("max_bond")))
        result.round_tt(eps=limits.get("rtol", 1e-14), rmax=ranks, algorithm=self.algorithm)
        result.transposed = False
        return result

    def round_sum(self, operators: Sequence[Any], **limits: Unpack[Limits]) -> Any:
        total = reduce(add, [operator.flatten() for operator in operators])
        eps, bond = limits.get("rtol", 1e-14), limits.get("max_bond")
        total.round_tt(eps=eps, rmax=bond, algorithm=self.algorithm)
        total.transposed = True
        return total

    def apply(self, operator: Any, x: Any) -> Any:
        return tntorch.tt_multiply(operator, x)

    def norm(self, operator: Any) -> Any:
        return tntorch.norm(operator.flatten())

    def inner(self, a: Any, b: Any) -> Any:
        return tntorch.dot(a.flatten(), b.flatten())


class TntorchFast(Tntorch):
    name, algorithm = "tntorch fast", "eig"
    only = ("decompose", "round_sum")


def libraries(device: str) -> list[Library]:
    """Return all libraries, tnmoe first; libraries on torch use ``device``, the rest the CPU."""
    return [
        Tnmoe(),
        TnmoeTorch(device),
        Tensorly(),
        TensorlyRandom(),
        Quimb(),
        QuimbFast(device),
        QuimbRandom(),
        TorchTT(device),
        Tntorch(device),
        TntorchFast(device),
    ]


def pair_legs(matrix: Any, shape: tn.MPOShape) -> Any:
    """Turn a matrix into a tensor with one axis (out_k, in_k) per site."""
    tensor = matrix.reshape(*shape.out_dims, *shape.in_dims)
    axes = [axis for site in range(shape.sites) for axis in (site, shape.sites + site)]
    permute = tensor.permute if isinstance(tensor, torch.Tensor) else tensor.transpose
    return permute(axes).reshape(shape.legs)


def require_bond(limits: Limits) -> None:
    """Refuse a case without a fixed bond."""
    if "max_bond" not in limits:
        raise Unsupported("needs a fixed bond")


def _quimb_limits(sites: int, limits: Limits) -> dict[str, Any]:
    """Return quimb's limits: per bond, ``rsum2`` discards ``cutoff`` of the squared norm."""
    cutoff = limits.get("rtol", 0.0) ** 2 / (sites - 1)
    return {"max_bond": limits.get("max_bond"), "cutoff": cutoff, "cutoff_mode": "rsum2"}


def _torchtt_limits(limits: Limits) -> dict[str, Any]:
    """Return torchTT's limits: ``eps`` bounds the relative error of the whole operator."""
    arguments: dict[str, Any] = {"eps": limits.get("rtol", 0.0)}
    return arguments | ({"rmax": limits["max_bond"]} if "max_bond" in limits else {})


def _as_tensor(operator: Any) -> Any:
    """Merge the two legs of every core."""
    return torchtt.TT([core.flatten(1, 2) for core in operator.cores])

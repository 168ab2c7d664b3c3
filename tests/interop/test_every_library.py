"""What all conversions have in common: nothing is changed, and nothing else is taken."""

import sys

import numpy as np
import pytest
import torch

import tnmoe as tn
from tests.interop import torchtt_stand_in
from tests.matrices import LIBRARIES, to_library, to_numpy
from tnmoe import interop

BOTH_WAYS = {
    "cores": (interop.to_cores, interop.from_cores),
    "quimb": (interop.to_quimb, interop.from_quimb),
    "tensorly": (interop.to_tensorly, interop.from_tensorly),
    "torchTT": (interop.to_torchtt, interop.from_torchtt),
}
SHAPES = {
    "one site": (tn.MPOShape((3,), (2,)), None),
    "one site of one number": (tn.MPOShape((1,), (1,)), None),
    "bonds of 1": (tn.MPOShape((3, 2, 2), (2, 1, 3)), 1),
    "legs of 1": (tn.MPOShape((1, 4, 1), (1, 1, 3)), None),
    "bonds larger than any matrix needs": (tn.MPOShape((2, 2), (2, 2)), None),
    "several bonds": (tn.MPOShape((2, 3, 2, 2), (3, 2, 1, 2)), 4),
}
DTYPES = ("float16", "float32", "float64", "complex64", "complex128")
ARRAYS = [(library, dtype) for library in ("numpy", "torch") for dtype in DTYPES]


@pytest.fixture(autouse=True)
def torchtt(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtt", torchtt_stand_in)


def an_mpo(name, like):
    shape, max_bond = SHAPES[name]
    mpo = tn.MPO.random(shape, max_bond, rng=0, like=like)
    return mpo + mpo if name.startswith("bonds larger") else mpo


@pytest.mark.parametrize(("library", "dtype"), [*ARRAYS, ("torch", "bfloat16")])
@pytest.mark.parametrize("other", BOTH_WAYS)
def test_cores_come_back_bit_for_bit(other, library, dtype):
    there, back = BOTH_WAYS[other]
    like = torch.zeros((), dtype=getattr(torch, dtype))
    for name in SHAPES:
        mpo = an_mpo(name, like.numpy() if library == "numpy" else like)
        again = back(there(mpo))
        assert again.shape == mpo.shape
        assert again.center_site is None
        # torchTT has tensors of torch only.
        assert other == "torchTT" or again.dtype == mpo.dtype
        for old, new in zip(mpo.cores, again.cores, strict=True):
            assert old.shape == tuple(new.shape)
            np.testing.assert_array_equal(to_numpy(old), to_numpy(new))
        assert to_numpy(again.cores[0]).dtype == to_numpy(mpo.cores[0]).dtype


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("there", [interop.to_cores, interop.to_torchtt, interop.to_scipy])
def test_arrays_of_any_library_will_do(there, library):
    there(an_mpo("several bonds", to_library(np.zeros(()), library)))


@pytest.mark.parametrize("other", BOTH_WAYS)
def test_padded_shapes_are_refused(other):
    padded = tn.decompose(np.ones((3, 4)), tn.MPOShape((2, 2), (2, 2), out_features=3))
    with pytest.raises(tn.InputError, match="only tnmoe supports padded shapes: MPOShape"):
        BOTH_WAYS[other][0](padded)


@pytest.mark.parametrize("other", BOTH_WAYS)
def test_only_an_operator_is_handed_over(other):
    mpo = tn.MPO.random(tn.MPOShape((2, 2), (2, 2)), rng=0)
    shared = tn.SharedMPO.replicate(mpo, num_experts=2)
    for value in (np.eye(4), mpo.cores, list(mpo.cores), shared, None):
        with pytest.raises(TypeError, match=f"expected an MPO, got {type(value).__name__}"):
            BOTH_WAYS[other][0](value)

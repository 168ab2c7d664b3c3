"""Lists of cores: every order of axes, both ways, and what is no list of cores."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tnmoe as tn
from tests.interop.cases import max_bonds, unpadded
from tests.matrices import dense_norm, libraries, rounding, to_library, to_numpy
from tnmoe import interop

ORDERS = ["".join(order) for order in permutations("loir")]
JOINED = [
    order.replace(legs, f"({legs})") for order in ORDERS for legs in ("oi", "io") if legs in order
]
SHAPE = tn.MPOShape((2, 3, 4), (5, 1, 6))


def an_mpo(like=None):
    return tn.MPO.random(SHAPE, max_bond=(7, 8), rng=0, like=like)


def matrix_of(cores, axes, shape):
    """Multiply out a list of cores, one einsum per site, with the axes that a string names."""
    order = axes.replace("(", "").replace(")", "")
    whole = np.ones((1, 1, 1))
    for core, out, in_ in zip(cores, shape.out_dims, shape.in_dims, strict=True):
        if "(" in axes:
            at, legs = axes.index("("), [out, in_] if "(oi)" in axes else [in_, out]
            core = core.reshape(*core.shape[:at], *legs, *core.shape[at + 1 :])
        whole = np.einsum(f"OIl,{order}->OoIir", whole, core)
        rows, o, columns, i, r = whole.shape
        whole = whole.reshape(rows * o, columns * i, r)
    return whole[:, :, 0]


@settings(max_examples=100)
@given(unpadded, libraries, max_bonds, st.sampled_from(ORDERS + JOINED))
def test_axes_say_how_a_list_multiplies_out_and_it_comes_back(case, library, max_bond, axes):
    shape, matrix = case
    mpo = tn.decompose(to_library(matrix, library), shape, max_bond=max_bond)
    cores = interop.to_cores(mpo, axes)
    found = matrix_of(list(map(to_numpy, cores)), axes, shape)
    assert dense_norm(found - to_numpy(mpo.to_matrix())) <= rounding(matrix)
    for bare in (cores, interop.to_cores(mpo, axes, outermost_bonds=False)):
        back = interop.from_cores(bare, axes, shape)
        assert back.shape == shape
        for old, new in zip(mpo.cores, back.cores, strict=True):
            assert (type(old), old.dtype) == (type(new), new.dtype)
            np.testing.assert_array_equal(to_numpy(old), to_numpy(new))


@pytest.mark.parametrize(
    ("axes", "shapes", "without"),
    [
        ("loir", [(1, 2, 5, 7), (7, 3, 1, 8), (8, 4, 6, 1)], [(2, 5, 7), (7, 3, 1, 8), (8, 4, 6)]),
        ("lroi", [(1, 7, 2, 5), (7, 8, 3, 1), (8, 1, 4, 6)], [(7, 2, 5), (7, 8, 3, 1), (8, 4, 6)]),
        ("l(oi)r", [(1, 10, 7), (7, 3, 8), (8, 24, 1)], [(10, 7), (7, 3, 8), (8, 24)]),
        ("(io)rl", [(10, 7, 1), (3, 8, 7), (24, 1, 8)], [(10, 7), (3, 8, 7), (24, 8)]),
    ],
)
def test_shapes_are_in_the_order_of_the_axes(axes, shapes, without):
    mpo = an_mpo()
    assert [core.shape for core in interop.to_cores(mpo, axes)] == shapes
    bare = interop.to_cores(mpo, axes, outermost_bonds=False)
    assert [core.shape for core in bare] == without


def test_one_site_alone_is_the_matrix():
    matrix = np.arange(6.0).reshape(2, 3)
    mpo = tn.MPO([matrix.reshape(1, 2, 3, 1)])
    for axes, expected in (("lroi", matrix), ("rilo", matrix.T), ("l(io)r", matrix.T.reshape(6))):
        (core,) = interop.to_cores(mpo, axes, outermost_bonds=False)
        np.testing.assert_array_equal(core, expected)
        back = interop.from_cores([core], axes, mpo.shape)
        np.testing.assert_array_equal(back.to_matrix(), matrix)


def test_only_one_of_the_outermost_bonds_may_be_there():
    mpo = an_mpo()
    first, *_ = interop.to_cores(mpo, "lroi", outermost_bonds=False)
    cores = [first, *interop.to_cores(mpo, "lroi")[1:]]
    np.testing.assert_array_equal(interop.from_cores(cores, "lroi").to_matrix(), mpo.to_matrix())


def test_the_reversed_list_has_the_least_significant_digits_first():
    """As ttpy counts: column-major, so that the first site counts fastest."""
    mpo = an_mpo()
    sizes = (*SHAPE.out_dims, *SHAPE.in_dims)
    theirs = mpo.to_matrix().reshape(sizes).transpose(2, 1, 0, 5, 4, 3)
    cores = interop.to_cores(mpo, "roil")[::-1]
    assert [core.shape for core in cores] == [(1, 4, 6, 8), (8, 3, 1, 7), (7, 2, 5, 1)]
    found = matrix_of(cores, "loir", tn.MPOShape(SHAPE.out_dims[::-1], SHAPE.in_dims[::-1]))
    np.testing.assert_allclose(found.reshape(theirs.shape), theirs)
    fortran = theirs.reshape(SHAPE.out_features, SHAPE.in_features, order="F")
    np.testing.assert_array_equal(fortran, mpo.to_matrix())
    back = interop.from_cores(cores[::-1], "roil")
    np.testing.assert_array_equal(back.to_matrix(), mpo.to_matrix())


def test_a_shape_may_be_padded_and_the_cores_are_as_large_as_its_legs():
    shape = tn.MPOShape((2, 3, 4), (5, 1, 6), out_features=20, in_features=29)
    mpo = interop.from_cores(interop.to_cores(an_mpo(), "l(oi)r"), "l(oi)r", shape)
    np.testing.assert_array_equal(mpo.to_matrix(), an_mpo().to_matrix()[:20, :29])


def test_cores_in_the_order_of_an_mpo_are_handed_over_themselves():
    mpo = an_mpo(like=torch.zeros(()))
    cores = interop.to_cores(mpo)
    assert all(a is b for a, b in zip(cores, mpo.cores, strict=True))
    back = interop.from_cores(cores)
    assert all(a is b for a, b in zip(back.cores, cores, strict=True))
    cores.pop()
    assert mpo.shape.sites == back.shape.sites == 3


def test_gradients_flow_through_both_ways():
    cores = [core.requires_grad_() for core in an_mpo(like=torch.zeros(())).cores]
    listed = interop.to_cores(tn.MPO(cores), "r(io)l", outermost_bonds=False)
    interop.from_cores(listed, "r(io)l", SHAPE).norm().backward()
    assert all(core.grad.abs().sum() > 0 for core in cores)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64"])
def test_cores_keep_their_dtype(dtype):
    mpo = an_mpo(like=torch.zeros((), dtype=getattr(torch, dtype)))
    back = interop.from_cores(interop.to_cores(mpo, "irol"), "irol")
    assert back.dtype == mpo.dtype
    assert all(torch.equal(a, b) for a, b in zip(back.cores, mpo.cores, strict=True))


def test_cores_of_several_dtypes_come_over_in_one():
    first, second, third = an_mpo().cores
    mixed = [first.astype(np.float32), second.astype(np.float16), third.astype(np.complex64)]
    back = interop.from_cores(mixed)
    assert back.dtype == np.complex64
    np.testing.assert_allclose(back.to_matrix(), an_mpo().to_matrix(), rtol=0.01, atol=0.1)


@pytest.mark.parametrize("gather", [tuple, iter, torch.nn.ParameterList])
def test_any_row_of_cores_will_do(gather):
    cores = an_mpo(like=torch.zeros(())).cores
    mpo = interop.from_cores(gather(cores))
    assert all(torch.equal(a, b) for a, b in zip(mpo.cores, cores, strict=True))


@pytest.mark.parametrize(
    "axes",
    ["lrud", "loi", "loirr", "lloir", "", "(lo)ir", "lo(ir)", "l(oi)(r)", "l(oir)", "l(oi",
     "l)oi(r", "l (oi) r", "LOIR", "l,o,i,r", "l(o)(i)r", "lóir", None, 4,
     ("l", "o", "i", "r"), b"loir"],
)  # fmt: skip
def test_axes_that_do_not_name_the_four_axes_are_refused(axes):
    message = (
        r"axes must hold each of l \(left bond\), o \(output leg\), i \(input leg\), "
        r"r \(right bond\) once"
    )
    for call in (lambda: interop.to_cores(an_mpo(), axes), lambda: interop.from_cores([], axes)):
        with pytest.raises(tn.InputError, match=message):
            call()


@pytest.mark.parametrize(
    ("cores", "axes", "shape", "message"),
    [
        # The order of another library, or bonds that differ.
        (an_mpo().cores, "lroi", None,
         r"core 0 has right bond 2, and core 1 left bond 7: read as 'lroi', the cores have shapes "
         r"\[\(1, 2, 5, 7\), \(7, 3, 1, 8\), \(8, 4, 6, 1\)\]"),
        (an_mpo().cores, "roil", None, "the outermost bonds must be 1, and core 0 has left bond 7"),
        (an_mpo().cores[:2], "loir", None,
         "the outermost bonds must be 1, and core 1 has right bond 8"),
        ([np.ones((1, 2, 2, 0)), np.ones((0, 2, 2, 1))], "loir", None, "bonds must be at least 1"),
        ([np.ones((1, 2, 0, 1))], "loir", None, "every leg of in_dims"),
        # Numbers of axes.
        ([np.ones((2, 3))] * 2, "loir", None,
         r"core 0 needs 4 axes \(left bond, output leg, input leg, right bond\) or, without "
         r"outermost bonds, 3, got shape \(2, 3\)"),
        ([np.ones((1, 2, 3, 4)), np.ones((4, 2, 3)), np.ones((4, 2, 3, 1))], "loir", None,
         r"core 1 needs 4 axes \(left bond, output leg, input leg, right bond\), got shape "
         r"\(4, 2, 3\)"),
        ([np.ones((1, 2, 3))], "loir", None, "without outermost bonds, 2, got shape"),
        ([np.ones((1, 2, 3, 1))], "r(io)l", tn.MPOShape((2,), (3,)),
         r"needs 3 axes \(right bond, input leg with output leg, left bond\)"),
        # Legs that share an axis.
        ([np.ones((1, 6, 1))], "l(oi)r", None, r"axes 'l\(oi\)r' join the legs of a site"),
        ([np.ones((1, 6, 1))], "l(oi)r", tn.MPOShape((2,), (4,)),
         "6 entries along the axis of its legs, and the shape has output leg 2 times input leg 4"),
        ([np.ones((1, 6, 1))], "l(oi)r", tn.MPOShape((2, 2), (3, 1)), "1 cores for the 2 sites"),
        (an_mpo().cores, "loir", tn.MPOShape((2, 3, 4), (5, 1, 7)), "do not fit MPOShape"),
        # What is no list of floating-point arrays of one library.
        ([], "loir", None, "at least one core"),
        ([np.ones((1, 2, 2, 1), int)], "loir", None, "floating-point or complex, got dtype int64"),
        ([np.ones((1, 2, 2, 1)), torch.ones(1, 2, 2, 1)], "loir", None, "one library"),
        (an_mpo(), "loir", None, "expected a list of cores, got a MPO"),
        (None, "loir", None, "expected a list of cores, got a NoneType"),
    ],
)  # fmt: skip
def test_a_list_that_is_no_operator_is_refused_with_what_was_given(cores, axes, shape, message):
    with pytest.raises(tn.InputError, match=message):
        interop.from_cores(cores, axes, shape)


@pytest.mark.parametrize(
    ("cores", "shape", "message"),
    [
        ([[[[[1.0]]]]], None, "expected an array of one of .*, got builtins.list"),
        ("core", None, "got builtins.str"),
        ([None], None, "got builtins.NoneType"),
        (an_mpo().cores, (2, 3, 4), "expected an MPOShape, got tuple"),
    ],
)
def test_what_is_no_array_and_no_shape_is_refused(cores, shape, message):
    with pytest.raises(TypeError, match=message):
        interop.from_cores(cores, shape=shape)

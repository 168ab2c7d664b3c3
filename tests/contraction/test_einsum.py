"""Contractions by products of matrices, against numpy.einsum."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.matrices import DTYPES, LIBRARIES, libraries, to_library, to_numpy
from tnmoe.backends import backend_named
from tnmoe.contraction.einsum import Contraction, contract

EQUATIONS = (
    "aoxb,cxid->acoibd",
    "ax,aoib,by->xoiy",
    "by,aoib,xoiy->ax",
    "rac,aoxb,cxid->roibd",
    "aoxb,cxid,loim,bdm->acl",
    "abc->cab",
    "ab,cd->dacb",
    "ab,bc,ca->",
    "ab,ab->",
)


@given(st.sampled_from(EQUATIONS), st.data(), libraries, st.sampled_from(DTYPES))
def test_contractions_equal_those_of_numpy(equation, data, library, dtype):
    terms = equation.split("->")[0].split(",")
    sizes = {index: data.draw(st.integers(0, 4)) for index in sorted(set("".join(terms)))}
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal([sizes[index] for index in term]).astype(dtype) for term in terms]
    given_arrays = [to_library(array, library) for array in arrays]
    result = to_numpy(contract(backend_named(library), equation, *given_arrays))
    expected = np.einsum(equation, *arrays)
    assert result.shape == expected.shape
    assert result.dtype == dtype
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("path", [[(0, 1), (0, 1)], [(1, 2), (1, 0)], [(0, 2), (0, 1)]])
def test_every_path_leads_to_the_same_result(library, path):
    equation, shapes = "ab,bc,cd->da", ((2, 3), (3, 4), (4, 5))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    contraction = Contraction(equation, shapes, path)
    result = contraction(backend_named(library), [to_library(one, library) for one in arrays])
    np.testing.assert_allclose(to_numpy(result), np.einsum(equation, *arrays))

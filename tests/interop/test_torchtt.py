"""The same operator in torchTT is the same matrix; in a stand-in where torchTT is not installed."""

import doctest
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import tnmoe as tn
from tests.docs.pages import PAGES, fences
from tests.interop import torchtt_stand_in
from tests.interop.cases import max_bonds, unpadded
from tests.matrices import dense_norm, libraries, rounding, to_library, to_numpy
from tnmoe import interop

SHAPE = tn.MPOShape((2, 3, 4), (3, 1, 5))


@pytest.fixture(params=["stand-in", "torchTT"])
def torchtt(request, monkeypatch):
    if request.param == "torchTT":
        return pytest.importorskip("torchtt")
    monkeypatch.setitem(sys.modules, "torchtt", torchtt_stand_in)
    return torchtt_stand_in


def random_cores(dtype=torch.float64, count=2, legs=(3, 2)):
    bonds = [1, *[4] * (count - 1), 1]
    rng = torch.Generator().manual_seed(0)
    return [
        torch.randn(bonds[k], *legs, bonds[k + 1], generator=rng).to(dtype) for k in range(count)
    ]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(unpadded, libraries, max_bonds)
def test_torchtt_rebuilds_the_same_matrix_and_round_trips(torchtt, case, library, max_bond):
    shape, matrix = case
    mpo = tn.decompose(to_library(matrix, library), shape, max_bond=max_bond)
    theirs = interop.to_torchtt(mpo)
    assert theirs.is_ttm
    assert tuple(zip(theirs.M, theirs.N, strict=True)) == tuple(
        zip(shape.out_dims, shape.in_dims, strict=True)
    )
    full = theirs.full().reshape(matrix.shape).numpy()
    assert dense_norm(full - to_numpy(mpo.to_matrix())) <= rounding(matrix)
    back = interop.from_torchtt(theirs)
    assert back.shape == shape
    for old, new in zip(mpo.cores, back.cores, strict=True):
        np.testing.assert_array_equal(to_numpy(old), new.numpy())


def test_tensors_of_torch_are_handed_over_themselves_with_their_gradients(torchtt):
    cores = [core.requires_grad_() for core in random_cores()]
    theirs = interop.to_torchtt(tn.MPO(cores))
    assert all(a is b for a, b in zip(theirs.cores, cores, strict=True))
    back = interop.from_torchtt(theirs)
    assert all(a is b for a, b in zip(back.cores, cores, strict=True))
    theirs.full().square().sum().backward()
    assert all(core.grad.abs().sum() > 0 for core in cores)


def test_torchtt_gets_copies_of_arrays_of_numpy(torchtt):
    mpo = tn.MPO.random(SHAPE, max_bond=3, rng=0)
    theirs = interop.to_torchtt(mpo)
    expected = mpo.to_matrix()
    for core in theirs.cores:
        assert core.dtype == torch.float64
        core.zero_()
    np.testing.assert_array_equal(mpo.to_matrix(), expected)


def test_the_list_of_torchtt_is_its_own(torchtt):
    mpo = tn.MPO(random_cores())
    interop.to_torchtt(mpo).cores.pop()
    theirs = torchtt.TT(random_cores())
    back = interop.from_torchtt(theirs)
    theirs.cores.pop()
    assert mpo.shape.sites == back.shape.sites == 2


def test_cores_of_several_dtypes_come_over_in_one(torchtt):
    first, second = random_cores()
    mixed = torchtt.TT([first.to(torch.float32), second.to(torch.complex64)])
    back = interop.from_torchtt(mixed)
    assert back.dtype == torch.complex64
    expected = tn.MPO([first, second]).to_matrix()
    torch.testing.assert_close(back.to_matrix().real, expected.float())


def test_what_is_no_operator_of_torchtt_is_refused(torchtt):
    tensor = torchtt.TT([core[:, :, 0] for core in random_cores()])
    integers = torchtt.TT(random_cores(torch.int64))
    mpo = tn.MPO(random_cores())
    for operator, message in (
        (tensor, "expected a TT-matrix of torchTT, got a TT of a tensor"),
        (integers, "floating-point or complex, got dtype int64"),
        (random_cores(), "got a list"),
        (torch.eye(3), "got a Tensor"),
        (mpo, "got a MPO"),
        (None, "got a NoneType"),
    ):
        with pytest.raises(tn.InputError, match=message):
            interop.from_torchtt(operator)


def test_without_torchtt_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtt", None)
    with pytest.raises(ImportError) as error:
        interop.to_torchtt(tn.MPO(random_cores()))
    assert str(error.value) == (
        "to_torchtt needs torchTT, which is not installed: pip install --no-build-isolation torchTT"
    )


def test_a_torchtt_that_does_not_import_keeps_its_own_error(monkeypatch, tmp_path):
    (tmp_path / "torchtt.py").write_text("import a_package_that_it_needs")
    monkeypatch.delitem(sys.modules, "torchtt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_it_needs"):
        interop.to_torchtt(tn.MPO(random_cores()))


def library_errors(real):
    """Return the errors that torchTT raises for cores that do not fit."""
    errors = sys.modules[f"{real.__name__}.errors"]
    return errors.RankMismatch, errors.InvalidArguments


def test_the_stand_in_is_like_torchtt():
    real = pytest.importorskip("torchtt")
    good = random_cores(count=3)
    for cores in (good, good[:1] + good[2:], [core[:, :, 0] for core in good]):
        ours, theirs = torchtt_stand_in.TT(cores), real.TT(cores)
        for name in ("cores", "is_ttm", "N", "R", *["M"] * theirs.is_ttm):
            assert getattr(ours, name) == getattr(theirs, name)
        torch.testing.assert_close(ours.full(), theirs.full())
    bad = (good[:2], good[1:], [good[0], good[0]], [good[0][0]], [good[0][..., 0], good[2]])
    for cores in bad:
        for library in (torchtt_stand_in, real):
            with pytest.raises((ValueError, *library_errors(real))):
                library.TT(cores)


def test_sums_products_and_rounding_of_torchtt_come_over():
    real = pytest.importorskip("torchtt")
    shape = tn.MPOShape((2, 3, 4), (2, 3, 4))
    like = torch.zeros((), dtype=torch.float64)
    a, b = (tn.MPO.random(shape, 3, rng=seed, like=like) for seed in (0, 1))
    x, y = map(interop.to_torchtt, (a, b))
    for theirs, ours in (
        (x + y, a + b),
        (x @ y, a @ b),
        (x.t(), a.T),
        ((x @ y).round(1e-10), a @ b),
        (real.eye([2, 3, 4]), tn.MPO.identity(shape, like=like)),
    ):
        torch.testing.assert_close(interop.from_torchtt(theirs).to_matrix(), ours.to_matrix())


@pytest.mark.parametrize("function", [interop.to_torchtt, interop.from_torchtt])
def test_the_examples_of_the_docstrings_hold(function):
    pytest.importorskip("torchtt")
    text = function.__doc__.replace("# doctest: +SKIP", "")
    names = vars(sys.modules[function.__module__]).copy()
    test = doctest.DocTestParser().get_doctest(text, names, function.__name__, None, None)
    results = doctest.DocTestRunner().run(test)
    assert results.attempted == 3
    assert results.failed == 0


def test_the_programs_on_the_page_run():
    pytest.importorskip("torchtt")
    programs = [code for _, code in fences(PAGES["howto/interop"]) if re.search("torchtt", code)]
    assert programs
    for program in programs:
        exec(program, {})

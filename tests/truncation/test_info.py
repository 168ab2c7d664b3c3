"""TruncationInfo: the bound on the error of the whole."""

import numpy as np
import pytest

import tnmoe as tn

FLAT = np.ones((1, 100))


def test_the_error_bound_adds_squares():
    info = tn.TruncationInfo(discarded=(3.0, 4.0), spectra=(FLAT, FLAT), methods=("svd", "svd"))
    assert info.error_bound == 5.0
    tiny = tn.TruncationInfo(discarded=(3e-200, 4e-200), spectra=(), methods=())
    assert tiny.error_bound == pytest.approx(5e-200)

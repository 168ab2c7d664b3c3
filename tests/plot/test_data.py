"""Bad input is named before a figure is made."""

import numpy as np
import pytest

import tnmoe as tn
from tnmoe import plot


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.network("W"), "network draws an MPOShape, an MPO or a SharedMPO, got str"),
        (lambda: plot.loss_curves({}), r"losses must have at least one entry, got \{\}"),
        (lambda: plot.loss_curves([1.0]), "losses must be a mapping from names, got list"),
        (lambda: plot.loss_curves({"a": []}), r"losses\['a'\] must be a sequence of real numbers"),
        (lambda: plot.loss_curves({"a": ["x"]}), r"losses\['a'\] must be a sequence of numbers"),
        (lambda: plot.loss_curves({"a": [1.0]}, window=0), "window must be a positive integer"),
        (lambda: plot.core_drift({"a": [-0.1]}), "must be finite and at least 0, got -0.1"),
        (lambda: plot.core_drift({"a": [1]}, steps=[1, 2]), "got 2 steps and 1 values of 'a'"),
        (lambda: plot.schmidt_spectra({"a": [1, np.nan]}), "finite and at least 0, got nan"),
        (lambda: plot.schmidt_spectra({"a": [1j]}), "real numbers, at least one, got complex128"),
        (lambda: plot.schmidt_spectra([1.0]), "operators must be a mapping from names, got list"),
        (
            lambda: plot.schmidt_spectra(tn.MPO.zeros(tn.MPOShape((2,), (2,)))),
            r"operators must have a bond, got MPO\(2×2, sites=1",
        ),
        (
            lambda: plot.schmidt_spectra({"a": tn.TruncationInfo((), (), ())}),
            r"operators\['a'\] must have a bond, got TruncationInfo",
        ),
        (lambda: plot.entropy({}), "operators must have at least one entry"),
        (lambda: plot.entropy(np.ones(3)), "operators must be a mapping from names, got ndarray"),
        (lambda: plot.entropy({"a": []}), r"operators\['a'\] must be a sequence of real numbers"),
        (lambda: plot.entropy({"a": [1]}, against="site"), "against must be one of bond, layer"),
        (lambda: plot.entropy({"a": [1]}, bond_dims=(2, 2)), "each of 2 bonds, got 1"),
        (
            lambda: plot.entropy({"a": [1], "b": [1, 2]}, against="layer"),
            r"equal numbers of bonds, got \{'a': 1, 'b': 2\}",
        ),
        (
            lambda: plot.entropy(tn.MPO.zeros(tn.MPOShape((2,), (2,)))),
            r"operators\['operator'\] must have a bond, got MPO\(2×2, sites=1",
        ),
        (lambda: plot.error_against_parameters({}), "truncations must have at least one entry"),
        (
            lambda: plot.error_against_parameters({"a": [(1, 2, 3, 4)]}),
            r"\(parameters, error, bound\), got a table of shape \(1, 4\)",
        ),
        (
            lambda: plot.error_against_parameters({"a": [(1, 0.5), (2,)]}),
            r"truncations\['a'\] must be a table of numbers",
        ),
        (lambda: plot.error_against_parameters({"a": [(1, np.inf)]}), "must be finite"),
        (lambda: plot.error_against_parameters({"a": [(1, 1)]}, dense=0), "dense must be a pos"),
        (lambda: plot.parameter_bars({}), "report must have at least one entry"),
        (lambda: plot.parameter_bars(3), "report must be a mapping from names, got int"),
        (lambda: plot.parameter_bars({"a": {}}), r"report\['a'\] must be a sequence of real num"),
        (lambda: plot.parameter_bars({"a": -1}), "finite and at least 0, got -1"),
        (lambda: plot.expert_load([]), "load must be a table of real numbers"),
        (lambda: plot.expert_load([[np.nan]]), "load must be finite and at least 0, got nan"),
        (lambda: plot.load_history({"a": {}}, "a"), r"history\['a'\] must have at least one entry"),
        (lambda: plot.load_history({"a": {"load": [1.0]}}, "a"), "statistic must be one of"),
        (
            lambda: plot.expert_load([[0.5, 0.5], [3, 5]]),
            r"divide counts by their sums, got \[3. 5.\]",
        ),
        (
            lambda: plot.load_history({"a": {"load": [[0.5, 0.5], [1.0]]}}, "a"),
            "load of 'a' must be a table of numbers",
        ),
        (
            lambda: plot.routing_statistic({"a": {"entropy": [[1.0], [1.0, 2.0]]}}, "entropy"),
            "entropy of 'a' must be a sequence of numbers",
        ),
        (
            lambda: plot.routing_statistic(
                {"a": {"entropy": [1]}, "b": {"load": [[1]]}}, "entropy"
            ),
            "statistic must be one of",
        ),
    ],
)
def test_bad_input_is_named_before_a_figure_is_made(call, message):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    with pytest.raises(tn.InputError, match=message):
        call()
    assert plt.get_fignums() == before

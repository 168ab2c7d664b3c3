"""Operators that the tests of several libraries have in common."""

from hypothesis import strategies as st

import tnmoe as tn
from tests.matrices import matrices

unpadded = matrices.filter(lambda case: case[1].shape == (case[0].padded_out, case[0].padded_in))
max_bonds = st.one_of(st.none(), st.integers(1, 8))


def pairs_of_operators(max_sites):
    return st.builds(
        lambda dims, seed: tuple(
            tn.MPO.random(tn.MPOShape(dims, dims), 4, rng=seed + k) for k in range(2)
        ),
        st.lists(st.integers(2, 3), min_size=2, max_size=max_sites),
        st.integers(0, 2**32 - 1),
    )


operators = pairs_of_operators(max_sites=5)

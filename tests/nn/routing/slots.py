"""Slots drawn at random, for tests."""

import torch
from hypothesis import strategies as st


@st.composite
def slots(draw):
    experts, sequences, length = (draw(st.integers(1, high)) for high in (7, 3, 8))
    size = (sequences * length, draw(st.integers(1, 4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    index = torch.randint(experts, size, generator=generator)
    kept = torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    capacity = torch.randint(1, 6, (sequences,), generator=generator).double()
    return index, kept, capacity, experts

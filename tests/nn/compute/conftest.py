import pytest
import torch

from tnmoe.nn.compute.cache import weight_cache


@pytest.fixture
def compiler():
    """Reset the compiler around a test: it gives up after a number of compilations."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def cache():
    weight_cache.clear()
    limit = weight_cache.limit
    yield weight_cache
    weight_cache.enabled, weight_cache.limit = True, limit
    weight_cache.clear()

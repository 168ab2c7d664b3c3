"""Matrices of cores that FSDP gathers are not kept."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from tests.nn.ranks import on_two_ranks
from tests.nn.training.small_layer import backward, make_top2_layer
from tnmoe.nn.compute import cache


def _evaluate_sharded(rank):
    """Evaluation after a step under FSDP; nothing looks at the numbers, as on an accelerator."""
    cache._samples_of = lambda cores: []
    plain, sharded = make_top2_layer(), make_top2_layer()
    fully_shard(sharded)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (plain, sharded)]
    for layer in (plain, sharded):
        for name in ("up", "down"):
            getattr(layer.experts, name).route = "cached"
    states = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    differences = []
    for _ in range(3):
        with torch.no_grad():
            cache.weight_cache.clear()
            outputs = sharded(states)
            kept = cache.weight_cache.used
            differences.append(float((outputs - plain(states)).abs().max()) + kept)
        for layer, optimizer in zip((plain, sharded), optimizers, strict=True):
            for each in (layer.experts.up, layer.experts.down):
                each.route = "rebuilt"
            optimizer.zero_grad()
            backward(layer)
            optimizer.step()
            for each in (layer.experts.up, layer.experts.down):
                each.route = "cached"
    return max(differences)


@pytest.mark.slow
def test_matrices_of_cores_that_fsdp_gathers_are_not_kept():
    assert max(on_two_ranks(_evaluate_sharded)) < 1e-5

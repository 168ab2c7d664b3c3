"""Operations of products with matrices, as torch counts them."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from tnmoe.nn.compute import slot_network, slots


def count_products(call):
    """Count the operations of a call, without the weighted sums over the slots of every token.

    Torch counts products, not sums. A layer may write these sums as either.
    """

    def sums(rows, weights):
        return (rows.unflatten(0, weights.shape) * weights[..., None]).sum(1)

    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        for module in (slots, slot_network):
            patch.setattr(module, "weighted_sums", sums)
        call()
    return counter.get_total_flops()

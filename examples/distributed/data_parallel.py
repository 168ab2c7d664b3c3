"""Train a mixture on several ranks: each has the whole model, and tokens of its own.

On two CPUs, or on as many GPUs as you say:

    torchrun --nproc-per-node 2 examples/distributed/data_parallel.py
"""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tnmoe import nn


def main() -> None:
    """Train for 100 steps, and print the loss of the first and of the last one."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")

    torch.manual_seed(0)  # the same model on every rank
    experts = nn.MPOExperts(8, 64, 256, layout="residual", max_bond=8, activation="gelu")
    layer = nn.MPOMoE(nn.TopKRouter(64, 8, top_k=2), experts).to(device)
    target = torch.randn(64, 64, device=device) / 8
    model = DistributedDataParallel(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)

    torch.manual_seed(1 + dist.get_rank())  # other tokens on every rank
    losses = []
    for _ in range(100):
        tokens = torch.randn(256, 64, device=device)
        with nn.record_routing(layer) as routing:
            loss = (model(tokens) - tokens @ target).square().mean()
        optimizer.zero_grad()
        (loss + 0.01 * routing.balance_loss(scope="ranks")).backward()
        nn.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())

    ends = torch.stack([losses[0], losses[-1]]) / dist.get_world_size()
    dist.all_reduce(ends)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks: loss {ends[0]:.2f}, after training {ends[1]:.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

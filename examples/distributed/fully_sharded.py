"""Shard every parameter over the ranks (FSDP2): a layer is put together while it computes.

On two CPUs, or on as many GPUs as you say:

    torchrun --nproc-per-node 2 examples/distributed/fully_sharded.py
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tnmoe import nn


def main() -> None:
    """Train for 100 steps; print the first and the last loss, and what a rank keeps."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(nn.MPOMoE(nn.TopKRouter(64, 8, top_k=2), nn.MPOExperts(8, 64, 256)) for _ in range(2))
    ).to(device)
    target = torch.randn(64, 64, device=device) / 8
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # after fully_shard

    torch.manual_seed(1 + dist.get_rank())
    losses = []
    for _ in range(100):
        tokens = torch.randn(256, 64, device=device)
        loss = (model(tokens) - tokens @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())

    ends = torch.stack([losses[0], losses[-1]]) / dist.get_world_size()
    dist.all_reduce(ends)
    kept = sum(each.to_local().numel() for each in model.parameters())
    share = kept / sum(each.numel() for each in model.parameters())
    if dist.get_rank() == 0:
        print(f"{share:.0%} on a rank: loss {ends[0]:.2f}, after training {ends[1]:.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

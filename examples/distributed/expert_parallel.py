"""Spread experts over the ranks of a machine: each has some experts, and tokens travel to them.

Several machines train replicas of the experts. On two CPUs, or on 2, 4 or 8 GPUs of a machine:

    torchrun --nproc-per-node 2 examples/distributed/expert_parallel.py
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from tnmoe import nn
from tnmoe.nn.parallel import shard_experts


def main() -> None:
    """Train for 100 steps; print the first and the last loss, and which experts this rank has."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    ranks, of_machine = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    names = ("dp", "ep")
    mesh = init_device_mesh(device.type, (ranks // of_machine, of_machine), mesh_dim_names=names)

    torch.manual_seed(0)
    layer = nn.MPOMoE(nn.TopKRouter(64, 8, top_k=2), nn.DenseExperts(8, 64, 256)).to(device)
    target = torch.randn(64, 64, device=device) / 8
    shard_experts(layer, mesh)  # before the optimiser, since it replaces parameters
    model = DistributedDataParallel(layer)  # averages the gradients of all that is not spread
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)

    torch.manual_seed(1 + dist.get_rank())
    losses = []
    for _ in range(100):
        tokens = torch.randn(256, 64, device=device)
        loss = (model(tokens) - tokens @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())

    ends = torch.stack([losses[0], losses[-1]]) / ranks
    dist.all_reduce(ends)
    own = len(layer.experts.up.stacked.to_local())
    if dist.get_rank() == 0:
        print(f"{own} of 8 experts per rank: loss {ends[0]:.2f}, after training {ends[1]:.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

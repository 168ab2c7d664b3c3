"""Train a mixture in a loop of your own, with Accelerate.

Needs `pip install 'tnmoe[hf]'`. On two CPUs, or on as many GPUs as you say:

    torchrun --nproc-per-node 2 examples/distributed/accelerate_loop.py

On GPUs, `accelerate launch` takes the place of torchrun. On CPUs it starts a single process.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from tnmoe import nn


def main() -> None:
    """Train for ten epochs, and print the loss of the first and of the last step."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(0)
    experts = nn.MPOExperts(8, 64, 256, layout="residual", max_bond=8, activation="gelu")
    layer = nn.MPOMoE(nn.TopKRouter(64, 8, top_k=2), experts)
    tokens = torch.randn(4096, 64)
    data = torch.utils.data.TensorDataset(tokens, tokens @ torch.randn(64, 64) / 8)
    loader = torch.utils.data.DataLoader(data, batch_size=256, shuffle=True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(layer, optimizer, loader)

    losses = []
    for _ in range(10):
        for inputs, targets in loader:
            with nn.record_routing(layer) as routing:
                loss = (model(inputs) - targets).square().mean()
            optimizer.zero_grad()
            accelerator.backward(loss + 0.01 * routing.balance_loss(scope="ranks"))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())

    first, last = (accelerator.reduce(each, "mean").item() for each in (losses[0], losses[-1]))
    ranks = accelerator.num_processes
    accelerator.print(f"{ranks} ranks: loss {first:.2f}, after training {last:.2f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()

"""Train a mixture under DeepSpeed, whose ranks each keep a part of the optimiser or of everything.

On two CPUs (``pip install deepspeed``, and DS_ACCELERATOR=cpu), or on as many GPUs as you say:

    torchrun --nproc-per-node 2 examples/distributed/deepspeed_zero.py
"""

import deepspeed
import torch
import torch.distributed as dist

from tnmoe import nn

STAGE = 3  # 2: parts of gradients and of the optimiser's state; 3: parts of parameters as well


def main() -> None:
    """Train for 100 steps, and print the loss of the first and of the last one."""
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    torch.manual_seed(0)  # the same model on every rank
    experts = nn.MPOExperts(8, 64, 256, layout="residual", max_bond=8, activation="gelu")
    layer = nn.MPOMoE(nn.TopKRouter(64, 8, top_k=2), experts)
    settings = {
        "train_micro_batch_size_per_gpu": 256,
        "zero_optimization": {"stage": STAGE},
        "gradient_clipping": 1.0,  # DeepSpeed clips to 1 unless you say otherwise
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(
        model=layer, model_parameters=list(layer.parameters()), config=settings
    )
    mask = nn.AutogradMask(layer, probability=0.5, seed=0)  # sees steps inside of backward
    target = torch.randn(64, 64, device=engine.device) / 8

    torch.manual_seed(1 + dist.get_rank())  # other tokens on every rank
    losses = []
    for _ in range(100):
        tokens = torch.randn(256, 64, device=engine.device)
        with mask.next_step():
            loss = (engine(tokens) - tokens @ target).square().mean()
            engine.backward(loss)
            engine.step()
        losses.append(loss.detach())

    ends = torch.stack([losses[0], losses[-1]]) / dist.get_world_size()
    dist.all_reduce(ends)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks: loss {ends[0]:.2f}, after training {ends[1]:.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""A training run that is the same on one process and on several, and what it leaves."""

import torch
from torch.nn.parallel import DistributedDataParallel

from tnmoe import nn
from tnmoe.nn import parallel

HIDDEN, INNER, STEPS = 8, 16, 5
LAYOUTS = ("dense", "interleaved", "split", "hidden", "residual")


def model_of(layout="hidden", experts=4, top_k=2, *, closed=(), load_bias=True, **settings):
    """Make a model in double precision whose experts differ; ``closed`` ones get no tokens."""
    torch.manual_seed(0)
    router = nn.TopKRouter(HIDDEN, experts, top_k=top_k, load_bias=load_bias)
    kind = nn.DenseExperts if layout == "dense" else nn.MPOExperts
    more = {} if layout == "dense" else {"layout": layout}
    settings = {"gated": True, "bias": True, "activation": "silu", **more, **settings}
    layer = nn.MPOMoE(router, kind(experts, HIDDEN, INNER, **settings))
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    if closed:
        nn.close_experts(layer, closed)
    ends = (torch.nn.Linear(HIDDEN, HIDDEN) for _ in range(2))
    return torch.nn.Sequential(next(ends), layer, next(ends)).double()


def rows_of(rank, step, rows):
    """Return the tokens of a rank in a step."""
    draw = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(rows[rank], HIDDEN, generator=draw, dtype=torch.float64)


def train(model, wrapped, ranks, rows, *, steps=STEPS, first=0, state=None, balance=0.0):
    """Train on the tokens of some ranks; return outputs, losses, gradients and what is left.

    A loss is the mean over the tokens of all ranks of the run, and a balance loss of them.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if state is not None:
        optimizer.load_state_dict(state)
    hooks = [nn.BiasBalancer(optimizer, model, rate=0.01)]
    mask = None
    if nn.shared_parameters(model):
        mask = nn.GradientMask(optimizer, model, 0.5, seed=1)
        mask.step = first
        hooks.append(mask)
    share = len(rows) / len(ranks)
    found = {"outputs": [], "losses": [], "norms": []}
    for step in range(first, first + steps):
        tokens = torch.cat([rows_of(rank, step, rows) for rank in ranks])
        with nn.record_routing(model) as routing:
            outputs = wrapped(tokens)
        loss = share * outputs.square().sum() / sum(rows)
        if balance:
            loss = loss + balance * routing.balance_loss(scope="ranks")
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            found["gradients"] = {
                name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad
            }
        clip = nn.clip_grad_norm_ if mask is None else mask.clip_grad_norm_
        found["norms"].append(clip(model.parameters(), 0.2).item())
        optimizer.step()
        found["outputs"].append(outputs.detach())
        found["losses"].append(loss.item())
    for hook in hooks:
        hook.remove()
    found["parameters"] = {name: whole(each) for name, each in model.named_parameters()}
    found["load biases"] = [bias.value.clone() for bias in hooks[0].biases]
    found["optimizer"] = optimizer
    return found


def whole(tensor):
    """Return the numbers of all ranks."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def spread(model, mesh):
    """Spread experts over a mesh, and let DDP average everything else."""
    parallel.shard_experts(model, mesh)
    return DistributedDataParallel(model)

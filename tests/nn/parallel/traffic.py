"""The bytes that a rank sends, counted from the collectives that it calls."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Counts the bytes to other ranks, and the collectives, in a ``with`` block.

    Every collective is an operation of torch's dispatcher, whoever calls it: a program, a DTensor,
    FSDP, or DistributedDataParallel in C++. Each counts as a ring sends it.
    """

    def __init__(self):
        super().__init__()
        self.sent, self.calls = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")) and name not in LOCAL:
            self.sent += COLLECTIVES[name](args)
            self.calls += 1
        return func(*args, **(kwargs or {}))


def all_reduce(args):
    tensors = [args[0]] if isinstance(args[0], Tensor) else args[0]
    return 2 * (1 - 1 / group_of(args).size()) * sum(map(size_of, tensors))


def all_gather(args):
    whole, part, *_ = args
    assert size_of(whole) == group_of(args).size() * size_of(part)
    return size_of(whole) - size_of(part)


def reduce_scatter(args):
    part, whole, *_ = args
    assert size_of(whole) == group_of(args).size() * size_of(part)
    return size_of(whole) - size_of(part)


def all_to_all(args):
    _, rows, _, _, counts = args[:5]
    group = group_of(args)
    counts = counts or [len(rows) // group.size()] * group.size()
    others = sum(counts) - counts[group.rank()]
    return others * rows[:1].numel() * rows.element_size()


COLLECTIVES = {
    "c10d::allreduce_": all_reduce,
    "_c10d_functional::all_reduce": all_reduce,
    "c10d::_allgather_base_": all_gather,
    "c10d::_reduce_scatter_base_": reduce_scatter,
    "c10d::alltoall_base_": all_to_all,
}
LOCAL = {"_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}


def size_of(tensor):
    return tensor.numel() * tensor.element_size()


def group_of(args):
    """Return the group of a call, which torch passes as an object or by its name."""
    for each in args:
        if isinstance(each, torch.ScriptObject) and "ProcessGroup" in str(each._type()):
            return ProcessGroup.unbox(each)
    return _resolve_process_group(args[-1])

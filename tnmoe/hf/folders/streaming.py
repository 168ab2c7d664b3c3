"""Running the model of a checkpoint while only one layer at a time has its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tnmoe.hf.folders.skeleton import Skeleton, with_tensors

# Tokens that go through a layer at a time.
_TOKENS = 4096


@contextmanager
def streamed(
    skeleton: Skeleton, on_layer: Callable[[int, int], None] | None = None
) -> Iterator[Any]:
    """Make the model of a skeleton runnable in a block.

    Modules outside of lists of layers keep their numbers throughout. A layer reads its numbers when
    it is called, sends a few sequences through at a time, and drops its numbers again. All
    sequences of a text should therefore go into one call of the model.

    Parameters
    ----------
    skeleton : Skeleton
        Whose model has its buffers in memory.
    on_layer : callable, optional
        Called with the number of layers that have run in a call, and with all of them.

    Yields
    ------
    PreTrainedModel
        In evaluation.
    """
    model = skeleton.model
    layers = _layers_of(model)
    inside = tuple(f"{path}." for path in layers)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    outside = [name for name in names if not name.startswith(inside)]
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if on_layer is not None:
            on_layer(done, len(layers))

    model.eval()
    with ExitStack() as stack:
        stack.enter_context(_filled(skeleton, outside))
        for path, layer in layers.items():
            own = [name for name in names if name.startswith(f"{path}.")]
            stack.enter_context(_streaming(skeleton, layer, own, count))
        yield model


def _layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the outermost lists of a model, by their paths."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(tuple(f"{p}." for p in found)):
            found |= {f"{path}.{name}": layer for name, layer in module.named_children()}
    return found


@contextmanager
def _filled(skeleton: Skeleton, names: list[str]) -> Iterator[None]:
    """Give parameters and persistent buffers their numbers in a block; ties hold."""
    tensors: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}
    for name in names:
        parameter = skeleton.model.get_parameter(name)
        if id(parameter) not in known:
            known[id(parameter)] = skeleton.load(skeleton.first_name(parameter))
        tensors[name] = known[id(parameter)]
    with with_tensors(skeleton.model, tensors):
        yield


@contextmanager
def _streaming(
    skeleton: Skeleton, layer: nn.Module, names: list[str], count: Callable[[], None]
) -> Iterator[None]:
    """Let a layer read its numbers when it is called."""
    forward = layer.forward

    def run(*arguments: Any, **named: Any) -> Any:
        states = next(each for each in (*arguments, *named.values()) if isinstance(each, Tensor))
        sequences = states.shape[0]
        size = max(1, _TOKENS // max(1, states[0].shape[0]))
        outputs = []
        with _filled(skeleton, names):
            for start in range(0, sequences, size):
                part = slice(start, start + size)
                outputs.append(
                    forward(
                        *(_part_of(each, part, sequences) for each in arguments),
                        **{name: _part_of(each, part, sequences) for name, each in named.items()},
                    )
                )
        count()
        sizes = [min(size, sequences - start) for start in range(0, sequences, size)]
        return _joined(outputs, sizes)

    layer.forward = run
    try:
        yield
    finally:
        layer.forward = forward


def _part_of(value: Any, part: slice, sequences: int) -> Any:
    """Return those sequences of an argument of a layer that a part names."""
    if isinstance(value, tuple):
        return tuple(_part_of(each, part, sequences) for each in value)
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == sequences:
        return value[part]
    return value


def _joined(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Join what a layer returned for parts with these numbers of sequences."""
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(_joined(each, sizes) for each in zip(*outputs, strict=True))
    if isinstance(first, Tensor) and first.ndim and [*map(len, outputs)] == list(sizes):
        return torch.cat(list(outputs))
    # What is the same for all sequences: a bias of positions.
    return first

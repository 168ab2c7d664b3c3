"""Recordings and masks of padding that a block sets apply in that block only."""

import asyncio
import contextvars
import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.nn.replicas import replicate
from tnmoe import nn

THREADS, CALLS = 8, 20


def make_layer(**settings):
    torch.manual_seed(0)
    return nn.MPOMoE(nn.TopKRouter(8, 4, 2, **settings), nn.DenseExperts(4, 8, 8))


def in_threads(work):
    """Results of ``work(number)`` from threads that run at once."""
    barrier = threading.Barrier(THREADS)

    def run(number):
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def test_threads_record_their_own_calls_and_no_others():
    layers = torch.nn.Sequential(make_layer(), make_layer())

    def work(number):
        wrong = 0
        for call in range(CALLS):
            x = torch.full((number + 1, 8), float(call))
            with nn.record_routing(layers) as routing:
                layers(x)
            expected = torch.nn.functional.linear(x, layers[0].router.weight)
            wrong += [each.name for each in routing.calls] != ["0.router", "1.router"]
            wrong += not torch.equal(routing.calls[0].logits, expected)
        return wrong

    assert in_threads(work) == [0] * THREADS


def test_threads_have_masks_of_their_own():
    layer = make_layer().eval()

    def work(number):
        wrong = 0
        mask = torch.arange(THREADS)[None] == number
        for _ in range(CALLS):
            with nn.ignore_padding(layer, mask):
                output = layer(torch.ones(1, THREADS, 8))
            wrong += not torch.equal((output != 0).any(-1), mask)
            wrong += bool((layer(torch.ones(1, THREADS, 8)) == 0).all(-1).any())
        return wrong

    assert in_threads(work) == [0] * THREADS


def test_matrices_kept_for_one_thread_are_right_for_all():
    torch.manual_seed(0)
    experts = nn.MPOExperts(4, 8, 16, sites=2).eval().requires_grad_(False)
    for projection in (experts.up, experts.down):
        projection.route = "cached"
    layers = [nn.MPOMoE(nn.TopKRouter(8, 4, 2), experts) for _ in range(2)]
    x = torch.randn(20, 8)
    expected = [layer(x) for layer in layers]

    def work(number):
        for call in range(CALLS):
            if (number + call) % 5 == 0:
                nn.weight_cache.clear()
            torch.testing.assert_close(layers[number % 2](x), expected[number % 2])

    in_threads(work)


def test_tasks_that_take_turns_record_their_own_calls():
    layer = make_layer()

    async def task(tokens):
        with nn.record_routing(layer) as routing:
            for _ in range(3):
                await asyncio.sleep(0)
                layer(torch.randn(tokens, 8))
        return [len(call.logits) for call in routing.calls]

    async def all_tasks():
        return await asyncio.gather(*map(task, range(1, 5)))

    assert asyncio.run(all_tasks()) == [[tokens] * 3 for tokens in range(1, 5)]


def test_a_thread_in_a_copy_of_the_context_belongs_to_the_block():
    layer = make_layer()

    async def main():
        with nn.record_routing(layer) as routing:
            await asyncio.to_thread(layer, torch.randn(3, 8))
        return routing

    assert len(asyncio.run(main()).calls) == 1


def test_replicas_that_other_threads_call_belong_to_the_block():
    layer, mask = make_layer(), torch.tensor([[1, 1, 0]])
    x = torch.ones(1, 3, 8)
    with nn.record_routing(layer) as routing, nn.ignore_padding(layer, mask):
        replicas = [replicate(layer) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            outputs = list(pool.map(lambda replica: replica(x), replicas))
    assert [call.name for call in routing.calls] == ["router"] * 2
    for output in outputs:
        assert (output == 0).all(-1).tolist() == [[False, False, True]]
    replicas[0](x)
    with nn.record_routing(replicas[0]) as own:
        replicas[0](x)
    assert len(own.calls) == 1


def test_blocks_in_generators_end_in_any_order():
    layer = make_layer()

    def steps():
        with nn.record_routing(layer) as routing:
            while True:
                yield routing

    first, second = steps(), steps()
    one, two = next(first), next(second)
    layer(torch.randn(3, 8))
    first.close()
    layer(torch.randn(3, 8))
    second.close()
    layer(torch.randn(3, 8))
    assert (len(one.calls), len(two.calls)) == (1, 2)


def test_a_block_that_ends_in_another_thread_has_ended():
    layer = make_layer()

    @contextmanager
    def block():
        with nn.record_routing(layer) as routing, nn.ignore_padding(layer, torch.zeros(3)):
            yield routing

    opened = block()
    routing = opened.__enter__()
    thread = threading.Thread(target=opened.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert (layer(torch.randn(3, 8)) != 0).all()
    assert routing.calls == []


def test_nothing_of_a_block_is_kept_or_copied():
    layer, mask = make_layer(), torch.ones(3)
    with nn.record_routing(layer) as routing, nn.ignore_padding(layer, mask):
        layer(torch.randn(3, 8))
        copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        copies[0](torch.randn(4, 8))
        assert len(routing.calls) == 1
    gone = weakref.ref(routing)
    del routing
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_in_a_thread_of_its_own_sees_the_block_around_it(reentrant):
    # Torch runs the backward passes of accelerators so; here an empty context stands for one.
    layer, mask = make_layer(), torch.tensor([[1, 1, 0]])
    contexts = [contextvars.copy_context(), contextvars.Context()]

    def run(x):
        return contexts.pop(0).run(layer, x)

    x = torch.randn(1, 3, 8, requires_grad=True)
    with nn.ignore_padding(layer, mask):
        contexts[0] = contextvars.copy_context()
        checkpoint(run, x, use_reentrant=reentrant).sum().backward()
    assert contexts == []
    assert (x.grad != 0).all(-1).tolist() == [[True, True, False]]


def test_compiled_layers_see_the_blocks_of_their_own_thread():
    torch.compiler.reset()
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x, mask = torch.randn(1, 3, 8), torch.tensor([[1, 1, 0]])
    with nn.record_routing(layer) as routing, nn.ignore_padding(layer, mask):
        assert (compiled(x) == 0).all(-1).tolist() == [[False, False, True]]
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(compiled, x).result()
    assert (other != 0).all()
    assert len(routing.calls) == 1
    torch.testing.assert_close(compiled(x), layer(x))

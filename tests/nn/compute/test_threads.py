"""Kept matrices and rates of devices, shared by threads that meet at the worst moment."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tnmoe as tn
from tnmoe.contraction import rates as rates_module
from tnmoe.nn.compute import cache as cache_module
from tnmoe.nn.compute.matrices import build_matrices
from tnmoe.nn.compute.slots import Groups
from tnmoe.nn.mpo_projection import MPOProjection

THREADS = 8
ROWS = torch.ones(3, 8)
GROUPS = Groups.of(torch.tensor([0, 1, 2]), 3)


def projection():
    made = MPOProjection(3, tn.MPOShape((2, 2, 2), (2, 2, 2)))
    made.reset_parameters()
    made.route = "cached"
    return made


def product(made):
    with torch.no_grad():
        return made(ROWS, GROUPS)


def in_threads(work, arguments):
    with ThreadPoolExecutor(THREADS) as pool:
        return [each.result(timeout=60) for each in [pool.submit(work, one) for one in arguments]]


def meet(barrier):
    """Wait for the other threads, unless they are blocked."""
    try:
        barrier.wait(timeout=0.2)
    except threading.BrokenBarrierError:
        barrier.reset()


def test_threads_together_keep_no_more_than_the_limit(cache, monkeypatch):
    made = [projection() for _ in range(THREADS)]
    product(made[0])
    cache.limit = 3 * cache.used
    cache.clear()
    barrier, can_keep = threading.Barrier(THREADS), cache.can_keep

    def after_a_meeting(*args):
        found = can_keep(*args)
        meet(barrier)
        return found

    monkeypatch.setattr(cache, "can_keep", after_a_meeting)
    found = in_threads(product, made)
    monkeypatch.undo()
    assert cache.used == cache.limit
    cache.clear()
    for each, before in zip(made, found, strict=True):
        torch.testing.assert_close(before, product(each))


def test_matrices_that_many_threads_need_are_built_once(cache, monkeypatch):
    made, built = projection(), []
    barrier = threading.Barrier(THREADS)

    def slow(*args):
        built.append(args)
        meet(barrier)
        return build_matrices(*args)

    monkeypatch.setattr(cache_module, "build_matrices", slow)
    found = in_threads(product, [made] * THREADS)
    assert len(built) == 1
    assert all(each.equal(found[0]) for each in found)


def test_threads_build_different_matrices_at_the_same_time(cache, monkeypatch):
    barrier = threading.Barrier(THREADS)

    def together(*args):
        barrier.wait(timeout=30)
        return build_matrices(*args)

    made = [projection() for _ in range(THREADS)]
    monkeypatch.setattr(cache_module, "build_matrices", together)
    in_threads(product, made)
    assert cache.used > 0


@pytest.mark.parametrize("change", ["forget", "clear"])
def test_matrices_of_cores_that_change_while_they_are_built_are_not_kept(
    change, cache, monkeypatch
):
    made = projection()

    def overtaken(*args):
        matrices = build_matrices(*args)
        made.center.data.mul_(2)  # which torch does not count
        cache.forget([made.center]) if change == "forget" else cache.clear()
        return matrices

    monkeypatch.setattr(cache_module, "build_matrices", overtaken)
    before = product(made)
    monkeypatch.undo()
    torch.testing.assert_close(product(made), 2 * before)


def test_a_garbage_collection_during_a_look_up_does_not_deadlock(cache, monkeypatch):
    made, can_keep = projection(), cache.can_keep

    def collecting(*args):
        cache.forget([made.center])  # as a finaliser may do
        return can_keep(*args)

    monkeypatch.setattr(cache, "can_keep", collecting)
    expected = in_threads(product, [made] * THREADS)
    monkeypatch.undo()
    torch.testing.assert_close(product(made), expected[0])


def test_building_that_fails_lets_the_next_thread_build(cache, monkeypatch):
    made = projection()

    def failing(*_):
        raise MemoryError

    monkeypatch.setattr(cache_module, "build_matrices", failing)
    with pytest.raises(MemoryError):
        in_threads(product, [made] * 2)
    monkeypatch.undo()
    (found,) = in_threads(product, [made])
    torch.testing.assert_close(found, product(made))


def test_rates_that_are_set_while_stored_ones_are_read_stay_set(monkeypatch):
    rates = rates_module.Rates(1e9, 1.0, 1e9, 1e-6)
    monkeypatch.setattr(rates_module, "_RATES", {})
    monkeypatch.setattr(
        rates_module, "_stored", lambda device: rates_module.set_rates(device, rates)
    )
    assert rates_module.get_rates("cpu") is rates
    assert rates_module.get_rates("cpu") is rates

"""Work on all cores whose results come in order, a few of them ahead."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

from tnmoe.errors import positive_int

T = TypeVar("T")


def results_of(tasks: Iterable[Callable[[], T]], jobs: int | None = None) -> Iterator[T]:
    """What tasks return, in their order; no more than ``jobs`` results are there at a time.

    Each runs on a single thread, so that what it computes does not depend on how many run.

    Parameters
    ----------
    tasks : iterable of callable
    jobs : int, optional
        Tasks at a time; as many as there are cores by default.
    """
    jobs = positive_int("jobs", os.cpu_count() or 1 if jobs is None else jobs)
    waiting = iter(tasks)
    before = torch.get_num_threads()
    with ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        queue: list[Future[T]] = []
        try:
            queue.extend(threads.submit(task) for task in islice(waiting, jobs))
            while queue:
                yield queue.pop(0).result()
                queue.extend(threads.submit(task) for task in islice(waiting, 1))
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
            # Threads to come would follow the last call that set it.
            torch.set_num_threads(before)

"""Tasks on several threads, with results in order and a bounded number of them in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

from tnmoe.errors import check_positive_int

T = TypeVar("T")


def resolve_jobs(jobs: int | None) -> int:
    """Return a number of jobs, checked, or by default the number of CPUs."""
    return check_positive_int("jobs", os.cpu_count() or 1 if jobs is None else jobs)


def ordered_results(tasks: Iterable[Callable[[], T]], jobs: int | None = None) -> Iterator[T]:
    """Run tasks on threads and yield their results in the order of the tasks.

    At most ``jobs`` tasks run or wait to be yielded. torch computes each on a single thread: the
    result does not depend on how many tasks run at a time.

    Parameters
    ----------
    tasks : iterable of callable
    jobs : int, optional
        Number of threads; the number of CPUs by default.
    """
    jobs = resolve_jobs(jobs)
    remaining = iter(tasks)
    threads_before = torch.get_num_threads()
    with ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        queue: list[Future[T]] = []
        try:
            queue.extend(pool.submit(task) for task in islice(remaining, jobs))
            while queue:
                yield queue.pop(0).result()
                queue.extend(pool.submit(task) for task in islice(remaining, 1))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            # A new thread inherits the last number that any thread has set.
            torch.set_num_threads(threads_before)

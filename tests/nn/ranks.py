"""Distributed runs of two processes on this machine."""

import multiprocessing
import socket


def on_two_ranks(function):
    """What a function (rank, port, results) puts of each of two processes of a distributed run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=function, args=(rank, port, results)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    try:
        found = dict(results.get(timeout=60) for _ in ranks)
        for process in ranks:
            process.join(timeout=60)
    finally:
        for process in ranks:  # one waits for ever where the other failed
            process.kill()
    return found

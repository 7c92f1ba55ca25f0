"""Jobs side by side, in processes of their own."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


def side_by_side(
    function: Callable[[Job], Result], jobs: Sequence[Job], processes: int
) -> Iterator[tuple[Job, Result]]:
    """Gives jobs and what `function` returns for them, as they are done.

    Args:
        function: Picklable, with picklable results.
        jobs: What it is called with; each process has an equal share of them.
        processes: How many, each on one thread.

    Raises:
        RuntimeError: If a process ends before its jobs are done. The others are ended, too.
    """
    workers: dict[Any, BaseProcess] = {}
    try:
        for first in range(processes):
            reader, worker = _start(function, jobs[first::processes])
            workers[reader] = worker
        while workers:
            ready: list[Any] = wait(workers)
            for reader in ready:
                try:
                    done: tuple[Job, Result] = pickle.loads(reader.recv_bytes())
                except EOFError:
                    worker = workers.pop(reader)
                    worker.join()
                    if worker.exitcode:
                        message = f"a process ended with code {worker.exitcode}"
                        raise RuntimeError(message) from None
                else:
                    yield done
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.join()


def _start(function: Callable[[Job], Result], jobs: Sequence[Job]) -> tuple[Any, BaseProcess]:
    context = get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    # Pickled here: multiprocessing would hand over each tensor as an open file.
    worker = context.Process(
        target=_work, args=(writer, pickle.dumps((function, jobs))), daemon=True
    )
    worker.start()
    writer.close()  # else nobody would see that the process has closed its own
    return reader, worker


def _work(writer: Connection, work: bytes) -> None:
    # An interruption from the keyboard reaches all processes; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    function, jobs = pickle.loads(work)
    try:
        for job in jobs:
            writer.send_bytes(pickle.dumps((job, function(job))))
    except BrokenPipeError:  # nobody is there any more who would want it
        pass

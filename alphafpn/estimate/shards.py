"""Shards on the processes of a `torch.distributed` group: what each one found, or how it failed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import msgspec
from torch import distributed

_POLL_SECONDS = 0.05


def is_shard() -> bool:
    """Whether this is one of several processes of an initialised default group."""
    ready = distributed.is_available() and distributed.is_initialized()
    return ready and distributed.get_world_size() > 1


def exchange(mine: dict[str, Any]) -> list[dict[str, Any]]:
    """Gives every process what all of them passed, by rank. All processes must call this.

    Raises:
        RuntimeError: If another process failed within `failures_are_shared` instead.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    number = _store().add(f"alphafpn/{rank}", 1)
    _post(number, {"found": mine})
    # Only a collective notices a process that has died, and only the store an error of one that
    # has not.
    arrival = distributed.barrier(async_op=True)
    while not arrival.is_completed():
        for other in range(world_size):
            _read(number, other)
        time.sleep(_POLL_SECONDS)
    arrival.wait()
    return [_read(number, other)["found"] for other in range(world_size)]


@contextlib.contextmanager
def failures_are_shared() -> Iterator[None]:
    """Lets processes that wait in `exchange` end with the error that is raised here."""
    try:
        yield
    except Exception as error:
        if is_shard():
            with contextlib.suppress(RuntimeError):  # the error itself tells more
                number = _store().add(f"alphafpn/{distributed.get_rank()}", 0) + 1
                _post(number, {"error": f"{type(error).__name__}: {error}"})
        raise


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()


def _post(number: int, message: dict[str, Any]) -> None:
    _store().set(f"alphafpn/{distributed.get_rank()}/{number}", msgspec.json.encode(message))


def _read(number: int, rank: int) -> dict[str, Any]:
    """Returns the message of a process in one exchange; empty as long as there is none."""
    key = f"alphafpn/{rank}/{number}"
    if not _store().check([key]):
        return {}
    message = msgspec.json.decode(_store().get(key), type=dict[str, Any])
    if "error" in message:
        raise RuntimeError(f"process {rank} failed to estimate: {message['error']}")
    return message

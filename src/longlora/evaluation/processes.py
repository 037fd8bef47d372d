"""The processes of an `accelerate launch` share an evaluation out: each does every n-th part, all know every result.

work      0   1   2   3   4        two processes; the last round has one part left, and the second process
first     0       2       4        does it too, so that models whose layers are spread over the processes (FSDP)
second        1       3  (4)       run as many forward passes everywhere
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from longlora.errors import UserError

Part = TypeVar("Part")
Result = TypeVar("Result")


def join() -> None:
    """Meet the other processes, where `accelerate launch` or `torchrun` started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState()


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return processes() == 1 or dist.get_rank() == 0


def shared_out(work: Sequence[Part], run: Callable[[Part], Result]) -> Iterator[tuple[Part, Result]]:
    """Each part of `work` with what `run` made of it, in order; the same in every process."""
    count = processes()
    if count == 1:
        for part in work:
            yield part, run(part)
        return
    for first in range(0, len(work), count):
        parts = work[first : first + count]
        found: list[Any] = [None] * count
        dist.all_gather_object(found, run(parts[min(dist.get_rank(), len(parts) - 1)]))
        yield from zip(parts, found, strict=False)


def told_by_first(make: Callable[[], Result]) -> Result:
    """What `make` returns in the first process, or the mistake it raises there, in every process."""
    if processes() == 1:
        return make()
    told: list[Any] = [None, None]
    if is_first():
        try:
            told[0] = make()
        except UserError as error:
            told[1] = str(error)
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise UserError(told[1])
    return told[0]

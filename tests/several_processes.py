"""Several processes that train together, forked from the test's own so that none of them imports torch again."""

import contextlib
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def together(count: int, work: Callable[[], object], log: Path, seconds: float = 300, **environment: str) -> list[int]:
    """Run `work` in `count` processes that find each other as torchrun's do; their exit statuses, by rank.

    Args:
        seconds: they are killed after so long.
    """
    return wait(start(count, work, log, **environment), seconds)


def start(count: int, work: Callable[[], object], log: Path, **environment: str) -> list[int]:
    """Process ids of `count` processes that run `work`, by rank.

    Args:
        work: raises, or calls `sys.exit`, where it fails.
        log: what they write to stdout and stderr goes into this file.
        environment: of all of them, such as `ACCELERATE_USE_FSDP="true"`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ.update(environment)
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(count),
                LOCAL_WORLD_SIZE=str(count),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            os._exit(_status(work, log))
        children.append(child)
    return children


def wait(children: list[int], seconds: float) -> list[int]:
    """Exit statuses of `children` (minus the signal's number where one ended them); all are killed after `seconds`."""
    until = time.monotonic() + seconds
    statuses: dict[int, int] = {}
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    statuses[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            for child in set(children) - set(statuses):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[child] for child in children]


_kept: list[object] = []
"""Streams of the test's process: one that nobody holds closes its file, which is the child's by then."""


def die_at(step: int, rank: int = 0) -> None:
    """Has process `rank` kill itself, without warning, at the end of optimiser step `step`, before it is saved."""
    from longlora.training.callbacks import MetricsCallback

    own = MetricsCallback.on_step_end

    def dying(self, args, state, *rest, **more):  # type: ignore[no-untyped-def]
        if state.global_step == step and os.environ.get("RANK") == str(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        own(self, args, state, *rest, **more)

    MetricsCallback.on_step_end = dying  # type: ignore[method-assign]


def slowly_after(step: int, words: list[str]) -> None:
    """The command, waiting a while at the end of each optimiser step from `step` on, so that a signal comes in time."""
    from longlora.cli import main
    from longlora.training.callbacks import MetricsCallback

    own = MetricsCallback.on_step_end

    def waiting(self, args, state, *rest, **more):  # type: ignore[no-untyped-def]
        own(self, args, state, *rest, **more)
        if state.global_step >= step:
            time.sleep(1)

    MetricsCallback.on_step_end = waiting  # type: ignore[method-assign]
    main(words)


def _status(work: Callable[[], object], log: Path) -> int:
    _kept.extend([sys.stdout, sys.stderr])
    logging.getLogger().handlers.clear()  # pytest's: the command sets up its own
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    try:
        work()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

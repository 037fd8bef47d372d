"""Long work, a process for each piece of it: its peak memory is its own, and nothing of one reaches the next."""

import logging
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from longlora.errors import UserError
from longlora.logs import quiet_libraries
from longlora.progress import Progress

logger = logging.getLogger(__name__)


def in_processes(todo: Sequence[Any], work: Callable[[Any], None], jobs: int, minutes: float | None = None) -> None:
    """Do `work` on each of `todo` in order, `jobs` at a time; when one fails, those that still run are stopped.

    Args:
        todo: what can be sent to another process, each with a `label` for people.
        work: a module's function, or a partial of one.
        jobs: processes; on several GPUs the one in place i takes GPU i modulo their number.
        minutes: nothing new is begun after so many; what is running is finished.

    Raises:
        UserError: a process was killed.
        Exception: whatever `work` met, with its traceback as the cause.
    """
    if not todo:
        return
    context, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // jobs)
    began, done = time.monotonic(), 0
    waiting, free = deque(todo), list(range(jobs))
    running: dict[Future[None], tuple[Any, int, ProcessPoolExecutor]] = {}
    with Progress("cells", "cells", len(todo)) as progress:
        try:
            while waiting or running:
                while waiting and free and (minutes is None or time.monotonic() - began < 60 * minutes):
                    item, place = waiting.popleft(), free.pop(0)
                    process = ProcessPoolExecutor(1, context, _begin, (place, threads))  # one for one piece of work
                    running[process.submit(_sendable, work, item)] = (item, place, process)
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    item, place, process = running[future]
                    try:
                        future.result()
                    except BrokenProcessPool as error:
                        raise UserError(
                            f"the process of {item.label} was killed: where memory ran out, give fewer --jobs or a "
                            "shorter --context. The same command goes on from its last checkpoint."
                        ) from error
                    process.shutdown()
                    del running[future]
                    free.append(place)
                    done += 1
                    logger.info("finished %s (%d of %d)", item.label, done, len(todo))
                    progress.show(done, f"{done} of {len(todo)} finished")
        finally:
            if running:
                for child in multiprocessing.active_children():
                    child.terminate()
            for _, _, process in running.values():
                process.shutdown()


def _begin(place: int, threads: int) -> None:
    """In a new process: its GPU, its share of the cores, its log."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the processes
    if torch.cuda.device_count() > 1:
        os.environ["LOCAL_RANK"] = str(place % torch.cuda.device_count())
    torch.set_num_threads(threads)
    quiet_libraries()


def _sendable(work: Callable[[Any], None], item: Any) -> None:
    """`work` on `item`; an error that would not survive being sent is raised as what it says."""
    try:
        work(item)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError(f"{error!r}\n{traceback.format_exc()}") from error
        raise

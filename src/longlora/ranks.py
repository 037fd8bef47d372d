"""The processes that work together: which of them this one is, what shares the model out, and what all agree on.

torchrun, Accelerate and Slurm's srun (recipes/slurm.sbatch) put it into the environment before a process starts.
Nothing here imports torch before it must.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

from longlora.errors import UserError

Part = TypeVar("Part")
Result = TypeVar("Result")

_OURS = "LONGLORA_USE_FSDP"

_SECONDS_TO_DIE = 2.0
"""A process that died is seen as dead by its neighbours on the machine after this long at most."""


def rank() -> int:
    """This process's number among all, 0 the first, which alone writes what is written once."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its machine, which is its GPU's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def engine() -> str | None:
    """What divides the model over the processes: `FSDP` (torch's `fully_shard`), `DeepSpeed`, or None, where each
    process has all of it (DDP, or one process alone)."""
    if _says("ACCELERATE_USE_FSDP") or _says(_OURS):
        return "FSDP"
    return "DeepSpeed" if _says("ACCELERATE_USE_DEEPSPEED") else None


def refuse_what_cannot_train(batch: int, device_batch: int, sequence_parallel: int = 1) -> None:
    """Mistakes of how the processes were started, which need nothing loaded to see.

    Args:
        batch: rows of an optimiser step.
        device_batch: rows that a process holds at a time.
        sequence_parallel: processes that share a row.

    Raises:
        UserError: FSDP1, context, tensor or sequence parallelism of Accelerate's, several GPUs under one process,
            processes that do not divide into groups that share a row, or a batch that does not divide.
    """
    if engine() == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "FSDP version 1 is asked for, which cannot train in part what lies in one flat weight: give `accelerate "
            "launch --fsdp_version 2`, or `fsdp_version: 2` in its config file (recipes/accelerate/fsdp2.yaml)."
        )
    if engine() == "FSDP" and os.environ.get("FSDP_AUTO_WRAP_POLICY", "") == "SIZE_BASED_WRAP":
        raise UserError(
            "FSDP's SIZE_BASED_WRAP has no effect: each decoder layer is a unit; give TRANSFORMER_BASED_WRAP, or none."
        )
    for kind, what in (("CP", "context"), ("TP", "tensor"), ("SP", "sequence")):
        size = os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")
        if _says("ACCELERATE_USE_PARALLELISM_CONFIG") and size.isdigit() and int(size) > 1:
            raise UserError(
                f"Accelerate's {what} parallelism (size {size}) cannot train here: leave it out; divide rows with "
                "--sequence-parallel, and the model with FSDP2 or DeepSpeed."
            )
    if _says("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("Megatron-LM cannot train here: divide the model with FSDP2 or DeepSpeed instead.")
    if world_size() == 1:
        import torch

        if engine() is None and torch.cuda.device_count() > 1:
            count = torch.cuda.device_count()
            raise UserError(
                f"{count} GPUs are visible and one process was started: start one for each with `accelerate launch "
                f"--num_processes {count} -m longlora …`, or show it one GPU with CUDA_VISIBLE_DEVICES=0."
            )
    if world_size() % sequence_parallel:
        raise UserError(
            f"--sequence-parallel is {sequence_parallel}: it must divide the number of processes, {world_size()}; "
            f"start as many with `accelerate launch --num_processes {sequence_parallel} -m longlora …`, or leave it "
            "out."
        )
    if sequence_parallel > 1 and engine() == "DeepSpeed":
        raise UserError("--sequence-parallel goes with data parallelism and FSDP2: leave it out with DeepSpeed.")
    groups = world_size() // sequence_parallel
    if batch % (device_batch * groups):
        with_rows = "processes" if sequence_parallel == 1 else "groups of processes that share a row"
        raise UserError(
            f"--batch is {batch}: it must be a multiple of --device-batch x {with_rows}, {device_batch} x {groups}."
        )


def join() -> None:
    """Meet the other processes; from here on FSDP is ours to do and no more Accelerate's.

    On a CPU Accelerate takes `--use_fsdp` for plain data parallelism and says nothing; with our own call of
    `fully_shard` (longlora.training.sharding) there is one way for all devices.
    """
    if _says("ACCELERATE_USE_FSDP"):
        os.environ["ACCELERATE_USE_FSDP"] = "false"
        os.environ[_OURS] = "true"
    if engine() == "DeepSpeed":
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "auto"  # `--batch` decides, not the launcher's 1
    if world_size() == 1:
        return
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        if torch.accelerator.is_available():
            from accelerate import PartialState

            PartialState()
        else:
            if engine() != "DeepSpeed":  # with it Accelerate would leave DeepSpeed out, and say nothing
                os.environ["ACCELERATE_USE_CPU"] = "true"
            distributed.init_process_group("gloo")
    from psutil import Process

    met: list[Any] = [None] * world_size()
    distributed.all_gather_object(met, (socket.gethostname(), os.getpid(), Process().create_time()))
    _present[:] = met


_present: list[tuple[str, int, float]] = []
"""Machine, process id and time of birth of each process."""


def joined() -> bool:
    """Whether there are others, and this process has met them."""
    return bool(_present)


def together() -> int:
    """How many processes have met; 1 before they did."""
    return len(_present) or 1


def shared_out(work: Sequence[Part], run: Callable[[Part], Result]) -> Iterator[tuple[Part, Result]]:
    """Each part of `work` with what `run` made of it, in order: each process does every n-th, all know every result.

    work      0   1   2   3   4        two processes; the last round has one part left, and the second process
    first     0       2       4        does it too, so that models whose layers are spread over the processes (FSDP)
    second        1       3  (4)       run as many forward passes everywhere
    """
    for first in range(0, len(work), together()):
        parts = work[first : first + together()]
        yield from zip(parts, everyones(run(parts[min(rank(), len(parts) - 1)])), strict=False)


def everyones(value: Result) -> list[Result]:
    """`value` of each process in their order; all of them must call."""
    if not joined():
        return [value]
    from torch import distributed

    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Go on once all processes are here."""
    everyones(None)


def first_alone(work: Callable[[], Result]) -> Result:
    """What the first process's `work` returns, in every process; a mistake that it meets is met by all."""
    if not joined():
        return work()
    from torch import distributed

    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return cast(Result, outcome[0])


def speaks() -> bool:
    """Whether this process is to tell of what ended it: the first one that asks; before they met, one a machine."""
    if not joined():
        return local_rank() == 0
    try:
        from torch.distributed.distributed_c10d import _get_default_store

        store = _get_default_store()
        first = store.add("longlora/ended", 1) == 1
        until = time.monotonic() + _SECONDS_TO_DIE
        while rank() == 0 and store.add("longlora/ended", 0) < world_size() and time.monotonic() < until:
            time.sleep(0.05)  # the store ends with this process, and the others have yet to ask
        return first
    except Exception:  # the process that kept the store is gone
        return True


def who_died() -> str | None:
    """Which of the processes on this machine is no more, in words, or None where all are there."""
    import psutil

    until = time.monotonic() + _SECONDS_TO_DIE
    while True:
        for number, (host, process, born) in enumerate(_present):
            if host != socket.gethostname() or number == rank():
                continue
            try:
                found = psutil.Process(process)
                gone = found.create_time() != born or found.status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                gone = True
            if gone:
                return f"process {number} of {world_size()} (pid {process} on {host})"
        if time.monotonic() > until:
            return None
        time.sleep(0.05)


def _says(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")

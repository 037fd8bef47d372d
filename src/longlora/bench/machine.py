"""The machine that is measured: device, name, free memory, time, and the peak of what a piece of work allocates."""

import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from longlora.errors import UserError

CPUINFO = Path("/proc/cpuinfo")
"""Where Linux names the processor."""


def choose_device(name: str) -> torch.device:
    """The device that `--device` names; `auto` is the GPU where there is one.

    Raises:
        UserError: a name that is no device, or a GPU that PyTorch does not find.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is '{name}': it must be cpu, cuda, cuda:N, or auto.")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device is '{name}', and PyTorch finds {count} CUDA devices here: give cpu or auto.")
    return device


def hardware(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the number of threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    said = CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""
    named = re.search(r"^model name\s*: (.+)$", said, re.MULTILINE)
    name = named[1].strip() if named else platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def now(device: torch.device) -> float:
    """Seconds on the wall clock, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that `work` holds at one time in PyTorch's allocator, beyond what was allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes a line when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    assert record.profiler is not None
    # `record.events()` lists only allocations outside of operators; the raw record has every one of them.
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

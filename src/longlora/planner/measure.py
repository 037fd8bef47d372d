"""What a training step really takes: steps on a randomly initialised model, counted instead of predicted.

Three ways. `gpu`: real steps, CUDA's allocator (`torch.cuda.max_memory_allocated`) and the clock. `process`: real
steps on the CPU, the peak of the process's resident memory. `fake`: PyTorch's fake tensors, which have shapes and
storages but no data, so that a 7B model runs on a laptop; every storage is counted while it lives. Attention there is
the CPU's fused kernel (it keeps output and log-sum-exp, no scores) in calls as large as a GPU's, and what kernels
allocate inside is not seen. The fake device and its host are one, so what offloading puts on the host is made where
nothing is counted.
"""

import ctypes
import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PreTrainedConfig, modeling_utils

from longlora.attention import block_attention
from longlora.attention.transformers_backend import use_shifted_attention
from longlora.errors import UserError
from longlora.model import lm_head
from longlora.model.adapters import add_adapters_from, parameter_groups
from longlora.model.lm_head import causal_lm_loss, unwrapped
from longlora.model.memory_saving import offloaded_activations
from longlora.model.memory_saving.in_the_model import save_memory_in
from longlora.model.memory_saving.layer_tiles import tile_layers
from longlora.model.memory_saving.liger_loss import why_not_liger
from longlora.model.memory_saving.offloaded_activations import checkpoint_layers
from longlora.model.memory_saving.offloaded_optimizer import OffloadedAdamW
from longlora.model.reading import quiet
from longlora.planner.reading import build_without_storage
from longlora.progress import Progress
from longlora.settings import AttentionSettings, TrainableSettings, TrainingSettings
from longlora.settings.memory import MemorySettings

aten = torch.ops.aten

WARM_UP_TOKENS = 64
"""Tokens of the step that real devices run before the first that counts."""


@dataclass(frozen=True)
class Measured:
    """One training step at one context."""

    context: int
    bytes: int | None
    """Most bytes at one time; None where it did not fit."""

    seconds: float | None
    """Of forward, backward and the optimiser's step on the device's rows; None for fake tensors."""


@dataclass(frozen=True)
class Trainee:
    """A randomly initialised model of some shape, and how it trains."""

    config: PreTrainedConfig
    trainable: TrainableSettings
    training: TrainingSettings
    attention: AttentionSettings
    accumulates: bool
    """Gradients of earlier rows of the same optimiser step are there already."""

    memory: MemorySettings = MemorySettings()
    """Switches as given by hand."""


def measure(trainee: Trainee, way: str, contexts: list[int], limit_bytes: int) -> list[Measured]:
    """One training step at each of `contexts`, growing, until one does not fit.

    Args:
        way: `gpu`, `process` or `fake`.
        limit_bytes: what fits, where nothing runs out by itself.

    Raises:
        UserError: a GPU is asked for and there is none, this system does not tell a process's peak, or a switch
            cannot be measured in this way.
    """
    device = torch.device("cuda" if way == "gpu" else "cpu")
    if way == "gpu" and not torch.cuda.is_available():
        raise UserError("--measure-by is gpu, and PyTorch finds none here: give fake or process.")
    if way == "fake":
        if trainee.memory.base_bits:
            raise UserError("a 4-bit base is made of real numbers: give --measure-by process or gpu.")
        model = build(trainee, torch.device("meta"))
        live = LiveBytes()
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake, live, _PlainAnswers(), _as_on_a_gpu(live):
            _materialise(model, device)
            return _grow(Run(trainee, model, device, live.elsewhere), contexts, limit_bytes, live.most)
    if way == "process" and (trainee.memory.offload_activations or trainee.memory.offload_optimizer):
        raise UserError("on the CPU there is nowhere to offload to: give --measure-by fake or gpu.")
    run = Run(trainee, build(trainee, device), device)
    meter = _CudaMeter() if way == "gpu" else _ProcessMeter(run)
    run.step(min(WARM_UP_TOKENS, contexts[0]))
    return _grow(run, contexts, limit_bytes, meter.most)


def free_bytes() -> int:
    """Memory that processes can still have, in bytes (Linux)."""
    return _proc("/proc/meminfo", "MemAvailable")


def _proc(path: str, name: str) -> int:
    """A size in bytes out of a file of `name: N kB` lines."""
    if not Path(path).exists():
        raise UserError(f"--measure-by process reads {path}, which {sys.platform} does not have: give fake.")
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, while they live; `peak` is the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary()
        self._elsewhere = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def most(self, work: Callable[[], None]) -> tuple[int, None]:
        """Most bytes at one time while `work` runs, what lived before included."""
        self.peak = self.live
        work()
        return self.peak, None

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is made in here lies in another memory, and is never counted."""
        self._elsewhere = True
        try:
            yield
        finally:
            self._elsewhere = False

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = 0 if self._elsewhere else storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        self.live -= size


class _PlainAnswers(TorchDispatchMode):
    """Answers what a step asks about values, which fake tensors do not have.

    Each row is one document (positions rise), every token is scored, logits agree, and a number is 1.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        if func in (aten.allclose.default, aten.equal.default):
            return True
        if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            return args[0].flatten(0, args[1][0].ndim - 1).clone()
        return func(*args, **(kwargs or {}))


@contextmanager
def _as_on_a_gpu(live: LiveBytes) -> Iterator[None]:
    """What is offloaded, by transformers' checkpointing or by tiles, where the model itself is on the CPU: it is copied
    still, there and back. Attention's calls are a GPU's, and every token is scored."""

    def there(tensor: Tensor) -> Tensor:
        with live.elsewhere():
            return tensor.clone()

    own = block_attention.calls_take
    with (
        patch.object(modeling_utils, "save_on_cpu", lambda **_: saved_tensors_hooks(there, torch.clone)),
        patch.object(offloaded_activations, "to_host", there),
        patch.object(offloaded_activations, "from_host", lambda tensor, _: tensor.clone()),
        patch.object(block_attention, "calls_take", lambda _, kernel: own(torch.device("cuda"), kernel)),
        patch.object(lm_head, "_ends_of_parts", lambda labels, chunk: (_every(chunk, len(labels)), len(labels))),
    ):
        yield


def _every(chunk: int, tokens: int) -> list[int]:
    return [*range(chunk, tokens, chunk), tokens]


class _CudaMeter:
    def most(self, work: Callable[[], None]) -> tuple[int, float]:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), time.perf_counter() - began


class _ProcessMeter:
    """What the run's tensors hold, and how far resident memory rises above that while a step runs (Linux)."""

    def __init__(self, run: "Run"):
        self.run = run
        # glibc: hand freed blocks of 64 KiB and more back at once, so that what is resident is what is in use
        if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
            mallopt(-3, 2**16)

    def most(self, work: Callable[[], None]) -> tuple[int, float]:
        gc.collect()
        before = _proc("/proc/self/status", "VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again (man 5 proc)
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        return self.run.held_bytes() + _proc("/proc/self/status", "VmHWM") - before, seconds


class Run:
    """Steps as `longlora.training.trainer` takes them, without the Trainer around."""

    def __init__(
        self,
        trainee: Trainee,
        model: nn.Module,
        device: torch.device,
        on_host: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """`on_host` surrounds what makes tensors on the host."""
        self.trainee, self.model, self.device = trainee, model.train(), device
        training, memory = trainee.training, trainee.memory
        if memory.layer_tile:
            tile_layers(unwrapped(model), memory.layer_tile, memory.offload_activations)
        elif training.gradient_checkpointing:
            checkpoint_layers(model, memory.offload_activations)
        liger = memory.loss_kernel != "chunked" and why_not_liger(unwrapped(model)) is None
        self.loss_kernel = "liger" if liger else "chunked"
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._gradients_of_zero()
        adamw = OffloadedAdamW if memory.offload_optimizer else torch.optim.AdamW
        self.optimizer = adamw(parameter_groups(model, training), betas=(training.beta1, training.beta2))
        with on_host() if memory.offload_optimizer else nullcontext():
            self.optimizer.step()  # makes its moments

    def step(self, context: int) -> None:
        """Forward and backward of `device_batch` rows of `context` tokens, clipping, and the optimiser's step."""
        attention, training = self.trainee.attention, self.trainee.training
        use_shifted_attention(
            self.model,
            min(attention.tokens_per_group(context), context),
            attention.pattern,
            options=attention.options,
            full_layers=attention.full_attention_layers,
            full_layers_share=attention.full_layers_share,
        )
        self.optimizer.zero_grad()
        if self.trainee.accumulates:
            self._gradients_of_zero()
        ids = torch.zeros((training.device_batch, context), dtype=torch.long, device=self.device)
        dtype = getattr(torch, training.dtype)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            inputs = {"input_ids": ids, "labels": ids}
            loss = causal_lm_loss(self.model, inputs, training.loss_chunk, kernel=self.loss_kernel)
        loss.backward()
        del loss
        torch.nn.utils.clip_grad_norm_(self.parameters, training.max_grad_norm or float("inf"))
        self.optimizer.step()

    def held_bytes(self) -> int:
        """Bytes of the model, its gradients and the optimizer's moments."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        moments = [state for states in self.optimizer.state.values() for state in states.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *gradients, *moments]
        return sum(tensor.nbytes for tensor in tensors)

    def _gradients_of_zero(self) -> None:
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)


def _grow(
    run: Run,
    contexts: list[int],
    limit_bytes: int,
    most: Callable[[Callable[[], None]], tuple[int, float | None]],
) -> list[Measured]:
    found: list[Measured] = []
    with Progress("measuring", "contexts", len(contexts)) as progress:
        for count, context in enumerate(contexts):
            progress.show(count, f"{context:,} tokens")
            try:
                size, seconds = most(partial(run.step, context))
            except torch.OutOfMemoryError:
                return [*found, Measured(context, None, None)]
            found.append(Measured(context, size, seconds))
            if size > limit_bytes:
                break
    return found


def build(trainee: Trainee, device: torch.device) -> nn.Module:
    """The model with what trains in it, random on a real device, without storage on `meta`."""
    dtype = getattr(torch, trainee.training.dtype)
    if device.type == "meta":
        model = build_without_storage(trainee.config, dtype)
    else:
        with torch.device("cpu") if trainee.memory.base_bits else device, quiet():
            model = AutoModelForCausalLM.from_config(trainee.config, dtype=dtype)
    save_memory_in(model, trainee.memory)
    with device:
        return cast(nn.Module, add_adapters_from(trainee.trainable, model))


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Gives each meta parameter and buffer a storage on `device`; tied ones stay one."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for table in cast("tuple[dict[str, Tensor | None], ...]", (module._parameters, module._buffers)):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    empty = torch.empty_like(tensor, device=device)
                    parameter = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
                table[name] = made[tensor]


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """A copy of `config` with its first `layers` layers.

    Raises:
        UserError: it has fewer.
    """
    config = deepcopy(config)
    text = config.get_text_config()
    if layers > text.num_hidden_layers:
        raise UserError(f"--measure-layers is {layers}: it must be at most the model's, {text.num_hidden_layers}.")
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config

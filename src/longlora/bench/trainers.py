"""One training step taken three ways, each by a Trainer: S2-Attn, full attention, and what anybody's script does.

The three begin from the same random weights. Frozen ones are one piece of memory that all three read, so that a 7B
model fits three times; what trains is each way's own. `plain` has nothing of this package in it: the stock model with
its default attention, stock PEFT with the same modules as ours, `transformers.Trainer` with the model's own loss over
all logits and its default optimiser.
"""

import copy
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from longlora.bench.machine import now
from longlora.errors import UserError
from longlora.model.adapters import add_adapters_from
from longlora.model.lm_head import unwrapped
from longlora.model.memory_saving.four_bit_base import quantise_base
from longlora.model.memory_saving.offloaded_activations import checkpointing_arguments
from longlora.model.memory_saving.tiled_mlp import tile_mlp
from longlora.model.reading import quiet
from longlora.settings import STEP_WAYS, BenchStepSettings, MemorySettings, PatternOptions
from longlora.training.callbacks import AttentionSchedule
from longlora.training.trainer import ContextTrainer

Rows = list[dict[str, Tensor]]
"""Each `{"input_ids": (N,), "labels": (N,)}`."""


@dataclass(frozen=True)
class Taken:
    """What one optimiser step gave."""

    seconds: float
    """Forward, backward, clipping and the optimiser, the device's work done."""

    processor_seconds: float
    """Of this process's threads meanwhile, which another's work on the same processor does not lengthen."""

    loss: float
    """Nats a token, before the update."""

    gradient_norm: float
    """Over all that trains, before clipping."""


class Way:
    """A model with its Trainer; `step` takes one optimiser step in the Trainer's own loop."""

    def __init__(self, trainer: Trainer, schedule: AttentionSchedule | None):
        self.trainer, self.schedule = trainer, schedule
        self.clock = _Clock(trainer.args.device)
        trainer.add_callback(self.clock)
        for printer in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printer)
        # `train` frees the device's cached memory as it begins: a step a call, each would pay for allocating it again
        cast(Any, trainer.accelerator).free_memory = lambda *objects: objects

    def step(self, rows: Rows) -> Taken:
        """One step on `rows`, all of them at once."""
        self.trainer.train_dataset = cast(Any, rows)
        if self.schedule is not None:
            self.schedule.context = len(rows[0]["input_ids"])
        with quiet():
            self.trainer.train()
        return self.clock.taken()

    def standing_bytes(self) -> int:
        """Bytes on the device between steps: weights (frozen ones too), buffers and the optimiser's moments."""
        model, optimizer = cast(nn.Module, self.trainer.model), self.trainer.optimizer
        states = () if optimizer is None else optimizer.state.values()  # it comes with the first step
        moments = [value for state in states for value in state.values() if torch.is_tensor(value)]
        held = (*model.parameters(), *model.buffers(), *moments)
        return sum(tensor.nbytes for tensor in held if tensor.device.type == self.trainer.args.device.type)

    def forget(self) -> None:
        """After a step that ran out of memory: drop what it left."""
        cast(nn.Module, self.trainer.model).zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Clock(TrainerCallback):
    """Times an optimiser step between the Trainer's own marks and keeps what the Trainer logs of it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.began = self.seconds = self.processor_began = self.processor_seconds = 0.0
        self.logged: dict[str, float] = {}

    def on_step_begin(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        self.began, self.processor_began = now(self.device), time.process_time()

    def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        self.seconds = now(self.device) - self.began
        self.processor_seconds = time.process_time() - self.processor_began

    def on_log(self, args, state, control, logs=None, **_):  # type: ignore[no-untyped-def]
        self.logged |= logs or {}

    def taken(self) -> Taken:
        return Taken(self.seconds, self.processor_seconds, self.logged["loss"], float(self.logged["grad_norm"]))


def make_ways(
    config: PreTrainedConfig,
    settings: BenchStepSettings,
    device: torch.device,
    folder: str,
    names: Sequence[str] = STEP_WAYS,
) -> dict[str, Way]:
    """The ways `names` to take a step, beginning from the same weights; ours with the memory switches of `settings`.

    Args:
        config: of the model, with as many layers as are wanted and a window of the context.
        device: cpu or cuda.
        folder: where the Trainers may write; they do not.

    Raises:
        UserError: nothing in the model can train as asked, or a switch that cannot act here.
    """
    with_ours = [name for name in names if name != "plain"] or ["full"]  # plain begins as ours does
    bases = _bases(config, settings, device, len(with_ours) + ("plain" in names))
    models = {name: _ours(bases.pop(), settings) for name in with_ours}
    if "plain" in names:
        models["plain"] = _plain(bases.pop(), next(iter(models.values())))
    return {name: _way(name, models[name], settings, device, folder) for name in names}


def random_rows(config: PreTrainedConfig, rows: int, context: int, seed: int) -> Rows:
    """Rows of random tokens; every token is a label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.get_text_config().vocab_size, (rows, context), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def _bases(
    config: PreTrainedConfig, settings: BenchStepSettings, device: torch.device, count: int
) -> list[PreTrainedModel]:
    """Models with the same random weights, which lie in the same memory unless all of them train or are 4-bit."""
    torch.manual_seed(settings.seed)
    quantised = settings.memory.base_bits is not None
    with torch.device("cpu") if quantised else device, quiet():
        base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))
    if quantised:
        quantise_base(base, device)
    again = copy.deepcopy if quantised or "full" in settings.trainable.train else _sharing_copy
    return [base, *(again(base) for _ in range(count - 1))]


def _sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of modules, hooks and buffers over the same weights."""
    same = {id(weight): nn.Parameter(weight.detach(), weight.requires_grad) for weight in model.parameters()}
    return copy.deepcopy(model, cast(Any, same))


def _ours(base: PreTrainedModel, settings: BenchStepSettings) -> nn.Module:
    if settings.memory.tiled_mlp:
        tile_mlp(base, settings.memory.mlp_tile)
    torch.manual_seed(settings.seed)  # of the LoRA matrices
    with next(base.parameters()).device:
        return cast(nn.Module, add_adapters_from(settings.trainable, base))


def _plain(base: PreTrainedModel, ours: nn.Module) -> nn.Module:
    """Stock PEFT on `base` with the modules that train in `ours`, from the same values; or every weight."""
    if not isinstance(ours, PeftModel):
        return base.float()
    with next(base.parameters()).device, quiet():
        plain = get_peft_model(base, copy.deepcopy(ours.peft_config["default"]))
    begin = {name: weight for name, weight in ours.named_parameters() if weight.requires_grad}
    own = {name: weight for name, weight in plain.named_parameters() if weight.requires_grad}
    if begin.keys() != own.keys():
        raise UserError(
            f"stock PEFT trains other weights of {type(base).__name__} than longlora does "
            f"({', '.join(sorted(begin.keys() ^ own.keys())[:3])}, …): please report it."
        )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(begin[name])
    return plain


def _way(name: str, model: nn.Module, settings: BenchStepSettings, device: torch.device, folder: str) -> Way:
    memory = MemorySettings() if name == "plain" else settings.memory
    with quiet():
        arguments = _arguments(settings, memory, device, folder)
    rows = random_rows(unwrapped(model).config, settings.rows, 2, settings.seed)
    if name == "plain":
        return Way(Trainer(model=cast(Any, model), args=arguments, train_dataset=cast(Any, rows)), None)
    attention = settings.attention
    if name == "full":
        attention = replace(attention, pattern="full", options=PatternOptions())
    schedule = AttentionSchedule(attention, 2, settings.seed)
    trainer = ContextTrainer(
        training=settings.training,
        in_order=True,
        memory=memory,
        model=model,
        args=arguments,
        train_dataset=rows,
        callbacks=[schedule],
    )
    return Way(trainer, schedule)


def _arguments(
    settings: BenchStepSettings, memory: MemorySettings, device: torch.device, folder: str
) -> TrainingArguments:
    """One optimiser step, nothing written; the same for ours and for plain."""
    training = settings.training
    return TrainingArguments(
        output_dir=folder,
        use_cpu=device.type == "cpu",
        max_steps=1,
        per_device_train_batch_size=settings.rows,
        learning_rate=training.lr,
        lr_scheduler_type="constant",
        weight_decay=training.weight_decay,
        adam_beta1=training.beta1,
        adam_beta2=training.beta2,
        max_grad_norm=training.max_grad_norm,
        **checkpointing_arguments(training.gradient_checkpointing, memory),
        bf16=training.dtype == "bfloat16",
        seed=training.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        log_level="error",
    )

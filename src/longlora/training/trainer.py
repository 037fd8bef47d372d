"""Training on packed rows with transformers' Trainer: our loss, our parameter groups, our metrics, nothing else."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from longlora import ranks
from longlora.errors import UserError
from longlora.evaluation.perplexity import perplexity
from longlora.model.adapters import parameter_groups
from longlora.model.lm_head import causal_lm_loss, unwrapped
from longlora.model.memory_saving.layer_tiles import tile_layers
from longlora.model.memory_saving.liger_loss import choose_loss_kernel
from longlora.model.memory_saving.offloaded_activations import checkpointing_arguments
from longlora.model.memory_saving.offloaded_optimizer import OffloadedAdamW
from longlora.model.sequence_parallel import SequenceGroup
from longlora.run_directory import RunDirectory, checkpoint_step
from longlora.settings import (
    AttentionSettings,
    MemorySettings,
    OptimisationSettings,
    PerplexitySettings,
    TrainingSettings,
)
from longlora.training.callbacks import AttentionSchedule, MetricsCallback, forget_peak_memory, peak_memory
from longlora.training.checkpoints import load_checkpoint, load_random_state, save_checkpoint
from longlora.training.interruption import Interruption
from longlora.training.row_order import FilledUp, RowOrder
from longlora.training.sharding import give_back_large_blocks, is_sharded

logger = logging.getLogger(__name__)

HeldOutLoss = Callable[[nn.Module], float]
"""Mean loss of a model in nats a token on what it does not train on."""


LONG_ON_A_CPU = 2**16
"""Tokens of a row from which the host's memory is managed for size instead of speed, where it is what trains."""


class ContextTrainer(Trainer):
    """transformers' Trainer with a chunked loss and a held-out loss weighted by token."""

    def __init__(
        self,
        *,
        training: TrainingSettings,
        in_order: bool,
        run: RunDirectory | None = None,
        held_out_loss: HeldOutLoss | None = None,
        before: Callable[[], None] | None = None,
        memory: MemorySettings,
        **arguments: Any,
    ):
        self.is_sharded = is_sharded(arguments["model"])
        super().__init__(**arguments)
        self.run, self.training, self.in_order, self.held_out_loss = run, training, in_order, held_out_loss
        self.before = before
        plain = unwrapped(cast(nn.Module, self.model))
        self.loss_kernel = choose_loss_kernel(memory.loss_kernel, plain)
        self.offload_optimizer = memory.offload_optimizer
        self.sequence = SequenceGroup(training.sequence_parallel) if training.sequence_parallel > 1 else None
        if memory.layer_tile:
            tile_layers(plain, memory.layer_tile, memory.offload_activations)

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer does; a model that is sharded already is neither moved nor wrapped."""
        super().create_accelerator_and_postprocess()
        if self.is_sharded:
            own = self.accelerator.prepare_model
            cast(Any, self.accelerator).prepare_model = lambda model, **_: own(
                model, device_placement=False, evaluation_mode=True
            )

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.is_sharded:
            super()._move_model_to_device(model, device)

    def prepare(self, checkpoint: Path | None) -> None:
        """Make ready all that trains, as `checkpoint` has it, without training."""
        self._prepare_for_training(self.args.max_steps, self.get_train_dataloader(), checkpoint)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.before is not None:
            self.before()
        if resume_from_checkpoint is not None:
            load_checkpoint(self, Path(resume_from_checkpoint))
        return prepared

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        """Everything is loaded once it is prepared."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random_state(Path(checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self.run is not None, "saved only where there is a run"
        save_checkpoint(self, self.run)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate of their own for norms and embeddings."""
        if self.optimizer is None:
            adamw = OffloadedAdamW if self.offload_optimizer else torch.optim.AdamW
            self.optimizer = adamw(
                parameter_groups(cast(nn.Module, model or self.model), self.training),
                betas=(self.training.beta1, self.training.beta2),
            )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Next-token loss over the optimiser step's tokens; the (context x vocabulary) logits never exist whole."""
        kernel, work = self.loss_kernel, cast(AbstractContextManager, nullcontext())
        if self.sequence is not None:
            # each process has counted the tokens of whole rows
            num_items_in_batch = torch.as_tensor(num_items_in_batch) / self.sequence.size
            piece, inputs = self.sequence.piece_of(inputs)
            work = piece.work()
        with work:
            loss = causal_lm_loss(model, inputs, self.training.loss_chunk, num_items_in_batch, kernel)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # data parallelism averages what this has summed
        return (loss, {}) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = len(cast(Any, self.train_dataset))
        device_batch, shared_by = self.args.per_device_train_batch_size, self.training.sequence_parallel
        together = device_batch * self.args.world_size // shared_by
        steps = math.ceil(rows / (together * self.args.gradient_accumulation_steps))
        seed = None if self.in_order else self.training.seed
        return RowOrder(rows, together, seed, lambda: self.state.global_step // steps, device_batch, shared_by)

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """The held-out loss, with full attention."""
        assert self.held_out_loss is not None, "evaluated only where something is held out"
        loss = self.held_out_loss(cast(nn.Module, self.model))
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": math.exp(loss)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def refuse_missing_trackers(training: OptimisationSettings) -> None:
    """Raises UserError when `report_to` names a tracker that is not installed."""
    available = get_available_reporting_integrations()
    for tracker in training.report_to:
        if tracker not in available:
            raise UserError(
                f"--report-to names '{tracker}', which is not installed here: install it, or give one of "
                f"{', '.join(available) or 'none (no tracker is installed)'}."
            )


def document_loss(documents: Sequence[np.ndarray], context: int) -> HeldOutLoss:
    """The held-out loss that is the loss of `documents` (token ids) in windows of `context` tokens."""
    settings = PerplexitySettings(contexts=(context,), stride=context)
    return lambda model: perplexity(model, documents, settings, progress=False)[0].nll


def train(
    model: nn.Module,
    rows: Dataset[dict[str, Tensor]],
    training: TrainingSettings,
    attention: AttentionSettings,
    run: RunDirectory,
    *,
    held_out_loss: HeldOutLoss | None = None,
    in_order: bool = False,
    context: int | None = None,
    tokens_per_step: int | None = None,
    collate: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]] | None = None,
    memory: MemorySettings | None = None,
    before: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train `model` in place on `rows`, checkpointing into `run`.

    Args:
        model: with the parameters that train marked so.
        rows: packed rows; where no `collate` says otherwise all of one length.
        training: optimisation.
        attention: the pattern, its group size and its schedule.
        run: where checkpoints and metrics go; with `training.resume` the last whole checkpoint is gone on from.
        held_out_loss: measured every `training.evaluate_every` steps.
        in_order: take the rows as they stand instead of shuffling them.
        context: tokens of the longest row there may be; default the first row's.
        tokens_per_step: tokens of an optimiser step, on average; default `training.batch` rows of `context`.
        collate: makes one batch of rows of several lengths.
        memory: layers in tiles, what is offloaded, the kernel of the loss; the rest of it the model has already.
        before: called once the engine has taken over `model`, before a checkpoint is loaded: what is to be measured of
            the model as it comes.

    Returns:
        Steps, final loss, tokens, seconds, tokens a second and peak memory.

    Raises:
        UserError: a checkpoint of more steps than are asked for, a loss that is no number, a kernel of the loss that
            cannot serve the model here, or a full disk.
        Interrupted: a signal ended it before its last step.
    """
    forget_peak_memory()
    memory = memory or MemorySettings()
    arguments = _trainer_arguments(training, run.path, held_out_loss is not None, memory)
    groups = arguments.world_size // training.sequence_parallel
    arguments.gradient_accumulation_steps = training.batch // (training.device_batch * groups)
    # the Trainer writes it into the config, which is saved with the result; the loss asks for no cache anyway
    arguments.use_cache = getattr(unwrapped(model).config, "use_cache", False)
    context = context or len(rows[0]["input_ids"])
    if context >= LONG_ON_A_CPU and not torch.accelerator.is_available():
        give_back_large_blocks()
    tokens_per_step = tokens_per_step or training.batch * context
    interruption = Interruption()
    trainer = ContextTrainer(
        run=run,
        before=before,
        training=training,
        in_order=in_order,
        held_out_loss=held_out_loss,
        memory=memory,
        model=model,
        args=arguments,
        train_dataset=FilledUp(rows),
        eval_dataset=rows if held_out_loss else None,
        data_collator=collate,
        callbacks=[
            MetricsCallback(run, tokens_per_step),
            AttentionSchedule(attention, context, training.seed),
            interruption,
        ],
    )
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    checkpoint = ranks.first_alone(lambda: run.last_checkpoint(verify=True)) if training.resume else None
    if checkpoint:
        logger.info("going on from %s", checkpoint)
    began = time.monotonic()
    steps = checkpoint_step(checkpoint) if checkpoint else 0
    if steps > training.steps:
        raise UserError(
            f"{checkpoint} has trained {steps} steps and --steps is {training.steps}: give --steps {steps} or more, or "
            "another --output."
        )
    if checkpoint and steps == training.steps:
        trainer.prepare(checkpoint)  # the loop would train one step more
    else:
        with interruption:
            steps = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).global_step
        interruption.raise_if_stopped(steps, training.steps)
    seconds = time.monotonic() - began
    if trainer.sequence is not None:
        logger.info("keys, values and their gradients sent: %s bytes a process", f"{trainer.sequence.sent_bytes:,}")
    metrics = run.read_metrics()
    return {
        "steps": steps,
        "loss": next((record["loss"] for record in reversed(metrics) if "loss" in record), None),
        "tokens": steps * tokens_per_step,
        "seconds": seconds,
        "tokens_per_second": metrics[-1]["tokens_per_second"] if metrics else None,
        "memory_bytes": peak_memory(),
    }


def _trainer_arguments(
    training: TrainingSettings, folder: Path, evaluates: bool, memory: MemorySettings
) -> TrainingArguments:
    every = training.evaluate_every if evaluates else None
    on_cpu = not torch.accelerator.is_available()
    # Accelerate takes `use_cpu` for a wish to have no DeepSpeed
    zero_on_cpu = on_cpu and ranks.engine() == "DeepSpeed"
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=on_cpu and not zero_on_cpu,
        ddp_backend="gloo" if zero_on_cpu else None,
        max_steps=training.steps,
        per_device_train_batch_size=training.device_batch,
        learning_rate=training.lr,
        lr_scheduler_type="constant_with_warmup" if training.schedule == "constant" else training.schedule,
        warmup_steps=training.warmup_steps,
        max_grad_norm=training.max_grad_norm,
        **checkpointing_arguments(training.gradient_checkpointing, memory),
        bf16=training.dtype == "bfloat16",
        fp16=training.dtype == "float16",
        seed=training.seed,
        data_seed=training.seed,
        logging_steps=1 if training.steps <= 200 else 10,
        logging_nan_inf_filter=False,
        save_steps=training.save_every,
        ddp_find_unused_parameters=False,
        eval_strategy="steps" if every else "no",
        eval_steps=every,
        report_to=list(training.report_to),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        log_level="warning",
    )

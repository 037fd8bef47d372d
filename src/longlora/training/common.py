"""What `longlora extend` and `longlora sft` have in common around the training itself."""

import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from longlora import ranks
from longlora.attention.documents import keeps_documents_apart
from longlora.errors import Unfinished, UserError
from longlora.model.adapters import trainable_summary
from longlora.model.lm_head import unwrapped
from longlora.model.loading import load
from longlora.model.memory_saving.in_the_model import save_memory_in
from longlora.model.memory_saving.offloaded_activations import refuse_checkpointing
from longlora.model.precision import cpu_computes
from longlora.model.sequence_parallel import refuse_sequence_parallel
from longlora.model.stopping import stop_at_end_of_turn
from longlora.planner.choosing import MemoryNeed, choose_memory
from longlora.run_directory import RunDirectory
from longlora.settings import ExtendSettings, MemorySettings, SftSettings, TrainableSettings
from longlora.training.checkpoints import save_model
from longlora.training.sharding import is_to_be_sharded, loads_weights
from longlora.training.trainer import refuse_missing_trackers

logger = logging.getLogger(__name__)

Settings = TypeVar("Settings", ExtendSettings, SftSettings)


def refuse_early(settings: ExtendSettings | SftSettings, row: int) -> None:
    """Raises UserError for mistakes that need neither weights nor data to see.

    Args:
        row: tokens of the longest row.
    """
    training = settings.training
    ranks.refuse_what_cannot_train(training.batch, training.device_batch, training.sequence_parallel)
    refuse_missing_trackers(training)
    group = settings.attention.tokens_per_group(row)
    if group > row:
        raise UserError(f"--group-size is {group:,}: it must be at most the tokens of a row, {row:,}.")


def refuse_full_attention_beyond(settings: ExtendSettings | SftSettings, steps: int) -> None:
    """Raises UserError where more steps are to have full attention than there are."""
    if settings.attention.full_attention_steps > steps:
        raise UserError(
            f"--full-attention-steps is {settings.attention.full_attention_steps:,}: it must be at most the steps, "
            f"{steps:,}."
        )


def with_memory_chosen(
    settings: Settings,
    config: PreTrainedConfig,
    row: int,
    trainable: TrainableSettings | None = None,
    four_bit: bool = True,
) -> Settings:
    """`settings` with `--memory auto` made into the switches that it stands for.

    Args:
        row: tokens of the longest row.
        trainable: what trains, where that is not as the settings have it.
        four_bit: whether the base may be quantised.
    """
    training = settings.training
    chosen = choose_memory(
        MemoryNeed(
            name=settings.model,
            config=config,
            context=row,
            attention=settings.attention,
            trainable=trainable or settings.trainable,
            training=training.for_rows(training.batch) if isinstance(settings, SftSettings) else settings.training,
            memory=settings.memory,
            trust_remote_code=settings.loading.trust_remote_code,
            four_bit=four_bit,
        )
    )
    training = replace(training, gradient_checkpointing=chosen.gradient_checkpointing)
    return replace(settings, memory=chosen.memory, training=training)


def load_for_training(
    settings: ExtendSettings | SftSettings, goes_on: bool = False
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model that trains, with a 4-bit base and a tiled MLP where the settings have them.

    Args:
        goes_on: with its adapter, which is to train further; else it comes plain, an adapter folded in.
    """
    loading = settings.loading
    if not torch.cuda.is_available() and not cpu_computes(getattr(torch, settings.training.dtype)):
        logger.info(
            "this CPU has no arithmetic of %s: --dtype float32 is several times faster", settings.training.dtype
        )
    model, tokenizer = load(
        settings.model,
        dtype=settings.training.dtype,
        device=None if settings.memory.base_bits or is_to_be_sharded() else "auto",
        blank=not loads_weights(),
        trust_remote_code=loading.trust_remote_code,
        revision=loading.revision,
        trainable=goes_on,
        merge=not goes_on,
    )
    plain, memory = unwrapped(model), settings.memory
    asked = settings.training.gradient_checkpointing and not memory.layer_tile
    refuse_checkpointing(type(plain).__name__, plain.supports_gradient_checkpointing, asked)
    save_memory_in(plain, memory)
    return model, tokenizer


def announce_trainable(trainee: nn.Module) -> dict[str, Any]:
    """`trainable_summary`, which is also logged."""
    trainable = trainable_summary(trainee)
    logger.info(
        "training %s of %s parameters (%.2f%%): %s",
        f"{trainable['trainable']:,}",
        f"{trainable['parameters']:,}",
        100 * trainable["share"],
        ", ".join(f"{name} {count:,}" for name, count in trainable["groups"].items()),
    )
    return trainable


def without_adapters(model: nn.Module) -> AbstractContextManager[None]:
    """`model` as it was before adapters were added to it."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def refuse_pieces(model: nn.Module, config: PreTrainedConfig, settings: ExtendSettings | SftSettings) -> None:
    """Raises UserError where `--sequence-parallel` cannot serve `model`, which is to train with `config`."""
    if settings.training.sequence_parallel > 1:
        apart = ranks.first_alone(lambda: keeps_documents_apart(model))
        refuse_sequence_parallel(unwrapped(model), config, settings.attention.pattern, apart)


def may_share_rows(model: nn.Module) -> bool:
    """Whether documents that are to be kept apart may share a row of `model`, which trains with S2-Attn."""
    if ranks.first_alone(lambda: keeps_documents_apart(model)):  # which alone holds the weights when several load
        return True
    logger.warning(
        "%s has layers, recurrent or convolutional, that carry a state from one document of a row into the next: each "
        "document gets a row of its own",
        type(unwrapped(model)).__name__,
    )
    return False


def refuse_unknown_token(largest: int, model: nn.Module, name: str) -> None:
    """Raises UserError when the model has no embedding for token `largest`, the largest of its data."""
    embedded = cast(nn.Embedding, unwrapped(model).get_input_embeddings()).num_embeddings
    if largest >= embedded:
        raise UserError(
            f"the tokenizer makes token {largest:,} but the model embeds only {embedded:,}: give the tokenizer that "
            f"belongs to {name}."
        )


def fingerprint(*arrays: np.ndarray) -> str:
    """Changes with any number in `arrays`, and with where one of them ends."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def save_result(model: Any, tokenizer: PreTrainedTokenizerBase, run: RunDirectory, context: int) -> None:
    """Save `adapter/` (or `model/` after full training) in one step, with the tokenizer set to the new window."""
    tokenizer.model_max_length = context
    if isinstance(model, PreTrainedModel):
        stop_at_end_of_turn(model.generation_config, tokenizer)
    target = run.model if isinstance(model, PreTrainedModel) else run.adapter
    beside = run.path / f".{target.name}"

    def finish() -> None:
        if target.exists():
            shutil.rmtree(target)
        beside.replace(target)

    with run.writing():
        ranks.first_alone(lambda: shutil.rmtree(beside, ignore_errors=True))
        save_model(model, beside, tokenizer)
        ranks.first_alone(finish)


def memory_facts(memory: MemorySettings, gradient_checkpointing: bool) -> dict[str, Any]:
    """The switches that a run trains with, for its summary."""
    names = "offload_activations layer_tile tiled_mlp mlp_tile offload_optimizer base_bits loss_kernel".split()
    return {"gradient_checkpointing": gradient_checkpointing} | {name: getattr(memory, name) for name in names}


@contextmanager
def nothing_left_behind(run: RunDirectory) -> Iterator[None]:
    """A mistake met before the first checkpoint leaves nothing, so that the mended command can use the same folder."""
    existed = run.settings_file.exists()
    try:
        yield
    except Unfinished:
        raise
    except UserError:
        if run.writes and not existed and run.last_checkpoint() is None:
            for file in (run.settings_file, run.metrics_file, run.content_file):
                file.unlink(missing_ok=True)
            shutil.rmtree(run.evaluation, ignore_errors=True)
        raise


def flat(settings: Any) -> dict[str, Any]:
    """Every setting by its flag's name."""
    found: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            found |= flat(value)
        elif field.name == "output" or (field.name == "model" and value != "demo" and Path(value).exists()):
            found[field.name] = str(Path(value).resolve())
        elif field.name not in ("json", "config"):
            found[field.name] = value
    return found

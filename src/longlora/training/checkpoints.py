"""Checkpoints that every engine writes alike, and that any number of processes goes on from.

    checkpoint-N/  adapter_model.safetensors … | model.safetensors …   stock PEFT or transformers: merges as it is
                   config.json                                         with the stretched positions
                   state/shard-…-of-….safetensors                      what trains in float32 and AdamW's moments, by
                                                                       name; each process wrote its part
                   random-R.safetensors                                of each process
                   trainer_state.json                                  the Trainer's own, with the scheduler's place
                   manifest.json                                       size and SHA-256 of each file, written last

torch.distributed.checkpoint cuts `state/` as the reading processes need it. A checkpoint is written beside its place
and renamed, so that it is there whole or not at all.
"""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME

from longlora import ranks
from longlora.errors import UserError
from longlora.model.memory_saving.offloaded_optimizer import OffloadedAdamW
from longlora.model.reading import quiet
from longlora.model.saving import save_adapter
from longlora.run_directory import KEPT, RunDirectory
from longlora.training import zero
from longlora.training.sharding import whole
from longlora.whole_files import write_manifest

if TYPE_CHECKING:
    from longlora.training.trainer import ContextTrainer

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(trainer: "ContextTrainer", run: RunDirectory) -> None:
    """Write `checkpoint-N` for the step that `trainer` has done, and remove all but the last two; all processes call.

    Raises:
        UserError: the disk is full, or the run's folder is gone.
    """
    step = trainer.state.global_step
    beside, place = run.path / f".checkpoint-{step}", run.path / f"checkpoint-{step}"
    model = cast(nn.Module, trainer.model)

    def begin() -> None:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()

    def finish() -> None:
        trainer.state.save_to_json(str(beside / TRAINER_STATE_NAME))
        write_manifest(beside)
        if place.exists():
            shutil.rmtree(place)
        beside.replace(place)
        for old in run.checkpoints()[KEPT:]:
            shutil.rmtree(old)

    with run.writing():
        ranks.first_alone(begin)
        save_model(model, beside)
        state = zero.state_on_first(trainer) if trainer.is_deepspeed_enabled else _state(trainer)
        with _alone_is_fine():
            state["schedule"] = torch.tensor(float(cast(Any, trainer.lr_scheduler).last_epoch))
            dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(beside / "state"), save_distributed=True))
        save_file(_random_state(), beside / f"random-{ranks.rank()}.safetensors")
        if ranks.rank() == 0:
            trainer._save_scaler(str(beside))
        ranks.wait_for_all()
        ranks.first_alone(finish)


def load_checkpoint(trainer: "ContextTrainer", checkpoint: Path) -> None:
    """Give the prepared `trainer` the weights, the optimizer and the scheduler of `checkpoint`; all processes call.

    Raises:
        UserError: it holds other weights than the run trains.
    """
    reader = dcp.HuggingFaceStorageReader(str(checkpoint / "state"))
    stored = reader.read_metadata().state_dict_metadata
    state = zero.empty_state(trainer) if trainer.is_deepspeed_enabled else _state(trainer, make=True)
    state["schedule"] = torch.tensor(0.0)
    for name, tensor in state.items():
        if name not in stored or tuple(cast(Any, stored[name]).size) != tuple(tensor.shape):
            raise UserError(
                f"{checkpoint} does not hold {name.partition('/')[2]} as this run trains it: go on with the settings "
                "and the model that it was made with."
            )
    with _alone_is_fine():
        dcp.load(state, storage_reader=reader)
    if trainer.is_deepspeed_enabled:
        zero.take_over(trainer, state)
    scheduler = cast(Any, trainer.lr_scheduler)
    scheduler.last_epoch = scheduler._step_count = int(state["schedule"])
    rates = scheduler.get_lr()
    for group, rate in zip(cast(Any, trainer.optimizer).param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    trainer._load_scaler(str(checkpoint))


def load_random_state(checkpoint: Path) -> None:
    """This process's random state; a run with more processes than wrote has none for the last of them."""
    file = checkpoint / f"random-{ranks.rank()}.safetensors"
    if file.exists():
        state = load_file(file)
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


def save_model(model: nn.Module, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """What came of the training as stock PEFT or transformers read it; all processes call, the first one writes."""
    state: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, nn.Parameter) or not tensor.requires_grad:
            kept = None if isinstance(tensor, nn.Parameter) else tensor
        elif id(tensor) in done:
            kept = done[id(tensor)]
        else:
            kept = done[id(tensor)] = _whole_weight(tensor)
        if kept is not None and ranks.rank() == 0:
            state[name] = kept
    if ranks.rank() == 0:
        if isinstance(model, PeftModel):
            save_adapter(model, folder, tokenizer, state)
        else:
            with quiet():
                cast(PreTrainedModel, model).save_pretrained(folder, state_dict=state)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    ranks.wait_for_all()


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by its name in a checkpoint; tied weights once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _whole_weight(parameter: nn.Parameter) -> Tensor:
    """All of a weight, on the CPU; every process must call."""
    return zero.whole_weight(parameter) if zero.holds(parameter) else whole(parameter.detach()).cpu()


def _state(trainer: "ContextTrainer", make: bool = False) -> dict[str, Tensor]:
    """What trains and what AdamW keeps of it, by name: the tensors themselves, this process's parts where sharded.

    Args:
        make: give the optimizer a state to load into where it has none yet.
    """
    kept = cast(Any, trainer.optimizer).optimizer.state
    found: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(cast(nn.Module, trainer.model)).items():
        found[f"weight/{name}"] = parameter.detach()
        if make and parameter not in kept:
            host = isinstance(cast(Any, trainer.optimizer).optimizer, OffloadedAdamW)
            kept[parameter] = {"step": torch.tensor(0.0)} | {
                moment: torch.zeros_like(parameter.detach(), device="cpu" if host else None) for moment in MOMENTS
            }
        found |= {f"{key}/{name}": value for key, value in kept.get(parameter, {}).items()}
    return found


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield

"""`longlora extend`: base model and long documents in, the same model with a longer window out, measured on the way."""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from longlora import ranks
from longlora.attention.cost import attention_cost
from longlora.attention.documents import keeps_documents_apart
from longlora.attention.transformers_backend import use_shifted_attention
from longlora.corpus.encoding import beginning
from longlora.corpus.holding_out import held_out_documents
from longlora.corpus.packing import describe, pack
from longlora.corpus.tokens import tokenize_corpus
from longlora.errors import Unfinished, UserError
from longlora.evaluation.command import perplexity_table
from longlora.model.adapters import add_adapters_from, trainable_summary
from longlora.model.lm_head import unwrapped
from longlora.model.loading import load, load_config
from longlora.model.memory_saving.in_the_model import save_memory_in
from longlora.model.positions import PositionExtension, extend_positions, present_context
from longlora.model.sequence_parallel import refuse_sequence_parallel
from longlora.model.stopping import stop_at_end_of_turn
from longlora.planner.choosing import MemoryNeed, choose_memory
from longlora.report.page import write_report
from longlora.run_directory import RunDirectory
from longlora.settings import ExtendSettings, MemorySettings, SftSettings
from longlora.training.checkpoints import save_model
from longlora.training.measuring import Data, measure, what_to_measure
from longlora.training.sharding import is_to_be_sharded, loads_weights, shard
from longlora.training.trainer import document_loss, refuse_missing_trackers, train

logger = logging.getLogger(__name__)


def extend(settings: ExtendSettings) -> dict[str, Any]:
    """Run `longlora extend`.

    Returns:
        `{"output", "positions", "attention", "trainable", "training", "memory", "data", "evaluation"}`, also written to
        the run directory as `evaluation/summary.json`; `memory` is `{"gradient_checkpointing", "offload_activations",
        "layer_tile", "tiled_mlp", "mlp_tile", "offload_optimizer", "base_bits", "loss_kernel"}`, as chosen.

    Raises:
        UserError: any setting, document, model or folder that does not fit, before anything is trained.
    """
    config = _refuse_early(settings)
    ranks.join()
    settings = ranks.first_alone(lambda: _with_memory_chosen(settings, config))
    resume, accept = settings.training.resume, settings.training.accept_changes
    run = RunDirectory(settings.output)
    with run.locked(), nothing_left_behind(run):
        run.begin("extend", flat(settings), resume, accept)
        model, tokenizer = load_for_training(settings)
        # here already, so that a model that cannot be served is refused before hours of work
        use_shifted_attention(
            model,
            settings.attention.tokens_per_group(settings.positions.tokens_per_row),
            backend=settings.attention.attention_backend,
        )
        data = prepare_data(settings, tokenizer, model)
        run.recognise(data.content, accept)
        measured = what_to_measure(settings, model, data)
        if measured:
            data = replace(data, held_out=[ids[: measured.document_tokens] for ids in data.held_out])
        evaluation = {}
        stretched = type(model.config).from_dict(model.config.to_dict())
        extension = extend_positions(stretched, settings.positions.context, settings.positions.method)
        refuse_pieces(model, stretched, settings)

        def before(trainee: nn.Module) -> None:
            """Measure the model as it came, then with its positions stretched."""
            with without_adapters(trainee):
                if measured:
                    evaluation["base"] = measure(run, "base", "base model", trainee, settings, data, measured.ways, 0)
                extend_positions(unwrapped(trainee), settings.positions.context, settings.positions.method)
                if measured:
                    label = f"{settings.positions.method}, not trained"
                    evaluation["untrained"] = measure(
                        run, "untrained", label, trainee, settings, data, measured.ways, 1
                    )

        trained, summary = train_extension(model, tokenizer, settings, run, data, extension, before)
        if measured:
            evaluation["trained"] = measure(run, "trained", "longlora", trained, settings, data, measured.ways, 2)
        summary["evaluation"] = evaluation
        run.write_evaluation("summary", summary)
        if run.writes:
            write_report(run.path)
    if run.writes and not settings.json:
        print(_story(summary))
    return summary


def train_extension(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: ExtendSettings,
    run: RunDirectory,
    data: Data,
    extension: PositionExtension,
    before: Callable[[nn.Module], None] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Add what trains, train with the attention pattern, and save the adapter (or the model) into `run`.

    Args:
        before: called with the model, adapters on and sharded if it is to be, before it trains; where it is None the
            positions are stretched already.

    Returns:
        The trained model in eval mode, and the run's summary without its evaluation.
    """
    set_seed(settings.training.seed)
    context = settings.positions.context
    trainee = add_adapters_from(settings.trainable, model)
    trainable = announce_trainable(trainee)
    if is_to_be_sharded():
        shard(trainee)
    row = settings.positions.tokens_per_row
    long = [ids for ids in data.held_out if len(ids) >= context][:8]
    trained = train(
        trainee,
        data.rows,
        settings.training,
        settings.attention,
        run,
        held_out_loss=document_loss(long, row) if long else None,
        in_order=settings.corpus.in_order,
        memory=settings.memory,
        before=partial(before, trainee) if before else None,
    )
    save_result(trainee, tokenizer, run, context)
    trainee.eval()
    return trainee, {
        "output": str(run.path),
        "model": settings.model,
        "positions": asdict(extension),
        "attention": asdict(settings.attention) | {"group_size": settings.attention.tokens_per_group(row)},
        "trainable": trainable,
        "training": trained,
        "attention_cost": attention_cost(settings.attention, settings.training, row, model.config),
        "memory": memory_facts(settings.memory, settings.training.gradient_checkpointing),
        "data": {"name": ", ".join(settings.corpus.data), **describe(data.rows)},
    }


def without_adapters(model: nn.Module) -> AbstractContextManager[None]:
    """`model` as it was before adapters were added to it."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


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


def prepare_data(settings: ExtendSettings, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Data:
    """Tokenise (or find in the cache) and pack the training documents, and tokenise the held-out ones.

    Raises:
        UserError: unreadable or too short documents, or tokens the model has no embedding for.
    """
    corpus, context = settings.corpus, settings.positions.context
    training = tokenize_corpus(tokenizer, corpus, held_out=False)
    chosen = np.arange(len(training))
    if settings.evaluation_data or "stdlib" in corpus.data:
        sources = settings.evaluation_data or ("stdlib",)
        measured = tokenize_corpus(tokenizer, replace(corpus, data=sources, max_tokens=None), held_out=True)
        held_out = [measured.document(index) for index in range(len(measured))]
        largest = max(training.largest_token, measured.largest_token)
    else:
        kept = held_out_documents(training, context)
        held_out = [training.document(index) for index in kept]
        chosen = np.setdiff1d(chosen, kept)
        largest = training.largest_token
    refuse_unknown_token(largest, model, settings.model)
    rows = pack(
        training,
        documents=chosen,
        context=settings.positions.tokens_per_row,
        packing=corpus.packing,
        prefer_long=corpus.prefer_long,
        mix=corpus.shares() if corpus.mix else None,
        seed=settings.training.seed,
        together=corpus.packing != "isolate" or may_share_rows(model),
    )
    if settings.positions.row_tokens is not None:
        rows.skip_positions(context, settings.training.seed)
    facts = describe(rows)
    logger.info(
        "%s documents, %s tokens, %s rows of %s tokens%s",
        f"{facts['documents']:,}",
        f"{facts['tokens']:,}",
        f"{facts['rows']:,}",
        f"{context:,}",
        "" if held_out else "; nothing held out to measure on: give --evaluation-data",
    )
    epochs = settings.training.steps * settings.training.batch / len(rows)
    if epochs > 1:
        logger.info("training passes over these rows %.1f times; more data or fewer --steps avoids that", epochs)
    content = {
        "the text to train on": {"fingerprint": fingerprint(training.offsets, training.tokens), "rows": len(rows)},
        "the text to measure on": {"fingerprint": fingerprint(*held_out), "documents": len(held_out)},
    }
    name = ", ".join(settings.evaluation_data or corpus.data)
    return Data(rows, held_out, name, content, next(iter(beginning(tokenizer)), None))


def fingerprint(*arrays: np.ndarray) -> str:
    """Changes with any number in `arrays`, and with where one of them ends."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


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


def _story(summary: dict[str, Any]) -> str:
    """What came of it, for a person at a terminal."""
    lines = [perplexity_table(list(summary["evaluation"].values()))] if summary["evaluation"] else []
    result = "model" if "full" in summary["trainable"]["groups"] else "adapter"
    lines += [
        f"result  {summary['output']}/{result}",
        f"report  {summary['output']}/report.html",
    ]
    if result == "adapter":
        lines.append(f"merge   longlora merge {summary['output']} --output FOLDER")
    return "\n".join(lines)


def memory_facts(memory: MemorySettings, gradient_checkpointing: bool) -> dict[str, Any]:
    """The switches that a run trains with, for its summary."""
    names = "offload_activations layer_tile tiled_mlp mlp_tile offload_optimizer base_bits loss_kernel".split()
    return {"gradient_checkpointing": gradient_checkpointing} | {name: getattr(memory, name) for name in names}


def _with_memory_chosen(settings: ExtendSettings, config: PreTrainedConfig) -> ExtendSettings:
    chosen = choose_memory(
        MemoryNeed(
            name=settings.model,
            config=config,
            context=settings.positions.tokens_per_row,
            attention=settings.attention,
            trainable=settings.trainable,
            training=settings.training,
            memory=settings.memory,
            trust_remote_code=settings.loading.trust_remote_code,
        )
    )
    training = replace(settings.training, gradient_checkpointing=chosen.gradient_checkpointing)
    return replace(settings, memory=chosen.memory, training=training)


def _refuse_early(settings: ExtendSettings) -> PreTrainedConfig:
    """Mistakes that need no weights to see; the config of the model, for what else can be told from it."""
    config = load_config(
        settings.model, trust_remote_code=settings.loading.trust_remote_code, revision=settings.loading.revision
    )
    training = settings.training
    ranks.refuse_what_cannot_train(training.batch, training.device_batch, training.sequence_parallel)
    refuse_missing_trackers(settings.training)
    window = present_context(config)
    if settings.positions.context <= window:
        raise UserError(
            f"--context is {settings.positions.context:,}: it must be above the window that {settings.model} has, "
            f"{window:,} tokens."
        )
    row = settings.positions.tokens_per_row
    group = settings.attention.tokens_per_group(row)
    if group > row:
        raise UserError(f"--group-size is {group:,}: it must be at most the tokens of a row, {row:,}.")
    if settings.attention.full_attention_steps > settings.training.steps:
        raise UserError(
            f"--full-attention-steps is {settings.attention.full_attention_steps:,}: it must be at most --steps, "
            f"{settings.training.steps:,}."
        )
    return config


def load_for_training(settings: ExtendSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The plain model that adapters go on, with a 4-bit base and a tiled MLP where the settings have them."""
    loading = settings.loading
    model, tokenizer = load(
        settings.model,
        dtype=settings.training.dtype,
        device=None if settings.memory.base_bits or is_to_be_sharded() else "auto",
        blank=not loads_weights(),
        trust_remote_code=loading.trust_remote_code,
        revision=loading.revision,
        merge=True,
    )
    return save_memory_in(cast(PreTrainedModel, model), settings.memory), tokenizer


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

"""`longlora extend`: base model and long documents in, the same model with a longer window out, measured on the way."""

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from longlora import ranks
from longlora.attention.cost import attention_cost
from longlora.attention.transformers_backend import use_shifted_attention
from longlora.corpus.encoding import beginning
from longlora.corpus.holding_out import held_out_documents
from longlora.corpus.packing import describe, pack
from longlora.corpus.tokens import tokenize_corpus
from longlora.errors import UserError
from longlora.evaluation.command import perplexity_table
from longlora.model.adapters import add_adapters_from
from longlora.model.lm_head import unwrapped
from longlora.model.loading import load_config
from longlora.model.positions import PositionExtension, extend_positions, present_context
from longlora.report.page import write_report
from longlora.run_directory import RunDirectory
from longlora.settings import ExtendSettings
from longlora.training.common import (
    announce_trainable,
    fingerprint,
    flat,
    load_for_training,
    may_share_rows,
    memory_facts,
    nothing_left_behind,
    refuse_early,
    refuse_full_attention_beyond,
    refuse_pieces,
    refuse_unknown_token,
    save_result,
    with_memory_chosen,
    without_adapters,
)
from longlora.training.measuring import Data, measure, what_to_measure
from longlora.training.sharding import is_to_be_sharded, shard
from longlora.training.trainer import document_loss, train

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
    settings = ranks.first_alone(lambda: with_memory_chosen(settings, config, settings.positions.tokens_per_row))
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


def _refuse_early(settings: ExtendSettings) -> PreTrainedConfig:
    """Mistakes that need no weights to see; the config of the model, for what else can be told from it."""
    config = load_config(
        settings.model, trust_remote_code=settings.loading.trust_remote_code, revision=settings.loading.revision
    )
    window = present_context(config)
    if settings.positions.context <= window:
        raise UserError(
            f"--context is {settings.positions.context:,}: it must be above the window that {settings.model} has, "
            f"{window:,} tokens."
        )
    refuse_early(settings, settings.positions.tokens_per_row)
    refuse_full_attention_beyond(settings, settings.training.steps)
    return config

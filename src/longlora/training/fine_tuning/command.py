"""`longlora sft`: a model and question-answer pairs in, a model that answers about long documents out, measured.

pairs ──► conversations ──► examples ──► packed rows ─┐
MODEL ──► (longer positions) ──► adapter, new or its own ──► training ──► run directory
                 └──────────── loss of held-out answers, before and after ───────────┘
"""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, set_seed

from longlora import ranks
from longlora.attention.transformers_backend import use_shifted_attention
from longlora.corpus.conversations import ConversationFormat, Example
from longlora.corpus.packing import IGNORED
from longlora.errors import UserError
from longlora.model.adapters import add_adapters_from
from longlora.model.lm_head import unwrapped
from longlora.model.loading import load_config, window
from longlora.model.positions import PositionExtension, extend_positions, original_context
from longlora.model.source import ModelSource, locate
from longlora.report.page import write_report
from longlora.run_directory import RunDirectory
from longlora.settings import CorpusSettings, SftSettings, TrainableSettings
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
from longlora.training.fine_tuning.answer_loss import answer_loss
from longlora.training.fine_tuning.examples import Read, hold_out, read_examples
from longlora.training.fine_tuning.packing import PackedExamples, collate, pack_examples
from longlora.training.measuring import known_before
from longlora.training.sharding import is_to_be_sharded, shard
from longlora.training.trainer import train

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is known before any weight is read."""

    source: ModelSource
    config: PreTrainedConfig
    present: int
    """Window of MODEL in tokens."""
    context: int
    """Tokens of the longest example."""

    @property
    def extends(self) -> bool:
        return self.context > self.present


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    rows: PackedExamples
    held_out: Sequence[Example]
    held_out_name: str
    facts: dict[str, Any]
    content: Mapping[str, Mapping[str, Any]]
    """What `RunDirectory.recognise` knows the pairs by."""


def sft(settings: SftSettings) -> dict[str, Any]:
    """Run `longlora sft`.

    The adapter of a run directory or adapter folder goes on training as it is, and so the result, too, goes on the
    model that it was made for; any other MODEL gets a fresh one (or trains in full, as `--train` says).

    Returns:
        `{"output", "model", "positions", "attention", "trainable", "training", "memory", "data", "answers"}`, also
        written to the run directory as `evaluation/summary.json`. `memory` is as `longlora extend` has it; `data` is
        `{"name", "prompt_format", "pairs", "examples", "held_out", "tokens", "answer_tokens", "rows", "longest",
        "too_long": {"pairs", "where"}, "answers_without_loss"}`, and `"held_out_too_long"` of `--evaluation-data`;
        `answers` has for `base`, `untrained` (where positions were stretched) and `trained` `{"label", "order",
        "model", "data", "nll", "perplexity", "tokens", "examples"}`.

    Raises:
        UserError: any setting, pair, model or folder that does not fit, before anything is trained.
    """
    plan = _plan(settings)
    ranks.join()
    settings = ranks.first_alone(lambda: _with_memory_chosen(settings, plan))
    resume, accept = settings.training.resume, settings.training.accept_changes
    run = RunDirectory(settings.output)
    with run.locked(), nothing_left_behind(run):
        run.begin("sft", flat(settings) | _base(plan.source), resume, accept)
        model, tokenizer = load_for_training(settings, goes_on=plan.source.is_adapter)
        # here already, so that a model that cannot be served is refused before hours of work
        use_shifted_attention(
            model, settings.attention.tokens_per_group(plan.context), backend=settings.attention.attention_backend
        )
        conversations = ConversationFormat(tokenizer, settings.prompt_format)
        data = _prepare(settings, conversations, plan.context, together=may_share_rows(model))
        run.recognise(data.content, accept)
        largest = max(int(example.tokens.max()) for example in [*data.rows.examples, *data.held_out])
        refuse_unknown_token(largest, model, settings.model)
        training = settings.training.for_rows(len(data.rows))
        _look_at_steps(settings, len(data.rows), training.steps)

        set_seed(settings.training.seed)
        goes_on = isinstance(model, PeftModel)
        trainee = model if isinstance(model, PeftModel) else add_adapters_from(settings.trainable, model)
        trainable = announce_trainable(trainee)
        if is_to_be_sharded():
            shard(trainee)
        answers = {}
        stretched = copy.deepcopy(unwrapped(model).config)
        extension = _extend(stretched, plan, settings.method)
        refuse_pieces(model, stretched, settings)

        def before() -> None:
            """Measure the model as it came, and then with its positions stretched where they are."""
            with nullcontext() if goes_on else without_adapters(trainee):
                if data.held_out:
                    answers["base"] = _measure(run, "base", "before", trainee, settings, data, 0)
                _extend(unwrapped(trainee), plan, settings.method)
                if data.held_out and plan.extends:
                    label = f"{settings.method}, not trained"
                    answers["untrained"] = _measure(run, "untrained", label, trainee, settings, data, 1)

        steps_an_epoch = math.ceil(len(data.rows) / training.batch)
        trained = train(
            trainee,
            data.rows,
            training,
            settings.attention,
            run,
            held_out_loss=_held_out_loss(settings, data) if data.held_out else None,
            context=plan.context,
            tokens_per_step=round(data.rows.tokens / steps_an_epoch),
            collate=collate,
            memory=settings.memory,
            before=before,
        )
        if conversations.template is not None:
            tokenizer.chat_template = conversations.template  # so that whoever uses the result asks as it was taught
        save_result(trainee, tokenizer, run, extension.context)
        trainee.eval()
        if data.held_out:
            answers["trained"] = _measure(run, "trained", "after", trainee, settings, data, 2)
        group_size = settings.attention.tokens_per_group(plan.context)
        summary = {
            "output": str(run.path),
            "model": settings.model,
            "positions": asdict(extension),
            "attention": asdict(settings.attention) | {"group_size": group_size},
            "trainable": trainable,
            "training": trained,
            "memory": memory_facts(settings.memory, settings.training.gradient_checkpointing),
            "data": data.facts,
            "answers": answers,
        }
        run.write_evaluation("summary", summary)
        if run.writes:
            write_report(run.path)
    if run.writes and not settings.json:
        print(_story(summary))
    return summary


def _plan(settings: SftSettings) -> Plan:
    """Mistakes that need no weights to see."""
    loading = settings.loading
    source = locate(settings.model, loading.revision)
    config = load_config(settings.model, trust_remote_code=loading.trust_remote_code, revision=loading.revision)
    present = window(config)
    if present is None:
        raise UserError(f"the config of {settings.model} does not tell its window: set its max_position_embeddings.")
    plan = Plan(source, config, present, settings.context or present)
    if not plan.extends and settings.method != type(settings).method:
        raise UserError(
            f"--method {settings.method} has no effect: {plan.context:,} tokens fit the window that {settings.model} "
            f"has, {present:,}; leave it out, or give a longer --context."
        )
    if source.is_adapter and settings.trainable != TrainableSettings():
        raise UserError(
            f"--train, --rank, --alpha and --lora-dropout have no effect: the adapter of {settings.model} goes on "
            f"training as it is. Leave them out, or merge it first (`longlora merge {settings.model} --output FOLDER`) "
            "and fine-tune the folder with a fresh adapter."
        )
    refuse_early(settings, plan.context)
    return plan


def _with_memory_chosen(settings: SftSettings, plan: Plan) -> SftSettings:
    trainable = settings.trainable
    if plan.source.is_adapter:
        if settings.memory.base_bits:
            raise UserError(
                f"--base-bits 4 quantises a plain base, and the adapter of {settings.model} goes on training as it is: "
                f"leave it out, or merge it first (`longlora merge {settings.model} --output FOLDER`)."
            )
        adapter = PeftConfig.from_pretrained(plan.source.location)
        parts = ("lora", "norm", "embed") if getattr(adapter, "modules_to_save", None) else ("lora",)
        trainable = TrainableSettings(train=parts, rank=getattr(adapter, "r", trainable.rank))
    return with_memory_chosen(settings, plan.config, plan.context, trainable, four_bit=not plan.source.is_adapter)


def _base(source: ModelSource) -> dict[str, Any]:
    """What the run records of the model that its adapter goes on, where that is not MODEL itself."""
    if not source.is_adapter:
        return {}
    return {"base": source.base, "base_revision": source.base_revision}


def _prepare(settings: SftSettings, conversations: ConversationFormat, context: int, together: bool) -> Data:
    def examples(files: tuple[str, ...]) -> Read:
        corpus = CorpusSettings(data=files, cache=settings.cache, skip_malformed=settings.skip_malformed)
        return read_examples(corpus, conversations, context, every_answer=settings.loss_on == "every")

    read = examples(settings.data)
    facts = dict(read.facts)
    if settings.evaluation_data:
        measured = examples(settings.evaluation_data)
        training, held_out = read.examples, measured.examples
        facts["held_out_too_long"] = measured.facts["too_long"]
    else:
        places = hold_out(read.documents, settings.held_out, settings.training.seed)
        training, held_out = map(read.examples.chosen, places)
    rows = pack_examples(training, context, settings.training.seed, together)
    answer_tokens = sum(example.answer_tokens for example in training)
    logger.info(
        "%s examples, %s tokens (%s of answers), in %s rows of at most %s; %s held out",
        f"{len(training):,}",
        f"{rows.tokens:,}",
        f"{answer_tokens:,}",
        f"{len(rows):,}",
        f"{context:,}",
        f"{len(held_out):,}" if held_out else "nothing",
    )
    facts |= {
        "name": ", ".join(settings.data),
        "prompt_format": conversations.name,
        "examples": len(training),
        "held_out": len(held_out),
        "tokens": rows.tokens,
        "answer_tokens": answer_tokens,
        "rows": len(rows),
    }
    content = {
        "what there is to train on": {"fingerprint": _fingerprint(training), "examples": len(training)},
        "what there is to measure on": {"fingerprint": _fingerprint(held_out), "examples": len(held_out)},
    }
    return Data(rows, held_out, ", ".join(settings.evaluation_data or settings.data), facts, content)


def _fingerprint(examples: Sequence[Example]) -> str:
    """Changes with any token of the examples and with what of them are answers."""
    return fingerprint(*(array for example in examples for array in (example.tokens, example.labels(IGNORED))))


def _look_at_steps(settings: SftSettings, rows: int, steps: int) -> None:
    """Say, or refuse, what does not fit together once the number of steps is known."""
    training = settings.training
    refuse_full_attention_beyond(settings, steps)
    if rows < training.batch:
        logger.warning(
            "each step takes all %d rows, fewer than --batch %d: a lower one makes more", rows, training.batch
        )
    if steps <= training.warmup_steps:
        logger.warning(
            "%d steps are within the warm-up of %d: the learning rate never reaches --lr; lower --warmup-steps, or "
            "--batch for more steps",
            steps,
            training.warmup_steps,
        )


def _extend(model: PreTrainedModel | PreTrainedConfig, plan: Plan, method: str) -> PositionExtension:
    """Stretch the positions where the plan has it, or tell that they stay."""
    if plan.extends:
        return extend_positions(model, plan.context, method)
    try:
        original = original_context(model if isinstance(model, PreTrainedConfig) else model.config)
    except UserError:  # learned positions
        original = plan.present
    message = f"the window stays as it is, {plan.present} tokens."
    return PositionExtension("none", original, plan.present, plan.present, plan.present / original, False, message)


def _held_out_loss(settings: SftSettings, data: Data) -> Any:
    chunk = settings.training.loss_chunk
    return lambda model: answer_loss(model, data.held_out, chunk=chunk, progress=False).nll


def _measure(
    run: RunDirectory, name: str, label: str, model: Any, settings: SftSettings, data: Data, order: int
) -> dict[str, Any]:
    """Loss of the held-out answers, kept as `evaluation/answers-NAME.json` for a resumed run."""
    file = f"answers-{name}"
    known = known_before(run, file, settings.training.resume and name != "trained")
    if known:
        return known
    measured = answer_loss(model, data.held_out, chunk=settings.training.loss_chunk)
    document = {
        "label": label,
        "order": order,
        "model": settings.model,
        "data": data.held_out_name,
        **asdict(measured),
    }
    logger.info("loss of held-out answers %s: %.3f nats a token", label, measured.nll)
    run.write_evaluation(file, document)
    return document


def _story(summary: dict[str, Any]) -> str:
    """What came of it, for a person at a terminal."""
    lines = []
    if summary["answers"]:
        first = next(iter(summary["answers"].values()))
        lines.append(f"loss of {first['examples']:,} held-out answers ({first['tokens']:,} tokens), nats a token")
        width = max(len(each["label"]) for each in summary["answers"].values())
        lines += [
            f"  {each['label']:<{width}}  {each['nll']:.3f}   perplexity {each['perplexity']:.2f}"
            for each in summary["answers"].values()
        ]
    left_out = summary["data"]["too_long"]["pairs"]
    if left_out:
        lines.append(f"left out  {left_out:,} of {summary['data']['pairs']:,} pairs, too long for the context")
    result = "model" if "full" in summary["trainable"]["groups"] else "adapter"
    lines += [f"result    {summary['output']}/{result}", f"report    {summary['output']}/report.html"]
    if result == "adapter":
        lines.append(f"merge     longlora merge {summary['output']} --output FOLDER")
    return "\n".join(lines)

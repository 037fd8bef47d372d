"""`longlora demo`: the whole way on the shipped model and the standard library, in minutes, without network or GPU."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from longlora.bench.attention import bench_attention
from longlora.errors import UserError
from longlora.evaluation.command import perplexity_table
from longlora.model.loading import load_config
from longlora.model.positions import extend_positions
from longlora.model.precision import quick_training_dtype
from longlora.report.page import write_report
from longlora.run_directory import RunDirectory
from longlora.settings import (
    AttentionSettings,
    BenchAttentionSettings,
    CorpusSettings,
    DemoSettings,
    ExtendSettings,
    PerplexitySettings,
    PositionSettings,
    TrainableSettings,
    TrainingSettings,
)
from longlora.training.common import flat, load_for_training
from longlora.training.extension import prepare_data, train_extension
from longlora.training.measuring import measure

logger = logging.getLogger(__name__)

CONTEXT = 4096
"""Tokens; eight times the demo model's window."""

CONTEXTS = (256, 512, 1024, 2048, 4096)
"""Where perplexity is measured, in tokens."""


def recipe(output: str, seed: int) -> ExtendSettings:
    """The demo's run as `longlora extend` settings: the recipe found best for the shipped model in a few minutes."""
    return ExtendSettings(
        model="demo",
        output=output,
        positions=PositionSettings(context=CONTEXT, method="yarn"),
        attention=AttentionSettings(pattern="shift", group_size=CONTEXT // 4, full_layers_share=1 / 3),
        trainable=TrainableSettings(train=("lora", "norm", "embed"), rank=8),
        corpus=CorpusSettings(data=("stdlib",)),
        training=TrainingSettings(
            steps=30,
            batch=2,
            device_batch=1,
            lr=2e-3,
            norm_lr=2e-3,
            embed_lr=1e-4,
            warmup_steps=5,
            schedule="linear",
            gradient_checkpointing=False,
            save_every=1000,
            dtype=quick_training_dtype(),
            seed=seed,
        ),
        perplexity=PerplexitySettings(contexts=CONTEXTS, max_documents=3, min_document_tokens=CONTEXT),
    )


def ways_to_measure(settings: ExtendSettings) -> list[PerplexitySettings]:
    """Each context by itself, with windows that slide by half of it: at 4,096 an eighth of what 256 costs."""
    return [
        replace(settings.perplexity, contexts=(context,), stride=context // 2)
        for context in settings.perplexity.contexts
    ]


def paper_recipe(settings: ExtendSettings, output: str) -> ExtendSettings:
    """The paper's own choices on the same budget: Position Interpolation, and one learning rate for all that trains."""
    return replace(
        settings,
        output=output,
        positions=replace(settings.positions, method="linear"),
        attention=replace(settings.attention, full_layers_share=0.0),
        trainable=TrainableSettings(),
        training=replace(settings.training, norm_lr=None, embed_lr=None, schedule="constant"),
    )


def demo(settings: DemoSettings) -> dict[str, Any]:
    """Run `longlora demo`.

    Returns:
        The summary of the run, with `evaluation` (perplexities by name) and `costs`.

    Raises:
        UserError: the output folder holds something that is not a demo, or there is no standard library source.
    """
    ours = recipe(settings.output, settings.seed)
    run = RunDirectory(ours.output)
    _replace_earlier(run)
    with run.locked():
        run.begin("demo", flat(ours), resume=False)
        window = load_config("demo").max_position_embeddings
        model, tokenizer = load_for_training(ours)
        data = prepare_data(ours, tokenizer, model)
        ways = ways_to_measure(ours)
        evaluation: dict[str, Any] = {}

        def note(name: str, label: str, measured: Any) -> None:
            document = measure(run, name, label, measured, ours, data, ways, order=len(evaluation))
            evaluation[name] = document

        note("base", f"base model, window {window}", model)
        for method, label in (("linear", "base + PI, not trained"), ("yarn", "base + YaRN, not trained")):
            stretched, _ = load_for_training(ours)
            extend_positions(stretched, CONTEXT, method)
            note(f"untrained-{method}", label, stretched)

        papers = paper_recipe(ours, str(run.path / "paper-recipe"))
        paper_run = RunDirectory(papers.output)
        with paper_run.locked():
            paper_run.begin("extend", flat(papers), resume=False)
            stretched, _ = load_for_training(papers)
            extension = extend_positions(stretched, CONTEXT, papers.positions.method)
            logger.info("training the paper's plain recipe (PI, one learning rate)")
            trained, _ = train_extension(stretched, tokenizer, papers, paper_run, data, extension)
        note("paper", "paper's recipe: PI, one rate", trained)

        extension = extend_positions(model, CONTEXT, ours.positions.method)
        logger.info("training longlora's recipe")
        model, summary = train_extension(model, tokenizer, ours, run, data, extension)
        note("trained", "longlora", model)

        costs = _costs(model, ours)
        run.write_evaluation("costs", costs)
        summary |= {"evaluation": evaluation, "costs": costs}
        run.write_evaluation("summary", summary)
        report = write_report(run.path)
    if not settings.json:
        print(_story(summary, report))
    return summary


def _replace_earlier(run: RunDirectory) -> None:
    if not run.path.exists() or not any(run.path.iterdir()):
        return
    if not run.settings_file.exists() or run.read_settings().get("command") != "demo":
        raise UserError(f"--output {run.path} is not empty and holds no demo: name another folder.")
    with run.locked():
        for entry in run.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != ".lock":
                entry.unlink()


def _costs(model: Any, settings: ExtendSettings) -> dict[str, Any]:
    """Time and peak memory of S²-Attn and of full attention for the model's shape, for `evaluation/costs.json`."""
    config, dtype, repeats = model.config, settings.training.dtype, 3
    document = bench_attention(
        BenchAttentionSettings(
            length=(CONTEXT, 2 * CONTEXT),
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            repeats=repeats,
            backends=("sdpa",),
            json=True,
        )
    )
    kept = ("length", "group_size", "full", "s2", "ratio")
    return {
        "hardware": document["hardware"],
        "dtype": dtype,
        "what": f"causal attention alone, forward + backward, {config.num_attention_heads} query and "
        f"{config.num_key_value_heads} KV heads of {config.head_dim}, medians of {repeats} rounds in turn",
        "rows": [{name: result[name] for name in kept} for result in document["results"]],
    }


def _story(summary: dict[str, Any], report: Path) -> str:
    """What happened, for a person at a terminal."""
    trainable, training = summary["trainable"], summary["training"]
    groups = ", ".join(f"{name} {count:,}" for name, count in trainable["groups"].items())
    lines = [
        "",
        perplexity_table(list(summary["evaluation"].values())),
        "",
        f"trained    {trainable['trainable']:,} of {trainable['parameters']:,} parameters "
        f"({trainable['share']:.1%}: {groups})",
        f"           {training['steps']} steps, {training['tokens']:,} tokens, {training['seconds']:.0f} s, "
        f"{training['tokens_per_second']:,.0f} tokens/s",
    ]
    for row in summary["costs"]["rows"]:
        full, s2 = row["full"], row["s2"]
        lines.append(
            f"attention  {row['length']:,} tokens: S2-Attn {s2['seconds'] * 1000:,.0f} ms and "
            f"{s2['memory_bytes'] / 2**20:,.0f} MiB, full {full['seconds'] * 1000:,.0f} ms and "
            f"{full['memory_bytes'] / 2**20:,.0f} MiB ({s2['seconds'] / full['seconds']:.2f} of the time)"
        )
    lines += [
        "",
        f"report     {report}",
        f"adapter    {summary['output']}/adapter (stock PEFT); `longlora merge {summary['output']} --output merged`",
        "your own   longlora extend YOUR_MODEL --data YOUR_DOCUMENTS --context 32768 --output RUN",
    ]
    return "\n".join(lines)

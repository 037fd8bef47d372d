"""`longlora plan`: from a config to operations, memory, the longest context, time and a recipe."""

import copy
from dataclasses import asdict, replace
from typing import Any

from longlora.model.loading import window
from longlora.model.positions import extend_positions
from longlora.planner.anatomy import Anatomy
from longlora.planner.comparison import predicted_and_measured
from longlora.planner.duration import duration, evaluation
from longlora.planner.fitting import Fit, refuse_what_cannot_be, with_switches
from longlora.planner.flops import attention_pairs, causal_flops, forward_flops
from longlora.planner.memory import Memory, host_bytes, peak
from longlora.planner.reading import read_anatomy
from longlora.planner.recipe import extend_knows, recipe_text, recipe_values, start_command
from longlora.planner.shapes import find_config
from longlora.planner.table import table
from longlora.settings import PlanSettings


def plan(settings: PlanSettings) -> dict[str, Any]:
    """Run `longlora plan`.

    Returns:
        `{"model", "architecture", "window", "context", "group_size", "pattern", "parameters", "trainable": {group:
        numbers}, "flops": {"full": {"attention", "projection", "ffn", "other", "total"}, "s2": …}, "table7": the same
        in TFLOP as the paper rounds, "causal_flops", "pairs", "memory_bytes": {"weights", "gradients", "optimizer",
        "activations", "logits", "workspace", "total"}, "moments": {moment: the same}, "peak", "host_bytes", "switches",
        "gpus", "fits", "max_context", "contexts": [{"switches", "max_context", "memory_bytes", "fits"}], "ladder",
        "time", "evaluation", "batch", "steps", "recommended", "measured"}`. FLOPs are of one
        forward pass of one row; memory is bytes a GPU, `memory_bytes` at the moment of the peak.

    Raises:
        UserError: MODEL is not there or cannot be served, or a setting that cannot be.
    """
    config = find_config(settings.model, settings.loading)
    positions = settings.positions
    if positions.context > (window(config) or 0):
        extend_positions(copy.deepcopy(config), positions.context, positions.method)  # refuses what `extend` would
    anatomy = read_anatomy(config, settings.trainable, settings.loading.trust_remote_code)
    refuse_what_cannot_be(anatomy, settings)
    fit = Fit(anatomy, settings)
    recommended = fit.cheapest(extend_knows())
    if settings.memory.memory == "auto":
        settings = with_switches(settings, recommended or max(fit.all_combinations(), key=fit.longest))
        size, reserve = settings.memory.gpu_memory, settings.memory.reserve
        settings = replace(settings, memory=replace(settings.memory.resolved(), gpu_memory=size, reserve=reserve))
        fit = Fit(anatomy, settings)
    document = {
        **_operations(anatomy, settings),
        **_memory(fit),
        "time": duration(anatomy, settings, settings.training.gradient_checkpointing),
        "evaluation": evaluation(anatomy, settings),
        "batch": settings.training.batch,
        "steps": settings.training.steps,
        "recommended": _recommended(fit, recommended),
    }
    if settings.measure:
        document["measured"] = predicted_and_measured(config, settings)
    if not settings.json:
        print(table(document))
        print(_advice(fit, recommended))
    return document


def _operations(anatomy: Anatomy, settings: PlanSettings) -> dict[str, Any]:
    context, attention = settings.positions.context, settings.attention
    group_size = attention.tokens_per_group(context)
    reach = {"full": None, "s2": None if attention.pattern == "full" else group_size}
    flops = {name: forward_flops(anatomy, context, tokens) for name, tokens in reach.items()}
    patterns = {"full": "full", "s2": attention.pattern}
    return {
        "model": settings.model,
        "architecture": anatomy.architecture,
        "window": anatomy.window,
        "context": context,
        "group_size": group_size,
        "pattern": attention.pattern,
        "parameters": anatomy.parameters,
        "trainable": anatomy.trainees.groups,
        "flops": {name: part.document() for name, part in flops.items()},
        "table7": {name: part.table7() for name, part in flops.items()},
        "causal_flops": {
            name: causal_flops(anatomy, context, attention, pattern, group_size).document()
            for name, pattern in patterns.items()
        },
        "pairs": {
            name: attention_pairs(anatomy, context, attention, pattern, group_size)
            for name, pattern in patterns.items()
        },
    }


def _memory(fit: Fit) -> dict[str, Any]:
    settings, context, given = fit.settings, fit.settings.positions.context, fit.given()
    moments = fit.moments(context, given)
    return {
        "memory_bytes": _parts(moments[peak(moments)]),
        "moments": {name: _parts(memory) for name, memory in moments.items()},
        "peak": peak(moments),
        "host_bytes": host_bytes(fit.anatomy, fit.step(context, given)),
        "switches": list(given),
        "gpus": {
            "count": settings.gpus,
            "device": settings.device,
            "memory_bytes": settings.gpu_bytes,
            "usable_bytes": fit.budget,
        },
        "fits": fit.fits(context, given),
        "max_context": fit.longest(given),
        "contexts": [
            {
                "switches": list(switches),
                "max_context": fit.longest(switches),
                "memory_bytes": fit.peak_bytes(context, switches),
                "fits": fit.fits(context, switches),
            }
            for switches in fit.all_combinations()
        ],
        "ladder": [list(switches) for switches in fit.ladder()],
    }


def _parts(memory: Memory) -> dict[str, int]:
    return {**asdict(memory), "total": memory.total}


def _recommended(fit: Fit, switches: tuple[str, ...] | None) -> dict[str, Any] | None:
    if switches is None:
        return None
    settings = with_switches(fit.settings, switches)
    return {
        "switches": list(switches),
        "max_context": fit.longest(switches),
        "recipe": recipe_values(settings),
        "command": start_command(settings),
    }


def _advice(fit: Fit, switches: tuple[str, ...] | None) -> str:
    """The recipe for people, or what would make the context fit."""
    settings, context = fit.settings, fit.settings.positions.context
    if switches is None:
        return _what_is_missing(fit)
    chosen = with_switches(settings, switches)
    time = duration(fit.anatomy, chosen, chosen.training.gradient_checkpointing)["s2"]
    notes = [
        start_command(chosen),
        f"predicted: {fit.peak_bytes(context, switches) / 1e9:.1f} GB a GPU, {time['seconds_per_step']:.1f} s a step",
    ]
    if fit.anatomy.window is not None and context <= fit.anatomy.window:
        notes.append(f"the model's window is {fit.anatomy.window:,} tokens already: extend wants a longer context")
    return f"\nrecipe\n\n{recipe_text(chosen, notes)}".rstrip()


def _what_is_missing(fit: Fit) -> str:
    within = extend_knows() | fit.asked()
    longest = max(fit.longest(names) for names in fit.all_combinations() if set(names) <= within)
    lines = [
        f"\n{fit.settings.positions.context:,} tokens do not fit with every switch on; the longest context that fits "
        f"is {longest:,}.",
    ]
    if fit.cheapest(set(fit.possible())) is not None:
        lines.append("They would fit with --shard.")
    lines.append("More GPUs with --shard or --sequence-parallel, or larger ones, make room.")
    return "\n".join(lines)

"""Train short, attend long: training attentions compared with full attention, at equal tokens and at equal cost.

Every cell trains on the same rows with the same new weights (those of its seed) and is tested with full attention.
Gaps to full attention are taken seed by seed, so what a seed does to both cancels out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from longlora.reproduction.cells import Cell
from longlora.reproduction.statistics import Estimate, estimate
from longlora.settings import AttentionSettings, ExtendSettings, PatternOptions


@dataclass(frozen=True)
class Method:
    """A way to train: its attention, what trains where it is not the usual, and its share of the steps."""

    label: str
    attention: AttentionSettings
    train: tuple[str, ...] | None = None
    steps: float = 1.0


def methods(context: int, steps: int) -> dict[str, Method]:
    """The study's methods by name, for a target `context` in tokens and cells of `steps` steps."""
    group, last = context // 4, max(1, steps // 6)

    def shift(**chosen: Any) -> AttentionSettings:
        return AttentionSettings(pattern="shift", group_size=group, **chosen)

    def scatter(**chosen: Any) -> AttentionSettings:
        return AttentionSettings(pattern="scatter", group_size=group, **chosen)

    def pieces(count: int, size: int) -> PatternOptions:
        return PatternOptions(scatter_pieces=count, scatter_piece_size=size)

    full = AttentionSettings(pattern="full", group_size=group)
    half = PatternOptions(scatter_heads="half")
    small = max(1, group // 8)
    found = {
        "full": Method("full", full),
        "full-half": Method("full, half of the steps", full, steps=0.5),
        "shift": Method("S²", shift()),
        "shift-last": Method(f"S², last {last} steps full", shift(full_attention_steps=last)),
        "scatter": Method("scatter", scatter()),
        "scatter-last": Method(f"scatter, last {last} steps full", scatter(full_attention_steps=last)),
        "shift-pieces": Method(f"S² + 4 pieces of {small}", shift(options=pieces(4, small))),
        "shift-few-pieces": Method(f"S² + 2 pieces of {small}", shift(options=pieces(2, small))),
        "scatter-pieces": Method(f"scatter, 4 pieces of {small}", scatter(options=pieces(4, small))),
        "shift-rotating": Method("S², 1/6 of layers full, drawn anew", shift(full_layers_share=1 / 6)),
        "shift-rotating-2": Method("S², 1/3 of layers full, drawn anew", shift(full_layers_share=1 / 3)),
    }
    lora = {
        "full": found["full"],
        "shift": found["shift"],
        "shift-layer": Method("S², the middle layer full", shift(full_attention_layers=(3,))),
        "scatter-half": Method("scatter in half of the heads", scatter(options=half)),
        "scatter-half-last": Method("the same, last steps full", scatter(options=half, full_attention_steps=last)),
        "scatter": found["scatter"],
        "scatter-last": found["scatter-last"],
        "shift-pieces": found["shift-pieces"],
        "shift-rotating": found["shift-rotating"],
    }
    return found | {
        f"lora-{name}": replace(method, label=f"LoRA alone: {method.label}", train=("lora",))
        for name, method in lora.items()
    }


def cells(base: ExtendSettings, seeds: Sequence[int], only: Sequence[str]) -> list[Cell]:
    """The cells of the study that `only` names (all, where it names none), seed by seed.

    Args:
        base: model, data, context, training and steps of every cell.
    """
    known = methods(base.positions.context, base.training.steps)
    return [_cell(name, known[name], base, seed) for seed in seeds for name in known if not only or name in only]


def _cell(name: str, method: Method, base: ExtendSettings, seed: int) -> Cell:
    training = replace(base.training, seed=seed, steps=max(1, round(base.training.steps * method.steps)))
    trainable = base.trainable
    if method.train is not None:
        trainable = replace(trainable, train=method.train)
        training = replace(training, norm_lr=None, embed_lr=None)
    settings = replace(base, attention=method.attention, trainable=trainable, training=training)
    return Cell(name, method.label, settings)


def summary(results: Sequence[dict[str, Any]], known: Mapping[str, Method]) -> list[dict[str, Any]]:
    """One entry a method, in the order of `known`: means and standard errors over its seeds, gaps to full attention.

    Returns:
        `{"name", "label", "seeds", "share" (of full attention's pairs), "seconds", "perplexity": {context: {"mean",
        "error"}}, "gap": {context: …}, "by_distance": […], "recall": […]}`. The gap is relative to full
        attention with the same trainable parts, seed by seed.
    """
    by_name: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_name.setdefault(result["name"], []).append(result)
    return [_entry(method.label, by_name[name], by_name) for name, method in known.items() if name in by_name]


def _entry(label: str, found: list[dict[str, Any]], by_name: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    name = found[0]["name"]
    yardstick = "lora-full" if name.startswith("lora-") else "full"
    full = {result["seed"]: result for result in by_name.get(yardstick, [])}
    paired = [(result, full[result["seed"]]) for result in found if result["seed"] in full]
    contexts = list(found[0]["perplexity"])
    full_pairs = [full_one["attention_cost"]["pairs"] for _, full_one in paired]
    own_pairs = [result["attention_cost"]["pairs"] for result, _ in paired]
    return {
        "name": name,
        "label": label,
        "seeds": [result["seed"] for result in found],
        "share": sum(own_pairs) / sum(full_pairs) if paired else found[0]["attention_cost"]["share"],
        "seconds": _told(estimate([result["training"]["seconds"] for result in found])),
        "memory_bytes": max(result["training"]["memory_bytes"] for result in found),
        "perplexity": {c: _told(estimate([result["perplexity"][c] for result in found])) for c in contexts},
        "gap": {
            c: _told(estimate([own["perplexity"][c] / other["perplexity"][c] - 1 for own, other in paired]))
            for c in contexts
            if paired
        },
        "by_distance": [
            {
                "nearest": sort["nearest"],
                "farthest": sort["farthest"],
                "tokens": sort["tokens"],
                **_told(estimate([result["by_distance"][place]["perplexity"] for result in found])),
            }
            for place, sort in enumerate(found[0]["by_distance"])
            if all(result["by_distance"][place]["tokens"] for result in found)
        ],
        "recall": [
            {
                "distance": point["distance"],
                "trials": sum(result["recall"][place]["trials"] for result in found),
                **_told(estimate([result["recall"][place]["accuracy"] for result in found])),
            }
            for place, point in enumerate(found[0]["recall"])
        ],
    }


def _told(found: Estimate) -> dict[str, Any]:
    return {"mean": found.mean, "error": found.error}


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The study for people: perplexity by context, the gap to full attention at the target, what it cost."""
    contexts = list(entries[0]["perplexity"])
    distances = [point["distance"] for point in entries[0]["recall"]]
    width = max(len("training attention"), *(len(entry["label"]) for entry in entries))
    heads = [f"{int(c):>17,}" for c in contexts] + [
        f"{'gap at ' + contexts[-1]:>17}",
        f"{'pairs':>7}",
        f"{'seconds':>9}",
    ]
    heads += [f"{f'recall {d:,}':>14}" for d in distances]
    lines = [f"{'training attention':<{width}}" + "".join(heads) + "  seeds"]
    for entry in entries:
        cells = [f"{_shown(entry['perplexity'][c], '.3f'):>17}" for c in contexts]
        gap = entry["gap"].get(contexts[-1])
        cells += [
            f"{'' if gap is None else _shown(gap, '+.2%'):>17}",
            f"{entry['share']:>7.2f}",
            f"{entry['seconds']['mean']:>9.0f}",
            *(f"{_shown(point, '.0%'):>14}" for point in entry["recall"]),
        ]
        lines.append(f"{entry['label']:<{width}}" + "".join(cells) + f"  {len(entry['seeds'])}")
    return "\n".join(lines)


def markdown(entries: Sequence[dict[str, Any]]) -> str:
    """The study as Markdown tables: perplexity and gap, copies by distance, recall."""
    contexts = list(entries[0]["perplexity"])
    first = ["training attention", "pairs", *(f"{int(c):,}" for c in contexts), "gap to full", "seconds"]
    quality = [
        [
            entry["label"],
            f"{entry['share']:.2f}",
            *(_shown(entry["perplexity"][c], ".3f") for c in contexts),
            _shown(entry["gap"][contexts[-1]], "+.2%") if entry["gap"] else "",
            f"{entry['seconds']['mean']:.0f}",
        ]
        for entry in entries
    ]
    sorts = entries[0]["by_distance"]
    second = ["training attention", *(f"{_distances(sort)} ({sort['tokens']:,})" for sort in sorts)]
    copies = [[entry["label"], *(_shown(sort, ".3f") for sort in entry["by_distance"])] for entry in entries]
    third = ["training attention", *(f"{point['distance']:,}" for point in entries[0]["recall"])]
    recalled = [[entry["label"], *(_shown(point, ".1%") for point in entry["recall"])] for entry in entries]
    return "\n\n".join(_markdown(*part) for part in ((first, quality), (second, copies), (third, recalled)))


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows))


def _distances(sort: dict[str, Any]) -> str:
    if sort["nearest"] == 0:
        return "no copy"
    return f"{sort['nearest']:,} on" if sort["farthest"] is None else f"{sort['nearest']:,} – {sort['farthest'] - 1:,}"


def _shown(value: dict[str, Any], form: str) -> str:
    error = "" if value["error"] is None else f" ± {format(value['error'], form.lstrip('+'))}"
    return format(value["mean"], form) + error

"""Train short, attend long: training attentions compared with full attention, at equal tokens and at equal cost.

Every cell trains on the same rows with the same new weights (those of its seed) and is tested with full attention.
Gaps to full attention are taken seed by seed, so what a seed does to both cancels out.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

from longlora.reproduction.entries import Entry, Figure, Ratio, Row, Size, Table
from longlora.reproduction.measuring import RECALL_PLACES, copy_edges
from longlora.reproduction.ways import Way
from longlora.settings import PatternOptions


def methods(context: int, steps: int) -> dict[str, Way]:
    """The study's methods by name, for a target `context` in tokens and cells of `steps` steps."""
    last, small = {"full_attention_steps": max(1, steps // 6)}, max(1, context // 32)
    half = {"options": PatternOptions(scatter_heads="half")}

    def pieces(count: int) -> dict[str, Any]:
        return {"options": PatternOptions(scatter_pieces=count, scatter_piece_size=small)}

    found: dict[str, tuple[str, str, dict[str, Any]]] = {
        "full": ("full", "full", {}),
        "full-half": ("full, half of the steps", "full", {}),
        "shift": ("S²", "shift", {}),
        "shift-last": (f"S², last {last['full_attention_steps']} steps full", "shift", last),
        "scatter": ("scatter", "scatter", {}),
        "scatter-last": (f"scatter, last {last['full_attention_steps']} steps full", "scatter", last),
        "shift-pieces": (f"S² + 4 pieces of {small}", "shift", pieces(4)),
        "shift-few-pieces": (f"S² + 2 pieces of {small}", "shift", pieces(2)),
        "scatter-pieces": (f"scatter, 4 pieces of {small}", "scatter", pieces(4)),
        "shift-rotating": ("S², 1/6 of layers full, drawn anew", "shift", {"full_layers_share": 1 / 6}),
        "shift-rotating-2": ("S², 1/3 of layers full, drawn anew", "shift", {"full_layers_share": 1 / 3}),
    }
    lora = {name: found[name] for name in ("full", "shift")}
    lora |= {
        "shift-layer": ("S², the middle layer full", "shift", {"full_attention_layers": (3,)}),
        "scatter-half": ("scatter in half of the heads", "scatter", half),
        "scatter-half-last": ("the same, last steps full", "scatter", half | last),
    }
    lora |= {name: found[name] for name in ("scatter", "scatter-last", "shift-pieces", "shift-rotating")}
    ways = [
        Way(name=name, label=label, pattern=pattern, attention=more, steps=0.5 if name == "full-half" else 1.0)
        for name, (label, pattern, more) in found.items()
    ] + [
        Way(name=f"lora-{name}", label=f"LoRA alone: {label}", pattern=pattern, attention=more, train=("lora",))
        for name, (label, pattern, more) in lora.items()
    ]
    return {way.name: way for way in ways}


def tables(size: Size) -> tuple[Table, ...]:
    """Perplexity, gap and cost; perplexity by the distance of copies; recall of repeated passages."""
    known = methods(size.top, size.steps)
    edges = copy_edges(size.top)
    sorts = {"no copy": 0, f"1 – {edges[0] - 1:,}": 1}
    sorts |= {f"{one:,} – {two - 1:,}": one for one, two in pairwise(edges)}
    sorts |= {f"{edges[-1]:,} on": edges[-1]}
    distances = [size.top * places // 16 for places in RECALL_PLACES]
    shorter = [context for context in (size.window, *size.contexts) if context < size.top]
    what = [*(f"perplexity-{context}" for context in shorter), "copies-all", "seconds"]
    # LoRA alone has rows of its own; in one picture with the others nobody finds a label
    drawn = tuple(name for name in known if not name.startswith("lora-"))

    def rows(names: list[str]) -> tuple[Row, ...]:
        return tuple(Row(key, way.label, tuple(Entry(way, name) for name in names)) for key, way in known.items())

    def against_full(row: Row) -> Row:
        own, full = known[row.key], known["full" if row.key in drawn else "lora-full"]
        gap = Ratio(Entry(own, "copies-all"), Entry(full, "copies-all"), gap=True)
        return replace(row, entries=(*row.entries, gap, Ratio(Entry(own, "pairs"), Entry(full, "pairs"))))

    return (
        Table(
            f"Training attention, perplexity by context; gap to full attention at {size.top:,} tokens",
            (*(f"{context:,}" for context in (*shorter, size.top)), "seconds", "gap %", "pairs"),
            tuple(map(against_full, rows(what))),
            notes=(
                "Gap: to full attention at the longest context, with the same parts trained, seed by seed. Pairs: "
                f"query-key pairs that training looks at, of full attention's. At {size.top:,} tokens windows slide by "
                "a quarter, elsewhere by half.",
            ),
            figure=Figure(
                kind="points",
                columns=(len(shorter) + 3, len(shorter)),
                rows=drawn,
                across="query-key pairs that training looks at, of full attention's",
            ),
            part="trade-off",
        ),
        Table(
            f"Perplexity at {size.top:,} tokens by the distance of the nearest copy, in tokens",
            tuple(sorts),
            rows([f"copies-{nearest}" for nearest in sorts.values()]),
            part="copies",
        ),
        Table(
            f"Recall of a repeated passage by its distance in tokens (group: {size.top // 4:,})",
            tuple(f"{distance:,}" for distance in distances),
            rows([f"recall-{distance}" for distance in distances]),
            number=".1%",
            figure=Figure(
                kind="lines", rows=drawn, up="share of a passage's tokens ranked first", across="distance, tokens"
            ),
            part="recall",
        ),
    )

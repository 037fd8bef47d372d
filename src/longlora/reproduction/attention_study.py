"""Train short, attend long: training attentions compared with full attention, at equal tokens and at equal cost.

Every cell trains on the same rows with the same new weights (those of its seed) and is tested with full attention.
Gaps to full attention are taken seed by seed, so what a seed does to both cancels out.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

from longlora.reproduction.entries import Entry, Figure, Ratio, Row, Size, Table
from longlora.reproduction.measuring import RECALL_PLACES, copy_edges
from longlora.reproduction.ways import Method
from longlora.settings import AttentionSettings, PatternOptions


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
    found: dict[str, tuple[str, AttentionSettings]] = {
        "full": ("full", full),
        "full-half": ("full, half of the steps", full),
        "shift": ("S²", shift()),
        "shift-last": (f"S², last {last} steps full", shift(full_attention_steps=last)),
        "scatter": ("scatter", scatter()),
        "scatter-last": (f"scatter, last {last} steps full", scatter(full_attention_steps=last)),
        "shift-pieces": (f"S² + 4 pieces of {small}", shift(options=pieces(4, small))),
        "shift-few-pieces": (f"S² + 2 pieces of {small}", shift(options=pieces(2, small))),
        "scatter-pieces": (f"scatter, 4 pieces of {small}", scatter(options=pieces(4, small))),
        "shift-rotating": ("S², 1/6 of layers full, drawn anew", shift(full_layers_share=1 / 6)),
        "shift-rotating-2": ("S², 1/3 of layers full, drawn anew", shift(full_layers_share=1 / 3)),
    }
    lora = {
        "full": found["full"],
        "shift": found["shift"],
        "shift-layer": ("S², the middle layer full", shift(full_attention_layers=(3,))),
        "scatter-half": ("scatter in half of the heads", scatter(options=half)),
        "scatter-half-last": ("the same, last steps full", scatter(options=half, full_attention_steps=last)),
        "scatter": found["scatter"],
        "scatter-last": found["scatter-last"],
        "shift-pieces": found["shift-pieces"],
        "shift-rotating": found["shift-rotating"],
    }
    return {
        name: Method(name=name, label=label, attention=attention, steps=0.5 if name == "full-half" else 1.0)
        for name, (label, attention) in found.items()
    } | {
        f"lora-{name}": Method(name=f"lora-{name}", label=f"LoRA alone: {label}", attention=attention, train=("lora",))
        for name, (label, attention) in lora.items()
    }


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

"""The paper's tables at our size: their rows and columns, and what the paper says of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from longlora.reproduction.entries import Check, Entry, Figure, Row, Size, Table
from longlora.reproduction.ways import Way

RATE_OF_ALL = (0.05, 0.15, 0.5)
"""Learning rates of full fine-tuning, as shares of LoRA's."""

USUAL_RATE_OF_ALL = 0.15

RECALL_PLACES = (3, 6, 10, 13)
"""Distances of repeated passages, in sixteenths of the context."""


def _perplexities(key: str, label: str, ways: Sequence[Way]) -> Row:
    return Row(key, label, tuple(Entry(way, f"perplexity-{way.context}") for way in ways))


def table1(size: Size) -> Table:
    """Short, shifted and full attention by target context, and positions stretched without training."""
    untrained = [
        _perplexities(
            f"untrained-{method}",
            f"{said}, not trained",
            [Way(context=context, method=method, trained=False) for context in size.contexts],
        )
        for method, said in (("linear", "Position Interpolation"), ("ntk", "NTK"), ("yarn", "YaRN"))
    ]
    trained = [
        _perplexities(key, label, [Way(context=context, pattern=key) for context in size.contexts])
        for key, label in (("full", "full attention"), ("plain", "short attention"), ("shift", "S²"))
    ]
    last = len(size.contexts) - 1
    checks = [
        Check(
            "untrained at least 1.5 times trained (Position Interpolation)",
            ("untrained-linear", last),
            "far above",
            ("shift", last),
        ),
        Check("untrained at least 1.5 times trained (NTK)", ("untrained-ntk", last), "far above", ("shift", last)),
        Check("untrained > trained (YaRN)", ("untrained-yarn", last), "above", ("shift", last)),
    ]
    for column, context in enumerate(size.contexts):
        checks += [
            Check(f"short attention worse than S² at {context:,}", ("plain", column), "above", ("shift", column)),
            Check(f"S² within 3% of full attention at {context:,}", ("shift", column), "near", ("full", column)),
        ]
    return Table(
        "Perplexity by target context: positions alone, full attention, short attention, S²",
        tuple(f"{context:,}" for context in size.contexts),
        (*untrained, *trained),
        tuple(checks),
        figure=Figure(kind="lines", across="context, tokens", rows=("untrained-yarn", "full", "plain", "shift")),
    )


def table2(size: Size) -> Table:
    """Attention patterns in training, tested with full attention and with the pattern itself."""
    said = {
        "full": "full attention",
        "shift": "S², across heads",
        "shift-layers": "S², across layers",
        "plain": "only P1 (short attention)",
        "shifted": "only P2 (shifted)",
        "dilated": "dilated",
        "strided": "strided",
    }
    rows = []
    for pattern, label in said.items():
        way = Way(context=size.top, pattern=pattern)
        rows.append(Row(pattern, label, (Entry(way, f"perplexity-{size.top}"), Entry(way, f"own-{size.top}"))))
    return Table(
        f"Attention patterns in training, perplexity at {size.top:,} tokens",
        ("full attention", "its own"),
        tuple(rows),
        (
            Check("S² across heads within 3% of full attention", ("shift", 0), "near", ("full", 0)),
            Check("across layers worse than across heads", ("shift-layers", 0), "above", ("shift", 0)),
            Check("P1 alone worse than S²", ("plain", 0), "above", ("shift", 0)),
            Check("P2 alone worse than S²", ("shifted", 0), "above", ("shift", 0)),
            Check("dilated worse than S²", ("dilated", 0), "above", ("shift", 0)),
            Check("strided worse than S²", ("strided", 0), "above", ("shift", 0)),
            Check("S² is better tested with full attention than with its own", ("shift", 1), "above", ("shift", 0)),
        ),
        notes=("Columns: what the trained model is tested with.", "Block-sparse attention is not built here."),
        figure=Figure(kind="dots", up="perplexity, by what the model is tested with"),
    )


def table3(size: Size) -> Table:
    """What trains, all with S²."""

    def lora(*more: str, **chosen: int | float | bool) -> Way:
        return replace(Way(context=size.top, train=("lora", *more)), **chosen)  # type: ignore[arg-type]

    ways = {
        "full" if rate == USUAL_RATE_OF_ALL else f"full-{rate}": (
            f"full fine-tuning, {rate:g} of LoRA's rate",
            Way(context=size.top, train=("full",), rate=rate),
        )
        for rate in RATE_OF_ALL
    }
    ways |= {f"rank-{rank}": (f"LoRA, rank {rank}", lora(rank=rank)) for rank in (8, 16, 32, 64, 128, 256)}
    ways |= {
        "rank-256-scaled": ("LoRA, rank 256, alpha 512", lora(rank=256, alpha=512.0)),
        "norm": ("LoRA + norm", lora("norm")),
        "embed": ("LoRA + embed", lora("embed")),
        "norm-embed": ("LoRA + norm + embed", lora("norm", "embed")),
        "norm-embed-one-rate": ("LoRA + norm + embed, all at one rate", lora("norm", "embed", one_rate=True)),
    }
    what = (f"perplexity-{size.top}", "millions", "rate", "embed-rate")
    return Table(
        f"What trains, with S², perplexity at {size.top:,} tokens",
        ("perplexity", "parameters (M)", "rate", "embeddings' rate"),
        tuple(Row(key, label, tuple(Entry(way, name) for name in what)) for key, (label, way) in ways.items()),
        (
            Check("LoRA alone worse than + norm + embed", ("rank-8", 0), "above", ("norm-embed", 0)),
            Check("rank 256 still worse than + norm + embed", ("rank-256", 0), "above", ("norm-embed", 0)),
            Check("a larger rank is not the cure: 256 no better than 8", ("rank-256", 0), "above", ("rank-8", 0)),
            Check("+ norm alone worse than both", ("norm", 0), "above", ("norm-embed", 0)),
            Check("+ embed alone worse than both", ("embed", 0), "above", ("norm-embed", 0)),
            Check("+ norm + embed within 3% of full fine-tuning", ("norm-embed", 0), "near", ("full", 0)),
            Check(
                "embeddings at LoRA's rate are worse than at their own",
                ("norm-embed-one-rate", 0),
                "above",
                ("norm-embed", 0),
            ),
        ),
        notes=(
            "LoRA's alpha stays 16 as in the original code, so a larger rank is scaled down (alpha / rank) unless the "
            "row says otherwise.",
        ),
        figure=Figure(kind="dots", columns=(0,)),
    )


def table4(size: Size) -> Table:
    """Training context by evaluation context, with and without S² and LoRA + norm + embed."""
    tested = (size.window, *size.contexts)
    kinds = {
        "full-full": ("full attention, full FT", {"pattern": "full", "train": ("full",), "rate": USUAL_RATE_OF_ALL}),
        "shift-full": ("S², full FT", {"train": ("full",), "rate": USUAL_RATE_OF_ALL}),
        "shift-lora": ("S², LoRA + norm + embed", {}),
    }
    rows = []
    for place, context in enumerate(size.contexts):
        for kind, (label, chosen) in kinds.items():
            way = replace(Way(context=context), **chosen)  # type: ignore[arg-type]
            entries = tuple(Entry(way, f"perplexity-{c}") if c <= context else None for c in tested)
            rows.append(Row(f"{kind}-{place}", f"{context:,}: {label}", entries))
    last = len(size.contexts) - 1
    checks = [
        Check(
            "more context is used: perplexity falls from the old window to the new one",
            (f"shift-lora-{last}", 0),
            "above",
            (f"shift-lora-{last}", last + 1),
        )
    ]
    for place, context in enumerate(size.contexts):
        checks += [
            Check(
                f"S², full FT within 3% of full attention, {context:,}", (f"shift-full-{place}", place + 1), "near",
                (f"full-full-{place}", place + 1),
            ),
            Check(
                f"S², LoRA + norm + embed within 3% of full FT, {context:,}", (f"shift-lora-{place}", place + 1),
                "near", (f"full-full-{place}", place + 1),
            ),
        ]  # fmt: skip
    return Table(
        "Training context (rows) by evaluation context (columns), perplexity",
        tuple(f"{context:,}" for context in tested),
        tuple(rows),
        tuple(checks),
        figure=Figure(kind="lines", across="tokens it is tested with", rows=tuple(f"{kind}-{last}" for kind in kinds)),
    )


def table6(size: Size) -> Table:
    """Retrieval: how much of a passage that is met again the model foresees, by the distance."""
    distances = [size.top * places // 16 for places in RECALL_PLACES]
    ways = {
        "untrained": ("YaRN, not trained", Way(context=size.top, method="yarn", trained=False)),
        "full": ("full attention", Way(context=size.top, pattern="full")),
        "plain": ("short attention", Way(context=size.top, pattern="plain")),
        "shift": ("S²", Way(context=size.top)),
    }
    rows = tuple(Row(k, label, tuple(Entry(way, f"recall-{d}") for d in distances)) for k, (label, way) in ways.items())
    last = len(distances) - 1
    return Table(
        f"Retrieval at {size.top:,} tokens: share of a repeated passage's tokens ranked first, by distance in tokens",
        tuple(f"{distance:,}" for distance in distances),
        rows,
        (
            Check("S² retrieves more than no training does, farthest", ("shift", last), "above", ("untrained", last)),
            Check("S² retrieves more than short attention, farthest", ("shift", last), "above", ("plain", last)),
            Check("full attention at most 10% above S², farthest", ("full", last), "near", ("shift", last), 0.1),
        ),
        number=".1%",
        notes=(
            "The paper asks LongChat's questions. A model that was never taught to answer cannot be asked, so here "
            "passages are repeated. One that was is asked by `longlora eval topics`: a cell's folder is a MODEL too.",
        ),
        figure=Figure(kind="lines", up="share of a passage's tokens ranked first", across="distance, tokens"),
    )


def table8(size: Size) -> Table:
    """Perplexity on the way, of full fine-tuning and of LoRA + norm + embed."""
    every = max(1, size.steps // 6)
    steps = (0, *range(every, size.steps + 1, every))
    ways = {
        "full": ("full fine-tuning", Way(context=size.top, train=("full",), rate=USUAL_RATE_OF_ALL, watched=every)),
        "norm-embed": ("LoRA + norm + embed", Way(context=size.top, watched=every)),
    }
    start = Entry(Way(context=size.top, trained=False), "step-0")
    rows = tuple(
        Row(key, label, (start, *(Entry(way, f"step-{step}") for step in steps[1:])))
        for key, (label, way) in ways.items()
    )
    last = len(steps) - 1
    return Table(
        f"Perplexity at {size.top:,} tokens by optimiser steps, with S²",
        tuple(str(step) for step in steps),
        rows,
        (
            Check("full fine-tuning better than no training", ("full", 0), "above", ("full", last)),
            Check("full fine-tuning falls faster at first", ("norm-embed", 1), "above", ("full", 1)),
            Check("LoRA + norm + embed ends within 3% of it", ("norm-embed", last), "near", ("full", last)),
        ),
        notes=("On other windows than the other tables: neighbouring ones, on up to eight documents.",),
        figure=Figure(kind="lines", across="optimiser steps"),
    )


def table11(size: Size) -> Table:
    """Group sizes as shares of the context."""
    shares = (2, 4, 6, 8)
    rows = []
    checks: list[Check] = []
    for context in reversed(size.contexts[-2:]):
        ways = [Way(context=context, pattern="full"), *(Way(context=context, groups=groups) for groups in shares)]
        rows.append(_perplexities(str(context), f"{context:,}", ways))
        key = str(context)
        checks += [
            Check(f"groups of 1/2 within 1% of full attention, {context:,}", (key, 1), "near", (key, 0), 0.01),
            Check(f"groups of 1/4 within 1% of full attention, {context:,}", (key, 2), "near", (key, 0), 0.01),
            Check(f"groups of 1/8 worse than 1/4, {context:,}", (key, 4), "above", (key, 2)),
        ]
    return Table(
        "Group size, as a share of the training context (rows), perplexity at that context",
        ("full", *(f"1/{groups}" for groups in shares)),
        tuple(rows),
        tuple(checks),
        figure=Figure(kind="lines", across="group, as a share of the context"),
    )


def figure1(size: Size) -> Table:
    """Perplexity, time and memory of full fine-tuning, plain LoRA and LongLoRA by context."""
    kinds = {
        "full": ("full FT, full attention", {"pattern": "full", "train": ("full",), "rate": USUAL_RATE_OF_ALL}),
        "lora": ("LoRA, full attention", {"pattern": "full", "train": ("lora",)}),
        "longlora": ("LongLoRA", {}),
    }
    rows = []
    for key, (label, chosen) in kinds.items():
        ways = [replace(Way(context=context), **chosen) for context in size.contexts]  # type: ignore[arg-type]
        entries = [
            *(Entry(way, f"perplexity-{way.context}") for way in ways),
            *(Entry(way, "seconds") for way in ways),
            *(Entry(way, "gigabytes") for way in ways),
        ]
        rows.append(Row(key, label, tuple(entries)))
    count = len(size.contexts)
    return Table(
        "Perplexity, seconds of training and memory (GB) by context",
        tuple(f"{word}{context:,}" for word in ("", "s ", "GB ") for context in size.contexts),
        tuple(rows),
        (
            Check("LoRA alone worse than LongLoRA, longest", ("lora", count - 1), "above", ("longlora", count - 1)),
            Check("LoRA with full attention slower", ("lora", 2 * count - 1), "above", ("longlora", 2 * count - 1)),
            Check("full FT takes more memory", ("full", 3 * count - 1), "above", ("longlora", 3 * count - 1)),
        ),
        notes=("On a CPU the memory is the process's peak, libraries and data included.",),
        figure=Figure(kind="panels", across="context, tokens"),
    )


TABLES: Mapping[str, Callable[[Size], Table]] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "table6": table6,
    "table8": table8,
    "table9": table4,
    "table11": table11,
    "figure1": figure1,
}
"""Every table that is made of cells; `table7` is computed (`longlora.reproduction.flops_table`)."""

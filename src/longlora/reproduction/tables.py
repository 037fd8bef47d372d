"""The paper's tables at our size: their rows and columns, and what the paper says of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from longlora.reproduction import attention_study
from longlora.reproduction.entries import Check, Entry, Figure, Row, Size, Table
from longlora.reproduction.measuring import RECALL_PLACES
from longlora.reproduction.ways import SAID, Way

RATE_OF_ALL = (0.05, 0.15, 0.5)
"""Learning rates of full fine-tuning, as shares of LoRA's."""

EVERYTHING: dict[str, Any] = {"train": ("full",), "rate": 0.15}
"""Full fine-tuning at its usual rate."""

FULL: dict[str, Any] = {"pattern": "full", **EVERYTHING}


def _perplexities(key: str, label: str, ways: Sequence[Way]) -> Row:
    return Row(key, label, tuple(Entry(way, f"perplexity-{way.context}") for way in ways))


def _rows(ways: Mapping[str, tuple[str, Way]], what: Sequence[str], before: Sequence[Entry] = ()) -> tuple[Row, ...]:
    """A row a way, `{key: (label, way)}`: the numbers `what` of each, behind those that all rows begin with."""
    return tuple(Row(key, label, (*before, *(Entry(way, name) for name in what))) for key, (label, way) in ways.items())


def _above(claim: str, left: str, right: str, column: int = 0) -> Check:
    return Check(claim, (left, column), "above", (right, column))


def _near(claim: str, left: str, right: str, column: int = 0, near: float = 0.03) -> Check:
    return Check(claim, (left, column), "near", (right, column), near)


def _heads(contexts: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"{context:,}" for context in contexts)


def table1(size: Size) -> Table:
    """Short, shifted and full attention by target context, and positions stretched without training."""
    untrained = {"linear": "Position Interpolation", "ntk": "NTK", "yarn": "YaRN"}
    trained = {"full": "full attention", "plain": "short attention", "shift": "S²"}
    rows = [
        _perplexities(
            f"untrained-{method}",
            f"{said}, not trained",
            [Way(context=context, method=method, trained=False) for context in size.contexts],
        )
        for method, said in untrained.items()
    ]
    rows += [
        _perplexities(pattern, label, [Way(context=context, pattern=pattern) for context in size.contexts])
        for pattern, label in trained.items()
    ]
    last = len(size.contexts) - 1
    checks = [
        Check(
            f"untrained at least 1.5 times trained ({untrained[method]})",
            (f"untrained-{method}", last),
            "far above",
            ("shift", last),
        )
        for method in ("linear", "ntk")
    ]
    checks.append(_above("untrained > trained (YaRN)", "untrained-yarn", "shift", last))
    for column, context in enumerate(size.contexts):
        checks.append(_above(f"short attention worse than S² at {context:,}", "plain", "shift", column))
        checks.append(_near(f"S² within 3% of full attention at {context:,}", "shift", "full", column))
    return Table(
        "Perplexity by target context: positions alone, full attention, short attention, S²",
        _heads(size.contexts),
        tuple(rows),
        tuple(checks),
        figure=Figure(kind="lines", across="context, tokens", rows=("untrained-yarn", "full", "plain", "shift")),
    )


def table2(size: Size) -> Table:
    """Attention patterns in training, tested with full attention and with the pattern itself."""
    ways = {pattern: (said, Way(context=size.top, pattern=pattern)) for pattern, said in SAID.items()}
    return Table(
        f"Attention patterns in training, perplexity at {size.top:,} tokens",
        ("full attention", "its own"),
        _rows(ways, [f"perplexity-{size.top}", f"own-{size.top}"]),
        (
            _near("S² across heads within 3% of full attention", "shift", "full"),
            _above("across layers worse than across heads", "shift-layers", "shift"),
            _above("P1 alone worse than S²", "plain", "shift"),
            _above("P2 alone worse than S²", "shifted", "shift"),
            _above("dilated worse than S²", "dilated", "shift"),
            _above("strided worse than S²", "strided", "shift"),
            Check("S² is better tested with full attention than with its own", ("shift", 1), "above", ("shift", 0)),
        ),
        notes=("Columns: what the trained model is tested with.", "Block-sparse attention is not built here."),
        figure=Figure(kind="dots", up="perplexity, by what the model is tested with"),
    )


def table3(size: Size) -> Table:
    """What trains, all with S²."""

    def lora(*more: str, **chosen: Any) -> Way:
        return replace(Way(context=size.top, train=("lora", *more)), **chosen)

    ways = {
        "full" if rate == EVERYTHING["rate"] else f"full-{rate}": (
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
        _rows(ways, what),
        (
            _above("LoRA alone worse than + norm + embed", "rank-8", "norm-embed"),
            _above("rank 256 still worse than + norm + embed", "rank-256", "norm-embed"),
            _above("a larger rank is not the cure: 256 no better than 8", "rank-256", "rank-8"),
            _above("+ norm alone worse than both", "norm", "norm-embed"),
            _above("+ embed alone worse than both", "embed", "norm-embed"),
            _near("+ norm + embed within 3% of full fine-tuning", "norm-embed", "full"),
            _above("embeddings at LoRA's rate are worse than at their own", "norm-embed-one-rate", "norm-embed"),
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
        "full-full": ("full attention, full FT", FULL),
        "shift-full": ("S², full FT", EVERYTHING),
        "shift-lora": ("S², LoRA + norm + embed", {}),
    }
    last = len(size.contexts) - 1
    best = f"shift-lora-{last}"
    rows = []
    checks = [
        Check(
            "more context is used: perplexity falls from the old window to the new one",
            (best, 0),
            "above",
            (best, last + 1),
        )
    ]
    for place, context in enumerate(size.contexts):
        for kind, (label, chosen) in kinds.items():
            way = Way(context=context, **chosen)
            entries = tuple(Entry(way, f"perplexity-{c}") if c <= context else None for c in tested)
            rows.append(Row(f"{kind}-{place}", f"{context:,}: {label}", entries))
        for kind, claim in (
            ("shift-full", "S², full FT within 3% of full attention"),
            ("shift-lora", "S², LoRA + norm + embed within 3% of full FT"),
        ):
            checks.append(_near(f"{claim}, {context:,}", f"{kind}-{place}", f"full-full-{place}", place + 1))
    return Table(
        "Training context (rows) by evaluation context (columns), perplexity",
        _heads(tested),
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
    last = len(distances) - 1
    return Table(
        f"Retrieval at {size.top:,} tokens: share of a repeated passage's tokens ranked first, by distance in tokens",
        _heads(distances),
        _rows(ways, [f"recall-{distance}" for distance in distances]),
        (
            _above("S² retrieves more than no training does, farthest", "shift", "untrained", last),
            _above("S² retrieves more than short attention, farthest", "shift", "plain", last),
            _near("full attention at most 10% above S², farthest", "full", "shift", last, 0.1),
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
        "full": ("full fine-tuning", Way(context=size.top, **EVERYTHING, watched=every)),
        "norm-embed": ("LoRA + norm + embed", Way(context=size.top, watched=every)),
    }
    start = Entry(Way(context=size.top, trained=False), "start")
    last = len(steps) - 1
    return Table(
        f"Perplexity at {size.top:,} tokens by optimiser steps, with S²",
        tuple(str(step) for step in steps),
        _rows(ways, [f"step-{step}" for step in steps[1:]], before=[start]),
        (
            Check("full fine-tuning better than no training", ("full", 0), "above", ("full", last)),
            _above("full fine-tuning falls faster at first", "norm-embed", "full", 1),
            _near("LoRA + norm + embed ends within 3% of it", "norm-embed", "full", last),
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
        key = str(context)
        ways = [Way(context=context, pattern="full"), *(Way(context=context, groups=groups) for groups in shares)]
        rows.append(_perplexities(key, f"{context:,}", ways))
        for column, share in ((1, "1/2"), (2, "1/4")):
            claim = f"groups of {share} within 1% of full attention, {context:,}"
            checks.append(Check(claim, (key, column), "near", (key, 0), 0.01))
        checks.append(Check(f"groups of 1/8 worse than 1/4, {context:,}", (key, 4), "above", (key, 2)))
    return Table(
        "Group size, as a share of the training context (rows), perplexity at that context",
        ("full", *(f"1/{groups}" for groups in shares)),
        tuple(rows),
        tuple(checks),
        figure=Figure(kind="lines", across="group, as a share of the context"),
    )


def figure1(size: Size) -> Table:
    """Perplexity, time and memory of full fine-tuning, plain LoRA and LongLoRA by context."""
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "full": ("full FT, full attention", FULL),
        "lora": ("LoRA, full attention", {"pattern": "full", "train": ("lora",)}),
        "longlora": ("LongLoRA", {}),
    }
    rows = []
    for key, (label, chosen) in kinds.items():
        ways = [Way(context=context, **chosen) for context in size.contexts]
        took = tuple(Entry(way, what) for what in ("seconds", "gigabytes") for way in ways)
        rows.append(Row(key, label, (*_perplexities(key, label, ways).entries, *took)))
    count = len(size.contexts)
    return Table(
        "Perplexity, seconds of training and memory (GB) by context",
        tuple(f"{word}{context:,}" for word in ("", "s ", "GB ") for context in size.contexts),
        tuple(rows),
        (
            _above("LoRA alone worse than LongLoRA, longest", "lora", "longlora", count - 1),
            _above("LoRA with full attention slower", "lora", "longlora", 2 * count - 1),
            _above("full FT takes more memory", "full", "longlora", 3 * count - 1),
        ),
        notes=("On a CPU the memory is the process's peak, libraries and data included.",),
        figure=Figure(kind="panels", across="context, tokens"),
    )


def _alone(table: Callable[[Size], Table]) -> Callable[[Size], tuple[Table, ...]]:
    return lambda size: (table(size),)


PAPERS = {
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

TABLES: Mapping[str, Callable[[Size], tuple[Table, ...]]] = {
    **{name: _alone(table) for name, table in PAPERS.items()},
    "attention-study": attention_study.tables,
}
"""Everything that is made of cells, by name; `table7` is computed (`longlora.reproduction.flops_table`)."""

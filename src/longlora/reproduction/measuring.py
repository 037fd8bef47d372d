"""What is measured on the model of a cell, with the model's full attention unless a measure says otherwise.

evaluation/MEASURE.json, MEASURE-N.json    one measurement, made once
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from longlora.attention.transformers_backend import use_shifted_attention
from longlora.evaluation.copying import perplexity_by_distance, recall
from longlora.evaluation.perplexity import perplexity
from longlora.reproduction.cells import Cell
from longlora.run_directory import RunDirectory
from longlora.settings import ExtendSettings, PerplexitySettings
from longlora.training.measuring import Data
from longlora.training.trainer import document_loss

DOCUMENTS = 3
"""Held-out documents that perplexity is measured on: the first that are as long as the context."""

WATCHED_DOCUMENTS = 8
"""Held-out documents of the perplexity on the way, as `longlora.training.extension.train_extension` takes them."""

PASSAGES = 48
"""Repeated passages a distance."""

RECALL_PLACES = (3, 6, 10, 13)
"""Distances of repeated passages, in sixteenths of the context."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """How a measurement is made, and which number of it an entry shows."""

    make: Callable[[Any, Data, ExtendSettings, str], Json]
    """(model, data, settings, N of `MEASURE-N`) -> JSON."""

    read: Callable[[Json, str], float]
    """(that JSON, N) -> the number."""

    shared: bool = False
    """One file, whatever N is."""


def _perplexity(model: Any, data: Data, settings: ExtendSettings, context: str) -> Json:
    """On the same documents at every context, windows sliding by half of it."""
    longest = settings.perplexity.min_document_tokens or settings.positions.context
    way = PerplexitySettings(
        contexts=(int(context),),
        stride=max(1, int(context) // 2),
        max_documents=DOCUMENTS,
        min_document_tokens=longest,
    )
    return {"perplexity": perplexity(model, data.held_out, way, progress=False)[0].perplexity}


def _own(model: Any, data: Data, settings: ExtendSettings, context: str) -> Json:
    """Perplexity with the attention of the training."""
    if settings.attention.pattern == "full":
        return _perplexity(model, data, settings, context)
    own = (settings.attention.tokens_per_group(settings.positions.context), settings.attention.pattern)
    use_shifted_attention(model, *own, inference=True)
    try:
        return _perplexity(model, data, settings, context)
    finally:
        use_shifted_attention(model, *own)


def _recall(model: Any, data: Data, settings: ExtendSettings, _: str) -> Json:
    context = settings.positions.context
    distances = [context * places // 16 for places in RECALL_PLACES]
    found = recall(model, data.held_out, distances, PASSAGES, settings.training.seed, context)
    return {"recall": [asdict(point) for point in found]}


def _recalled(document: Json, distance: str) -> float:
    return next(point["accuracy"] for point in document["recall"] if point["distance"] == int(distance))


def _copies(model: Any, data: Data, settings: ExtendSettings, _: str) -> Json:
    """Perplexity at the target context, windows sliding by a quarter, by the distance of the nearest copy."""
    context = settings.positions.context
    found = perplexity_by_distance(model, _long(data, context, DOCUMENTS), context, context // 4, copy_edges(context))
    return {"by_distance": [asdict(sort) for sort in found]}


def copy_edges(context: int) -> list[int]:
    """Distances of copies at which a new sort begins, in tokens: half a group, a group and two."""
    group = context // 4
    return [group // 2, group, 2 * group]


def _copied(document: Json, nearest: str) -> float:
    """Perplexity of the sort that begins at the distance `nearest`, or of all sorts."""
    sorts = [sort for sort in document["by_distance"] if nearest in ("all", str(sort["nearest"]))]
    tokens = sum(sort["tokens"] for sort in sorts)
    return math.exp(sum(sort["nll"] for sort in sorts) / tokens) if tokens else math.nan


def _start(model: Any, data: Data, settings: ExtendSettings, _: str) -> Json:
    """Perplexity before training, on the windows that the run itself watches."""
    context = settings.positions.context
    return {"perplexity": math.exp(document_loss(_long(data, context, WATCHED_DOCUMENTS), context)(model))}


def _long(data: Data, context: int, most: int) -> Sequence[np.ndarray]:
    return [ids for ids in data.held_out if len(ids) >= context][:most]


def _plain_perplexity(document: Json, _: str) -> float:
    return document["perplexity"]


MEASURES: dict[str, Measure] = {
    "perplexity": Measure(_perplexity, _plain_perplexity),
    "own": Measure(_own, _plain_perplexity),
    "start": Measure(_start, _plain_perplexity, shared=True),
    "recall": Measure(_recall, _recalled, shared=True),
    "copies": Measure(_copies, _copied, shared=True),
}
"""`perplexity-N` and `own-N` are perplexity at N tokens, with full attention and with the training attention;
`start` the perplexity before training; `recall-N` recall over N tokens; `copies-N` perplexity by copies."""


def measure_file(kind: str, number: str) -> str | None:
    """The measurement that an entry reads, without `.json`; None where training itself tells the number."""
    if kind not in MEASURES:
        return None
    return kind if MEASURES[kind].shared or not number else f"{kind}-{number}"


def measured(name: str, model: Any, data: Data, settings: ExtendSettings) -> Json:
    """The measurement `name`, as JSON."""
    kind, _, number = name.partition("-")
    return MEASURES[kind].make(model, data, settings, number)


def _embed_rate(cell: Cell, _: Json) -> float | None:
    training = cell.settings.training
    return training.embed_lr or (training.lr if {"embed", "full"} & set(cell.settings.trainable.train) else None)


TOOK: Mapping[str, Callable[[Cell, Json], float | None]] = {
    "seconds": lambda _, result: result["training"]["seconds"],
    "gigabytes": lambda _, result: result["training"]["memory_bytes"] / 1e9,
    "millions": lambda _, result: result["trainable"]["trainable"] / 1e6,
    "pairs": lambda _, result: result["attention_cost"]["pairs"],
    "rate": lambda cell, _: cell.settings.training.lr,
    "embed": _embed_rate,
}
"""What training took, from a cell and its `cell.json`: seconds, GB, millions of trained parameters, query-key pairs
that attention looked at; and its learning rates."""


def number_of(kind: str, number: str, cell: Cell, result: Json) -> float | None:
    """The number that an entry shows, from its placed and finished cell; None where it has not been measured."""
    run = RunDirectory(cell.settings.output)
    if kind == "step":
        steps = {record["step"]: record["eval_perplexity"] for record in run.read_metrics() if "eval_loss" in record}
        return steps.get(int(number))
    if kind in TOOK:
        return TOOK[kind](cell, result)
    document = run.read_evaluation(measure_file(kind, number) or "")
    return None if document is None else MEASURES[kind].read(document, number)

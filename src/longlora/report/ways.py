"""Which measurements may stand in one figure: those made in the same way; of the others it is said what differs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from longlora.report.models import Kind, Model
from longlora.report.wording import duration, joined, listed, spread, whole
from longlora.results import LongPPL, Result, Retrieval, Ruler, Short

Thing = TypeVar("Thing")

Group = Sequence[tuple[Model, Kind]]

Way = Mapping[str, str]
"""What must be the same for two measurements to be compared: a name and a value in words."""

UNSAID = ("fingerprint",)
"""Parts of a way that tell measurements apart and mean nothing to a reader."""


def way_of(document: Result) -> Way:
    """How the measurement was made, as far as others must have been made so too."""
    if isinstance(document, Retrieval):
        way = {"trials a square": spread([cell.trials + cell.skipped for cell in document.results])}
        way |= _prompts(document) | {"seed": document.seed}
        if document.task != "passkey":
            way["cases"] = joined(document.data) or "not said"
        else:
            lengths = f"multiples of {document.interval or 0:,} tokens, as the original code estimates them"
            way |= {"keys": document.keys, "lengths": lengths if document.interval else ""}
    elif isinstance(document, Ruler):
        way = {"average over": joined(document.average_over) or "no task", "seed": document.seed, **_prompts(document)}
        way |= {"trials a task and length": str(document.trials or "")}
        way |= {"threshold": "" if document.threshold is None else f"{100 * document.threshold:.1f}%"}
    else:
        way = {"text": joined(document.data), "fingerprint": document.data_fingerprint}
    if isinstance(document, Short):
        way |= {"baseline": document.baseline, "stride": document.stride, "score": document.score}
        if document.results:
            way["documents"] = spread([row.documents for row in document.results])
    elif isinstance(document, LongPPL):
        row, short, stride = document.results[0], document.short_context, document.short_stride
        way |= {"context": f"{row.context:,} tokens", "tokens": whole(row.tokens)}
        way |= {"short context": f"{short:,} to {short + stride - 1:,} tokens" if short and stride else ""}
        way |= {"key tokens": f"chosen by {document.evaluator}" if document.evaluator else "each model's own"}
        way |= {"alpha": document.alpha, "beta": document.beta}
    return {name: value or "–" for name, value in way.items()}


def _prompts(document: Result) -> dict[str, str]:
    """How prompts were written."""
    said = "not said" if document.chat is None else "chat template" if document.chat else "plain text"
    said += " with a system turn" if document.system is not None else ""
    return {"prompts": said} | ({"BOS": document.bos} if document.bos in ("yes", "no") else {})


def alike(things: Sequence[Thing], way: Callable[[Thing], Way]) -> list[list[Thing]]:
    """The things that were made in the same way together; the larger groups first, then in their order."""
    groups: list[list[Thing]] = []
    for thing in things:
        for group in groups:
            if dict(way(group[0])) == dict(way(thing)):
                group.append(thing)
                break
        else:
            groups.append([thing])
    return sorted(groups, key=len, reverse=True)


def grouped(done: Sequence[tuple[Model, Kind]], draw: Callable[[Group[Kind]], dict[str, Any]]) -> list[dict[str, Any]]:
    """What `draw` makes of the models that were measured alike, with how, and why they stand apart from the first."""
    groups = alike(done, lambda each: way_of(each[1]))
    return [
        draw(group)
        | {
            "way": in_words(way_of(group[0][1])),
            "apart": difference(way_of(group[0][1]), way_of(groups[0][0][1])) if group is not groups[0] else "",
            "seconds": listed(
                [f"{duration(found.seconds)} for {model.name}" for model, found in group if found.seconds]
            ),
        }
        for group in groups
    ]


def in_words(way: Way) -> str:
    """
    >>> in_words({"trials": "5", "seed": "0", "fingerprint": "3f"})
    'trials: 5; seed: 0'
    """
    return "; ".join(f"{name}: {value}" for name, value in way.items() if name not in UNSAID and value != "–")


def difference(way: Way, other: Way) -> str:
    """What is not the same in `way` as in `other`, for the sentence that keeps them apart.

    >>> difference({"trials": "5", "seed": "0"}, {"trials": "3", "seed": "0"})
    'trials 5, not 3'
    >>> difference({"text": "a", "fingerprint": "1"}, {"text": "a", "fingerprint": "2"})
    'other text under the same name'
    """
    names = [name for name in dict.fromkeys([*way, *other]) if way.get(name) != other.get(name)]
    said = [f"{name} {way.get(name, '–')}, not {other.get(name, '–')}" for name in names if name not in UNSAID]
    return listed(said) if said else "other text under the same name"

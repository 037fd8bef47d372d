"""Result documents, the JSON files of evaluations and runs: the schema by which they are read.

`read` is for files of any age and origin: what is missing, of another kind or out of range becomes the field's default,
and a row that lacks what it cannot do without is left out. Every figure that is measured on a sample has `low` and
`high`, the ends of its 95% interval, beside it.
"""

import math
import types
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

Kind = TypeVar("Kind")

MOST = 10**18
"""No count of tokens, documents or parameters is larger."""

COMMAND: ContextVar[tuple[str, ...]] = ContextVar("command", default=())
"""The command line that runs, word by word, which its results keep; empty where Python calls."""

Share = Annotated[float, "from 0 to 1"]
Unbounded = Annotated[float, "infinite too; NaN where it is no number"]
Said = Annotated[str, "any scalar, in words"]

RETRIEVALS = ("passkey", "topics", "lines")

MEASURES = ("perplexity", *RETRIEVALS, "ruler", "short", "longppl")
"""Evaluations, in the order of the page: `longlora eval NAME` leaves `NAME.json`."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Perplexity at one context."""

    context: int
    """Window length in tokens."""
    perplexity: Unbounded = math.nan
    low: float | None = None
    high: float | None = None
    """Of its 95% interval over documents; None for one document."""
    stride: int | None = None
    """Tokens that windows slide by, where each context has its own."""
    tokens: int | None = None
    """Tokens scored; with `--score window` and `stream`, as often as they were."""
    documents: int | None = None
    """Documents scored."""
    text: str = ""
    """Fingerprint of the scored documents; empty in files that have none."""
    document_nll: tuple[float, ...] = ()
    """Summed loss of each document, in nats, in their order."""
    document_tokens: tuple[int, ...] = ()
    """Tokens scored of each document."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What all results have in common."""

    model: str = ""
    """MODEL as the evaluation was given it."""
    label: str = ""
    """What people call it, with how its positions were stretched."""
    command: tuple[str, ...] = ()
    """The command line that made it, word by word."""
    extend_to: int | None = None
    method: str = ""
    seconds: float | None = None
    order: float | None = None
    """Place in tables and charts."""
    data: str | tuple[str, ...] = ""
    seed: Said = ""
    score: str = ""
    data_fingerprint: str = ""
    chat: bool | None = None
    bos: str = ""
    system: str | None = None


@dataclass(frozen=True, kw_only=True)
class Perplexities(Result):
    """`perplexity.json`, `perplexity-NAME.json`: a model at several contexts."""

    name: str = ""
    stride: int | None = None
    results: tuple[Measured, ...] = ()

    def at(self, context: int | None) -> Measured | None:
        return next((result for result in self.results if result.context == context), None)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One cell of passkey, topics or lines."""

    context: int
    """Tokens of the prompt; of topics and lines, their mean."""
    depth: Share | None = None
    """Of the key; None where it may be anywhere, and of topics and lines."""
    topics: int | None = None
    lines: int | None = None
    """Topics or lines of the prompt."""
    accuracy: Share | None = None
    low: float | None = None
    high: float | None = None
    trials: int = 0
    skipped: int = 0
    """Prompts that did not fit."""

    @property
    def number(self) -> int | None:
        return self.topics or self.lines


@dataclass(frozen=True, kw_only=True)
class Retrieval(Result):
    """`passkey.json`, `topics.json` or `lines.json`."""

    task: str = ""
    keys: Said = ""
    interval: int | None = None
    results: tuple[Answered, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RulerCell:
    """Share of the expected words found."""

    context: int
    task: str
    accuracy: Share | None = None
    low: float | None = None
    high: float | None = None
    skipped: int = 0


@dataclass(frozen=True, kw_only=True)
class Average:
    """Over the tasks that ran at every context."""

    context: int
    accuracy: Share
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    task: str
    reason: str
    context: int | None = None


@dataclass(frozen=True, kw_only=True)
class Ruler(Result):
    """`ruler.json`."""

    trials: int = 0
    results: tuple[RulerCell, ...] = ()
    averages: tuple[Average, ...] = ()
    average_over: str | tuple[str, ...] = ()
    threshold: Share | None = None
    effective_length: int | None = None
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Change:
    """A perplexity or a task's metric, before and after."""

    before: float
    after: float
    verdict: str = ""
    context: int | None = None
    tokens: int = 0
    documents: int = 0
    task: str = ""
    metric: str = ""
    samples: int = 0
    low: float | None = None
    high: float | None = None
    """Of the change: a share of a perplexity, a difference of an accuracy."""


@dataclass(frozen=True, kw_only=True)
class Short(Result):
    """`short.json`."""

    baseline: str = ""
    stride: Said = ""
    results: tuple[Change, ...] = ()
    tasks: tuple[Change, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LongPPLRow:
    """LongPPL beside plain perplexity, over all documents."""

    context: int
    """Most tokens of a document, L."""
    perplexity: float
    """exp of all tokens' mean loss."""
    tokens: int
    """Tokens scored: all but the first of each document."""
    longppl: float | None = None
    """exp of the key tokens' mean loss; None when there are no key tokens."""
    low: float | None = None
    high: float | None = None
    """Of LongPPL, over documents; None for one document."""
    key_tokens: int = 0
    """The model's tokens that are key tokens."""


@dataclass(frozen=True, kw_only=True)
class LongPPL(Result):
    """`longppl.json`."""

    evaluator: str | None = None
    """Who chose the key tokens; None: the model itself."""
    short_context: int | None = None
    short_stride: int | None = None
    alpha: Said = ""
    beta: Said = ""
    results: tuple[LongPPLRow, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answers(Result):
    """`answers-NAME.json`: loss on held-out answers."""

    nll: float
    """Nats a token."""
    low: float | None = None
    high: float | None = None
    name: str = ""
    tokens: int | None = None
    examples: int | None = None


KINDS: Mapping[str, type[Result]] = {
    "perplexity": Perplexities,
    **dict.fromkeys(RETRIEVALS, Retrieval),
    "ruler": Ruler,
    "short": Short,
    "longppl": LongPPL,
}


def read(kind: type[Kind], value: Any) -> Kind | None:
    """`value`, parsed JSON, as a `kind`; None where it lacks a field that has no default."""
    if not isinstance(value, dict):
        return None
    hints, found = get_type_hints(kind, include_extras=True), {}
    for field in fields(kind):  # type: ignore[arg-type]
        converted = _as(hints[field.name], value.get(field.name))
        if converted is not None:
            found[field.name] = converted
        elif field.default is MISSING:
            return None
    return kind(**found)


def number(value: Any) -> float | None:
    """`value` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def whole(value: Any) -> int | None:
    """`value` as a whole number from 1 to `MOST`, or None."""
    found = number(value)
    return int(found) if found is not None and 1 <= found <= MOST else None


def _as(hint: Any, value: Any) -> Any:
    """`value` as what `hint` names, or None."""
    if hint == Share:
        found = number(value)
        return found if found is not None and 0 <= found <= 1 else None
    if hint == Unbounded:
        return value if isinstance(value, float) and math.isinf(value) else number(value)
    if hint == Said:
        return ("yes" if value else "no") if isinstance(value, bool) else _scalar(value)
    if get_origin(hint) in (Union, types.UnionType):
        return next((found for part in get_args(hint) if (found := _as(part, value)) is not None), None)
    if get_origin(hint) is tuple:
        part = get_args(hint)[0]
        return tuple(f for v in value if (f := _as(part, v)) is not None) if isinstance(value, list) else None
    if is_dataclass(hint):
        return read(hint, value)  # type: ignore[arg-type]
    if hint is int:
        return whole(value)
    if hint is float:
        return number(value)
    return value if isinstance(hint, type) and hint is not types.NoneType and isinstance(value, hint) else None


def _scalar(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int | float) else None

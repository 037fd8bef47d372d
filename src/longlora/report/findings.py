"""What the measurements say, in sentences made from the numbers and from nothing else."""

from dataclasses import dataclass, field

from longlora.report import wording
from longlora.report.axes import drawable
from longlora.report.changes import change, direction, interval, said
from longlora.report.reading import Recorded
from longlora.results import Measured, Perplexities

METHODS = {
    "yarn": "YaRN",
    "linear": "Position Interpolation",
    "ntk": "NTK-aware scaling",
    "dynamic": "dynamic NTK scaling",
    "llama3": "Llama 3’s scaling",
    "longrope": "LongRoPE",
    "none": "a larger limit and no other change",
}

PATTERNS = {
    "shift": "S²-Attn: attention inside groups of {group} tokens, shifted by half a group in half of the heads",
    "shift-layers": "attention inside groups of {group} tokens, shifted by half a group in every other layer",
    "plain": "attention inside groups of {group} tokens, never shifted (short attention)",
    "shifted": "attention inside groups of {group} tokens, shifted by half a group in every head",
    "cyclic": "S²-Attn as Algorithm 1 has it: groups of {group} tokens, rolled by half a group in half of the heads",
    "dilated": "dilated attention: groups of {group} tokens that lie 1 to 4 tokens apart, by head",
    "strided": "attention inside groups of {group} tokens, in half of the heads of tokens a stride apart",
    "full": "full attention",
}


@dataclass(frozen=True)
class Finding:
    """The page's first sentence and what follows from it; `good` is None where nothing follows."""

    headline: str
    conclusions: list[str]
    good: bool | None = None
    decisive: list[tuple[str, str]] = field(default_factory=list)
    """What a person decides by: a name and a figure each."""


def finding(run: Recorded) -> Finding:
    """The perplexity of the trained model at its longest measured context, beside the models it has to beat."""
    trained, base = run.measured("trained"), run.measured("base")
    if trained is None:
        return _not_measured(run)
    far = trained.results[-1]
    where = f"{wording.whole(far.context)} tokens"
    if not drawable(far.perplexity):
        return Finding(
            f"After training, perplexity on held-out text at {where} is {_value(far)}: this run did not work.",
            _loss_advice(run),
            good=False,
        )
    home = _home(run, base)
    said = f"Perplexity on held-out text at {where} is {_value(far)} after training"
    beyond = base.at(far.context) if base else None
    if home and home.context < far.context:
        own = "its own " if home.context == run.whole("positions", "original_context") else ""
        said += f"; the base model has {_value(home)} at {own}{wording.whole(home.context)}"
        said += f" and {_value(beyond)} at {wording.whole(far.context)}" if beyond else ""
    elif beyond:
        said += f"; the base model has {_value(beyond)} there"
    conclusions, good = _judge(far, home if home and home.context < far.context else None, beyond)
    stretched = _stretched(run, far)
    against = change(far, stretched[0]) if stretched else None
    if stretched and against and direction(against) >= 0:
        verdict = "made it worse" if direction(against) else "made no difference"
        conclusions.append(f"Against positions stretched alone ({stretched[1]}), training {verdict}.")
        good = None if good else good
    if run.context and far.context < run.context:
        conclusions.append(
            f"The model was trained for {wording.whole(run.context)} tokens; nothing was measured beyond {where}."
        )
    return Finding(said + ".", conclusions, good, _decisive(run, trained, far, home, beyond, stretched))


def _decisive(
    run: Recorded,
    trained: Perplexities,
    far: Measured,
    home: Measured | None,
    beyond: Measured | None,
    stretched: tuple[Measured, str] | None,
) -> list[tuple[str, str]]:
    """Gain at the new length, loss at the old, and the cost."""
    there = f"at {wording.whole(far.context)} tokens"
    pairs = [
        (
            f"gain {there} over positions stretched alone{f' ({stretched[1]})' if stretched else ''}",
            far,
            stretched[0] if stretched else None,
        ),
        (f"gain {there} over the base model", far, beyond),
        (f"gain {there} over the base model in its own window", far, home),
        ("change in the old window", trained.at(home.context) if home else None, home),
    ]
    found = []
    for name, one, other in pairs:
        if one and other and one is not other:
            difference = change(one, other)
            told = f"from {_value(other)}" + (", other text: not to be compared" if drawable(other.perplexity) else "")
            if difference:
                sure = "" if interval(difference) else "; no interval: one document, or an old file"
                told = f"perplexity {said(difference)}, from {_value(other)}{sure}"
            found.append((name, told))
    cost = [
        f"{wording.duration(seconds)}" if (seconds := run.number("training", "seconds")) else "",
        f"{wording.whole(tokens)} tokens" if (tokens := run.whole("training", "tokens")) else "",
        f"{wording.memory(size)} of memory" if (size := run.whole("training", "memory_bytes")) else "",
    ]
    return found + ([("cost", ", ".join(filter(None, cost)))] if any(cost) else [])


def what_was_done(run: Recorded) -> list[str]:
    """Positions, attention while training, and what trained: a sentence each, as far as the run says."""
    return [sentence for sentence in (_positions(run), _attention(run), _trainable(run)) if sentence]


def _name(run: Recorded) -> str:
    name = run.settings.get("model") or run.word("model") or "the model"
    return "the demo model" if name == "demo" else str(name)


def _value(result: Measured) -> str:
    return wording.perplexity(result.perplexity)


def _home(run: Recorded, base: Perplexities | None) -> Measured | None:
    """The base model at its original window, or at the longest context measured inside it."""
    original = run.whole("positions", "original_context")
    inside = [result for result in base.results if original and result.context <= original] if base else []
    return inside[-1] if inside and drawable(inside[-1].perplexity) else None


def _judge(far: Measured, home: Measured | None, beyond: Measured | None) -> tuple[list[str], bool | None]:
    """Against the base model: at the same length it must win, against its own window it is worth saying by how much."""
    against = change(far, beyond) if beyond else None
    if against and direction(against) >= 0:
        where = f"{wording.whole(far.context)} tokens"
        return [f"This run did not help: at {where} the base model, not trained for that, is as good or better."], False
    found = change(far, home) if home else None
    if home is None or found is None:
        return [], True if beyond else None
    there = f"the base model’s at {wording.whole(home.context)}"
    if direction(found) < 0:
        return [f"The longer window helps: perplexity is {said(found)} than {there}."], True
    if direction(found) == 0:
        return [
            "The model reads the longer window without loss but does not gain from it: perplexity is "
            f"{there}{interval(found)}."
        ], None
    return [f"The model does not gain from the longer window: perplexity is {said(found)} than {there}."], False


def _stretched(run: Recorded, far: Measured) -> tuple[Measured, str] | None:
    """The best of the models whose positions were stretched alone, and its name."""
    others = [
        (result, each.label)
        for each in run.perplexities
        if each.name.startswith("untrained") and (result := each.at(far.context)) and drawable(result.perplexity)
    ]
    return min(others, key=lambda other: other[0].perplexity, default=None)


def _not_measured(run: Recorded) -> Finding:
    measured = next((each for each in run.perplexities if each.results), None)
    if measured:
        first = measured.results[-1]
        return Finding(
            f"The trained model has not been measured; {measured.label} has perplexity {_value(first)} "
            f"at {wording.whole(first.context)} tokens.",
            [],
        )
    original, context = run.whole("positions", "original_context"), run.context
    if context is None:
        return Finding(f"A run on {_name(run)}, in which no perplexity has been measured.", [])
    came = f" from {wording.whole(original)}" if original else ""
    done = "extended" if run.summary else "to be extended"
    said = f"{_name(run)} {done}{came} to {wording.whole(context)} tokens; no perplexity has been measured."
    return Finding(said.replace("the ", "The ", 1) if said.startswith("the ") else said, [])


def _loss_advice(run: Recorded) -> list[str]:
    rate = run.settings.get("lr")
    return [
        f"Try a lower learning rate than {wording.plain(rate)}."
        if isinstance(rate, float) and rate
        else "Try a lower learning rate."
    ]


def _positions(run: Recorded) -> str:
    original, context = run.whole("positions", "original_context"), run.whole("positions", "context")
    factor, method = run.number("positions", "factor"), run.word("positions", "method")
    if not (original and context and factor and method):
        return ""
    name = _name(run)
    if factor == 1 or run.summary["positions"].get("changed") is False:
        return f"The positions of {name} were left as they are, for {wording.whole(context)} tokens."
    return (
        f"The rotary positions of {name} were stretched {wording.plain(factor)} times, from {wording.whole(original)} "
        f"to {wording.whole(context)} tokens, with {METHODS.get(method, method)}."
    )


def _attention(run: Recorded) -> str:
    pattern, group = run.word("attention", "pattern"), run.whole("attention", "group_size")
    if not pattern:
        return ""
    steps, tokens = run.whole("training", "steps"), run.whole("training", "tokens")
    how = PATTERNS.get(pattern, "").format(group=wording.whole(group)) if group else ""
    how = how or f"the attention pattern {pattern}"
    length = f" for {wording.whole(steps)} steps ({wording.whole(tokens)} tokens)" if steps and tokens else ""
    return f"The model trained{length} with {how}; in use it attends to everything before a token, as any other model."


def _trainable(run: Recorded) -> str:
    trainable, total = run.whole("trainable", "trainable"), run.whole("trainable", "parameters")
    if not (trainable and total):
        return ""
    parts = run.settings.get("train")
    parts = [str(part) for part in parts] if isinstance(parts, list) else []
    named = {"norm": "the norms", "embed": "the embeddings", "full": "every weight"}
    said = [named[part] for part in parts if part in named]
    if "lora" in parts:
        said.insert(0, f"LoRA matrices of rank {run.settings.get('rank', '?')} on the attention")
    what = f"What trained: {wording.listed(said)}, " if said else "What trained: "
    return (
        f"{what}{wording.whole(trainable)} of {wording.whole(total)} parameters ({wording.percent(trainable / total)})."
    )

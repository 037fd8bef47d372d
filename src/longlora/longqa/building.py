"""`longlora longqa build`: plan, cost, teacher, and pairs that go to the file one by one.

documents ──► planning ──► estimate (--dry-run ends here)
                 │ tasks not in the file yet
                 ▼
              teacher ──► answers judged ──► pairs appended, useless and repeated ones counted
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from longlora.errors import UserError, printable
from longlora.longqa.answers import Answer, plain
from longlora.longqa.pair_files import GrowingPairs
from longlora.longqa.pairs import question_and_answer
from longlora.longqa.planning import QuestionPlan, Task, task_key
from longlora.progress import Progress
from longlora.settings import BuildLongQASettings

logger = logging.getLogger(__name__)


class Teacher(Protocol):
    """Who answers: `longqa.endpoint.Endpoint` or `longqa.local_teacher.LocalTeacher`."""

    name: str
    """As it is recorded with each pair."""

    def answer_each(self, asked: Iterable[tuple[Task, str]]) -> Iterator[tuple[Task, Answer]]:
        """The answer to each (task, prompt), as they come, in any order."""


def build_pairs(settings: BuildLongQASettings) -> dict[str, Any]:
    """Run `longlora longqa build`.

    Returns:
        `{"output", "teacher", "dry_run", "estimate": {"documents", "sections", "calls", "tokens_in", "tokens_out",
        "longest_prompt", "already", "categories", "materials"}}`, and unless it is a dry run `"pairs"` in the file
        now, `"added"`, `"skipped": {reason: count}`, `"tokens": {"in", "out"}` as the teacher counted.

    Raises:
        UserError: documents that cannot be read or hold nothing, an output that is in the way, a teacher that cannot
            be loaded or reached or that gave no useful answer at all.
    """
    _require_apart(settings)
    growing = GrowingPairs(settings.output, settings.resume) if settings.output else None
    present = growing.present() if growing else []
    done = {task_key(pair) for pair in present}
    answers = {plain(pair.answer) for pair in present}
    there = len(present)
    del present  # with all their material
    reached = _endpoint(settings) if settings.teacher_url and not settings.dry_run else None
    plan = QuestionPlan(settings, _tokenizer(settings))
    estimate = plan.estimate(done)
    if there > estimate.already:
        logger.info("%s holds %d pairs of another plan; they stay", settings.output, there - estimate.already)
    result: dict[str, Any] = {
        "output": settings.output or None,
        "teacher": settings.teacher or (settings.teacher_url or "").partition("?")[0] or None,
        "dry_run": settings.dry_run,
        "estimate": estimate.document(),
    }
    _say("\n".join(estimate.lines()), settings)
    if settings.teacher and not settings.teacher_url:
        from longlora.longqa.local_teacher import require_room

        require_room(settings.teacher, estimate.longest_prompt, settings.answer_tokens, settings.loading)
    if settings.dry_run or growing is None:
        return result
    added, skipped, tokens = 0, Counter[str](), Counter[str]()
    with growing, Progress("asking", "questions", estimate.calls) as progress:
        try:
            if estimate.calls:
                teacher = reached or _local(settings)
                asked = ((task, task.prompt) for task in plan.tasks() if task.key not in done)
                for task, answer in teacher.answer_each(asked):
                    tokens.update({"in": answer.prompt_tokens, "out": answer.answer_tokens})
                    said = plain(answer.text)
                    problem = answer.problem or ("answer given before" if said in answers else "")
                    if problem:
                        _count(skipped, problem, answer, task)
                    else:
                        source = task.source | {"teacher": teacher.name} | ({"cut": True} if answer.cut else {})
                        growing.append(question_and_answer(task.prompt, answer.text, task.category, source))
                        answers.add(said)
                        added += 1
                    left_out = sum(skipped.values())
                    progress.show(added + left_out, f"{added:,} pairs, {left_out:,} skipped")
        except BaseException:
            if added:
                logger.info("%d new pairs are in %s; --resume goes on from there", added, growing.lines)
            raise
        if there or added:
            growing.finish()
    if not there and not added:
        raise UserError(f"the teacher gave no useful answer ({_counts(skipped)}): give another --teacher.")
    result |= {"pairs": there + added, "added": added, "skipped": dict(skipped), "tokens": dict(tokens)}
    _say(_summary(result, skipped), settings)
    return result


def _require_apart(settings: BuildLongQASettings) -> None:
    output = Path(settings.output).absolute()
    for source in settings.documents:
        if settings.output and Path(source).is_dir() and Path(source).absolute() in output.parents:
            raise UserError(
                f"--output {settings.output} lies in --documents {source}, where it would be read as a document: "
                "name a file elsewhere."
            )


def _tokenizer(settings: BuildLongQASettings) -> Any:
    name = settings.tokenizer or (None if settings.teacher_url else settings.teacher)
    if name is None:
        return None
    from longlora.model.loading import load_tokenizer

    return load_tokenizer(name, **vars(settings.loading))


def _endpoint(settings: BuildLongQASettings) -> Teacher:
    from longlora.longqa.endpoint import Endpoint

    return Endpoint(
        str(settings.teacher_url),
        settings.teacher,
        settings.endpoint,
        answer_tokens=settings.answer_tokens,
        parallel=settings.parallel,
    )


def _local(settings: BuildLongQASettings) -> Teacher:
    from longlora.longqa.local_teacher import LocalTeacher

    return LocalTeacher(
        str(settings.teacher),
        answer_tokens=settings.answer_tokens,
        batch=settings.parallel,
        loading=settings.loading,
    )


def _count(skipped: Counter[str], problem: str, answer: Answer, task: Task) -> None:
    """The first of each kind is shown in full, so that the user sees what goes wrong without a flood of it."""
    if not skipped[problem]:
        place = f"{task.source['document']}, section {task.source['section']}"
        logger.warning("skipped (%s): %s: %s", problem, place, " ".join((answer.detail or answer.text).split())[:160])
    skipped[problem] += 1


def _summary(result: dict[str, Any], skipped: Counter[str]) -> str:
    line = f"{result['added']:,} pairs added, {result['pairs']:,} in {result['output']}"
    return f"{line}; skipped {sum(skipped.values()):,} ({_counts(skipped)})" if skipped else line


def _counts(skipped: Counter[str]) -> str:
    return ", ".join(f"{problem} {count:,}" for problem, count in skipped.most_common()) or "it was asked nothing"


def _say(text: str, settings: BuildLongQASettings) -> None:
    if settings.json:
        logger.info("%s", text)
    else:
        print(printable(text), flush=True)

"""What tables and studies share: their base settings, and what their documents say of where they come from."""

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from longlora.bench.machine import choose_device, hardware
from longlora.demo import recipe
from longlora.errors import UserError, check_choice
from longlora.model.loading import load_config
from longlora.model.positions import original_context
from longlora.run_directory import versions
from longlora.settings import ExtendSettings, ReproduceSettings

EMBED_RATE = 1 / 20
"""Learning rate of embeddings, of LoRA's."""


def window_of(settings: ReproduceSettings) -> int:
    """The model's original window in tokens."""
    return original_context(load_config(settings.model))


def base_settings(settings: ReproduceSettings, context: int) -> ExtendSettings:
    """The demo's recipe on the model and documents asked for, with `context` as its longest context; every context is
    measured on the same documents, those of at least that length.
    """
    ours = recipe("", 0)
    own = ours.training
    if settings.lr is not None:
        own = replace(own, lr=settings.lr, norm_lr=settings.lr, embed_lr=EMBED_RATE * settings.lr)
    return replace(
        ours,
        model=settings.model,
        evaluation_data=settings.evaluation_data,
        positions=replace(ours.positions, context=context, method=settings.method),
        corpus=replace(ours.corpus, data=settings.data),
        perplexity=replace(ours.perplexity, min_document_tokens=context),
        training=replace(own, steps=settings.steps, batch=settings.batch, save_every=max(1, settings.steps // 3)),
    )


def about(settings: ReproduceSettings) -> dict[str, Any]:
    """What every document begins with: on what it was made, when and where."""
    return {
        "name": settings.name,
        "model": settings.model,
        "data": ", ".join(settings.data),
        "evaluation_data": ", ".join(settings.evaluation_data) or "a held-out part of the standard library",
        "steps": settings.steps,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": hardware(choose_device("auto")),
        "versions": versions(),
    }


def refuse_mistakes(settings: ReproduceSettings, names: Iterable[str]) -> None:
    """Raises UserError where `--only` has none of `names`, or what is measured would be a part of what trains."""
    for name in settings.only:
        check_choice("cell of --only", name, names)
    if "stdlib" not in settings.data and not settings.evaluation_data:
        raise UserError(
            f"--evaluation-data is missing: {settings.name} measures everything on the same documents, and those held "
            "out of --data would change with the context; name some that are not in --data."
        )

"""What all cells of a table or study share."""

from dataclasses import replace

from longlora.demo import recipe
from longlora.model.loading import load_config
from longlora.model.positions import original_context
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

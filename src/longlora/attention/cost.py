"""What the attention of a training run costs, counted in pairs of a query and a key that it looks at."""

from typing import Any

from transformers import PreTrainedConfig

from longlora.attention.layout import Documents, plan, query_key_pairs
from longlora.attention.patterns import Draw, layers_drawn, random_choices
from longlora.attention.schedule import attention_at
from longlora.settings import AttentionSettings, PatternOptions, TrainingSettings

STEPS_COUNTED = 20
"""Steps of an attention with random choices that are counted one by one; further ones are taken to be like them."""


def attention_cost(
    attention: AttentionSettings, training: TrainingSettings, context: int, config: PreTrainedConfig
) -> dict[str, Any]:
    """Query-key pairs of a run on rows of `context` tokens that are one document each, over layers, heads and rows.

    Returns:
        `{"pairs", "full_pairs", "share"}`: of the run, of the same run with full attention, and the first over the
        second.
    """
    text = config.get_text_config()
    heads, layers = text.num_attention_heads, text.num_hidden_layers
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    row: Documents = (((0, context),),)
    always_full = {layer % layers for layer in attention.full_attention_layers}
    full = query_key_pairs(plan(row, context, heads, key_heads, context, "full"))
    others = [layer for layer in range(layers) if layer not in always_full]
    drawn_full = layers_drawn(attention.full_layers_share, len(others))
    alike: dict[tuple[str, int], list[int]] = {}
    for step in range(training.steps):
        alike.setdefault(attention_at(attention, context, step, training.steps), []).append(step)
    pairs = 0.0
    for (pattern, group_size), steps in alike.items():
        options = attention.options if pattern == attention.pattern else PatternOptions()
        counted = steps[: STEPS_COUNTED if random_choices(pattern, options) else 1]
        sparse = sum(
            query_key_pairs(
                plan(row, context, heads, key_heads, group_size, pattern, layer, options, Draw(training.seed, step))
            )
            for step in counted
            for layer in others
        )
        # which layers are drawn is chance; each is as likely as the others
        a_step = sparse / len(counted) * (1 - drawn_full / max(1, len(others)))
        pairs += len(steps) * (a_step + full * (drawn_full + len(always_full)))
    whole = full * layers * training.steps
    return {
        "pairs": round(pairs) * training.batch,
        "full_pairs": whole * training.batch,
        "share": pairs / whole,
    }

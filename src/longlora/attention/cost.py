"""What the attention of a training run costs, counted in pairs of a query and a key that it looks at."""

from typing import Any

from transformers import PreTrainedConfig

from longlora.attention.layout import Documents, plan, query_key_pairs
from longlora.attention.patterns import Draw, layers_drawn
from longlora.attention.schedule import attention_at
from longlora.settings import AttentionSettings, PatternOptions, TrainingSettings


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
    pairs = 0
    for step in range(training.steps):
        pattern, group_size = attention_at(attention, context, step, training.steps)
        options = attention.options if pattern == attention.pattern else PatternOptions()
        others = [layer for layer in range(layers) if layer not in always_full]
        drawn_full = layers_drawn(attention.full_layers_share, len(others))
        pairs += full * len(always_full)
        sparse = [
            query_key_pairs(
                plan(row, context, heads, key_heads, group_size, pattern, layer, options, Draw(training.seed, step))
            )
            for layer in others
        ]
        # which layers are drawn is chance; each is as likely as the others
        pairs += round(sum(sparse) * (1 - drawn_full / max(1, len(others)))) + full * drawn_full
    rows = training.batch
    whole = full * layers * training.steps
    return {"pairs": pairs * rows, "full_pairs": whole * rows, "share": pairs / whole}

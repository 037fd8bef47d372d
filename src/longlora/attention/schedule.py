"""Which attention each optimiser step of a run trains with: known from its settings alone."""

from longlora.settings import AttentionSettings


def attention_at(attention: AttentionSettings, context: int, step: int, steps: int) -> tuple[str, int]:
    """Pattern and group size in tokens of optimiser step `step` (from 0) of `steps`.

    >>> growing = AttentionSettings(group_size=1024, final_group_size=4096, full_attention_steps=10)
    >>> [attention_at(growing, 4096, step, 40) for step in (0, 9, 10, 20, 29, 30)]
    [('shift', 1024), ('shift', 1024), ('shift', 2048), ('shift', 4096), ('shift', 4096), ('full', 1024)]
    """
    first = attention.tokens_per_group(context)
    before_full = steps - attention.full_attention_steps
    if step >= before_full:
        return "full", first
    sizes = [first]
    while attention.final_group_size is not None and sizes[-1] < attention.final_group_size:
        sizes.append(min(2 * sizes[-1], attention.final_group_size))
    return attention.pattern, sizes[step * len(sizes) // before_full]

"""Greedy generation for measurements: the model's own full attention and its KV cache, prompts batched by length.

transformers' `generate` does the work: the prompt is read once (the LM head on its last token only), each new token
reads the cache. What this room adds is what a measurement needs: plain argmax whatever `generation_config` came with
the model (Qwen's has a repetition penalty, Llama's samples), prompts of any lengths in any order, and each answer
handed over as soon as it is there.

    prompts  [3 7 1 9]  [5 2]  [8 8 4 6]        a pass of two, padded on the left, then the other:
             . . 5 2 → …      8 8 4 6 → …
             3 7 1 9 → …
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from longlora import ranks
from longlora.evaluation.cost import CPU_TOKENS, announce, tokens_a_pass
from longlora.evaluation.perplexity import evaluating
from longlora.model.lm_head import unwrapped
from longlora.model.positions import frequencies_change_at
from longlora.progress import Progress

Prompt = Sequence[int] | np.ndarray
"""Token ids (N,)."""


def generate(
    model: nn.Module,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    stop_tokens: Collection[int] = (),
    stop: Callable[[list[int]], bool] | None = None,
    batch: int = 0,
    progress: str | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, in the order of `prompts`; see `generate_each`."""
    answers: list[list[int]] = [[] for _ in prompts]
    each = generate_each(
        model, prompts, max_new_tokens, stop_tokens=stop_tokens, stop=stop, batch=batch, progress=progress
    )
    for index, tokens in each:
        answers[index] = tokens
    return answers


def generate_each(
    model: nn.Module,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    stop_tokens: Collection[int] = (),
    stop: Callable[[list[int]], bool] | None = None,
    batch: int = 0,
    progress: str | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Greedy continuations as they come, `(index of the prompt, new tokens)`, from the shortest prompt to the longest.

    The model runs in evaluation mode, with its ordinary full attention, and is left in the mode it was in. Equal to
    `model.generate(prompt, do_sample=False)` of transformers, up to rounding where prompts of a pass differ in length.
    Processes of one launch share the passes out.

    Args:
        model: a causal language model of transformers, possibly wrapped (PEFT).
        prompts: token ids (N,) of each prompt, with whatever special tokens it needs; nothing is added or cut.
        max_new_tokens: tokens an answer has at most; those of `stop_tokens` do not belong to it.
        stop_tokens: ids that end an answer, such as the end of a turn; without any it has `max_new_tokens` tokens.
        stop: called with the new tokens of one answer after each of them; True ends it there.
        batch: prompts a pass; 0 chooses for the memory that is free.
        progress: title of the progress on stderr, and of what it will take; None shows none.

    Raises:
        ValueError: a prompt without tokens, or `max_new_tokens` below 1.
    """
    if max_new_tokens < 1 or not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt needs at least one token, and its answer room for at least one")
    changes_at = frequencies_change_at(model)
    total, done, answered = sum(len(prompt) for prompt in prompts), 0, 0
    lengths = [len(prompt) for prompt in prompts]
    most = tokens_a_pass(model, max(lengths) + max_new_tokens, cached=True) if lengths and not batch else 0
    apart = changes_at is not None and max(lengths, default=0) + max_new_tokens > changes_at
    if progress:
        with evaluating(model):
            announce(progress, model, lengths, max_new_tokens)

    def run(indices: list[int]) -> list[list[int]]:
        return _run(model, [prompts[index] for index in indices], max_new_tokens, stop_tokens, stop)

    with Progress(progress, "tokens", total) if progress and ranks.rank() == 0 else nullcontext() as bar:
        for indices, found in ranks.shared_out(list(passes(lengths, batch, most, apart)), run):
            yield from zip(indices, found, strict=True)
            done, answered = done + sum(lengths[index] for index in indices), answered + len(indices)
            if bar is not None:
                bar.show(done, f"{answered:,} of {len(prompts):,} prompts")


def passes(lengths: Sequence[int], batch: int = 0, most: int = CPU_TOKENS, apart: bool = False) -> Iterator[list[int]]:
    """Which prompts run together: indices by rising length, `batch` at a time or `most` tokens with the padding;
    `apart` keeps different lengths apart, for frequencies that follow the longest row.

    >>> list(passes([4000, 9000, 4096, 70]))
    [[3, 0], [2], [1]]
    """
    rows: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        full = len(rows) == batch if batch else (len(rows) + 1) * lengths[index] > most
        if rows and (full or (apart and lengths[index] != lengths[rows[0]])):
            yield rows
            rows = []
        rows.append(index)
    if rows:
        yield rows


def _run(
    model: nn.Module,
    rows: list[Prompt],
    max_new_tokens: int,
    stop_tokens: Collection[int],
    stop: Callable[[list[int]], bool] | None,
) -> list[list[int]]:
    """The new tokens of each of `rows`, in one pass, padded on the left."""
    base = cast(Any, unwrapped(model))
    width = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for at, row in enumerate(rows):
        input_ids[at, width - len(row) :] = torch.as_tensor(row)
        mask[at, width - len(row) :] = 1
    ends = _Ends(width, frozenset(stop_tokens), stop)
    # the prompt is read whole: in chunks, SDPA would need a mask (chunk, context) where it now needs none
    config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens)
    with evaluating(model), _own_settings_only(base):
        output = base.generate(
            input_ids.to(base.device),
            attention_mask=mask.to(base.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([ends]),
        )
    new = output[:, width:].tolist()
    return [tokens[: ends.found.get(at)] for at, tokens in enumerate(new)]


class _Ends(StoppingCriteria):
    """Where each answer ends: before a stop token, or after the token at which `stop` says so."""

    def __init__(self, width: int, stop_tokens: frozenset[int], stop: Callable[[list[int]], bool] | None) -> None:
        self.width, self.stop_tokens, self.stop = width, stop_tokens, stop
        self.found: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for at, tokens in enumerate(input_ids[:, self.width :].tolist()):
            if at in self.found:
                continue
            if tokens[-1] in self.stop_tokens:
                self.found[at] = len(tokens) - 1
            elif self.stop is not None and self.stop(tokens):
                self.found[at] = len(tokens)
        finished = [at in self.found for at in range(len(input_ids))]
        return torch.tensor(finished, device=input_ids.device)


@contextmanager
def _own_settings_only(base: Any) -> Iterator[None]:
    """Without the checkpoint's generation settings: sampling, penalties and lengths would change what is measured."""
    settings = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = settings

"""`longlora bench perplexity`: sliding-window perplexity beside the plain way, every window's full logits.

One process, the two in turn round by round, one window at a time in both. What they compute must agree, or no speed is
given. The plain way holds context × vocabulary logits; ours only those of the tokens that a window scores.
"""

from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from longlora.bench.machine import hardware, now, peak_bytes
from longlora.corpus.tokens import tokenize_corpus
from longlora.errors import UserError
from longlora.evaluation.loading import data_name, held_out
from longlora.evaluation.perplexity import evaluating, perplexity, windows
from longlora.model.lm_head import unwrapped
from longlora.model.loading import load
from longlora.model.positions import extend_positions, present_context
from longlora.progress import Progress
from longlora.settings import BenchPerplexitySettings, PerplexitySettings

MOST_APART = 1e-4
"""Nats that the two mean losses may differ by in float32, from the order of sums; for half precision see `_allowed`."""


def bench_perplexity(settings: BenchPerplexitySettings) -> dict[str, Any]:
    """Run `longlora bench perplexity`.

    Returns:
        `{"hardware", "torch", "model", "dtype", "data", "context", "stride", "windows", "tokens", "repeats", "nll":
        {"scored", "full"}, "difference", "seconds": {"scored", "full"}, "ratio", "peak_bytes": {"scored", "full"},
        "logits_bytes", "correct"}`; `scored` is what longlora does, `full` the plain way; seconds are medians over the
        rounds for all windows, `ratio` the median of scored / full; `peak_bytes` what one window adds to the weights;
        `logits_bytes` one window's full logits in float32.

    Raises:
        UserError: a model, document or length that does not fit, or results that disagree, for which no speed is given.
    """
    model, tokenizer = load(settings.model, dtype=settings.dtype, device="auto")
    config, place = unwrapped(model).config, next(model.parameters()).device
    if present_context(config) < settings.context:
        extend_positions(model, settings.context)
    corpus = tokenize_corpus(tokenizer, settings.corpus, held_out=held_out(settings.corpus))
    needed = settings.context + (settings.windows - 1) * settings.stride
    lengths = np.diff(corpus.offsets)
    if lengths.max() < needed:
        raise UserError(
            f"no document has the {needed:,} tokens of {settings.windows} windows: the longest of {len(corpus):,} has "
            f"{lengths.max():,}; give fewer --windows or longer documents."
        )
    document = corpus.document(int(np.argmax(lengths >= needed)))[:needed]
    wanted = PerplexitySettings(contexts=(settings.context,), stride=settings.stride, evaluation_batch=1)

    def scored(tokens: np.ndarray) -> tuple[float, int]:
        (result,) = perplexity(model, [tokens], wanted, progress=False)
        return result.nll, result.tokens

    def full(tokens: np.ndarray) -> tuple[float, int]:
        return full_logits_loss(model, tokens, settings.context, settings.stride)

    ways = {"scored": scored, "full": full}
    found = {name: way(document) for name, way in ways.items()}
    difference = abs(found["scored"][0] - found["full"][0])
    if difference > _allowed(model) or found["scored"][1] != found["full"][1]:
        raise UserError(
            f"the two ways disagree: {found['scored'][0]:.6f} nats over {found['scored'][1]:,} tokens and "
            f"{found['full'][0]:.6f} over {found['full'][1]:,}. No speed is given for a wrong result; please report it."
        )
    one = document[: settings.context]
    memory = {name: peak_bytes(partial(way, one), place) for name, way in ways.items()}
    rounds: list[dict[str, float]] = []
    with Progress(f"perplexity at {settings.context:,}", "rounds", settings.repeats) as bar:
        for number in range(settings.repeats):
            seconds = {}
            for name, way in ways.items():
                began = now(place)
                way(document)
                seconds[name] = now(place) - began
            rounds.append(seconds)
            bar.show(number + 1, f"round {number + 1} of {settings.repeats}")
    result = {
        "hardware": hardware(place),
        "torch": torch.__version__,
        "model": settings.model,
        "dtype": str(unwrapped(model).dtype).removeprefix("torch."),
        "data": data_name(settings.corpus),
        "context": settings.context,
        "stride": settings.stride,
        "windows": settings.windows,
        "tokens": found["full"][1],
        "repeats": settings.repeats,
        "nll": {name: nll for name, (nll, _) in found.items()},
        "difference": difference,
        "seconds": {name: median(seconds[name] for seconds in rounds) for name in ways},
        "ratio": median(seconds["scored"] / seconds["full"] for seconds in rounds),
        "peak_bytes": memory,
        "logits_bytes": settings.context * config.get_text_config().vocab_size * 4,
        "correct": True,
    }
    if not settings.json:
        print(_table(result))
    return result


def full_logits_loss(model: nn.Module, document: np.ndarray, context: int, stride: int) -> tuple[float, int]:
    """Mean loss in nats of a document's tokens (n,), each scored once, and their number, with all logits of a window.

    The plain way, with nothing of this package in it but the list of windows (`--score last`).
    """
    place = next(model.parameters()).device
    total, count = 0.0, 0
    with evaluating(model):
        for begin, end, first in windows(len(document), context, stride, "last"):
            ids = torch.from_numpy(document[begin:end].astype(np.int64)).to(place)
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
            losses = functional.cross_entropy(logits[:-1], ids[1:], reduction="none")[first - 1 :]
            total, count = total + losses.double().sum().item(), count + len(losses)
    return total / count, count


def _allowed(model: nn.Module) -> float:
    """Nats of mean loss that rounding explains: in half precision the head rounds its logits alike, whatever the chunk,
    but matrix products of other shapes may sum in another order."""
    return MOST_APART if unwrapped(model).dtype == torch.float32 else 10 * MOST_APART


def _table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"{result['hardware']}; torch {result['torch']}; {result['model']} in {result['dtype']}; {result['data']}",
        f"context {result['context']:,}, stride {result['stride']}, {result['windows']} windows, "
        f"{result['tokens']:,} tokens scored; medians of {result['repeats']} rounds in turn",
        "",
        f"{'':<24}{'loss':>12}{'seconds':>10}{'peak memory':>14}",
    ]
    for name, words in (("full", "every window's logits"), ("scored", "scored tokens only")):
        lines.append(
            f"{words:<24}{result['nll'][name]:>12.6f}{result['seconds'][name]:>10.2f}"
            f"{result['peak_bytes'][name] / 2**20:>10,.0f} MiB"
        )
    lines.append(
        f"time {result['ratio']:.2f} of the plain way; context × vocabulary in float32 is "
        f"{result['logits_bytes'] / 2**20:,.0f} MiB"
    )
    return "\n".join(lines)

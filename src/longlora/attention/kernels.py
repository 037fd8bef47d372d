"""What computes one part: dense attention of a batch of blocks, with what merging parts and the backward pass need.

A query's keys may come in several parts. Attention over part p of them gives an output and its `lse`, the logarithm of
the sum of exp(score). With `lse = log(sum of exp(lse_p))` over the parts,

    output                           = sum over p of exp(lse_p - lse) * output_p
    gradient of the scores of part p = exp(score - lse) * (dO . V - dO . output)

so the backward of each part, given the *whole* output and lse, is exact. A weight w on a part's keys adds log(w) to its
lse, and an attention sink is a part whose lse is its logit and whose output is zero. The same identity joins the blocks
of FlashAttention (arXiv 2205.14135, section 3.1) and the devices of Ring Attention (arXiv 2310.01889).

Shapes: b blocks, h query heads, k KV heads, L queries, S keys, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Scoring:
    """How scores become weights of the values."""

    scale: float | None = None
    """Factor of the scores; default 1 / sqrt(D)."""

    dropout: float = 0.0
    """Probability with which an attention weight is dropped."""

    softcap: float | None = None
    """Scores become `softcap * tanh(scores / softcap)` (Gemma 2)."""

    sinks: Tensor | None = None
    """(H,) one extra logit a query head that takes part in the softmax and carries no value (gpt-oss)."""


class Kernel(Protocol):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, seed: int) -> tuple[Tensor, Tensor]:
        """(b, h, L, D), (b, k, S, D), (b, k, S, Dv) -> output (b, h, L, Dv) and lse (b, h, L).

        `causal` where query i reads keys 0 … i, and S is L. `seed` is what dropout draws from.
        """

    def backward(
        self, gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, causal: bool, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, from the whole `output` and `lse` of these queries."""


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """The type of lse, and of sums of gradients, for inputs of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def why_not_flash(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What keeps PyTorch's flash attention from taking (…, D), (…, D), (…, Dv) tensors like these here, or None."""
    if not q.dtype == k.dtype == v.dtype:
        return f"it needs tensors of one type, and these are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.device.type == "cuda" and (q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > 256):
        return f"on CUDA it takes heads up to 256 wide in bfloat16 or float16, and these are {q.shape[-1]}, {q.dtype}"
    return None if q.device.type in ("cpu", "cuda") else f"it has no kernel for {q.device.type}"


@dataclass(frozen=True)
class FlashKernel:
    """PyTorch's flash attention on CPU and CUDA; grouped queries without repeating K and V, nothing L x S in memory."""

    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, seed: int) -> tuple[Tensor, Tensor]:
        width = v.shape[-1]
        q, k, v = _of_one_width(q, k, v)
        if q.device.type == "cpu":
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=self.scale)
        else:
            found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=self.scale)
        return found[0][..., :width], found[1]

    def backward(
        self, gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, causal: bool, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_keys, of_values = k.shape[-1], v.shape[-1]
        gradient, q, k, v, output = _of_one_width(gradient, q, k, v, output)
        if q.device.type == "cpu":
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient, q, k, v, output, lse, 0.0, causal, scale=self.scale
            )
        else:
            # without dropout the random state is not read; torch.nn.attention.varlen hands on the same two
            unread = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
            sizes, lse = (q.shape[2], k.shape[2]), lse.contiguous()
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                gradient, q, k, v, output, lse, None, None, *sizes, 0.0, causal, *unread, scale=self.scale
            )
        return dq[..., :of_keys], dk[..., :of_keys], dv[..., :of_values]


def _of_one_width(*tensors: Tensor) -> Sequence[Tensor]:
    """Zeros added where values are narrower or wider than keys (DeepSeek): they change no score and no sum."""
    width = max(x.shape[-1] for x in tensors)
    return [x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in tensors]


LARGEST = 2**23
"""Scores that `WrittenKernel` holds at a time."""


@dataclass(frozen=True)
class WrittenKernel:
    """Attention written out, a tile of queries at a time, for what flash attention lacks."""

    scale: float
    dropout: float = 0.0
    softcap: float | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, seed: int) -> tuple[Tensor, Tensor]:
        outputs, sums = [], []
        for here, seen, kept in self._tiles(q, k, causal, seed):
            scores, _ = self._scores(q[:, :, here], k[:, :, :seen], causal)
            lse = scores.logsumexp(-1)
            weights = (scores - lse.unsqueeze(-1)).exp_() * kept
            outputs.append((weights.to(v.dtype) @ v[:, :, :seen].unsqueeze(2)).flatten(1, 2))
            sums.append(lse.flatten(1, 2))
        return torch.cat(outputs, 2), torch.cat(sums, 2)

    def backward(
        self, gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, causal: bool, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = sum_type(q.dtype)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=exact) for x in (k, v))
        for here, seen, kept in self._tiles(q, k, causal, seed):
            scores, slope = self._scores(q[:, :, here], k[:, :, :seen], causal)
            weights = (scores - lse[:, :, here].unflatten(1, (k.shape[1], -1)).unsqueeze(-1)).exp_()
            g, out = (x[:, :, here].to(exact).unflatten(1, (k.shape[1], -1)) for x in (gradient, output))
            of_weights = g @ v[:, :, :seen].unsqueeze(2).transpose(-1, -2).to(exact) * kept
            of_scores = weights * (of_weights - (g * out).sum(-1, keepdim=True)) * (slope * self.scale)
            grouped = q[:, :, here].unflatten(1, (k.shape[1], -1)).to(exact)
            dq[:, :, here] = (of_scores @ k[:, :, :seen].unsqueeze(2).to(exact)).flatten(1, 2).to(q.dtype)
            dk[:, :, :seen] += (of_scores.transpose(-1, -2) @ grouped).sum(2)
            dv[:, :, :seen] += ((weights * kept).transpose(-1, -2) @ g).sum(2)
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    def _scores(self, q: Tensor, k: Tensor, causal: bool) -> tuple[Tensor, Tensor | float]:
        """(b, k, h / k, L, S), and what the soft cap multiplies gradients by."""
        exact = sum_type(q.dtype)
        scores = (q.unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).transpose(-1, -2)).to(exact) * self.scale
        slope: Tensor | float = 1.0
        if self.softcap is not None:
            capped = torch.tanh(scores / self.softcap)
            scores, slope = self.softcap * capped, 1 - capped.square()
        if causal:  # the last query reads the last key
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(k.shape[2] - q.shape[2] + 1)
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores, slope

    def _tiles(self, q: Tensor, k: Tensor, causal: bool, seed: int) -> Iterator[tuple[slice, int, Tensor | float]]:
        """Queries, how many keys these may read, and what dropout multiplies their weights by."""
        length, keys = q.shape[2], k.shape[2]
        size = max(1, LARGEST // (q.shape[0] * q.shape[1] * keys))
        random = torch.Generator(q.device).manual_seed(seed) if self.dropout else None
        for start in range(0, length, size):
            here = slice(start, min(start + size, length))
            seen = here.stop if causal else keys
            if random is None:
                yield here, seen, 1.0
                continue
            shape = (q.shape[0], k.shape[1], q.shape[1] // k.shape[1], here.stop - start, seen)
            kept = torch.rand(shape, generator=random, device=q.device, dtype=torch.float32) >= self.dropout
            yield here, seen, kept.to(sum_type(q.dtype)) / max(1 - self.dropout, 1e-12)

"""The backends of block attention: what each needs, which one `auto` takes, and the one place where they are called.

| backend | what computes the blocks | acts on |
|---|---|---|
| `sdpa` | PyTorch's flash attention on views of the blocks, part by part, merged | CPU; CUDA in 16 bit |
| `eager` | attention written out, a tile at a time: soft caps and dropout too | all |
| `varlen` | `torch.nn.attention.varlen`, one call a set of heads | CUDA, 16 bit |
| `flex` | FlexAttention with a mask a set of heads, one call a set | CUDA |
| `flash` | an installed flash-attn 2, 3 or 4, one call a set of heads | CUDA, 16 bit |

The first two serve everything: whole rows, pieces, sliding windows, sinks, blocks that read others. `auto` takes the
first of `AUTO` that can act. On CPU the others cannot train, and `sdpa` was the faster of the two wherever both were
measured (docs/performance.md). On CUDA nothing has been measured yet, so the order is the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from longlora.attention import varlen_kernels
from longlora.attention.block_attention import Halo, block_attention
from longlora.attention.flex import flex_kernel
from longlora.attention.kernels import FlashKernel, Kernel, Scoring, WrittenKernel, why_not_flash
from longlora.attention.layout import HeadSetPlan
from longlora.attention.varlen_attention import VarlenKernel, varlen_attention
from longlora.attention.varlen_layout import can_be_laid_out
from longlora.errors import UserError, check_choice
from longlora.settings import ATTENTION_BACKENDS

AUTO = ("sdpa", "eager")
"""In the order of preference; `eager` can always act."""


@dataclass(frozen=True)
class VarlenBackend:
    """A kernel for variable lengths, and what keeps it from acting."""

    kernel: VarlenKernel
    missing: Callable[[], str | None]
    """What this machine lacks."""

    refuses: Callable[[Tensor, Tensor], str | None]
    """What is wrong with a query (B, H, N, D) and value (B, Hkv, N, Dv) like these."""


def _flex_refuses(query: Tensor, value: Tensor) -> str | None:
    if query.device.type != "cuda":
        return f"FlexAttention has a backward on CUDA only, and these tensors are on {query.device.type}"
    return None


def _flash_refuses(query: Tensor, value: Tensor) -> str | None:
    return varlen_kernels.why_not_these(query, value) or varlen_kernels.flash_attn_missing_for(query.device)


VARLEN = {
    "varlen": VarlenBackend(varlen_kernels.torch_varlen, varlen_kernels.why_no_varlen, varlen_kernels.why_not_these),
    "flex": VarlenBackend(flex_kernel, varlen_kernels.why_no_flex, _flex_refuses),
    "flash": VarlenBackend(varlen_kernels.flash_attn, varlen_kernels.why_no_flash_attn, _flash_refuses),
}


def check_backend(backend: str) -> None:
    """Raises UserError for a backend that is unknown, or that this machine cannot run whatever the tensors."""
    check_choice("attention backend", backend, ATTENTION_BACKENDS)
    reason = VARLEN[backend].missing() if backend in VARLEN else None
    if reason:
        raise _cannot_act(backend, reason)


def why_not(backend: str, query: Tensor, value: Tensor, plans: Sequence[HeadSetPlan], scoring: Scoring) -> str | None:
    """What keeps `backend` from computing this, or None.

    Args:
        backend: a name of `ATTENTION_BACKENDS` but `auto`.
        query: (B, H, N, D); value: (B, Hkv, N, Dv).
        plans: from `longlora.attention.layout.plan`.
    """
    if backend == "eager":
        return None
    if scoring.softcap is not None:
        return "the model caps its attention scores (softcap), which only 'eager' computes"
    if scoring.dropout:
        return f"it has no attention dropout, and the model asks for {scoring.dropout}; only 'eager' has"
    if backend == "sdpa":
        return why_not_flash(query, query, value)
    found = VARLEN[backend]
    if reason := found.missing() or found.refuses(query, value):
        return reason
    if scoring.sinks is not None:
        return "the model has attention sinks (s_aux), which only 'sdpa' and 'eager' compute"
    if not all(can_be_laid_out(plan) for plan in plans):
        return "it reads each key once and all that come before it (no --scatter-weighted, no sliding window)"
    return None


def choose_backend(backend: str, query: Tensor, value: Tensor, plans: Sequence[HeadSetPlan], scoring: Scoring) -> str:
    """The backend that acts: `backend` itself, or for `auto` the first of `AUTO` that can.

    Raises:
        UserError: `backend` cannot act here; the sentence says why.
    """
    if backend == "auto":
        return next(name for name in AUTO if why_not(name, query, value, plans, scoring) is None)
    if reason := why_not(backend, query, value, plans, scoring):
        raise _cannot_act(backend, reason)
    return backend


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plans: Sequence[HeadSetPlan],
    scoring: Scoring,
    backend: str = "auto",
    *,
    start: int = 0,
    halo: Halo | None = None,
) -> Tensor:
    """Causal attention inside the blocks of `plans` and over what they read; padding tokens get zeros.

    Args:
        query: (B, H, N, D); key: (B, Hkv, N, D); value: (B, Hkv, N, Dv).
        plans: from `longlora.attention.layout.plan`.
        backend: a name of `ATTENTION_BACKENDS`.
        start, halo: of a piece of a row; see `longlora.attention.block_attention.block_attention`. A backend other than
            `sdpa` and `eager` leaves pieces to `auto`.

    Returns:
        (B, H, N, Dv), a view of a contiguous (B, N, H, Dv).

    Raises:
        UserError: a backend that cannot act here.
    """
    if backend in VARLEN and halo is not None:
        backend = "auto"
    chosen = choose_backend(backend, query, value, plans, scoring)
    if chosen in VARLEN:
        return varlen_attention(query, key, value, plans, VARLEN[chosen].kernel, scoring.scale, start)
    kernel = dense_kernel(chosen, query.shape[-1], scoring)
    return block_attention(query, key, value, plans, kernel, sinks=scoring.sinks, start=start, halo=halo)


def dense_kernel(backend: str, width: int, scoring: Scoring) -> Kernel:
    """The kernel of `sdpa` or `eager` for heads of `width`."""
    scale = width**-0.5 if scoring.scale is None else scoring.scale
    return FlashKernel(scale) if backend == "sdpa" else WrittenKernel(scale, scoring.dropout, scoring.softcap)


def _cannot_act(backend: str, reason: str) -> UserError:
    return UserError(f"attention backend '{backend}' cannot act here: {reason}. Give 'auto', which takes one that can.")

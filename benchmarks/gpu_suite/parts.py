"""The parts that are the package's own benchmarks."""

from typing import Any

from longlora.bench.attention import bench_attention
from longlora.bench.step import bench_step
from longlora.settings import STEP_WAYS, BenchAttentionSettings, BenchStepSettings


def attention(length: int, seconds_left: float, backends: list[str] | None = None, **arguments: Any) -> dict[str, Any]:
    """`longlora bench attention` at one length, groups of a quarter of it.

    Args:
        backends: those to measure; default all that can act. Where one of them breaks the measurement, SDPA alone is
            measured, and `without` says what broke.
    """

    def measured(names: tuple[str, ...]) -> dict[str, Any]:
        return bench_attention(BenchAttentionSettings(length=(length,), backends=names, json=True, **arguments))

    try:
        return measured(tuple(backends or ()))
    except Exception as error:  # a kernel may raise anything
        if backends == ["sdpa"]:
            raise
        return measured(("sdpa",)) | {"without": f"{type(error).__name__}: {error}"[:1000]}


def step(context: int, seconds_left: float, ways: list[str] | None = None, **arguments: Any) -> dict[str, Any]:
    """`longlora bench step` at one context."""
    wanted = tuple(ways or STEP_WAYS)
    return bench_step(BenchStepSettings(context=(context,), ways=wanted, json=True, **arguments))

"""Benchmarks: what S2-Attn costs on this machine, beside full attention, in one process."""

from longlora.bench.attention import attention_costs, bench_attention

__all__ = ["attention_costs", "bench_attention"]

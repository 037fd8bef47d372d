"""Benchmarks: what S2-Attn costs on this machine, beside full attention, in one process."""

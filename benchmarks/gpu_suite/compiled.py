"""`torch.compile` of a model in S2 training: no graph break in attention, the same loss, and what a step then costs."""

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import longlora
from longlora.bench.machine import now
from longlora.bench.step import read_config
from longlora.model.loading import quiet
from longlora.settings import BenchStepSettings

APART = 5e-3
"""Share by which the losses may differ in bfloat16, where compiled arithmetic rounds less often."""


def compiled_step(
    model: str, layers: int, context: int, device: str, seconds_left: float, dtype: str = "bfloat16", repeats: int = 5
) -> dict[str, Any]:
    """Forward and backward of the model's own loss, eager and compiled, in turn.

    Returns:
        `{"context", "layers", "graphs", "graph_breaks", "reasons", "loss": {"eager", "compiled"}, "same_loss",
        "compile_seconds", "seconds": {"eager", "compiled"}}`; seconds are the least of the rounds.
    """
    place = torch.device(device)
    config, _ = read_config(BenchStepSettings(model=model, context=(context,), layers=layers))
    torch.manual_seed(0)
    with place, quiet():
        base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    base = longlora.add_adapters(base, rank=8, train=("norm", "embed")).train()
    longlora.use_shifted_attention(base, group_size=context // 4)
    ids = torch.randint(config.get_text_config().vocab_size, (1, context), device=place)

    def step(trainee: Any) -> float:
        with torch.autocast(place.type, torch.bfloat16, enabled=dtype != "float32"):
            loss = trainee(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        base.zero_grad()
        return loss.item()

    losses = {"eager": step(base)}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    faster = torch.compile(base)
    began = time.perf_counter()
    losses["compiled"] = step(faster)
    compile_seconds = time.perf_counter() - began
    counters = torch._dynamo.utils.counters
    reasons = {str(reason)[:300]: count for reason, count in counters["graph_break"].items()}
    seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
    for _ in range(repeats):
        for name, trainee in (("eager", base), ("compiled", faster)):
            began = now(place)
            step(trainee)
            seconds[name].append(now(place) - began)
    return {
        "context": context,
        "layers": layers,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(reasons.values()),
        "reasons": reasons,
        "loss": losses,
        "same_loss": abs(losses["compiled"] - losses["eager"]) <= APART * losses["eager"],
        "compile_seconds": compile_seconds,
        "seconds": {name: min(times) for name, times in seconds.items()},
    }

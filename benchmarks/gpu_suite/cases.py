"""The cases in the order in which they are worth having: what is asked first, with how long each takes on an H200."""

from dataclasses import dataclass
from typing import Any

PARTS = ("environment", "parity", "attention", "scatter", "step", "ladder")

BACKENDS = ("sdpa", "varlen", "flash", "flex", "eager")

RUNGS = ("nothing", "loss", "checkpointing", "tiled", "activations", "optimizer", "base")
"""Rungs of the ladder of longest contexts; each has what those before it have."""


@dataclass(frozen=True)
class Case:
    """One result of the suite."""

    part: str
    name: str
    function: str
    """`module:function` of this package; takes `arguments` and `seconds_left`, returns a JSON document."""

    arguments: dict[str, Any]
    seconds: float
    """What it takes on an H200, by calculation; it is not begun with less time left."""

    limit: float
    """Seconds after which it is stopped."""

    @property
    def key(self) -> str:
        return f"{self.part}/{self.name}"


def gpu_cases() -> list[Case]:
    """Llama-2-7B's shape in bfloat16 on one CUDA GPU; those that answer a question of the summary first."""
    model = "llama2-7b"
    heads = {"heads": 32, "head_dim": 128, "dtype": "bfloat16", "device": "cuda", "repeats": 5}
    training = {"model": model, "dtype": "bfloat16", "device": "cuda"}
    climbing = {"model": model, "device": "cuda", "group_size": 8192}

    def case(part: str, name: str, function: str, seconds: float, **arguments: Any) -> Case:
        return Case(part, name, function, arguments, seconds, max(60.0, 3 * seconds))

    def parity(backend: str, seconds: float) -> Case:
        return case("parity", backend, "parity:parity", seconds, backend=backend, device="cuda", length=517)

    def attention(length: int, seconds: float, pattern: str = "shift") -> Case:
        part = "scatter" if pattern == "scatter" else "attention"
        return case(part, str(length), "parts:attention", seconds, **heads, length=length, pattern=pattern)

    def rung(name: str, seconds: float) -> Case:
        probes = [2048, 8192] if name in ("nothing", "loss") else [8192, 16384]
        return case("ladder", name, "ladder:rung", seconds, **climbing, rung=name, probes=probes)

    first = [
        case("environment", "environment", "environment:environment", 5),
        parity("sdpa", 10),
        parity("varlen", 10),
        parity("flash", 10),
        parity("flex", 50),
        attention(32768, 15),
        case("step", "32768", "parts:step", 75, **training, context=32768, repeats=3),
        attention(131072, 35),
        case("step", "102400", "parts:step", 125, **training, context=102400, repeats=1, ways=["s2", "full"]),
        attention(32768, 15, "scatter"),
        rung("optimizer", 85),
        rung("checkpointing", 50),
        attention(8192, 10),
    ]
    rest = [
        attention(65536, 20),
        attention(16384, 10),
        attention(8192, 10, "scatter"),
        rung("nothing", 25),
        rung("loss", 25),
        rung("tiled", 50),
        rung("activations", 85),
        rung("base", 85),
        parity("eager", 10),
    ]
    return [*first, *rest]


def small_cases() -> list[Case]:
    """The same parts on a CPU in little, to try the script itself; the numbers mean nothing."""
    model = "demo"
    heads = {"heads": 4, "head_dim": 16, "dtype": "float32", "device": "cpu", "repeats": 1}
    training = {"model": model, "layers": 1, "dtype": "float32", "device": "cpu"}
    climbing = {"model": model, "layers": 1, "device": "cpu", "group_size": 32}

    def case(part: str, name: str, function: str, **arguments: Any) -> Case:
        return Case(part, name, function, arguments, 1, 600)

    return [
        case("environment", "environment", "environment:environment"),
        *(case("parity", name, "parity:parity", backend=name, device="cpu", length=29) for name in BACKENDS),
        case("attention", "64", "parts:attention", **heads, length=64),
        case("scatter", "64", "parts:attention", **heads, length=64, pattern="scatter"),
        case("step", "96", "parts:step", **training, context=96, repeats=1),
        *(
            case("ladder", name, "ladder:rung", **climbing, rung=name, probes=[64, 128], limit=60_000_000)
            for name in RUNGS
        ),
    ]

"""The reader's way of CONTRIBUTING.md: twelve functions that a run really goes through, in the order it does."""

import importlib
import inspect
import re
from pathlib import Path
from types import FunctionType

from longlora.cli import main

ROOT = Path(__file__).resolve().parents[1]


def steps():
    """(file, function) of each step, as CONTRIBUTING.md lists them."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.search(r"^## The reader's way\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^\| \d+ \|.*\| `(\S+\.py)` `([\w.]+)` \|$", section[1], re.MULTILINE)


def watched(monkeypatch, file, name, seen):
    """From here on the function notes that it was called; its code is exchanged, since others import it by name."""
    module = importlib.import_module(f"longlora.{file.removesuffix('.py').replace('/', '.')}")
    if hasattr(getattr(module, name), "cache_clear"):
        getattr(module, name).cache_clear()  # of what other tests asked for
    function = inspect.unwrap(getattr(module, name))
    inner = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    inner.__kwdefaults__ = function.__kwdefaults__
    monkeypatch.setitem(function.__globals__, "_noting", seen)
    monkeypatch.setitem(function.__globals__, f"_inner_{name}", inner)
    outer = eval(f"lambda *given, **named: (_noting.setdefault({name!r}), _inner_{name}(*given, **named))[1]")
    monkeypatch.setattr(function, "__code__", outer.__code__)
    monkeypatch.setattr(function, "__defaults__", None)
    monkeypatch.setattr(function, "__kwdefaults__", None)


def test_the_way_is_the_one_that_a_run_goes(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    seen = {}
    for file, name in steps():
        watched(monkeypatch, file, name, seen)
    base, data, run, merged = (tmp_path / name for name in ("base", "data", "run", "merged"))
    tiny_model("llama", vocab_size=257, tie_word_embeddings=True).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    data.mkdir()
    for number in range(20):
        (data / f"{number}.txt").write_text("a tree has a left and a right node " * 20)
    options = "--context 256 --steps 1 --batch 1 --dtype float32 --evaluation-tokens 0".split()
    main(["extend", str(base), "--data", str(data), "--output", str(run), *options, "--json"])
    main(["merge", str(run), "--output", str(merged), "--json"])
    assert len(seen) == 12
    assert list(seen) == [name for _, name in steps()]
    assert (merged / "model.safetensors").exists()

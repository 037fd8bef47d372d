"""Run directories as training leaves them, made without training: extended positions, a random change to what trains.

Also the look at them from outside: a process that has stock transformers and PEFT, and no longlora.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from longlora.model.adapters import add_adapters
from longlora.model.positions import extend_positions, present_context
from longlora.model.saving import save_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FACTOR = 4


def save_base(folder: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Path:
    """A base model folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def extend(config: Any) -> Any:
    """Position Interpolation by `FACTOR`."""
    extend_positions(config, present_context(config) * FACTOR, "linear")
    return config


def disturb(model: torch.nn.Module, seed: int = 1) -> None:
    """A random step of everything trainable, large enough to show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def make_run(folder: Path, base: Path, tokenizer: "PreTrainedTokenizerBase", **adapters: Any) -> "PreTrainedModel":
    """Writes a run directory on `base` and returns the model that was saved in it; `adapters` go to add_adapters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, config=extend(AutoConfig.from_pretrained(base)))
    model = add_adapters(plain, **adapters)
    disturb(model)
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text(yaml.safe_dump({"model": str(base)}))
    if adapters.get("train") == ("full",):
        save_base(folder / "model", model, tokenizer)
    else:
        save_adapter(model, folder / "adapter", tokenizer)
    return model.eval()


def token_ids(vocabulary: int = 97) -> torch.Tensor:
    """Two rows of 23 tokens (2, 23)."""
    return torch.randint(0, vocabulary, (2, 23), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits (2, 23, V) of the test tokens, in float32."""
    return model(token_ids()).logits.float()


STOCK = """
import json, sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

def logits(model):
    ids = torch.randint(0, 97, (2, 23), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.eval()(ids).logits.float()

def error(model, expected):
    return float((logits(model) - expected).abs().max() / expected.abs().max())

def tied(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight

results = {}
for folder in map(Path, sys.argv[1:]):
    expected = torch.load(folder / "expected.pt")
    result = results[folder.name] = {}
    if (folder / "run" / "adapter").is_dir():
        adapter = folder / "run" / "adapter"
        config = AutoConfig.from_pretrained(adapter)
        base = AutoModelForCausalLM.from_pretrained(folder / "base", config=config, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, adapter)
        result["adapter"] = error(model, expected)
        plain = model.merge_and_unload()
        result["unloaded"], result["unloaded_tied"] = error(plain, expected), tied(plain)
    if (folder / "merged").is_dir():
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
        result["merged"], result["merged_tied"] = error(merged, expected), tied(merged)
        result["rope"], result["context"] = merged.config.rope_parameters, merged.config.max_position_embeddings
        tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
        result["tokenizer"] = [tokenizer.model_max_length, tokenizer.chat_template]
assert "longlora" not in sys.modules
print(json.dumps(results))
"""


def seen_by_stock_libraries(folders: list[Path]) -> dict[str, dict[str, Any]]:
    """For each folder of `base/`, `run/`, `expected.pt` and maybe `merged/`, by its name: settings, and errors as a
    share of the largest logit."""
    command = [sys.executable, "-I", "-c", STOCK, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

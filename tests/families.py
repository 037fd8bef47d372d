"""Every decoder family that the installed transformers can build tiny, and what each command makes of it.

Nothing here lists families: they are what transformers' own table has. `python tests/families.py` tries them all and
writes docs/models.md; stopped, it goes on where it was. Named families are tried anew.
"""

import contextlib
import io
import json
import multiprocessing
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from conftest import make_tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longlora.cli import main

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WINDOW, VOCABULARY = 128, 320

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 6,  # every sixth of some has attention, or full attention
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "original_max_position_embeddings": WINDOW,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "is_decoder": True,
    # what else makes a model large, by the names that families give it
    "n_embd": 64,
    "n_layer": 6,
    "n_head": 4,
    "n_positions": WINDOW,
    "head_dim": 16,
    "global_head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "attn_layer_indices": [2, 5],
    "sliding_window": 2048,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "num_mtp_layers": 0,
    "rotary_dim": 8,
    "num_heads": 8,
    "mamba_d_ssm": 128,
    "d_model": 64,
    "decoder_layers": 6,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 80,
    "dff": 80,
    "dim_ff": 80,
    "o_lora_rank": 16,
    "n_shared_experts": 1,
    # of towers for pictures and sounds
    "image_size": 28,
    "patch_size": 14,
    "depth": 2,
    "out_hidden_size": 64,
    "encoder_layers": 2,
}
OF_ONE: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "gpt_neo": {"num_layers": 6, "attention_types": [[["global", "local"], 3]]},
    "mimo_v2_flash": {"head_dim": 24, "swa_head_dim": 24},
    "zaya": {"num_experts_per_tok": 1},
}
"""What only some families take."""

OWN_WORDS = "## Other versions"
"""What stands in the document from here on is written by hand."""

LARGEST = 16_000_000
"""Parameters above which a family is not tiny whatever is asked: its config has sizes of its own names."""

COMMANDS = {
    "plan": "plan {base} --context 512",
    "chat": "chat {base} --question why --answer-tokens 2",
    "eval": "eval perplexity {base} --data {text} --contexts 64 --stride 64 --max-documents 1",
    "extend": "extend {base} --context 256 --data {text} --evaluation-data {text} --contexts 64 --max-documents 1 "
    "--steps 1 --batch 1 --dtype float32 --output {run}",
    "sft": "sft {base} --data {pairs} --held-out 0 --batch 1 --epochs 1 --dtype float32 --output {run}-sft",
    "merge": "merge {run} --output {run}-merged",
    "export": "export {base} --gguf {run}.gguf",
}
"""Column -> command; `merge` needs the run that `extend` leaves."""


def families() -> list[str]:
    """transformers' model types with a causal language model, less those that are only another's name for its text."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def of_sizes(known: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    found = {name: size for name, size in sizes.items() if hasattr(known, name)}
    rope = getattr(known, "rope_parameters", None) or {}
    if "original_max_position_embeddings" in rope:  # else the window would be a large model's
        own = {"factor": 4.0, "original_max_position_embeddings": WINDOW // 4, "max_position_embeddings": WINDOW}
        found["rope_parameters"] = rope | {name: size for name, size in own.items() if name in rope}
    return found


def build(model_type: str) -> Any | None:
    """A tiny random model, `None` where its config takes other sizes than these."""
    own = SMALL | OF_ONE.get(model_type, {})
    without_width = {name: size for name, size in own.items() if "head_dim" not in name}
    everywhere = {"num_key_value_heads": own["num_attention_heads"]}  # latent attention repeats no keys
    for sizes in (own, own | everywhere, own | {"pad_token_id": 1}, without_width):
        torch.manual_seed(0)
        try:
            known = AutoConfig.for_model(model_type)
            parts = {name: of_sizes(getattr(known, name), sizes) for name in known.sub_configs}
            config = AutoConfig.for_model(model_type, **of_sizes(known, sizes) | parts)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
            if size > LARGEST:
                return None
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            with torch.no_grad():
                model(torch.arange(9)[None])
            return model
        except Exception:  # whatever a family's own code raises for sizes that do not go together
            continue
    return None


def said(command: str) -> str:
    """`yes`, the sentence of a refusal, or `TRACEBACK` and its last line."""
    out, error = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            main(command.split())
    except SystemExit as end:
        if end.code == 2:
            return error.getvalue().strip().splitlines()[-1].removeprefix("longlora: ")
        return "yes" if not end.code else f"TRACEBACK exit {end.code}"
    except BaseException:
        return f"TRACEBACK {traceback.format_exc().splitlines()[-1]}"
    return "yes"


def commands_of(model: Any, folder: Path, only: tuple[str, ...] = tuple(COMMANDS)) -> dict[str, str]:
    """What each command says to `model`, saved into `folder`."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]
    (folder / "pairs.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    places = {"base": folder / "base", "text": folder / "text.txt", "pairs": folder / "pairs.jsonl"}
    answers = {}
    for name in only:
        answers[name] = said(COMMANDS[name].format(run=folder / "run", **places))
    if answers.get("extend", "yes") != "yes":
        answers.pop("merge", None)  # it had no run
    return answers


def sweep(names: list[str], seconds: int) -> Iterator[tuple[str, dict[str, str] | None]]:
    """`(family, answers)`, `None` for one that could not be built tiny; each in a process that has `seconds`."""
    forked = multiprocessing.get_context("fork")  # with everything imported: a fresh process takes ten seconds
    with tempfile.TemporaryDirectory() as folder:
        commands_of(build("llama"), Path(folder))
    for name in names:
        mine, its = forked.Pipe(duplex=False)
        child = forked.Process(target=one_family, args=(name, its))
        child.start()
        its.close()
        try:
            late = dict.fromkeys(COMMANDS, f"TRACEBACK not done after {seconds} s")
            yield name, mine.recv() if mine.poll(seconds) else late
        except EOFError:
            yield name, dict.fromkeys(COMMANDS, "TRACEBACK its process was killed")
        child.kill()
        child.join()


def one_family(name: str, answers: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = build(name)
        answers.send(commands_of(model, Path(folder)) if model is not None else None)


def table(rows: dict[str, dict[str, str] | None], versions: str, own_words: str) -> str:
    """docs/models.md, which ends with `own_words`."""
    notes: list[str] = []

    def cell(family: str, answer: str | None) -> str:
        if answer is None or answer == "yes":
            return "–" if answer is None else "yes"
        sentence = re.sub(r"[^\s']*/tmp\w*/base", "MODEL", answer)
        # so that families share a sentence
        sentence = re.sub(rf"\b(an? |the |this )?{family}\w* (model|config)\b", r"the \2", sentence)
        sentence = re.sub(r"\b(an? )?\w+(For\w+|LMHeadModel)\b", "the model", sentence)
        sentence = re.sub(r" \(up to \S+\) differ by up to \S+ from", " differ from", sentence)
        if sentence not in notes:
            notes.append(sentence)
        return f"no [{notes.index(sentence) + 1}]"

    lines = [f"| family | {' | '.join(COMMANDS)} |", f"|---{'|---' * len(COMMANDS)}|"]
    for name, answers in rows.items():
        if answers is not None:
            lines.append(f"| {name} | {' | '.join(cell(name, answers.get(column)) for column in COMMANDS)} |")
    unbuilt = ", ".join(name for name, answers in rows.items() if answers is None)
    left = ", ".join(name for name in families() if name not in rows)
    return "\n".join(
        [
            "# Models",
            "",
            f"Written by `python tests/families.py` ({versions}): tiny random models of the decoder families that",
            "transformers' own table names, and what each command does with them. A `no` is a sentence and exit status",
            "2; `–` was not tried: the run it needs was refused, or (no `eval`) only `plan` and `chat` were.",
            "",
            *lines,
            "",
            *(f"{number}. {note}" for number, note in enumerate(notes, start=1)),
            "",
            f"Not tried, because their configs take other sizes: {unbuilt or 'none'}.",
            "",
            f"Not reached when this was written: {left or 'none'}.",
            "",
            own_words,
        ]
    )


if __name__ == "__main__":
    import transformers

    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    done = Path("build/families.jsonl")  # so that it may be stopped and go on
    done.parent.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    found: dict[str, dict[str, str] | None] = dict(lines)
    for family, answers in sweep(sys.argv[1:] or [name for name in families() if name not in found], seconds=1200):
        found[family] = answers
        with done.open("a") as rows:
            rows.write(json.dumps([family, answers]) + "\n")
        print(family, json.dumps(answers), file=sys.stderr, flush=True)
    document = Path("docs/models.md")
    own_words = "".join(document.read_text(encoding="utf-8").partition(OWN_WORDS)[1:])
    document.write_text(table(dict(sorted(found.items())), versions, own_words), encoding="utf-8")

"""Documents packed into a row are as if alone, whatever the layers of a model that mix tokens."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from longlora.attention.documents import keeps_documents_apart
from longlora.attention.transformers_backend import use_shifted_attention
from longlora.cli import main
from longlora.corpus.conversations import ConversationFormat
from longlora.longqa.pair_files import read_pairs

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
DELTA = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 2}
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": ({}, True),
    "qwen2_moe": ({"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}, True),
    "gemma3_text": (
        {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
        True,
    ),
    "qwen3_5_text": (DELTA, False),
    "bamba": (MAMBA | {"attn_layer_indices": [1, 3]}, False),
    "olmo_hybrid": ({}, False),
    # whose state changes logits by a hundredth of the largest, not much above bfloat16's steps
    "jamba": (
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "initializer_range": 0.02,
        },
        False,
    ),
}
"""transformers' model type -> (config, whether its layers begin anew where positions do)."""


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(SIZES | FAMILIES[name][0]))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_whether_a_state_runs_on_is_found_out(name):
    """The oracle: stock transformers on a document alone and on one with another before it."""
    model, apart = make_model(name), FAMILIES[name][1]
    tokens = torch.randint(300, (1, 24), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(12).repeat(2)[None]
    with torch.no_grad():
        alone = model(input_ids=tokens[:, 12:], use_cache=False).logits
        packed = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, 12:]
    assert torch.allclose(packed, alone, atol=1e-4) == apart
    use_shifted_attention(model.train(), 4)
    assert keeps_documents_apart(model) == apart
    assert model.training
    assert keeps_documents_apart(model.to(torch.bfloat16)) == apart


def test_a_hybrid_gets_one_conversation_a_row(tmp_path, tiny_tokenizer, caplog):
    """The recorded loss is the examples' own, each by itself in stock transformers; batch 4 of 4 rows is one step."""
    model, tokenizer = make_model("qwen3_5_text"), tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    pairs = tmp_path / "pairs.jsonl"
    turns = [
        [{"role": "user", "content": "why?" * n}, {"role": "assistant", "content": "so " * n}] for n in range(1, 5)
    ]
    pairs.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    run = tmp_path / "run"
    main(
        f"sft {tmp_path / 'base'} --data {pairs} --held-out 0 --output {run} --batch 4 --epochs 1 --pattern full "
        "--dtype float32 --json".split()
    )
    recorded = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    conversations, total, count = ConversationFormat(tokenizer), 0.0, 0
    for pair in read_pairs(str(pairs)):
        example = conversations.example(pair.conversation())
        ids = torch.from_numpy(example.tokens.astype(np.int64))[None]
        labels = torch.from_numpy(example.labels(-100))
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    assert recorded == pytest.approx(total / count, abs=1e-4)
    assert "recurrent" in caplog.text

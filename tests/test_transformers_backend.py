"""`s2_attn` inside real transformers models: against the dense oracle, unpatched, with padding, packing and windows."""

import copy
import math

import pytest
import torch
import transformers
from attention_oracle import cut_of_head, sees
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from longlora.attention.transformers_backend import use_shifted_attention
from longlora.errors import UserError

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "Llama": {},
    "Mistral": {},
    "Mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    "Phi": {},
    "Phi3": {},
    "GPTNeoX": {},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "Olmo2": {},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 7},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    "StableLm": {},
    "Starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0},
    "Granite": {},
    "Cohere": {},
    "DeepseekV3": {
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
    },
    "GptOss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 7},
}


def build(architecture: str, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**SMALL | ARCHITECTURES[architecture] | changes)
    model = AutoModelForCausalLM.from_config(config).double().train()
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # the grouped kernel has no float64
    return model


def dense_mask(length, group, kind, dilation, documents, window):
    """(N, N) of who sees whom; `documents` (N,) ids, negative for padding."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for document in documents.unique().tolist():
        at = (documents == document).nonzero().flatten()
        if document >= 0:
            mask[at[:, None], at[None, :]] = sees(kind, dilation, len(at), group)
    if window is not None:
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        mask &= distance < window
    return mask


def oracle_implementation(group, pattern, layer_types):
    """A second attention implementation that shares nothing with ours: dense masks, everything written out."""

    def forward(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=None,
        sliding_window=None,
        softcap=None,
        s_aux=None,
        position_ids=None,
        **_,
    ):
        rows, heads, length, width = query.shape
        key_heads = key.shape[1]
        local = layer_types is not None and layer_types[module.layer_idx] == "sliding_attention"
        ordinal = module.layer_idx if layer_types is None else layer_types[: module.layer_idx].count("full_attention")
        outputs = []
        for row in range(rows):
            positions = position_ids[row if position_ids.shape[0] > 1 else 0]
            documents = torch.cat([torch.zeros(1), (positions.diff() <= 0).cumsum(0)]).long()
            if attention_mask is not None:
                documents = torch.where(attention_mask[row].bool(), documents, -1)
            for head in range(heads):
                kind, dilation = ("full", 1) if local else cut_of_head(pattern, head, heads, key_heads, ordinal)
                mask = dense_mask(length, group, kind, dilation, documents, sliding_window if local else None)
                scores = query[row, head] @ key[row, head * key_heads // heads].T
                scores = scores * (width**-0.5 if scaling is None else scaling)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                scores = scores.masked_fill(~mask, -math.inf)
                if s_aux is not None:
                    scores = torch.cat([scores, s_aux[head].expand(length, 1)], 1)
                weights = torch.nan_to_num(scores.softmax(-1))[:, :length]
                outputs.append(weights @ value[row, head * key_heads // heads])
        return torch.stack(outputs).unflatten(0, (rows, heads)).transpose(1, 2), None

    return forward


def reference(model, group, pattern, **inputs):
    """Logits of an independent copy of `model` under the oracle implementation."""
    copied = copy.deepcopy(model)
    layer_types = getattr(copied.config, "layer_types", None)
    AttentionInterface.register("oracle", oracle_implementation(group, pattern, layer_types))
    AttentionMaskInterface.register("oracle", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    copied.config._attn_implementation = "oracle"
    return copied, copied(**inputs, use_cache=False).logits


def padded_batch(length=25):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (3, length), generator=generator)
    mask = torch.ones(3, length, dtype=torch.long)
    mask[0, :6] = 0
    mask[1, -9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_equals_the_oracle_with_padding(architecture):
    model, inputs = build(architecture), padded_batch()
    copied, expected = reference(model, 8, "shift", **inputs)
    use_shifted_attention(model, 8)
    actual = model(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=1e-10)
    expected[real].square().sum().backward()
    actual[real].square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), copied.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Phi3", "GPTNeoX", "Olmo2", "Gemma", "Gemma2"])
@pytest.mark.parametrize("pattern", ["shift", "shift-layers", "dilated"])
def test_a_document_alone_padded_and_packed_has_the_same_logits(architecture, pattern):
    model = use_shifted_attention(build(architecture), 8, pattern)
    first, second = torch.randint(3, 97, (1, 21)), torch.randint(3, 97, (1, 14))
    alone = [model(input_ids=ids, use_cache=False).logits for ids in (first, second)]
    positions = torch.cat([torch.arange(21), torch.arange(14)])[None]
    packed = model(input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-10)
    batch = torch.zeros(2, 21, dtype=torch.long)
    batch[0], batch[1, 7:] = first, second
    mask = (batch != 0).long()
    left = model(input_ids=batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False)
    torch.testing.assert_close(left.logits[1, 7:], alone[1][0], rtol=0, atol=1e-10)


def test_eval_is_the_models_own_attention_and_train_comes_back():
    model, inputs = build("Llama"), padded_batch()
    model.eval()
    expected = model(**inputs).logits
    use_shifted_attention(model, 8)
    assert torch.equal(model(**inputs).logits, expected)
    shifted = model.train()(**inputs, use_cache=False).logits
    assert not torch.allclose(shifted[2], expected[2])
    assert torch.equal(model.eval()(**inputs).logits, expected)
    generated = model.generate(inputs["input_ids"][:1, 6:], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 25 - 6 + 3)


def test_full_pattern_trains_as_the_model_itself():
    model = build("Llama").float()
    inputs = {"input_ids": torch.randint(3, 97, (1, 24))}
    expected = model(**inputs, use_cache=False).logits
    use_shifted_attention(model, 8, "full")
    assert torch.equal(model(**inputs, use_cache=False).logits, expected)
    use_shifted_attention(model, 24)
    assert torch.equal(model(**inputs, use_cache=False).logits, expected)


def test_inference_can_be_asked_to_use_the_pattern():
    model, inputs = build("Llama"), padded_batch()
    trained = use_shifted_attention(model, 8, "plain")(**inputs, use_cache=False).logits
    use_shifted_attention(model, 8, "plain", inference=True).eval()
    torch.testing.assert_close(model(**inputs, use_cache=False).logits, trained, rtol=0, atol=1e-12)


def test_the_group_is_a_quarter_of_the_window_by_default():
    model, inputs = build("Llama", max_position_embeddings=32), padded_batch()
    expected = use_shifted_attention(model, 8)(**inputs, use_cache=False).logits
    assert torch.equal(use_shifted_attention(model)(**inputs, use_cache=False).logits, expected)


def test_a_deep_copy_is_independent():
    model = use_shifted_attention(build("Llama"), 8)
    inputs = padded_batch()
    expected = model(**inputs, use_cache=False).logits
    copied = use_shifted_attention(copy.deepcopy(model), 5).eval()
    copied(**inputs)
    copied.set_attn_implementation("eager")
    assert (model.config._attn_implementation, copied.config._attn_implementation) == ("s2_attn", "eager")
    assert torch.equal(model(**inputs, use_cache=False).logits, expected)


def test_config_is_not_marked_by_it(tmp_path):
    model = build("Llama")
    before = model.config.to_dict()
    use_shifted_attention(model, 8)(**padded_batch(), use_cache=False)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("name", ["Falcon", "Bloom", "Mpt"])
def test_models_without_an_attention_interface_are_refused(name):
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "n_layer": 1,
        "n_head": 4,
        "n_layers": 1,
        "n_heads": 4,
        "d_model": 32,
    }
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**sizes))
    with pytest.raises(UserError, match="does not take an attention implementation"):
        use_shifted_attention(model, 8)


def test_what_cannot_be_honoured_is_refused():
    model = build("Llama")
    ids = torch.randint(3, 97, (1, 12))
    with pytest.raises(UserError, match="Did you mean 'shift'"):
        use_shifted_attention(model, 8, "shfit")
    with pytest.raises(UserError, match="at least 2"):
        use_shifted_attention(model, 1)
    with pytest.raises(UserError, match="not a transformers model"):
        use_shifted_attention(torch.nn.Linear(2, 2), 8)
    use_shifted_attention(model, 8)
    with pytest.raises(UserError, match="padding mask of shape"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 12, 12, dtype=torch.bool), use_cache=False)
    with pytest.raises(UserError, match="padding inside a document"):
        holes = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
        model(input_ids=ids, attention_mask=holes, use_cache=False)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(UserError, match="no KV cache"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    with pytest.raises(UserError, match="every layer of this model attends to the last 5 tokens"):
        use_shifted_attention(build("Mistral", sliding_window=5), 4)(input_ids=ids, use_cache=False)

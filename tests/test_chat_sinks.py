"""Attention sinks against two oracles: what remains in sight read from scratch, and StreamingLLM token by token."""

import threading

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import longlora
from longlora.chat.answering import Answerer, Ended, Reading
from longlora.chat.attention_sinks import ROTATIONS_OF_A_KEY, SinkWindow
from longlora.chat.prefix_cache import PrefixCaches, ReadTokens
from longlora.chat.sampling import Sampler
from longlora.errors import UserError
from longlora.settings import AnswerSettings

SINKS, RECENT = 3, 16
TOKENS = torch.randint(0, 97, (90,), generator=torch.Generator().manual_seed(1)).tolist()


def read_on(model, tokens, pieces, sinks=SINKS, recent=RECENT):
    """Reads `tokens` in pieces of the given sizes: after each `(tokens so far, evicted, logits (V,))`."""
    answerer = Answerer(model, PrefixCaches(model, 1000, sinks), SinkWindow(model, sinks, recent))
    read = answerer.caches.take([*tokens, 0])
    at, found = 0, []
    for size in pieces:
        logits = answerer._read(read, tokens[at : at + size])
        at += size
        found.append((at, read.evicted, logits))
        assert read.slots == read.cache.get_seq_length() <= sinks + recent
    return found


PIECES = [7, 5, 1, 1, 8, 8, 1, 1, 1, 1, 1, 6, 1, 1, 1, 1, 1, 1, 1, 1, 8, 1, 1, 1]


@pytest.mark.parametrize("method", [None, "yarn", "linear"])
def test_with_one_layer_it_is_what_is_in_sight_read_from_scratch(tiny_model, architecture, method):
    """With one layer keys and values depend on their token alone, so the oracle is the plain model on what remains."""
    model = tiny_model(architecture, num_hidden_layers=1)
    if method:
        longlora.extend_positions(model, 256, method)
    evictions = set()
    for at, evicted, logits in read_on(model, TOKENS, PIECES):
        in_sight = TOKENS[:SINKS] + TOKENS[SINKS + evicted : at] if evicted else TOKENS[:at]
        with torch.no_grad():
            expected = model(torch.tensor([in_sight]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        evictions.add(evicted)
    assert len(evictions) > 5


def test_what_left_makes_no_difference_and_what_stays_does(tiny_model):
    """Shows that the comparison above can fail."""
    model = tiny_model("llama", num_hidden_layers=1)
    last = read_on(model, TOKENS, PIECES)[-1]

    def changed(place):
        other = list(TOKENS)
        other[place] = (other[place] + 1) % 97
        return float((read_on(model, other, PIECES)[-1][2] - last[2]).abs().max())

    at, evicted, _ = last
    assert changed(SINKS) == changed(SINKS + evicted - 1) == 0
    assert min(changed(0), changed(SINKS + evicted), changed(at - 1)) > 1e-3


def streaming_llm(model, tokens, evicted_at, sinks):
    """Logits (N, V) of a Llama in float64, token by token: keys kept without positions, and rotated anew each time for
    their places among what is in sight (section 3.2 of arXiv 2309.17453). `evicted_at[t]` have left when t is read."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)

    def normed(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name]

    def rotated(x, position):  # x (heads, width): pairs (i, i + width / 2) as complex numbers
        pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(frequencies), position * frequencies)
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    kept = [([], []) for _ in range(config.num_hidden_layers)]
    logits = []
    for at, token in enumerate(tokens):
        evicted = evicted_at[at]
        in_sight = [*range(min(sinks, at + 1)), *range(sinks + evicted, at + 1)]
        x = weights["model.embed_tokens.weight"][token]
        for number, (keys, values) in enumerate(kept):
            name = f"model.layers.{number}."
            h = normed(x, name + "input_layernorm.weight")
            query, key, value = ((weights[f"{name}self_attn.{part}_proj.weight"] @ h).view(-1, width) for part in "qkv")
            keys.append(key)
            values.append(value)
            query = rotated(query, len(in_sight) - 1)
            seen = torch.stack([rotated(keys[place], slot) for slot, place in enumerate(in_sight)])
            seen = seen.repeat_interleave(heads // kv_heads, dim=1)
            share = (torch.einsum("hd,nhd->hn", query, seen) / width**0.5).softmax(-1)
            said = torch.stack([values[place] for place in in_sight]).repeat_interleave(heads // kv_heads, dim=1)
            x = x + weights[name + "self_attn.o_proj.weight"] @ torch.einsum("hn,nhd->hd", share, said).flatten()
            h = normed(x, name + "post_attention_layernorm.weight")
            gate, up = (weights[f"{name}mlp.{part}_proj.weight"] @ h for part in ("gate", "up"))
            x = x + weights[name + "mlp.down_proj.weight"] @ (functional.silu(gate) * up)
        logits.append(weights["lm_head.weight"] @ normed(x, "model.norm.weight"))
    return torch.stack(logits)


def test_with_several_layers_it_is_streaming_llm_token_by_token(tiny_model):
    model = tiny_model("llama", num_hidden_layers=3)
    found = read_on(model, TOKENS, PIECES)
    evicted_at, before = [], 0
    for at, evicted, _ in found:
        evicted_at += [evicted] * (at - before)
        before = at
    expected = streaming_llm(model, TOKENS[:before], evicted_at, SINKS)
    for at, _, logits in found:
        torch.testing.assert_close(logits.double(), expected[at - 1], rtol=1e-4, atol=1e-4)
    without = streaming_llm(model, TOKENS[:before], [0] * before, SINKS)
    assert (without[-1] - expected[-1]).abs().max() > 0.01


def test_a_key_is_turned_a_few_times_only(tiny_model):
    model = tiny_model("llama")
    turns = []
    window = SinkWindow(model, SINKS, 32)
    rotated = window.rotated
    window.rotated = lambda keys, positions: turns.append(-positions) or rotated(keys, positions)
    answerer = Answerer(model, PrefixCaches(model, 1000, SINKS), window)
    read = ReadTokens(answerer.caches.take([1]).cache)
    for token in TOKENS + TOKENS:
        answerer._read(read, [token])
    evictions = len(turns) // model.config.num_hidden_layers
    assert set(turns) == {32 // ROTATIONS_OF_A_KEY}
    assert evictions == -(-(180 - SINKS - 32) // 4)


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("mistral", {"sliding_window": 8}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    ],
)
def test_models_whose_keys_cannot_be_turned_are_refused(tiny_model, architecture, overrides):
    with pytest.raises(UserError, match="--attention-sinks needs rotary positions"):
        SinkWindow(tiny_model(architecture, **overrides), 4, 16)


def test_learned_positions_and_layers_without_positions_are_refused(tiny_model):
    config = AutoConfig.for_model("gpt2", vocab_size=97, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    with pytest.raises(UserError, match="GPT2LMHeadModel here has others"):
        SinkWindow(AutoModelForCausalLM.from_config(config).eval(), 4, 16)
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def without_positions(hidden_states, position_embeddings, **options):
        cos, sin = position_embeddings
        return forward(hidden_states, (torch.ones_like(cos), torch.zeros_like(sin)), **options)

    def called(*arguments, hidden_states=None, position_embeddings=None, **options):
        return without_positions(arguments[0] if arguments else hidden_states, position_embeddings, **options)

    attention.forward = called
    with pytest.raises(UserError, match="same for every length and layer"):
        SinkWindow(model, 4, 16)


def test_answers_of_a_long_conversation_go_on_from_the_cache(tiny_model):
    model = tiny_model("llama")
    answerer = Answerer(model, PrefixCaches(model, 1000, SINKS), SinkWindow(model, SINKS, RECENT))

    def answer(prompt):
        happenings = list(
            answerer.answer(
                prompt,
                max_new_tokens=10,
                stop_tokens=(),
                sampler=Sampler(AnswerSettings()),
                stop=threading.Event(),
            )
        )
        return [each for each in happenings if isinstance(each, int)], happenings

    first, _ = answer(TOKENS[:40])
    assert len(first) == 10
    # the conversation goes on: only what is new is read
    _, happenings = answer(TOKENS[:40] + first + TOKENS[40:44])
    reused = next(each.reused for each in happenings if isinstance(each, Reading))
    assert reused == 49
    assert isinstance(happenings[-1], Ended)
    # another conversation shares only tokens that have left: it is read from its beginning
    _, happenings = answer(TOKENS[:20] + TOKENS[50:60])
    assert next(each.reused for each in happenings if isinstance(each, Reading)) == 0


def test_a_cache_that_lost_tokens_serves_what_begins_like_all_it_lost(tiny_model):
    """Two sinks and five evicted: the sixth token is gone, so a prompt must share seven."""
    caches = PrefixCaches(tiny_model("llama"), 1000, sinks=2)
    read = ReadTokens(DynamicCache(), list(range(20)), evicted=5)
    assert caches._usable(read, [*range(7), 90, 91]) == 7
    assert caches._usable(read, [*range(6), 90, 91]) == 0
    read.evicted = 0
    assert caches._usable(read, [*range(6), 90, 91]) == 6

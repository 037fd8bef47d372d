"""What belongs to a forward pass stays with it: its draw, through checkpointing, other passes and torch.compile.

And the ways into and out of S2-Attn that are transformers' own: `attn_implementation="s2_attn"`.
"""

import subprocess
import sys

import pytest
import torch
from test_transformers_backend import build, padded_batch

import longlora
from longlora.attention.patterns import Draw
from longlora.attention.transformers_backend import use_shifted_attention
from longlora.errors import UserError
from longlora.settings import PatternOptions

DRAWING = {
    "scatter": ("scatter", {}),
    "scatter, weighted": ("scatter", {"options": PatternOptions(scatter_pieces=2, scatter_weighted=True)}),
    "pieces in shift": ("shift", {"options": PatternOptions(scatter_pieces=1)}),
    "offset in shift": ("shift", {"options": PatternOptions(vary_offset=True)}),
    "offset in shift-layers": ("shift-layers", {"options": PatternOptions(vary_offset=True)}),
    "layers drawn": ("shift", {"full_layers_share": 0.5}),
    "layers drawn, dilated": ("dilated", {"full_layers_share": 0.5}),
    "layers drawn, scattered": ("scatter", {"full_layers_share": 0.5, "full_layers": (0,)}),
}


def gradients_of(model, passes, silent, called=None):
    """Losses of `passes` forwards, of which `silent` has no gradient, and the gradients of one backward of all."""
    inputs = padded_batch(40)
    model.zero_grad()
    losses = []
    for turn in range(passes):
        with torch.set_grad_enabled(turn != silent):
            losses.append(
                (model if called is None else called)(**inputs, labels=inputs["input_ids"], use_cache=False).loss
            )
    sum((turn + 1) * loss for turn, loss in enumerate(losses) if turn != silent).backward()
    return [loss.item() for loss in losses], [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(("passes", "silent"), [(2, None), (2, 0), (3, 1)])
@pytest.mark.parametrize("way", DRAWING)
def test_a_pass_is_computed_again_with_what_it_drew(way, passes, silent):
    pattern, chosen = DRAWING[way]
    model = build("Llama", num_hidden_layers=3)
    found = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        use_shifted_attention(model, 8, pattern, draw=Draw(5), **chosen)
        found.append(gradients_of(model, passes, silent))
    assert len(set(found[0][0])) > 1  # the passes did draw differently
    for losses, gradients in found[1:]:
        assert losses == pytest.approx(found[0][0], abs=1e-12)
        for want, got in zip(found[0][1], gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_a_compiled_model_draws_alike_and_compiles_once(tiny_model):
    torch._dynamo.reset()
    model = tiny_model("llama").double().train()
    compiled = torch.compile(model, backend="eager")
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found = []
        for called in (model, compiled):
            use_shifted_attention(model, 8, "scatter", draw=Draw(7))
            found.append(gradients_of(model, 3, 1, called))
        assert found[0][0] == pytest.approx(found[1][0], abs=1e-12)
        for want, got in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    use_shifted_attention(model, 5, "dilated")
    gradients_of(model, 2, None, compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_a_step_draws_from_what_it_is_told(tiny_model):
    model = use_shifted_attention(tiny_model("llama"), 8, "scatter").train()
    ids = torch.randint(0, 50, (2, 40))
    losses = []
    for step in (3, 4, 3):
        longlora.draw_from(model, longlora.Draw(seed=1, step=step))
        losses.append([model(ids, labels=ids, use_cache=False).loss.item() for _ in range(2)])
    assert losses[0] == losses[2]
    assert len({*losses[0], *losses[1]}) == 4


def test_what_was_planned_in_inference_mode_trains():
    for pattern in ("dilated", "strided", "cyclic", "scatter"):
        model = use_shifted_attention(build("Llama"), 7, pattern, inference=True).eval()
        with torch.inference_mode():
            expected = model(**padded_batch(33), use_cache=False).logits
        found = model.train()(**padded_batch(33), use_cache=False).logits
        assert pattern == "scatter" or torch.equal(found, expected)
        found.sum().backward()


# ------------------------------------------------------------------------------------------------ transformers' own way


@pytest.mark.parametrize("architecture", ["Llama", "GPTNeoX", "GPT2", "Gemma2", "GptOss"])
def test_the_implementation_alone_is_enough(architecture):
    """By its name alone: a quarter of the window trains, and eval() is the model as it was, generation included."""
    sizes = {"max_position_embeddings": 32}
    if architecture == "GptOss":  # its default positions stretch any window 32 times
        sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    plain = build(architecture, **sizes)
    named = build(architecture, **sizes, attn_implementation="s2_attn")
    assert named.config._attn_implementation == "s2_attn"
    inputs = {name: x[1:] for name, x in padded_batch().items()}
    expected = use_shifted_attention(build(architecture, **sizes), 8)(**inputs, use_cache=False)
    assert torch.equal(named(**inputs, use_cache=False).logits, expected.logits)
    real = inputs["attention_mask"].bool()
    plain, named = plain.float(), named.float()  # Gemma 2's own attention takes float64 masks for infinite: NaN
    alone = plain.eval()(**inputs).logits[real]
    torch.testing.assert_close(named.eval()(**inputs).logits[real], alone, rtol=0, atol=1e-10)
    prompt = {name: x[:1, :9] for name, x in inputs.items()}
    generated = [m.generate(**prompt, max_new_tokens=12, do_sample=False) for m in (plain, named)]
    assert torch.equal(*generated)


def test_the_config_says_which_groups_and_pattern():
    inputs = padded_batch()
    for told, group, pattern in (
        ({"group_size": 6}, 6, "shift"),
        ({"pattern": "dilated"}, 8, "dilated"),
        ({"group_size": 5, "pattern": "scatter"}, 5, "scatter"),
    ):
        named = build("Llama", max_position_embeddings=32, attn_implementation="s2_attn", s2_attn=told)
        expected = use_shifted_attention(build("Llama"), group, pattern)(**inputs, use_cache=False).logits
        assert torch.equal(named(**inputs, use_cache=False).logits, expected)
        asked = use_shifted_attention(build("Llama", max_position_embeddings=32, s2_attn=told))
        assert torch.equal(asked(**inputs, use_cache=False).logits, expected)
    named = build("Llama", max_position_embeddings=32, attn_implementation="s2_attn", s2_attn={"pattern": "scatter"})
    losses = []
    for _ in range(2):
        longlora.draw_from(named, Draw(3))
        losses.append(named(**inputs, use_cache=False).logits[0, -1, 0].item())
    assert losses[0] == losses[1]
    for told, message in (({"groups": 6}, "it may hold group_size and pattern"), ({"group_size": 1}, "at least 2")):
        with pytest.raises(UserError, match=message):
            build("Llama", attn_implementation="s2_attn", s2_attn=told)(**inputs, use_cache=False)


def same(one, other):
    """Equal to the bit; stock attention makes NaN of padding before a row's first token."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def test_transformers_own_call_has_the_last_word():
    inputs = padded_batch()
    model = build("Llama", attn_implementation="eager")
    eager = model(**inputs, use_cache=False).logits
    shifted = use_shifted_attention(model, 8)(**inputs, use_cache=False).logits
    model.set_attn_implementation("eager")
    for training in (True, False, True):
        assert same(model.train(training)(**inputs, use_cache=False).logits, eager)
    model.set_attn_implementation("s2_attn")
    assert same(model(**inputs, use_cache=False).logits, shifted)
    assert same(model.eval()(**inputs, use_cache=False).logits, eager)
    plain = build("Llama", max_position_embeddings=32)
    plain.set_attn_implementation("s2_attn")  # without use_shifted_attention
    assert torch.equal(plain(**inputs, use_cache=False).logits, shifted)


def test_importing_longlora_is_enough_for_transformers_to_know_the_name(tmp_path, tiny_model):
    """Imported before transformers, and after."""
    tiny_model("llama").save_pretrained(tmp_path)
    script = f"""
import sys
import longlora
assert "torch" in sys.modules or "longlora.attention" not in sys.modules
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
import torch
ids = torch.arange(40)[None]
for _ in range(2):
    model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, attn_implementation="s2_attn").train()
    named = model(ids, use_cache=False).logits
    assert torch.equal(named, longlora.use_shifted_attention(model, 16)(ids, use_cache=False).logits)
    assert not torch.equal(named, model.eval()(ids).logits)
    for name in [name for name in sys.modules if name.startswith("longlora")]:
        del sys.modules[name]
    for known in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        known._global_mapping.pop("s2_attn")
    import longlora
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_loading_takes_the_implementation(tmp_path, tiny_model, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.arange(40)[None]
    model, _ = longlora.load(tmp_path, attn_implementation="s2_attn")
    plain, _ = longlora.load(tmp_path)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    expected = use_shifted_attention(plain, 16).train()(ids, use_cache=False).logits
    assert torch.equal(model.train()(ids, use_cache=False).logits, expected)
    with pytest.raises(UserError, match="s2-attn"):
        longlora.load(tmp_path, attn_implementation="s2-attn")

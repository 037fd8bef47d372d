"""Greedy generation equals transformers' own, and an argmax over whole forward passes, for any mix of prompts."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_runs import disturb
from transformers import GenerationConfig

import longlora
from longlora.evaluation import generation
from longlora.evaluation.generation import generate, generate_each, passes
from longlora.model.positions import follow_each_length

PROMPTS = [[5, 17, 3, 88, 41], [9], [60, 2, 2, 31, 7, 7, 7, 54, 19, 23, 11], [12, 13, 14, 15, 16], [96, 1, 50]]


def by_whole_passes(model, prompt, new_tokens):
    """Argmax of a forward pass over everything so far, without a cache, in float64."""
    model, tokens = model.double(), list(prompt)
    with torch.no_grad():
        for _ in range(new_tokens):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    model.float()
    return tokens[len(prompt) :]


def by_transformers(model, prompt, new_tokens, **options):
    output = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=new_tokens, eos_token_id=None, **options
    )
    return output[0, len(prompt) :].tolist()


def test_equal_to_transformers_and_to_whole_passes(tiny_model, architecture):
    model = tiny_model(architecture)
    answers = generate(model, PROMPTS, 9)
    assert answers == [by_transformers(model, prompt, 9) for prompt in PROMPTS]
    assert answers == [by_whole_passes(model, prompt, 9) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_how_many_run_together_changes_nothing(tiny_model, batch):
    model = tiny_model("qwen3")
    assert generate(model, PROMPTS, 6, batch=batch) == generate(model, PROMPTS, 6)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_each_prompt_has_the_frequencies_of_its_own_length(tiny_model, kind):
    """Whatever the model read before, and beside it: one table of the longest row so far would serve all."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
    lists = {"short_factor": [1.0] * 8, "long_factor": [2.0 + 2 * number for number in range(8)]}
    windows = {"max_position_embeddings": 8 if kind == "dynamic" else 32}
    rope |= {} if kind == "dynamic" else lists

    def fresh():
        return tiny_model("llama", rope_parameters=dict(rope), **windows)

    prompts = [PROMPTS[0] * times for times in (1, 2, 3, 4)]
    expected = [by_transformers(fresh(), prompt, 6) for prompt in prompts]
    model = fresh()
    follow_each_length(model)
    for order in (1, -1):
        assert generate(model, prompts[::order], 6, batch=4)[::order] == expected
    assert [generate(model, [prompt], 6)[0] for prompt in prompts[::-1]] == expected[::-1]


def test_it_runs_on_the_cache_with_one_token_a_step_and_logits_of_the_last_token(tiny_model):
    model = tiny_model("llama")
    widths, logits = [], []
    model.register_forward_pre_hook(
        lambda _m, _a, keywords: widths.append(tuple(keywords["input_ids"].shape)), with_kwargs=True
    )
    model.register_forward_hook(lambda _m, _a, output: logits.append(tuple(output.logits.shape)))
    generate(model, [PROMPTS[0], PROMPTS[3]], 4)
    assert widths == [(2, 5), (2, 1), (2, 1), (2, 1)]
    assert logits == [(2, 1, 97)] * 4


def test_a_stop_token_ends_an_answer_and_does_not_belong_to_it(tiny_model):
    model = tiny_model("llama")
    free = generate(model, PROMPTS, 12)
    stop = free[2][4]
    cut = [answer[: answer.index(stop)] if stop in answer else answer for answer in free]
    assert any(len(answer) < 12 for answer in cut)
    assert any(len(answer) == 12 for answer in cut)
    assert generate(model, PROMPTS, 12, stop_tokens=[stop, 1000]) == cut


def test_a_stop_rule_ends_an_answer_after_the_token_it_says(tiny_model):
    model = tiny_model("llama")
    free = generate(model, PROMPTS, 12)
    answers = generate(model, PROMPTS, 12, stop=lambda tokens: sum(tokens) > 250)
    for answer, whole in zip(answers, free, strict=True):
        assert answer == whole[: len(answer)]
        assert sum(answer[:-1]) <= 250 < sum(answer)
    assert len({len(answer) for answer in answers}) > 1


def test_a_finished_answer_costs_no_more_steps(tiny_model):
    model = tiny_model("llama")
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    generate(model, [PROMPTS[0]], 50, stop=lambda tokens: len(tokens) == 3)
    assert len(steps) == 3


def test_the_models_own_generation_settings_change_nothing_and_stay(tiny_model, caplog):
    model = tiny_model("llama")
    plain = generate(model, PROMPTS, 8)
    own = GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=1.9, max_length=7, eos_token_id=plain[0][1], num_beams=3
    )
    model.generation_config = own
    with caplog.at_level(logging.WARNING):
        assert generate(model, PROMPTS, 8) == plain
    assert model.generation_config is own
    assert caplog.records == []


def test_adapters_count_and_training_modes_come_back(tiny_model):
    base = tiny_model("llama")
    plain = generate(base, PROMPTS, 8)
    model = get_peft_model(base, LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"]))
    disturb(model)
    model.train()
    base.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    answers = generate(model, PROMPTS, 8)
    assert [module.training for module in model.modules()] == modes
    assert answers != plain
    assert answers == [by_transformers(model.eval(), prompt, 8) for prompt in PROMPTS]


def test_a_model_that_trains_with_shifted_attention_answers_with_its_full_attention(tiny_model):
    plain = generate(tiny_model("llama"), PROMPTS, 8)
    model = longlora.use_shifted_attention(tiny_model("llama"), group_size=4)
    assert generate(model.train(), PROMPTS, 8) == plain


def test_half_precision_with_trainable_parts_in_float32(tiny_model):
    model = tiny_model("llama").bfloat16()
    model.model.norm.float()
    assert [len(answer) for answer in generate(model, PROMPTS, 3)] == [3] * 5


def test_answers_come_one_pass_after_another_shortest_first(tiny_model):
    each = generate_each(tiny_model("llama"), PROMPTS, 2, batch=2)
    assert [next(each)[0] for _ in range(5)] == [1, 4, 0, 3, 2]


def test_a_prompt_without_tokens_is_refused(tiny_model):
    with pytest.raises(ValueError, match="at least one token"):
        generate(tiny_model("llama"), [[1], []], 2)
    with pytest.raises(ValueError, match="room"):
        generate(tiny_model("llama"), [[1]], 0)


def test_nothing_to_do(tiny_model):
    assert generate(tiny_model("llama"), [], 3) == []


def test_progress_counts_prompt_tokens(tiny_model, monkeypatch):
    shown = []
    monkeypatch.setattr(
        generation.Progress, "show", lambda self, done, detail: shown.append((self.total, done, detail))
    )
    generate(tiny_model("llama"), PROMPTS, 1, batch=3, progress="answers")
    assert shown == [(25, 9, "3 of 5 prompts"), (25, 25, "5 of 5 prompts")]


@given(st.lists(st.integers(1, 20_000), max_size=40), st.integers(0, 5))
def test_passes_hold_each_prompt_once_by_length_within_bounds(lengths, batch):
    found = list(passes(lengths, batch))
    assert sorted(index for rows in found for index in rows) == list(range(len(lengths)))
    flat = [lengths[index] for rows in found for index in rows]
    assert flat == sorted(lengths)
    for rows in found:
        width = max(lengths[index] for index in rows)
        assert len(rows) == 1 or (len(rows) <= batch if batch else len(rows) * width <= 8192)
    assert all(len({lengths[index] for index in rows}) == 1 for rows in passes(lengths, batch, apart=True))

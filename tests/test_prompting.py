"""Prompts as tokens: chat templates with and without system turns, BOS once or not at all."""

import jinja2
import pytest
from tokenizers.processors import TemplateProcessing

from longlora.errors import UserError
from longlora.evaluation.prompting import PromptFormat

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WITH_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}" + CHATML
)
REFUSES_SYSTEM = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' <|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[model] ' }}{% endif %}"
)
PARTS = CHATML.replace("m['content']", "m['content'][0]['text']")
IGNORES_SYSTEM = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}\n{% endif %}{% endfor %}"


@pytest.fixture
def tokenizer(tiny_tokenizer):
    """Bytes, with the marks of turns as added tokens and a BOS that it does not put of its own accord."""
    made = tiny_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": "<s>"})
    return made


def putting(tokenizer, single):
    """`tokenizer`, which puts special tokens around a text of its own accord: `<s> $A`, `<s> $A <|endoftext|>`."""
    names = ["<s>", "<|endoftext|>"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    )
    return tokenizer


def written(tokenizer, *arguments, text="Hello", opening="", **options):
    return tokenizer.decode(PromptFormat(tokenizer, **options).tokens(text, opening, *arguments))


def test_plain_text_is_the_text_and_the_words_the_answer_begins_with(tokenizer):
    assert written(tokenizer) == "Hello"
    assert written(tokenizer, opening="It is") == "Hello It is"
    assert written(tokenizer, "\n A: ", opening="It is") == "Hello\n A: It is"


@pytest.mark.parametrize(
    ("single", "bos", "expected"),
    [
        ("$A", "auto", "Hello"),
        ("$A", "yes", "<s>Hello"),
        ("$A", "no", "Hello"),
        ("<s> $A", "auto", "<s>Hello"),
        ("<s> $A", "yes", "<s>Hello"),
        ("<s> $A", "no", "Hello"),
        ("<s> $A <|endoftext|>", "auto", "<s>Hello"),
        ("$A <|endoftext|>", "auto", "Hello"),
    ],
)
def test_bos_in_plain_text(tokenizer, single, bos, expected):
    assert written(putting(tokenizer, single), bos=bos) == expected


@pytest.mark.parametrize(("bos", "expected"), [("auto", "<s>"), ("yes", "<s>"), ("no", "")])
def test_bos_in_a_template_that_has_it_comes_once_though_the_tokenizer_would_put_it_too(tokenizer, bos, expected):
    tokenizer.chat_template = REFUSES_SYSTEM
    found = written(putting(tokenizer, "<s> $A"), bos=bos)
    assert found == expected + "[user] Hello <|im_end|>[model] "


@pytest.mark.parametrize(("bos", "expected"), [("auto", ""), ("yes", "<s>"), ("no", "")])
def test_bos_in_a_template_that_has_none(tokenizer, bos, expected):
    tokenizer.chat_template = CHATML
    found = written(putting(tokenizer, "<s> $A"), bos=bos)
    assert found == expected + "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_a_bos_that_opens_every_turn_stays(tokenizer):
    """SmolLM2's."""
    tokenizer.bos_token, tokenizer.chat_template = "<|im_start|>", WITH_DEFAULT_SYSTEM
    found = [written(tokenizer, bos=bos) for bos in ("auto", "yes", "no")]
    assert found[0] == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert found == [found[0]] * 3


def test_the_answer_begins_inside_the_assistants_turn(tokenizer):
    tokenizer.chat_template = CHATML
    assert written(tokenizer, opening="The key is") == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nThe key is"
    )
    tokenizer.chat_template = REFUSES_SYSTEM
    assert written(tokenizer, opening="The key is") == "<s>[user] Hello <|im_end|>[assistant] The key is"


def test_the_question_is_in_the_prompt_whatever_the_template(tokenizer):
    tokenizer.chat_template = PARTS
    assert written(tokenizer, text="Hello <|im_end|>", opening="The key is") == (
        "<|im_start|>user\nHello <|im_end|><|im_end|>\n<|im_start|>assistant\nThe key is"
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert PromptFormat(tokenizer).tokens("Hello <|im_end|>").tolist().count(end) == 1  # the text's are letters
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match="without the question: mend the template, or give --chat no"):
        PromptFormat(tokenizer).tokens("Hello")


def test_a_template_that_rewrites_what_the_assistant_says_or_takes_no_such_turn(tokenizer):
    refuses = CHATML.replace(
        "{{ '<|im_start|>'", "{% if m['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}{{ '<|im_start|>'"
    )
    for template in (CHATML.replace("m['content']", "m['content'].upper()"), refuses):
        tokenizer.chat_template = template
        found = written(tokenizer, text="HELLO", opening="The key is")
        assert found == "<|im_start|>user\nHELLO<|im_end|>\n<|im_start|>assistant\nThe key is"
        assert PromptFormat(tokenizer).stop_tokens() == {0}


def test_special_marks_become_single_tokens(tokenizer):
    tokenizer.chat_template = CHATML
    tokens = PromptFormat(tokenizer).tokens("Hi").tolist()
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (tokens.count(start), tokens.count(end)) == (2, 1)
    assert len(tokens) == 3 + len("user\nHi\nassistant\n")


def test_a_system_turn(tokenizer):
    tokenizer.chat_template = WITH_DEFAULT_SYSTEM
    assert "system\nBe kind." in written(tokenizer)
    assert written(tokenizer, system="Be brief.").startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"
    )
    assert "Be kind." not in written(tokenizer, system="Be brief.")


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, IGNORES_SYSTEM])
def test_a_template_that_takes_no_system_turn_gets_its_text_in_the_users(tokenizer, template):
    tokenizer.chat_template = template
    assert "Be brief.\n\nHello" in written(tokenizer, system="Be brief.")


def test_chat_is_by_template_and_by_wish(tokenizer):
    assert not PromptFormat(tokenizer).chat
    tokenizer.chat_template = CHATML
    assert PromptFormat(tokenizer).chat
    assert written(tokenizer, chat="no") == "Hello"


def test_what_cannot_be_is_refused(tokenizer, tiny_tokenizer):
    with pytest.raises(UserError, match="--chat is yes, but the tokenizer has no chat template"):
        PromptFormat(tokenizer, chat="yes")
    with pytest.raises(UserError, match="--system is a turn of a chat"):
        PromptFormat(tokenizer, system="Be brief.")
    with pytest.raises(UserError, match="--bos is yes, but the tokenizer has no BOS"):
        PromptFormat(tiny_tokenizer(), bos="yes")
    with pytest.raises(UserError, match="unknown --chat 'maybe'"):
        PromptFormat(tokenizer, chat="maybe")
    tokenizer.chat_template = "{{ raise_exception('only tools') }}"
    with pytest.raises(
        UserError, match=r"cannot write turns of user \(only tools\): mend the template, or give --chat no"
    ):
        PromptFormat(tokenizer).tokens("Hello")


def test_template_errors_are_what_transformers_raises(tokenizer):
    """The refusal above rests on it."""
    tokenizer.chat_template = REFUSES_SYSTEM
    with pytest.raises(jinja2.TemplateError, match="System role"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


def test_stop_tokens_are_every_end_there_is(tokenizer, tiny_model):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [7, 8]
    assert PromptFormat(tokenizer).stop_tokens() == {0}
    assert PromptFormat(tokenizer).stop_tokens(model) == {0, 7, 8}
    for template in (CHATML, REFUSES_SYSTEM, PARTS):
        tokenizer.chat_template = template
        assert PromptFormat(tokenizer).stop_tokens() == {0, end}
    tokenizer.chat_template = IGNORES_SYSTEM  # a turn ends with a line break there, which is no mark
    assert PromptFormat(tokenizer).stop_tokens() == {0}
    model.generation_config.eos_token_id = 9
    assert PromptFormat(tokenizer).stop_tokens(model) == {0, 9}
    model.generation_config.eos_token_id = None
    assert PromptFormat(tokenizer).stop_tokens(model) == {0}


def test_text_beyond_the_tokenizers_length_is_whole_and_without_a_warning(tokenizer, caplog):
    tokenizer.model_max_length = 8
    with caplog.at_level("WARNING"):
        assert len(PromptFormat(tokenizer).tokens("x" * 50)) == 50
    assert caplog.records == []


def test_answers_are_read_without_special_tokens(tokenizer):
    form = PromptFormat(tokenizer)
    assert form.text(tokenizer("<s> 12 <|im_end|>").input_ids) == " 12 "

"""A conversation apart from any interface: exact answers, nothing read twice, stops anywhere, no silent cut."""

import threading
from pathlib import Path

import pytest
import torch
from chat_tokenizers import CHATML, byte_level, sentencepiece_like
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import save_base

from longlora.chat import answering
from longlora.chat.answering import Answerer, Ended, Reading
from longlora.chat.documents import ChatDocument, read_document
from longlora.chat.exporting import as_json, as_markdown
from longlora.chat.prefix_cache import PrefixCaches
from longlora.chat.prompting import AnswerText, ChatPrompts
from longlora.chat.sampling import Sampler
from longlora.chat.session import Answer, ChatModel, ChatSession
from longlora.corpus.conversations import ConversationFormat
from longlora.errors import UserError
from longlora.evaluation.generation import generate
from longlora.longqa.prompts import material_prompt
from longlora.settings import AnswerSettings, ChatSettings, SinkSettings

DOCUMENT = [5, 17, 3, 88, 41, 60, 2, 2, 31, 7, 7, 7, 54, 19, 23, 11, 90, 4, 33]
FIRST, SECOND, OTHER = [12, 13, 14], [96, 1, 50, 8], [30, 29, 28, 27, 26, 25]


def answerer_of(model, capacity=1000):
    return Answerer(model, PrefixCaches(model, capacity))


def answer(answerer, prompt, tokens=6, stop_tokens=(), stop=None):
    """New tokens, how many were reused, and why it ended."""
    new, reused, reason = [], None, ""
    for each in answerer.answer(
        prompt,
        max_new_tokens=tokens,
        stop_tokens=stop_tokens,
        sampler=Sampler(AnswerSettings()),
        stop=stop or threading.Event(),
    ):
        if isinstance(each, Reading):
            reused = each.reused
        elif isinstance(each, Ended):
            reason = each.reason
        else:
            new.append(each)
    return new, reused, reason


LONG = {"original_max_position_embeddings": 32, "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("name", "window", "rope"),
    [
        ("llama", 128, {"rope_type": "longrope", **LONG}),
        ("phi3", 128, {"rope_type": "longrope", **LONG}),
        ("llama", 32, {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}),
    ],
    ids=["longrope", "Phi-3", "dynamic"],
)
@pytest.mark.parametrize("length", [20, 70])
def test_frequencies_that_change_with_the_length_answer_as_stock_generate_does(tiny_model, name, window, rope, length):
    """Whatever was read before, shorter or longer, and though prompts are read in pieces."""
    config = tiny_model(name).config
    half = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if rope["rope_type"] == "longrope":
        factors = {"short_factor": [1.0] * (half // 2), "long_factor": [1 + 0.5 * n for n in range(half // 2)]}
        rope = rope | factors
    more = {"original_max_position_embeddings": 32} if name == "phi3" else {}
    build = {"max_position_embeddings": window, "rope_parameters": rope, **more}
    model = tiny_model(name, **build)
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(1, 96, (length,), generator=generator).tolist()
    stock = tiny_model(name, **build).eval()
    stock.load_state_dict(model.state_dict())
    tensor = torch.tensor([prompt])
    expected = stock.generate(
        tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=6, do_sample=False, eos_token_id=None
    )[0, length:].tolist()
    answerer = answerer_of(model.eval())
    for before in ([], prompt[:18], [*prompt, *prompt[:20]], prompt):
        if before:
            answer(answerer, before)
        assert answer(answerer, prompt)[0] == expected


def tokens_read(model):
    """A list that grows by the tokens of each forward pass."""
    widths = []
    model.register_forward_pre_hook(
        lambda _m, _a, keywords: widths.append(keywords["input_ids"].shape[1]), with_kwargs=True
    )
    return widths


@pytest.mark.parametrize("piece", [3, 256])
def test_answers_are_those_of_a_fresh_start_whatever_was_read_before(tiny_model, architecture, piece, monkeypatch):
    monkeypatch.setattr(answering, "PIECE_TOKENS", piece)
    model = tiny_model(architecture)
    answerer = answerer_of(model)
    prompts = [DOCUMENT + FIRST, DOCUMENT + SECOND, OTHER, DOCUMENT + FIRST + [9] * 5, DOCUMENT + SECOND]
    fresh = [generate(model, [prompt], 6)[0] for prompt in prompts]
    assert [answer(answerer, prompt)[0] for prompt in prompts] == fresh


def test_a_model_with_a_sliding_window_can_be_cut_back_too(tiny_model):
    model = tiny_model("mistral", sliding_window=8)
    answerer = answerer_of(model)
    for prompt in (DOCUMENT + FIRST, DOCUMENT[:11] + OTHER, DOCUMENT + SECOND):
        assert answer(answerer, prompt)[0] == generate(model, [prompt], 6)[0]


def test_the_second_question_reads_only_what_is_new(tiny_model):
    model = tiny_model("llama", max_position_embeddings=8192)
    document = torch.randint(0, 97, (4096,), generator=torch.Generator().manual_seed(0)).tolist()
    answerer = answerer_of(model, 8192)
    widths = tokens_read(model)
    new, _, _ = answer(answerer, document + FIRST, 4)
    assert sum(widths) == 4096 + 3 + 3  # the last new token is not read
    assert max(widths) <= answering.PIECE_TOKENS
    widths.clear()
    follow_up = document + FIRST + new + SECOND
    _, reused, _ = answer(answerer, follow_up, 4)
    assert reused == 4096 + 3 + 3
    assert sum(widths) == 1 + 4 + 3
    widths.clear()
    _, reused, _ = answer(answerer, document + OTHER, 1)
    assert reused == 4096
    assert sum(widths) == len(OTHER) <= 0.1 * 4096


def test_several_documents_stay_read(tiny_model):
    model = tiny_model("llama")
    answerer = answerer_of(model)
    one, two = [1, *DOCUMENT], [1, *reversed(DOCUMENT)]
    for document, question, known in ((one, FIRST, 0), (two, FIRST, 1), (one, SECOND, 20), (two, SECOND, 20)):
        new, reused, _ = answer(answerer, document + question)
        assert reused == known
        assert new == generate(model, [document + question], 6)[0]


def test_the_least_recently_used_goes_first(tiny_model):
    model = tiny_model("llama")
    answerer = answerer_of(model, capacity=2 * (len(DOCUMENT) + 1))
    one, two, three = [1, *DOCUMENT], [2, *DOCUMENT], [3, *DOCUMENT]
    for document in (one, two, one, three):
        answer(answerer, document, 1)
    assert answerer.caches.kept_tokens == 2 * (len(DOCUMENT) + 1)
    assert answer(answerer, two, 1)[1] == 0
    assert answer(answerer, three, 1)[1] == len(DOCUMENT)
    nothing_kept = answerer_of(model, capacity=0)
    answer(nothing_kept, one, 1)
    assert nothing_kept.caches.kept_tokens == 0


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(tiny_model):
    model = tiny_model("llama")
    whole = generate(model, [DOCUMENT], 8)[0]
    at = next(at for at in range(1, 8) if whole[at] not in whole[:at])
    assert answer(answerer_of(model), DOCUMENT, 8, {whole[at]}) == (whole[:at], 0, "end")
    assert answer(answerer_of(model), DOCUMENT, 8)[2] == "length"


def test_stopped_while_reading_it_goes_on_from_there(tiny_model, monkeypatch):
    monkeypatch.setattr(answering, "PIECE_TOKENS", 4)
    model = tiny_model("qwen3")
    answerer, stop = answerer_of(model), threading.Event()
    for each in answerer.answer(
        DOCUMENT, max_new_tokens=5, stop_tokens=(), sampler=Sampler(AnswerSettings()), stop=stop
    ):
        if isinstance(each, Reading) and each.done == 8:
            stop.set()
    assert each == Ended("stopped")
    new, reused, _ = answer(answerer, DOCUMENT)
    assert reused == 8
    assert new == generate(model, [DOCUMENT], 6)[0]


def test_an_iterator_closed_in_the_middle_leaves_a_sound_cache(tiny_model):
    model = tiny_model("llama")
    answerer = answerer_of(model)
    happenings = answerer.answer(
        DOCUMENT, max_new_tokens=9, stop_tokens=(), sampler=Sampler(AnswerSettings()), stop=threading.Event()
    )
    taken = [next(happenings) for _ in range(5)]
    happenings.close()
    assert isinstance(taken[-1], int)
    new, reused, _ = answer(answerer, DOCUMENT + SECOND)
    assert reused == len(DOCUMENT)
    assert new == generate(model, [DOCUMENT + SECOND], 6)[0]


def test_a_pass_that_fails_leaves_no_torn_cache(tiny_model):
    model = tiny_model("llama")
    answerer = answerer_of(model)
    answer(answerer, DOCUMENT)
    # the first layer has the new keys by then
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError):
        answer(answerer, DOCUMENT + SECOND)
    hook.remove()
    assert answer(answerer, DOCUMENT + SECOND)[:2] == (generate(model, [DOCUMENT + SECOND], 6)[0], 0)


# -------------------------------------------------------------------------------------------------------- sampling


def test_sampling_follows_temperature_and_top_p():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert Sampler(AnswerSettings()).choose(logits) == 1
    nucleus = Sampler(AnswerSettings(temperature=1, top_p=0.6, seed=1))
    draws = [nucleus.choose(logits) for _ in range(2000)]
    assert set(draws) == {1, 3}
    assert draws.count(1) / 2000 == pytest.approx(4 / 7, abs=0.045)  # four standard deviations
    cold = Sampler(AnswerSettings(temperature=0.5, seed=2))
    draws = [cold.choose(logits) for _ in range(2000)]
    assert draws.count(1) / 2000 == pytest.approx(16 / 30, abs=0.045)


def test_a_seed_repeats_and_another_does_not():
    logits = torch.zeros(50)

    def drawn(seed):
        sampler = Sampler(AnswerSettings(temperature=1, seed=seed))
        return [sampler.choose(logits) for _ in range(20)]

    assert drawn(3) == drawn(3) != drawn(4)
    assert drawn(None) != drawn(None)


# --------------------------------------------------------------------------------------------------- text and prompts


@pytest.mark.parametrize("make", [lambda: byte_level(["<e>"], None, None, "<e>"), lambda: sentencepiece_like(None)])
def test_text_comes_whole_and_once(make):
    tokenizer = make()

    @settings(max_examples=40, deadline=None)
    @given(st.text(max_size=30))
    def check(text):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        said = AnswerText(tokenizer)
        pieces = [said.add(token) for token in tokens]
        assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
        whole = "".join(pieces) + said.rest()
        assert whole == tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    check()


def test_half_a_character_at_the_end_is_shown_as_such():
    tokenizer = byte_level(["<e>"], None, None, "<e>")
    tokens = tokenizer("né", add_special_tokens=False)["input_ids"][:-1]
    said = AnswerText(tokenizer)
    assert [said.add(token) for token in tokens] == ["n", ""]
    assert said.rest() == "\ufffd"


BOOK = ChatDocument("moby.txt", "Call me Ishmael.", 16, "book", "Moby-Dick")
NOTE = ChatDocument("note.txt", "It was a whale.", 15, "material", "")


def test_a_template_gets_the_papers_prompt_and_the_turns(tiny_model):
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], CHATML, None, "<|im_end|>")
    prompts = ChatPrompts(tiny_model("llama"), tokenizer)
    assert prompts.name == "template"
    turns = [
        {"role": "user", "content": "Who is it?"},
        {"role": "assistant", "content": "Ishmael."},
        {"role": "user", "content": "Why?"},
    ]
    trained_on = [
        {"role": "user", "content": material_prompt(BOOK.text, "Who is it?", "book", "Moby-Dick")},
        *turns[1:],
    ]
    assert prompts.prompt([BOOK], turns) == ConversationFormat(tokenizer, "template").prompt(trained_on)
    assert tokenizer.eos_token_id in prompts.stop_tokens
    two = tokenizer.decode(prompts.prompt([BOOK, NOTE], turns[:1]))
    assert two.index("Call me Ishmael.") < two.index("It was a whale.") < two.index("Who is it?")
    assert two.count("Memorize the content") == 2


def test_a_base_model_gets_text_to_go_on_with(tiny_model, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    prompts = ChatPrompts(tiny_model("llama"), tokenizer)
    assert prompts.name == "plain"
    question = [{"role": "user", "content": "def f(n):"}]
    assert tokenizer.decode(prompts.prompt([], question)) == "def f(n):"
    more = [*question, {"role": "assistant", "content": " return n"}, {"role": "user", "content": "f(3)"}]
    assert tokenizer.decode(prompts.prompt([], more)) == "def f(n): return n\n\nf(3)"
    assert tokenizer.decode(prompts.prompt([NOTE], more)) == (
        "Below is a material. Memorize the content and answer my question after the material.\n It was a whale. \n "
        "Now the material ends. def f(n):\nAnswer: return n\n\nQuestion: f(3)\nAnswer:"
    )
    with pytest.raises(UserError, match="no chat template"):
        ChatPrompts(tiny_model("llama"), tokenizer, "template")
    assert "[INST]Who?[/INST]" in tokenizer.decode(
        ChatPrompts(tiny_model("llama"), tokenizer, "inst").prompt([], [{"role": "user", "content": "Who?"}])
    )


# --------------------------------------------------------------------------------------------------------- sessions


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)
    return save_base(tmp_path_factory.mktemp("models") / "tiny", model, tokenizer)


def chat_model(folder, **options):
    answer_settings = options.pop("answer", AnswerSettings(answer_tokens=12))
    return ChatModel(ChatSettings(model=str(folder), answer=answer_settings, **options))


def asked(session, question, **options):
    """The answer's pieces and the `Answer`."""
    *happenings, last = session.ask(question, **options)
    assert isinstance(last, Answer)
    return [each for each in happenings if isinstance(each, str)], last


@pytest.fixture
def note(tmp_path, folder):
    path = tmp_path / "note.txt"
    path.write_text("The keeper is called Tobias Wren.\n" * 10)
    return path


def test_a_session_keeps_turns_counts_tokens_and_reads_the_document_once(folder, note):
    model = chat_model(folder)
    document = read_document(note, model.tokenizer)
    assert document.tokens == len(note.read_text().strip())
    session = ChatSession(model, [document])
    assert session.used_tokens == document.tokens
    pieces, first = asked(session, "Who?")
    assert "".join(pieces) == first.text
    assert first.reused_tokens == 0
    assert first.finish in ("length", "end")
    assert first.prompt_tokens > document.tokens
    assert session.turns == [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": first.text}]
    assert session.used_tokens == first.used_tokens == first.prompt_tokens + first.answer_tokens
    _, second = asked(session, "And his cat?")
    assert second.prompt_tokens - second.reused_tokens <= 0.1 * first.prompt_tokens
    session.begin_again()
    _, again = asked(session, "Who?")
    assert again.text == first.text
    assert again.reused_tokens == again.prompt_tokens - 1


def test_a_stopped_answer_stays_as_far_as_it_came(folder):
    session, stop = ChatSession(chat_model(folder, answer=AnswerSettings(answer_tokens=300))), threading.Event()
    last = None
    for each in session.ask("Who?", stop):
        if isinstance(each, str):
            stop.set()
        last = each
    assert isinstance(last, Answer)
    assert last.finish == "stopped"
    assert 0 < last.answer_tokens < 300
    assert session.turns[-1]["content"] == last.text


def test_stopped_before_anything_was_said_the_question_was_not_asked(folder):
    session, stop = ChatSession(chat_model(folder)), threading.Event()
    stop.set()
    pieces, answer = asked(session, "Who?", stop=stop)
    assert (pieces, answer.finish, answer.first_token_seconds) == ([], "stopped", None)
    assert session.turns == []


def test_a_document_longer_than_the_window_is_refused_by_its_length_and_has_sections(folder, tmp_path):
    model = chat_model(folder)
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(f"Chapter {number}\n\n" + "A whale was seen. " * 40 for number in range(1, 6)))
    document = read_document(path, model.tokenizer)
    surplus = model.surplus([document])
    assert surplus == document.tokens - model.room([document]) > 0
    with pytest.raises(UserError, match=f"'long.txt' has {document.tokens:,} tokens, {surplus:,} more than fit"):
        asked(ChatSession(model, [document]), "Who?")
    budget = model.section_budget(document)
    parts = [document.part(number, budget, model.tokenizer) for number in range(1, 6)]
    assert [part.heading for part in parts] == [f"Chapter {number}" for number in range(1, 6)]
    assert "".join("".join(part.text.split()) for part in parts) == "".join(document.text.split())
    assert all(model.surplus([part]) == 0 for part in parts)
    _, answer = asked(ChatSession(model, [parts[4]]), "Who?")
    assert answer.used_tokens <= model.window
    with pytest.raises(UserError, match="no section 6: its sections are 1 to 5"):
        document.part(6, budget, model.tokenizer)


def test_the_largest_document_that_fits_leaves_room_for_a_question_and_its_answer(folder):
    model = chat_model(folder)
    room = model.room([NOTE])
    largest = ChatDocument("a.txt", "x" * room, room, "material", "")
    assert model.surplus([largest]) == 0
    _, answer = asked(ChatSession(model, [largest]), "?")
    assert answer.finish in ("length", "end")
    assert answer.used_tokens <= model.window == 1024
    assert model.surplus([ChatDocument("a.txt", "x" * (room + 1), room + 1, "material", "")]) == 1


def test_an_answer_that_meets_the_end_of_the_window_says_so_and_the_next_is_refused(folder):
    model = chat_model(folder, answer=AnswerSettings(answer_tokens=100))
    session = ChatSession(model)
    _, answer = asked(session, "x" * 1000)
    assert (answer.finish, answer.answer_tokens, answer.used_tokens) == ("window", 24, 1024)
    with pytest.raises(UserError, match="1,02[0-9] tokens .*begin a new one, or start with --attention-sinks"):
        asked(session, "y")


def test_with_attention_sinks_a_conversation_has_no_end(folder, monkeypatch):
    sinks = SinkSettings(attention_sinks=4, sink_window=100)
    model = chat_model(folder, sinks=sinks, answer=AnswerSettings(answer_tokens=30))
    letters = model.tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"]
    # bytes that are no text would not be the same tokens again in the next prompt
    monkeypatch.setattr(Sampler, "choose", lambda _self, logits: letters[int(logits[letters].argmax())])
    session = ChatSession(model)
    for question in ("a" * 40, "b" * 60, "c" * 50):
        _, answer = asked(session, question)
        assert answer.finish in ("length", "end")
    assert answer.used_tokens > 150
    assert answer.evicted_tokens == answer.used_tokens - 104
    assert answer.prompt_tokens - answer.reused_tokens <= 55
    assert model.answerer.caches.kept_tokens <= 104
    with pytest.raises(UserError, match="together are more than the window"):
        chat_model(folder, sinks=SinkSettings(attention_sinks=4, sink_window=1024))


def test_a_plain_answer_ends_before_a_question_of_the_models_own(folder, monkeypatch):
    model = chat_model(folder, answer=AnswerSettings(answer_tokens=100))
    planned = [*model.tokenizer("A man.\n\nQuest of\n\nQuestion: Who else?")["input_ids"]]
    monkeypatch.setattr(Sampler, "choose", lambda _self, _logits: planned.pop(0))
    session = ChatSession(model, [NOTE])
    pieces, answer = asked(session, "Who?")
    assert (answer.text, answer.finish) == ("A man.\n\nQuest of", "end")
    assert "".join(pieces) == answer.text


def test_what_is_said_is_saved(folder):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": " A man. "}]
    import json

    part = ChatDocument("a.txt", "…", 3, "book", "", 2, "Chapter 5")
    assert json.loads(as_json("tiny", [NOTE, part], turns)) == {
        "model": "tiny",
        "documents": [
            {"name": "note.txt", "tokens": 15},
            {"name": "a.txt", "tokens": 3, "section": 2, "heading": "Chapter 5"},
        ],
        "messages": turns,
    }
    assert as_markdown("tiny", [part], turns) == (
        "# Conversation with tiny\n\nDocument: a.txt, section 2 (Chapter 5), 3 tokens\n\n"
        "## Question 1\n\nWho?\n\n## Answer 1\n\nA man.\n"
    )

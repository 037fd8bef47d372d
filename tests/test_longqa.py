"""Long question-answer pairs: prompts, questions, sections, answers, both file formats, and the plan of a build."""

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import GOOD, book
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from longlora.corpus.encoding import token_starts
from longlora.errors import UserError
from longlora.longqa.answers import judged, repetition
from longlora.longqa.pair_files import GrowingPairs, Malformed, iterate_pairs, read_pairs, write_pairs
from longlora.longqa.pairs import Message, Pair, pair_from_record, question_and_answer
from longlora.longqa.planning import QuestionPlan, material_of, title_of
from longlora.longqa.prompts import material_opening, material_prompt
from longlora.longqa.question_bank import choose, questions, read_questions
from longlora.longqa.sections import count, cut
from longlora.settings import BuildLongQASettings


def tokens_of(text: str) -> int:
    """What `count` counts without a tokenizer, from its description: a token for every four characters."""
    return -(-len(text) // 4)


# ---------------------------------------------------------------------------------------------- prompts, questions


def test_the_prompt_is_the_papers_with_the_blanks_of_the_released_data():
    assert material_prompt("TEXT", " Why? ", "book", "Emma") == (
        "Below is some paragraphs in the book, Emma. Memorize the content and answer my question after the book."
        "\n TEXT \n Now the material ends. Why?"
    )
    assert material_prompt("TEXT", "Why?", "paper", "ignored").startswith(
        "Below is a paper. Memorize the content and answer my question after the paper.\n TEXT"
    )
    assert "answer my question after the material.\n" in material_opening("TEXT")
    opening = material_opening("TEXT", "book", "Emma")
    for question in ("Why?", "Who?"):
        assert material_prompt("TEXT", question, "book", "Emma") == opening + question


@pytest.mark.parametrize(
    ("material", "categories"),
    [
        ("book", {"summary", "idea", "relationships", "characters", "details"}),
        ("paper", {"summary", "contribution", "novelty", "limitation", "method", "details"}),
    ],
)
def test_the_bank_has_the_papers_categories(material, categories):
    every = questions(material)
    assert {question.category for question in every} == categories
    assert len({question.id for question in every}) == len({question.text for question in every}) == len(every)
    assert all("{it}" in question.text for question in every)
    assert every[0].about(material, part=True) == f"Please summarize this part of the {material} in one paragraph."
    assert every[0].about(material, part=False) == f"Please summarize the {material} in one paragraph."


def test_categories_take_turns_and_a_section_is_asked_nothing_twice():
    bank = questions("book")
    turns = choose(bank, 2, "seed")
    asked = [next(turns) for _ in range(50)]
    counts = {
        name: sum(each.category == name for pair in asked for each in pair) for name in {each.category for each in bank}
    }
    assert set(counts.values()) == {20}  # 100 questions, 5 categories
    assert all(first.category != second.category for first, second in asked)
    again = choose(bank, 2, "seed")
    assert [next(again) for _ in range(50)] == asked
    (everything,) = (next(choose(bank, 99, "x")),)
    assert sorted(each.id for each in everything) == sorted(each.id for each in bank)


def test_a_users_own_questions(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("law:\n- Which law is {it} about?\n- Who is bound by it?\n", encoding="utf-8")
    assert [(each.id, each.about("paper", False)) for each in read_questions(str(path))] == [
        ("own/law/1", "Which law is the paper about?"),
        ("own/law/2", "Who is bound by it?"),
    ]
    for content in ("just words", "law: Which?", "law: []", "law: [1]", "- a", "{"):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"own\.yaml"):
            read_questions(str(path))


# --------------------------------------------------------------------------------------------------------- sections


def check_sections(text: str, budget: int, tokenizer: Any = None) -> list[Any]:
    sections = list(cut(text, budget, tokenizer))
    reached = 0
    for section in sections:
        assert text[reached : section.begin].strip() == ""  # nothing but blanks is left out
        piece = text[section.begin : section.end]
        assert piece == piece.strip()
        count = tokens_of(piece) if tokenizer is None else len(tokenizer(piece, add_special_tokens=False)["input_ids"])
        assert section.tokens == count <= budget
        reached = section.end
    assert text[reached:].strip() == ""
    return sections


@hypothesis_settings(max_examples=200, deadline=None)
@given(
    st.text(st.sampled_from("ab .\n\t。!#1C") | st.characters(exclude_categories=["Cs"]), max_size=300),
    st.integers(1, 40),
)
def test_sections_keep_the_budget_and_every_word(text, budget):
    check_sections(text, budget)


def test_sections_keep_the_budget_of_a_real_tokenizer(tiny_tokenizer):
    text = book(2) + "naïve “x” 日本語。" * 40
    for budget in (17, 100, 1001):
        check_sections(text, budget, tiny_tokenizer())


def test_a_piece_that_has_more_tokens_alone_than_in_its_surroundings_still_keeps_the_budget():
    """A SentencePiece-like tokenizer begins every text with a blank of its own: one token more for each section."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={each: number for number, each in enumerate("▁abc")}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast("ab")["input_ids"] == [0, 1, 2]
    sections = check_sections("abc" * 100, 20, fast)
    assert [section.tokens for section in sections[:3]] == [20, 20, 20]


def test_the_highest_rank_within_reach_is_cut_at():
    filler = "word " * 60  # 300 characters, 75 tokens
    for mark, cut_before in [
        ("\n\nCHAPTER 2\n\n", "CHAPTER 2"),
        ("\n\n## Results\n\n", "## Results"),
        ("\n\n", "other"),
        ("\n", "other"),
        (". ", "other"),
    ]:
        text = filler.strip() + mark + "other " * 60
        first, second, *_ = check_sections(text, 100)
        assert text[second.begin :].startswith(cut_before), mark
        assert first.end <= text.index(mark.strip() or "other") + 1
    # A chapter beats the paragraph that lies nearer to the middle.
    text = filler + "\n\n" + "mid " * 8 + "\n\nChapter IV\n\n" + "other " * 60
    assert text[check_sections(text, 100)[1].begin :].startswith("Chapter IV")


def test_headings_in_prose_are_none():
    prose = "Part of the trouble was that\nChapter one had been read by everyone.\n\n1 See the note on page 3.\n\n"
    (section,) = check_sections(prose * 3, 1000)
    assert section.heading == ""


def test_the_last_section_is_no_crumb():
    text = "word " * 88  # 110 tokens for a budget of 100
    assert [section.tokens for section in check_sections(text.strip(), 100)] == pytest.approx([55, 55], abs=1)


def test_sections_know_their_chapter():
    sections = check_sections(book(3, paragraphs=6), 150)
    names = [section.heading for section in sections]
    assert names == sorted(names)
    assert set(names) == {"CHAPTER 1", "CHAPTER 2", "CHAPTER 3"}


def test_tokens_start_where_the_tokenizer_says(tiny_tokenizer):
    assert token_starts(tiny_tokenizer(), "ab日").tolist() == [0, 1, 2, 2, 2]  # a token a byte
    assert [count("123456789"[:length]) for length in (0, 1, 4, 5, 9)] == [0, 1, 1, 2, 3]


# ---------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (GOOD, ""),
        ("她住在海边的一座小房子里，很少见人。", ""),
        ("", "empty"),
        (" \n…!", "empty"),
        ("Yes.", "empty"),
        ("As an AI language model, I cannot read books.", "refusal"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("Please provide the text of the chapter first.", "refusal"),
        ("He says: 'I cannot answer you,' and leaves. " + GOOD, "refusal"),
        (f"{GOOD} It is a long way, and they meet many people on it. He says: 'I cannot answer you.'", ""),
        ("The king is dead. " * 30, "repetition"),
        ("海边的房子。" * 20, "repetition"),
        ("<think>The reader wants a summary.</think>\n" + GOOD, ""),
        ("<think>The reader wants a summary and", "empty"),
        ("Who lives by the sea, and why?", "echo"),
        ("The material ends.", "echo"),
    ],
)
def test_useless_answers_are_told_from_useful_ones(text, problem):
    answer = judged(text, material_prompt("TEXT", "Who lives by the sea, and why?"))
    assert answer.problem == problem
    assert "<think>" not in answer.text


def test_an_answer_cut_short_ends_with_its_last_whole_sentence():
    answer = judged('She left. He said "Why not?" And then th', "q", cut=True)
    assert (answer.text, answer.problem, answer.cut) == ('She left. He said "Why not?"', "", True)
    assert judged("She left the house and then th", "q", cut=True).problem == "cut short"


def test_repetition_is_the_share_of_four_grams_said_before():
    words = [f"w{number}" for number in range(30)]
    assert repetition(" ".join(words)) == 0
    assert repetition(" ".join(words + words)) == pytest.approx(27 / 57)  # of 57 4-grams 27 come again
    assert repetition("a b " * 9) == 0  # too short to say


# ------------------------------------------------------------------------------------------------------------ files


def pairs_to_write() -> list[Pair]:
    nasty = 'line\nbreak \u2028 "quote" \\ tab\t 日本 \x1f'
    return [
        question_and_answer(f"prompt {nasty}", f"answer {nasty}", "summary", {"characters": [0, 9], "sha256": "ab"}),
        question_and_answer("second prompt", "second answer"),
    ]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_what_is_written_is_read_back(tmp_path, name):
    path = tmp_path / name
    assert write_pairs(path, pairs_to_write()) == 2
    got = read_pairs(path)
    for pair, written in zip(got, pairs_to_write(), strict=True):
        assert (pair.messages, pair.category, pair.source) == (written.messages, written.category, written.source)
    if name == "a.json":
        plain = json.loads(path.read_text(encoding="utf-8"))
        assert [(each["instruction"], each["output"]) for each in plain] == [
            (pair.prompt, pair.answer) for pair in pairs_to_write()
        ]
        assert [pair.where for pair in got] == ["record 1", "record 2"]
    else:
        plain = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        assert plain[1] == {
            "messages": [
                {"role": "user", "content": "second prompt"},
                {"role": "assistant", "content": "second answer"},
            ]
        }
        assert [pair.where for pair in got] == ["line 1", "line 2"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_the_datasets_library_reads_what_is_written(tmp_path, name):
    import datasets

    written = [question_and_answer(f"prompt {n}", f"answer {n}", "idea", {"characters": [n, 9]}) for n in range(3)]
    write_pairs(tmp_path / name, written)
    table = datasets.load_dataset("json", data_files=str(tmp_path / name), cache_dir=str(tmp_path), split="train")
    if name == "a.json":
        assert (table["instruction"][2], table["output"][2]) == ("prompt 2", "answer 2")
    else:
        assert table["messages"][2] == written[2].conversation()


def test_longalpaca_with_an_input_and_a_chat_with_several_turns():
    pair = pair_from_record({"instruction": "Translate.", "input": "mer", "output": "sea", "id": 3})
    assert (pair.prompt, pair.answer) == ("Translate.\nmer", "sea")
    assert pair_from_record({"instruction": "Hi.", "input": "", "output": "Ho."}).prompt == "Hi."
    assert pair_from_record({"instruction": "Hi.", "input": None, "output": "Ho."}).prompt == "Hi."
    turns = [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    pair = pair_from_record({"messages": [{"role": role, "content": content} for role, content in turns]})
    assert pair.messages == tuple(Message(*turn) for turn in turns)
    assert (pair.prompt, pair.answer) == ("c", "d")


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversation": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "a", "completion": "b"},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "model", "content": "b"}]},
    ],
)
def test_conversations_are_read_as_trl_and_the_hub_write_them(record):
    assert pair_from_record(record).messages == (Message("user", "a"), Message("assistant", "b"))


def test_tools_and_reasoning_are_kept_for_the_template():
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}]
    turns = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "name": "add", "content": "4"},
        {"role": "assistant", "content": "Four.", "reasoning_content": "The tool said so."},
    ]
    pair = pair_from_record({"messages": turns, "tools": [{"name": "add"}]})
    assert pair.conversation() == [turns[0], {**turns[1], "content": ""}, *turns[2:]]
    assert (pair.prompt, pair.answer, pair.tools) == ("2+2?", "Four.", [{"name": "add"}])


MALFORMED = [
    ("[1]", "is a list"),
    ('{"instruction": "a"}', "its fields are: instruction"),
    ('{"instruction": "a", "output": ""}', "the answer is empty"),
    ('{"instruction": "a", "output": 3}', "'output' is a int"),
    ('{"instruction": " ", "output": "b"}', "the prompt is empty"),
    ('{"messages": []}', "its roles are none"),
    ('{"messages": "hello"}', "not a list of objects"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "its roles are user"),
    ('{"messages": [{"role": "robot", "content": "a"}]}', "role 'robot'"),
    ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "parts that are not all text"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}', "answer is empty"),
]
FINE = '{"instruction": "a", "output": "b"}'


@pytest.mark.parametrize(("record", "reason"), [*MALFORMED, ('{"instruction": ', "not valid JSON")])
def test_a_malformed_line_is_named_and_hides_none_after_it(tmp_path, record, reason):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{FINE}\n\n{record}\n{FINE}\n", encoding="utf-8")
    first, bad, last = iterate_pairs(path)
    assert isinstance(first, Pair)
    assert isinstance(last, Pair)
    assert isinstance(bad, Malformed)
    assert bad.where == "line 3"
    assert reason in bad.reason
    with pytest.raises(UserError, match=r"a\.jsonl', line 3: .*longqa check"):
        read_pairs(path)


@pytest.mark.parametrize(("record", "reason"), MALFORMED)
def test_a_malformed_record_of_an_array_is_named_by_number_and_line(tmp_path, record, reason):
    path = tmp_path / "a.json"
    path.write_text(f"[\n {FINE},\n {record} ,\n\n {FINE}\n]\n", encoding="utf-8")
    found = list(iterate_pairs(path))
    assert [type(each) for each in found] == [Pair, Malformed, Pair]
    assert [each.where for each in found] == ["record 1", "record 2", "record 3"]
    assert reason in found[1].reason  # type: ignore[union-attr]


@pytest.mark.parametrize("end", ["", ",", ', {"instruction":', " x]", ", ]x"[:1]])
def test_an_array_that_breaks_off_says_where(tmp_path, end):
    path = tmp_path / "a.json"
    path.write_text(f"[{FINE},\n{FINE}{end}", encoding="utf-8")
    *whole, last = iterate_pairs(path)
    assert isinstance(last, Malformed)
    assert "the rest was not read" in last.reason
    assert all(isinstance(each, Pair) for each in whole)
    assert len(whole) == 2


def test_files_that_hold_no_pairs(tmp_path):
    cases = {
        "none.json": ("[]", "no pairs"), "empty.jsonl": ("", "no pairs"), "text.txt": ("Call me", "holds no records"),
        "latin.jsonl": (b'{"instruction": "na\xefve", "output": "b"}', "utf-8"),
    }  # fmt: skip
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=words):
            read_pairs(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        read_pairs(tmp_path / "missing.json")


def test_several_turns_have_no_place_in_longalpacas_format(tmp_path):
    several = Pair((Message("system", "s"), Message("user", "a"), Message("assistant", "b")))
    with pytest.raises(UserError, match="write .jsonl"):
        write_pairs(tmp_path / "a.json", [several])
    assert list(tmp_path.iterdir()) == []
    assert write_pairs(tmp_path / "a.jsonl", [several]) == 1


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_growing_file_survives_being_cut_in_the_middle_of_a_pair(tmp_path, name):
    path = tmp_path / name
    first, second = pairs_to_write()
    with contextlib.suppress(KeyboardInterrupt), GrowingPairs(path, resume=False) as growing:
        growing.append(first)
        growing.append(second)
        raise KeyboardInterrupt
    with growing.lines.open("r+b") as file:
        file.truncate(growing.lines.stat().st_size - 5)
    with pytest.raises(UserError, match="--resume"):
        GrowingPairs(path, resume=False)
    growing = GrowingPairs(path, resume=True)
    assert [pair.answer for pair in growing.present()] == [first.answer]
    with growing:
        growing.append(second)
        with pytest.raises(UserError, match="in use by another run"), GrowingPairs(path, resume=True):
            pass
        growing.finish()
    assert [pair.answer for pair in read_pairs(path)] == [first.answer, second.answer]
    assert [file.name for file in tmp_path.iterdir()] == [name]
    with GrowingPairs(path, resume=True) as growing:  # a finished file grows on
        growing.append(question_and_answer("third", "third answer"))
        growing.finish()
    assert [pair.answer for pair in read_pairs(path)][2:] == ["third answer"]


# --------------------------------------------------------------------------------------------- the plan and its cost


def settings_for(documents: Path, output: Path | None = None, **more: Any) -> BuildLongQASettings:
    given = {"documents": (str(documents),), "section_tokens": 200, "dry_run": output is None}
    return BuildLongQASettings(**(given | {"output": str(output or "")} | more))


def test_what_kind_of_material_and_its_title(tmp_path):
    from longlora.corpus.documents import Document

    paper = "Title\n\nAbstract\nWe show.\n\n1 Introduction\n…\n" + "word " * 500 + "\nReferences\n[1] A."
    assert material_of(Document("a.pdf", paper)) == "paper"
    assert material_of(Document("a.txt", book(3))) == "book"
    assert material_of(Document("a.epub", "words")) == "book"
    assert material_of(Document("speech.txt", "My fellow citizens, the abstract references of …")) == "material"
    assert title_of(Document("x/the_two-sisters.txt", "Once")) == "The Two Sisters"
    assert title_of(Document("x/1.epub", "# Emma\n\nOnce")) == "Emma"
    assert title_of(Document("x/2701-0.txt", "Once")) == title_of(Document("hub:some/thing:17", "Once")) == ""


def test_the_plan_is_the_same_twice_and_its_sources_lead_back_to_the_text(tmp_path):
    text = book(4)
    (tmp_path / "novel.txt").write_text(text, encoding="utf-8")
    tasks, again = (list(QuestionPlan(settings_for(tmp_path)).tasks()) for _ in range(2))
    assert tasks == again
    assert len(tasks) == 2 * tasks[0].source["sections"] == len({task.key for task in tasks})
    for task in tasks:
        begin, end = task.source["characters"]
        assert task.prompt == material_prompt(text[begin:end], task.source["question"], "book", "Novel")
        assert task.source["document"] == str(tmp_path / "novel.txt")
    assert [task.key for task in QuestionPlan(settings_for(tmp_path, seed=1)).tasks()] != [task.key for task in tasks]


def test_documents_and_sections_that_stand_there_twice_are_asked_about_once(tmp_path, caplog):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(book(2), encoding="utf-8")
    alone = {task.key for task in QuestionPlan(settings_for(tmp_path / "a.txt")).tasks()}
    with caplog.at_level(logging.INFO):
        estimate = QuestionPlan(settings_for(tmp_path)).estimate()
    assert estimate.calls == len(alone)
    assert "1 documents that stand there twice" in caplog.text


def test_a_section_that_stands_in_two_documents_is_asked_the_same_only_once(tmp_path, caplog):
    shared, more = (f"# Part\n\n{book(1, seed=seed)}" for seed in (1, 2))
    (tmp_path / "a.md").write_text(shared + "\n" + more, encoding="utf-8")
    (tmp_path / "b.md").write_text(shared + "\n" + "# Other\n\n" + book(1, seed=3), encoding="utf-8")
    most = max(tokens_of(each) for each in (shared, more, book(1, seed=3))) + 10
    whole = {"section_tokens": most, "categories": ("summary",), "questions_per_section": 3, "material": "book"}
    with caplog.at_level(logging.INFO):
        estimate = QuestionPlan(settings_for(tmp_path, **whole)).estimate()
    assert (estimate.documents, estimate.sections, estimate.calls) == (2, 3, 9)
    assert "3 questions about a section that stands there twice" in caplog.text


def test_limits_of_the_plan(tmp_path):
    (tmp_path / "a.txt").write_text(book(8), encoding="utf-8")
    (tmp_path / "b.txt").write_text(book(8, seed=1), encoding="utf-8")
    (tmp_path / "c.txt").write_text("Too short to ask about.", encoding="utf-8")

    def of(**more: Any) -> list[Any]:
        return list(QuestionPlan(settings_for(tmp_path, **more)).tasks())

    assert [Path(task.source["document"]).name for task in of(pairs_per_document=3)] == ["a.txt"] * 3 + ["b.txt"] * 3
    sections = [task.source["section"] for task in of(pairs_per_document=4, questions_per_section=1)][:4]
    total = of()[0].source["sections"]
    assert [section / total for section in sections] == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8], abs=1 / total)
    assert len(of(max_pairs=5)) == 5
    assert {task.category for task in of(categories=("idea",))} == {"idea"}
    assert {task.source["material"] for task in of(material="paper")} == {"paper"}
    with pytest.raises(UserError, match="nothing to ask about"):
        QuestionPlan(settings_for(tmp_path, categories=("novelty",))).estimate()
    with pytest.raises(UserError, match="Did you mean 'idea'"):
        QuestionPlan(settings_for(tmp_path, categories=("ideas",)))


def test_the_estimate_counts_calls_and_tokens(tmp_path):
    (tmp_path / "a.txt").write_text(book(3), encoding="utf-8")
    settings = settings_for(tmp_path, answer_tokens=100)
    tasks = list(QuestionPlan(settings).tasks())
    estimate = QuestionPlan(settings).estimate({tasks[0].key, tasks[3].key})
    assert (estimate.calls, estimate.already) == (len(tasks) - 2, 2)
    assert estimate.tokens_out == 100 * (len(tasks) - 2)
    asked = sum(tokens_of(task.prompt) for number, task in enumerate(tasks) if number not in (0, 3))
    assert asked < estimate.tokens_in < asked * 1.3  # the chat template's share is a guess

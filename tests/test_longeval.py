"""LongEval: LongChat's own first cases to the letter, broken files, new cases, scoring, and the two commands.

`FIRST_TOPICS` and `FIRST_LINES` are the first records of LongChat's `5_topics.jsonl` and `200_lines.jsonl` (Apache-2.0)
with conversations and lines left out of their middle.
"""

import json
import re

import pytest
from tiny_runs import save_base

from longlora.cli import main
from longlora.errors import UserError
from longlora.evaluation import longeval, retrieval
from longlora.evaluation.longeval import (
    accuracy_table,
    evaluate_lines,
    evaluate_topics,
    gives_number,
    names_first_topic,
)
from longlora.evaluation.longeval_cases import (
    WORDS,
    Case,
    conversation,
    lines_prompt,
    make_lines,
    make_topics,
    our_topics,
    read_lines,
    read_topic_list,
    read_topics,
)
from longlora.settings import LinesSettings, TopicsSettings

CREATIVITY = (
    "USER: I would like to discuss the topic of the psychology of creativity. \n ASSISTANT: Sure, I'd be happy to talk "
    "about that with you! What specifically would you like to know? \n USER: Great, this is the end of our discussion "
    "on the topic The psychology of creativity, let's talk about the next topic."
)
ADDICTION = (
    "USER: I would like to discuss the topic of the psychology of addiction and recovery. \n ASSISTANT: Sure, I'd be "
    "happy to discuss that topic with you. What would you like to know about it? \n USER: Great, this is the end of "
    "our discussion on the psychology of addiction and recovery. Let's talk about the next topic."
)
FIRST_TOPICS = {
    "test_id": 0,
    "prompt": (
        "Below is a record of our previous conversation on 2 different topics. You are the ASSISTANT, and I am the "
        "USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. "
        "Memorize each <TOPIC>. At the end of the record, I will ask you to retrieve the first topic. Now the record "
        "start. " + CREATIVITY + ADDICTION + " Now the record ends. What is the first topic we discussed? Only give me "
        "the topic name. Do not summarize yourself."
    ),
    "topics": ["The psychology of creativity", "The psychology of addiction and recovery"],
    "prompt_length": -1,
}
FIRST_LINES = {
    "random_idx": ["torpid-kid", 7],
    "expected_number": 2416,
    "num_lines": 5,
    "token_size": 4803,
    "correct_line": "line torpid-kid: REGISTER_CONTENT is <2416>\n",
    "prompt": (
        "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
        "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
        "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
        "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
        "line grotesque-classmate: REGISTER_CONTENT is <42527>\nline imperfect-bull: REGISTER_CONTENT is <3119>\n"
        "line torpid-kid: REGISTER_CONTENT is <2416>\nline needless-service: REGISTER_CONTENT is <13594>\n"
        "line oval-underpants: REGISTER_CONTENT is <33851>\n\nNow the record is over. Tell me what is the "
        "<REGISTER_CONTENT> in line torpid-kid? I need the number. "
    ),
    "prompt_length": -1,
}


def written(folder, name, *records):
    file = folder / name
    file.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return str(file)


# --------------------------------------------------------------------------------------------------- LongChat's files


def test_the_first_topics_case_is_what_we_write(tmp_path):
    case = read_topics(written(tmp_path, "5_topics.jsonl", FIRST_TOPICS))[0]
    assert case == Case(
        2, FIRST_TOPICS["prompt"], "The psychology of creativity", ("The psychology of addiction and recovery",)
    )
    conversations = dict(zip(FIRST_TOPICS["topics"], (CREATIVITY, ADDICTION), strict=True))
    made = [make_topics(list(conversations.items()), 2, trial, 0) for trial in range(20)]
    assert case in made
    for other in made:
        chosen = (other.expected, *other.others)
        assert (
            other.prompt
            == WORDS["topics_begin"].format(number=2) + "".join(map(conversations.get, chosen)) + WORDS["topics_end"]
        )


def test_the_first_lines_case_is_what_we_write(tmp_path):
    case = read_lines(written(tmp_path, "200_lines.jsonl", FIRST_LINES))[0]
    assert case == Case(5, FIRST_LINES["prompt"], "2416", ("torpid-kid",))
    found = re.findall(r"^line (.*): REGISTER_CONTENT is <(\d+)>$", case.prompt, re.MULTILINE)
    assert lines_prompt([(name, int(number)) for name, number in found], "torpid-kid") == case.prompt


def test_empty_lines_are_no_cases(tmp_path):
    assert len(read_lines(written(tmp_path, "x.jsonl", "", FIRST_LINES, "  ", FIRST_LINES, ""))) == 2


@pytest.mark.parametrize(
    ("read", "records", "sentence"),
    [
        (read_lines, [FIRST_LINES, '{"random_idx": ["torpid', FIRST_LINES], "x.jsonl, line 2 is not JSON"),
        (read_lines, [FIRST_LINES, "", "[1, 2]"], "x.jsonl, line 3 lacks 'prompt'"),
        (read_lines, [FIRST_TOPICS], "x.jsonl, line 1 lacks 'expected_number'.*another task"),
        (
            read_lines,
            [FIRST_LINES | {"expected_number": "<2416>"}],
            "line 1: 'expected_number' is .*: it must be a whole number",
        ),
        (read_lines, [FIRST_LINES | {"prompt": 7}], "line 1: 'prompt' is 7: it must be text"),
        (read_lines, [], "x.jsonl holds no case"),
        (read_topics, [FIRST_TOPICS, FIRST_LINES], "x.jsonl, line 2 lacks 'topics'"),
        (read_topics, [FIRST_TOPICS | {"topics": []}], "line 1: 'topics' is .*must be a list"),
        (read_topics, [FIRST_TOPICS | {"topics": "a, b"}], "line 1: 'topics' is 'a, b'"),
        (read_topic_list, [{"topic": "x"}], "line 1 lacks 'conversation'"),
    ],
)
def test_a_broken_line_is_named(tmp_path, read, records, sentence):
    with pytest.raises(UserError, match=sentence):
        read(written(tmp_path, "x.jsonl", *records))


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read .No such file"):
        read_lines(str(tmp_path / "none.jsonl"))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read .it is not UTF-8"):
        read_topics(str(tmp_path / "binary.jsonl"))
    with pytest.raises(UserError, match="holds no topic"):
        read_topic_list(written(tmp_path, "topics.txt", "", " "))


# ---------------------------------------------------------------------------------------------------------- new cases


@pytest.mark.parametrize("number", [1, 2, 200, 911, 7000])
def test_lines_of_any_number(number):
    case = make_lines(number, 3, 0)
    found = re.findall(r"^line (\S[^:]*-[^:]*): REGISTER_CONTENT is <(\d+)>$", case.prompt, re.MULTILINE)
    lines = dict(found)
    assert len(found) == len(lines) == number
    assert lines[case.others[0]] == case.expected
    assert all(1 <= int(value) <= 50_000 for value in lines.values())
    assert case.prompt.endswith(f"in line {case.others[0]}? I need the number. ")


def test_cases_are_drawn_anew_for_each_trial_length_and_seed():
    prompts = {make_lines(*which).prompt for which in ((20, 0, 0), (20, 1, 0), (20, 0, 1), (21, 0, 0), (20, 0, 0))}
    assert len(prompts) == 4
    asked = [make_lines(10, trial, 0) for trial in range(200)]
    places = [
        [line.split(":")[0][5:] for line in case.prompt.split("\n")[2:12]].index(case.others[0]) for case in asked
    ]
    assert set(places) == set(range(10))


def test_topics_come_once_a_case_and_in_any_order():
    conversations = our_topics()
    assert len(dict(conversations)) == len(conversations) == 240
    case = make_topics(conversations, 240, 0, 0)
    assert {case.expected, *case.others} == {topic for topic, _ in conversations}
    assert len(set(case.others)) == 239
    assert [case.prompt.count(text) for _, text in conversations] == [1] * 240
    firsts = {make_topics(conversations[:4], 3, trial, 0).expected for trial in range(60)}
    assert firsts == {topic for topic, _ in conversations[:4]}
    with pytest.raises(UserError, match="--topics is 241, and there are 240 topics"):
        make_topics(conversations, 241, 0, 0)


def test_a_conversation_of_ours_begins_and_ends_as_longevals():
    text = conversation("The art of bread baking")
    assert text.startswith("USER: I would like to discuss the topic of the art of bread baking. \n ASSISTANT: Sure, ")
    assert text.endswith(
        " \n USER: Great, this is the end of our discussion on the topic The art of bread baking, let's talk about the "
        "next topic."
    )
    assert text == conversation("The art of bread baking")


def test_topic_lists(tmp_path):
    own = {"topic_id": 1, "topic": "The psychology of creativity", "conversation": CREATIVITY}
    assert read_topic_list(written(tmp_path, "conversations.jsonl", own)) == [(own["topic"], CREATIVITY)]
    plain = written(tmp_path, "topics.txt", "Tea", "", "  Salt mines ")
    assert read_topic_list(plain) == [("Tea", conversation("Tea")), ("Salt mines", conversation("Salt mines"))]


# ------------------------------------------------------------------------------------------------------------ scoring


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The <REGISTER_CONTENT> in line torpid-kid is <2416>.", True),
        ("2416", True),
        ("In line 7 it is 2,416", False),  # the last number is 416, as LongEval reads it
        ("<2416>, which is not 31", False),
        ("<02416>", True),
        ("I cannot say.", False),
        ("", False),
        ("-2416", True),
    ],
)
def test_lines_are_scored_by_the_last_number(answer, right):
    """`re.findall("\\d+", output)[-1]` as an integer."""
    assert gives_number(answer, Case(200, "", "2416", ("torpid-kid",))) is right


TOPICS = ("The role of art in society", "The impact of social media on communication", "The psychology of happiness")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        # answers in LongChat's published predictions, with what a reader would say of them
        ("The first topic we discussed was the role of art in society.", True),
        ('The first topic we discussed was "The role of art in society".', True),
        ("The topic of the role of art in society.", True),
        ("'The role of art in society', USER: Excellent! Thank you", True),
        ("The topic was: The psychology of happiness.", False),
        ("<TOPIC>.USER: Yes, I remember this topic.", False),
        ("The role of sports in society", False),
        ("The role of art in society, the impact of social media on communication, the psychology of happiness", True),
        ("We went from the psychology of happiness to the role of art in society.", False),
        ("role of ART in society!", True),
        ("the role of artists in society", False),
        ("", False),
    ],
)
def test_topics_are_scored_by_the_first_one_named(answer, right):
    assert names_first_topic(answer, Case(3, "", TOPICS[0], TOPICS[1:])) is right


def test_a_topic_inside_a_longer_one():
    longer = Case(2, "", "The impact of social media on health in adults", ("The impact of social media on health",))
    shorter = Case(2, "", longer.others[0], (longer.expected,))
    said = "It was the impact of social media on health in adults."
    assert names_first_topic(said, longer)
    assert not names_first_topic(said, shorter)
    assert names_first_topic("It was the impact of social media on health.", shorter)


# --------------------------------------------------------------------------------------------------------- the commands

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def asked_of(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    """A saved byte-level model of window 5000 whose answers are what a rule says; and the prompts it was given."""
    prompts = []

    def prepare(answer, chat):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = CHAT if chat else None
        model = tiny_model("llama", vocab_size=257, max_position_embeddings=5000)
        folder = save_base(tmp_path / "base", model, tokenizer)

        def generate_each(_model, rows, max_new_tokens, *, stop, **_options):
            for index, row in enumerate(rows):
                text = tokenizer.decode(row)
                prompts.append(text)
                tokens = tokenizer(answer(text)).input_ids[:max_new_tokens]
                ends = [at for at in range(1, len(tokens) + 1) if stop is not None and stop(tokens[:at])]
                yield index, tokens[: ends[0]] if ends else tokens

        monkeypatch.setattr(retrieval, "generate_each", generate_each)
        return str(folder)

    return prepare, prompts


def test_lines_through_a_chat_template(asked_of, tmp_path, capsys):
    prepare, prompts = asked_of
    folder = prepare(lambda text: "The number in line 7 is\n<2416>." if "torpid-kid? I" in text else "None.", True)
    other = FIRST_LINES | {"prompt": FIRST_LINES["prompt"].replace("in line torpid-kid?", "in line imperfect-bull?")}
    data = (written(tmp_path, "a.jsonl", FIRST_LINES, other), written(tmp_path, "b.jsonl", other | {"num_lines": 6}))
    document = evaluate_lines(LinesSettings(models=(folder,), data=data))
    assert prompts[0] == f"<user>{FIRST_LINES['prompt']}\n<a>"
    mean = round(sum(map(len, prompts[:2])) / 2)
    intervals = [(result.pop("low"), result.pop("high")) for result in document["results"]]
    assert [low <= accuracy <= high for (low, high), accuracy in zip(intervals, (0.5, 0.0), strict=True)] == [True] * 2
    assert [result.pop("scores") for result in document["results"]] == [[1, 0], [0]]
    assert document["results"] == [
        {"context": mean, "lines": 5, "accuracy": 0.5, "trials": 2, "skipped": 0, "tokens": mean},
        {
            "context": len(prompts[2]),
            "lines": 6,
            "accuracy": 0.0,
            "trials": 1,
            "skipped": 0,
            "tokens": len(prompts[2]),
        },
    ]
    assert (document["task"], document["chat"], document["data"], document["seed"]) == (
        "lines",
        True,
        ["a.jsonl", "b.jsonl"],
        None,
    )
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"% right, of lines\s+5\s+6", printed[0])
    assert re.fullmatch(rf"{re.escape(folder)}\s+50 \(9–91\)\s+0 \(0–79\)", printed[1])


def test_a_base_model_goes_on_from_longevals_words_to_the_end_of_the_line(asked_of, tmp_path):
    prepare, prompts = asked_of
    folder = prepare(lambda _text: "\n <2416>\nline grotesque-classmate: REGISTER_CONTENT is <1>", False)
    document = evaluate_lines(
        LinesSettings(models=(folder,), data=(written(tmp_path, "a.jsonl", FIRST_LINES),), json=True)
    )
    assert prompts == [FIRST_LINES["prompt"] + "Line <torpid-kid>: <REGISTER_CONTENT> is"]
    assert document["results"][0]["accuracy"] == 1.0
    folder = prepare(lambda _text: " the psychology of creativity.\nUSER: Great", False)
    document = evaluate_topics(
        TopicsSettings(models=(folder,), data=(written(tmp_path, "b.jsonl", FIRST_TOPICS),), json=True)
    )
    assert prompts[1] == FIRST_TOPICS["prompt"] + "\n ASSISTANT: The first topic is"
    assert document["results"][0]["accuracy"] == 1.0


def test_topics_of_new_cases_and_those_that_do_not_fit(asked_of, tmp_path, caplog):
    prepare, prompts = asked_of
    folder = prepare(lambda text: "It is the " + re.search(r"the topic of the ([^<].*?)\.", text)[1], True)
    plain = written(tmp_path, "topics.txt", "The tea", "The salt", "The ink")
    asked = {"models": (folder,), "topic_list": plain, "topics": (1, 3), "trials": 4, "json": True}
    document = evaluate_topics(TopicsSettings(**asked))
    assert [(r["topics"], r["accuracy"], r["trials"], r["skipped"]) for r in document["results"]] == [
        (1, 1.0, 4, 0),
        (3, None, 0, 4),
    ]
    assert "4 of 8 prompts do not fit" in caplog.text
    assert (document["data"], document["seed"]) == (["topics.txt"], 0)
    assert "–" in accuracy_table([document], "topics")
    longest = document["results"][1]["tokens"] + longeval.TOPIC_TOKENS
    for limit, fits in ((longest + 60, True), (1000, False)):
        prompts.clear()
        if fits:
            found = evaluate_topics(TopicsSettings(**asked, max_context=limit))
            assert [result["trials"] for result in found["results"]] == [4, 4]
            assert "beyond the model's window of 5000" in caplog.text
        else:
            with pytest.raises(UserError, match="no prompt of topics fits"):
                evaluate_topics(TopicsSettings(**asked | {"topics": (3,)}, max_context=limit))
            assert prompts == []


def test_a_prompt_exactly_at_the_limit_is_asked(asked_of, tmp_path):
    prepare, prompts = asked_of
    folder = prepare(lambda _text: "2416", True)
    data = (written(tmp_path, "a.jsonl", FIRST_LINES),)
    evaluate_lines(LinesSettings(models=(folder,), data=data, json=True))
    whole = len(prompts[0]) + 100
    at = evaluate_lines(LinesSettings(models=(folder,), data=data, json=True, max_context=whole))
    assert at["results"][0]["trials"] == 1
    with pytest.raises(UserError, match=f"the closest takes {whole:,} tokens with its answer, and {whole - 1:,} are"):
        evaluate_lines(LinesSettings(models=(folder,), data=data, json=True, max_context=whole - 1))


def test_trials_and_lengths_choose_among_the_cases_of_files(asked_of, tmp_path):
    prepare, prompts = asked_of
    folder = prepare(lambda _text: "2416", True)
    many = [FIRST_LINES | {"prompt": f"{FIRST_LINES['prompt']} {number}"} for number in range(5)]
    data = (written(tmp_path, "a.jsonl", *many), written(tmp_path, "b.jsonl", FIRST_LINES | {"num_lines": 9}))
    document = evaluate_lines(LinesSettings(models=(folder,), data=data, lines=(5,), trials=3, json=True))
    assert [result["trials"] for result in document["results"]] == [3]
    assert [text[-5] for text in prompts] == ["0", "1", "2"]
    with pytest.raises(UserError, match="--lines is 7, and the files of --data hold cases with 5, 9"):
        evaluate_lines(LinesSettings(models=(folder,), data=data, lines=(7,), json=True))


def test_going_on_asks_only_for_what_is_missing(asked_of, tmp_path):
    prepare, prompts = asked_of
    folder = prepare(lambda _text: "2416", True)
    asked = {"models": (folder,), "output": str(tmp_path / "out"), "json": True}
    evaluate_lines(LinesSettings(**asked, lines=(4,), trials=2))
    more = evaluate_lines(LinesSettings(**asked, lines=(4, 5), trials=3, resume=True))
    assert len(prompts) == len(set(prompts)) == 6
    assert [result["trials"] for result in more["results"]] == [3, 3]
    assert json.loads((tmp_path / "out" / "lines.json").read_text()) == more


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["topics", "demo", "--data", "a.jsonl", "--topic-list", "b.txt"], "--topic-list makes new cases and --data"),
        (["lines", "demo", "--data", "a.jsonl", "--seed", "3"], "--seed has no effect on the cases of --data"),
        (["lines", "demo", "--data", "none.jsonl"], "none.jsonl cannot be read"),
        (["lines", "demo", "--lines", "0"], "--lines is 0"),
        (["topics", "demo", "--topics", "300"], "--topics is 300, and there are 240 topics"),
        (["topics", "demo", "--trials", "1"], "no prompt of topics fits: the closest takes"),
        (["topics", "demo", "--max-context", "1"], "--max-context is 1"),
        (["topics"], ""),
    ],
)
def test_mistakes_are_one_sentence(command, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *command])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_the_command_on_the_shipped_model(capsys):
    main(["eval", "lines", "demo", "--lines", "3,8", "--trials", "2", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert [(result["lines"], result["trials"] + result["skipped"]) for result in document["results"]] == [
        (3, 2),
        (8, 2),
    ]
    assert document["results"][0]["context"] < document["results"][1]["context"]

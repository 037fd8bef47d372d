"""`longlora report A B C`: the page's numbers are the files', and what cannot be compared is never drawn together."""

import json
import math
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from html_pages import Element, Page, value
from report_runs import listed, longppl, passkey, perplexities, ruler, short, whole_run, write_run
from test_report import HOSTILE, spoiled

from longlora import cli
from longlora.errors import UserError
from longlora.report.command import report
from longlora.report.costs import cost_of
from longlora.report.missing import missing
from longlora.report.models import read_models
from longlora.report.page import render
from longlora.report.reading import read_run
from longlora.settings import ReportSettings

WORSE = {"one": 1.0, "two": 1.05, "three": 1.1}
"""Three runs, and by what their perplexities are above those of the first."""

TRAINED = (26.4, 24.12, 23.31, 22.92, 23.104)


def pieces(name: str) -> dict[str, Any]:
    """A run with every evaluation, measured as the others are."""
    worse = WORSE[name]
    return whole_run() | {
        "evaluation/perplexity-trained.json": perplexities("longlora", [worse * each for each in TRAINED]),
        "evaluation/passkey.json": passkey({1024: 1.0, 4096: round(0.8 / worse, 3)}),
        "evaluation/topics.json": listed("topics", {5: 0.9, 10: round(0.5 / worse, 3), 20: None}),
        "evaluation/lines.json": listed("lines", {200: 0.25}),
        "evaluation/ruler.json": ruler({1024: 0.95, 2048: round(0.9 / worse, 3), 4096: 0.5}),
        "evaluation/short.json": short({256: 26.83, 512: 24.3712}, {256: 26.83 * worse, 512: 23.0}),
        "evaluation/longppl.json": longppl(5.5 * worse, 23 * worse),
    }


def write_runs(folder: Path, changes: dict[str, dict[str, Any]] | None = None) -> list[str]:
    """The runs' folders; `changes` are other pieces of one of them, None to leave one out."""
    for name in WORSE:
        changed = pieces(name) | (changes or {}).get(name, {})
        write_run(folder / name, {file: piece for file, piece in changed.items() if piece is not None})
    return [str(folder / name) for name in WORSE]


def page_of(paths: list[str]) -> Element:
    return Page(render(read_models(paths))).root


def section(page: Element, name: str) -> Element:
    heading = page.id(name)
    assert heading is not None
    assert heading.parent is not None
    return heading.parent


def rows_of(found: Element) -> list[list[str]]:
    return [[cell.text.strip() for cell in row.all("th") + row.all("td")] for row in found.all("tr")]


# ------------------------------------------------------------------------------------------------------- the numbers


def test_perplexity_of_all_in_one_chart_and_what_they_share_once(tmp_path: Path) -> None:
    page = page_of(write_runs(tmp_path))
    found = section(page, "perplexity")
    rows = {cells[0]: cells[1:] for cells in rows_of(found)}
    labels = ["demo, as it was", "demo, YaRN, not trained", "demo, PI, not trained", "one", "two", "three"]
    assert [name for name in rows if name not in ("model", "documents", "tokens scored")] == labels
    for name, worse in WORSE.items():
        shown = [float(cell.replace(" (best)", "")) for cell in rows[name]]
        assert shown == pytest.approx([worse * each for each in TRAINED], abs=5e-3)
        assert all("(best)" in cell for cell in rows[name]) == (name == "one")
    assert "Not to be compared" not in page.text
    drawn = [svg for svg in found.all("svg") if "perplexity" in svg["aria-label"].lower()]
    assert all(f"{name}:" in svg["aria-label"] for svg in drawn for name in WORSE)
    lines = [path for path in drawn[0].all("path") if "strong" in path.classes]
    assert len({tuple(path.classes) for path in lines}) == 3, "a colour each"


def test_the_first_sentences_hold_the_numbers(tmp_path: Path) -> None:
    page = page_of(write_runs(tmp_path))
    assert page.all("h1")[0].text == "3 models compared: one, two and three"
    said = [line.text for line in page.all("ul", "conclusion")[0].all("li")]
    assert said == [
        f"Perplexity at 4,096 tokens: 23.10 for one, {23.104 * 1.05:.2f} for two and {23.104 * 1.1:.2f} for three; "
        "310.3 for what they were made from; 28.10 for that with stretched positions, not trained.",
        "Pass keys found at 4,096 tokens: 86.7% (62 to 96) by one, 84.1% (59 to 95) by two and 81.8% (57 to 94) by "
        "three.",
        "RULER’s effective length in tokens: 2,048, of 2 tasks for one, 2,048, of 2 tasks for two and 1,024, of 2 "
        "tasks for three.",
        "At short length: one is not shown to lose anything; two regressed by 5.0% (perplexity at 256); three "
        "regressed by 10.0% (perplexity at 256).",
    ]


def test_heat_maps_stand_side_by_side_on_one_scale(tmp_path: Path) -> None:
    found = section(page_of(write_runs(tmp_path)), "retrieval")
    maps = [each for each in found.all("div", "map") if "Pass keys" in each.all("table")[0]["aria-label"]]
    assert [each.all("p")[0].text for each in maps] == list(WORSE)
    for each, worse in zip(maps, WORSE.values(), strict=True):
        share = round(0.8 / worse, 3)
        shares = (1, share, 1, share, 1, 1, 1, (2 * share + 1) / 3)
        squares = each.all("td", "heat")
        assert [float(square["style"].removeprefix("--share: ")) for square in squares] == pytest.approx(
            shares, abs=1e-3
        )
        assert [square.all("data")[0].text for square in squares] == [f"{100 * each:.0f}" for each in shares]
        assert squares[0].all("small")[0].text == "57–100", "five of five, by Wilson"
        assert rows_of(each)[0] == ["depth, by context", "1,024", "4,096"]
    (topics,) = [each for each in found.all("div", "map") if "First topics" in each.all("table")[0]["aria-label"]]
    assert topics.text.count("×") == 3, "twenty topics do not fit"
    assert "two: 10 of 30 prompts do not fit with their answers" in found.text
    caption = found.all("p", "note")[0].text
    for part in ("Trials a square: 5", "seed: 0", "keys: 1", "plain text", "1 min 2 s for two"):
        assert part in caption
    assert "20 topics take 440 tokens" in found.text


def test_ruler_short_and_longppl_tables(tmp_path: Path) -> None:
    page = page_of(write_runs(tmp_path))
    averages, every = section(page, "ruler").all("table")
    assert rows_of(averages) == [
        ["model", "1,024", "2,048", "4,096", "effective length"],
        ["one", "95.0", "90.0", "50.0", "2,048, of 2 tasks"],
        ["two", "95.0", "85.7", "50.0", "2,048, of 2 tasks"],
        ["three", "95.0", "81.8", "50.0", "1,024, of 2 tasks"],
    ]
    reached = [["best" in cell.classes for cell in row.all("td")[:3]] for row in averages.all("tr")[1:]]
    assert reached == [[True, True, False], [True, True, False], [True, False, False]]
    assert ["ruler_vt, three", "90.0", "76.8", "45.0"] in rows_of(every)
    assert "ruler_qa_squad: asks questions of SQuAD" in section(page, "ruler").text
    assert "threshold: 85.6%" in section(page, "ruler").text

    before_after = [cells for cells in rows_of(section(page, "short")) if "perplexity at 256" in cells]
    assert [cells[4] for cells in before_after] == ["unchanged", "regressed by 5.0%", "regressed by 10.0%"]
    after = [26.83 * worse for worse in WORSE.values()]
    assert [float(cells[3]) for cells in before_after] == pytest.approx(after, abs=5e-4)

    rows = section(page, "longppl").all("tr")[1:]
    assert [[value(cell) for cell in row.all("td")[:2]] for row in rows] == [
        [pytest.approx(5.5 * worse), pytest.approx(23 * worse)] for worse in WORSE.values()
    ]
    assert ["best" in row.all("td")[0].classes for row in rows] == [True, False, False]
    assert "chosen by a/judge" in section(page, "longppl").text


def test_what_training_cost(tmp_path: Path) -> None:
    cheap, dear = ({"pairs": 1e12 * share, "full_pairs": 1e12, "share": share} for share in (0.28125, 1.0))
    of = {"one": {"attention_cost": cheap}, "two": {}, "three": {"attention_cost": dear}}
    changes = {
        name: {"evaluation/summary.json": whole_run()["evaluation/summary.json"] | more} for name, more in of.items()
    }
    changes["two"]["evaluation/summary.json"]["training"] |= {"seconds": 1000.0, "tokens": 77}
    found = section(page_of(write_runs(tmp_path, changes)), "costs")
    rows = {row.all("th")[0].text: row.all("td") for row in found.all("tr")[1:]}
    assert [value(row[0]) for row in rows.values()] == [421.25, 1000.0, 421.25]
    assert [value(row[1]) for row in rows.values()] == [4915200, 77, 4915200]
    assert [value(row[2]) for row in rows.values()] == [3328599654] * 3
    assert "read different numbers of tokens" in found.text
    for name, counted in (("one", cheap), ("three", dear)):
        assert [value(cell) for cell in rows[name][4:6]] == [counted["pairs"], counted["share"]]
    assert [cell.text for cell in rows["two"][4:6]] == ["–", "–"]


def test_a_cell_of_a_study_says_what_it_cost(tmp_path: Path) -> None:
    cell = {
        "training": {"steps": 30, "seconds": 264.4, "tokens": 245760, "memory_bytes": 1319342080},
        "trainable": {"trainable": 1150208, "parameters": 5967104},
        "attention_cost": {"pairs": 12082544640, "share": 0.25},
    }
    write_run(tmp_path / "cell", {"settings.yaml": {"model": "demo"}, "evaluation/cell.json": cell})
    found = cost_of("cell", read_run(tmp_path / "cell"))
    assert (found.seconds, found.tokens, found.pairs, found.share) == (264.4, 245760, 12082544640, 0.25)


# --------------------------------------------------------------------------------- what may not be compared


@pytest.mark.parametrize(
    ("file", "other", "heading", "why"),
    [
        ("passkey", passkey({1024: 1.0, 4096: 0.5}, seed=1), "retrieval", "seed 1, not 0"),
        ("passkey", passkey({1024: 1.0}, chat=True), "retrieval", "prompts chat template, not plain text"),
        ("topics", listed("topics", {5: 1.0}, data=["5_topics.jsonl"]), "retrieval", "cases 5_topics.jsonl, not new"),
        ("ruler", ruler({1024: 0.9}, trials=3), "ruler", "trials a task and length 3, not 20"),
        ("ruler", ruler({1024: 0.9}, average_over=["ruler_vt"]), "ruler", "average over ruler_vt, not niah"),
        ("short", short({512: 3.0}, {512: 3.0}, stride=64), "short", "stride 64, not 256"),
        ("short", short({512: 3.0}, {512: 3.0}, baseline="x"), "short", "baseline x, not demo"),
        ("longppl", longppl(2.0, 3.0, data_fingerprint="other"), "longppl", "other text under the same name"),
        ("longppl", longppl(2.0, 3.0, evaluator="b/judge"), "longppl", "key tokens chosen by b/judge, not chosen by a"),
        ("perplexity-trained", perplexities("x", TRAINED, data="books"), "perplexity", "text books, not stdlib"),
        ("perplexity-trained", perplexities("x", TRAINED, stride=64), "perplexity", "stride at 256 64, not 256"),
        ("perplexity-trained", perplexities("x", TRAINED, score="window"), "perplexity", "score window, not last"),
        ("perplexity-trained", perplexities("x", (9.0,), contexts=(300,)), "perplexity", "no context was measured"),
    ],
)
def test_what_was_measured_in_another_way_stands_apart(
    tmp_path: Path, file: str, other: dict[str, Any], heading: str, why: str
) -> None:
    paths = write_runs(tmp_path, {"one": {f"evaluation/{file}.json": other}})
    page = page_of(paths)
    found = section(page, heading)
    (apart,) = [each.text for each in found.all("p", "warning") if "Not to be compared" in each.text]
    assert f"Not to be compared with the figures above: {why}" in apart
    # the two that are alike come first, and the odd one's numbers are in no picture or table with theirs
    shown = [[cell.text.strip() for cell in each.all("th")] for each in found.all("table")]
    named = [each for each in (*found.all("svg"), *found.all("table")) if each.attributes.get("aria-label")]
    shown += [re.findall(r"\w+", each["aria-label"]) for each in named]
    names = [{name for name in WORSE if any(name in words.split(", ") for words in each)} for each in shown]
    assert {"one"} in names
    # the other tasks of "retrieval" are still drawn together
    assert heading == "retrieval" or {"two", "three"} in names
    assert heading == "retrieval" or not any("one" in each and len(each) > 1 for each in names)
    measure = file.partition("-")[0]
    (again,) = [each for each in missing(read_models(paths)) if "in the way of the others" in each.what]
    assert again.commands[0].startswith(f"longlora eval {measure} {paths[0]}")


def test_text_of_the_same_name_and_length_but_other_words_is_not_drawn_together(tmp_path: Path) -> None:
    one, two = (perplexities("m", TRAINED, data_fingerprint=each) for each in ("aa", "bb"))
    for name, document in (("a", one), ("b", two)):
        write_run(tmp_path / name, {"perplexity.json": document})
    page = page_of([str(tmp_path / "a"), str(tmp_path / "b")])
    assert "Not to be compared with the figures above: other text under the same name" in page.text
    write_run(tmp_path / "b", {"perplexity.json": one})
    assert "Not to be compared" not in page_of([str(tmp_path / "a"), str(tmp_path / "b")]).text


def test_key_tokens_of_each_models_own_are_said_to_be_incomparable(tmp_path: Path) -> None:
    own = {"evaluation/longppl.json": longppl(3.0, 9.0, evaluator=None)}
    found = section(page_of(write_runs(tmp_path, dict.fromkeys(WORSE, own))), "longppl")
    assert "Each model chose its own key tokens, so the LongPPL of these rows cannot be compared" in found.text
    assert not found.all("td", "best")


# -------------------------------------------------------------------------------------------------- what is missing


def test_what_is_missing_is_named_with_the_command_that_measured_the_others(tmp_path: Path) -> None:
    """With every flag of that command, but those of one model or one call."""
    gone = {f"evaluation/{name}.json": None for name in ("passkey", "ruler", "longppl", "lines", "topics")}
    paths = write_runs(tmp_path, {"two": gone, "three": {"evaluation/passkey.json": None}})
    named = {each.what: each.commands for each in missing(read_models(paths))}
    assert named == {
        "Pass keys of two and three": [
            f"longlora eval passkey {paths[1]} {paths[2]} --trials 5 --contexts 1024,4096 --depths 3"
        ],
        "Topics of two": [f"longlora eval topics {paths[1]} --chat yes --trials 10 --topics 5,10,20"],
        "Lines of two": [f"longlora eval lines {paths[1]} --chat yes --trials 10 --lines 200"],
        "RULER of two": [
            f"longlora eval ruler {paths[1]} --tasks niah_single_1,ruler_vt --threshold 0.856 --trials 20 --bos yes"
        ],
        "LongPPL of two": [f"longlora eval longppl {paths[1]} --data stdlib --context 4096 --evaluator a/judge"],
    }
    text = section(page_of(paths), "missing").text
    assert all(command in text for commands in named.values() for command in commands)


def test_every_command_of_the_page_is_understood(tmp_path: Path) -> None:
    write_run(tmp_path / "bare", {"settings.yaml": {"model": "demo"}})
    original = passkey({1000: 0.5}, interval=500)
    for row in original["results"]:
        del row["depth"]
    write_run(tmp_path / "results", {"passkey.json": original, "lines.json": listed("lines", {200: 1.0}, seed=None)})
    for paths in ([*write_runs(tmp_path), str(tmp_path / "bare"), str(tmp_path / "results")], [str(tmp_path / "bare")]):
        commands = [command for each in missing(read_models(paths)) for command in each.commands]
        assert len(commands) >= 7
        for command in commands:
            words = shlex.split(command)
            assert words[0] == "longlora"
            assert cli.parse(words[1:])


def test_the_runs_own_perplexity_says_what_was_lost_at_short_length(tmp_path: Path) -> None:
    paths = write_runs(tmp_path, {"two": {"evaluation/short.json": None}})
    found = section(page_of(paths), "short").text
    change = 100 * (1.05 * 24.12 / 24.3712 - 1)
    assert f"regressed by {change:.1f}%" in found
    named = [each.what for each in missing(read_models(paths))]
    assert named == ["What is lost at short length of two in the way of the others"]


# ---------------------------------------------------------------------------------------------- which folders it takes


def test_folders_of_results_and_baselines(tmp_path: Path) -> None:
    one = write_runs(tmp_path)[0]
    write_run(Path(one), {"evaluation/baseline/passkey.json": passkey({1024: 0.25, 4096: 0.0})})
    several = tmp_path / "several"
    write_run(several, {"baseline/passkey.json": passkey({1024: 0.5}, model="owner/base")})
    mine = passkey({1024: 0.75}, model="owner/mine", label="owner/mine, ntk to 4,096, not trained")
    write_run(several, {"1-mine/passkey.json": mine | {"extend_to": 4096, "method": "ntk"}})
    subjects = read_models([one, str(several)])
    assert [subject.name for subject in subjects] == ["demo (baseline)", "owner/base (baseline)", "one", "1-mine"]
    assert [subject.model for subject in subjects] == ["demo", "owner/base", one, "owner/mine"]
    text = page_of([one, str(several)]).text
    assert "owner/mine, ntk to 4,096, not trained" in text
    assert f"longlora eval lines owner/mine --output {several}/1-mine --extend-to 4096 --method ntk --chat yes" in text
    assert "2 models compared: one and 1-mine" in text
    assert "Pass keys found at 1,024 tokens: 50% (27 to 73) by demo (baseline)" in text


def test_names_that_are_alike_get_their_folders(tmp_path: Path) -> None:
    for name in ("a/seed0", "b/seed0", "c"):
        write_run(tmp_path / name, {"settings.yaml": {"model": "demo"}})
    names = [each.name for each in read_models([str(tmp_path / name) for name in ("a/seed0", "b/seed0", "c")])]
    assert names == ["a/seed0", "b/seed0", "c"]


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, said in (("empty", "holds no results"), ("missing", "does not exist")):
        with pytest.raises(UserError, match=f"{path}' {said}: give run directories"):
            read_models([str(tmp_path / path)])
    run = write_runs(tmp_path)[0]
    with pytest.raises(UserError, match="'.*one' is named twice: leave one of them out"):
        read_models([run, run + "/"])
    with pytest.raises(UserError, match="MODEL is missing"):
        ReportSettings(models=())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_runs(tmp_path)
    monkeypatch.chdir(tmp_path)
    cli.main(["report", *paths])
    assert capsys.readouterr().out == "comparison.html\n"
    assert Path("comparison.html").read_text(encoding="utf-8") == render(read_models(paths))
    cli.main(["report", *paths[:2], "--output", "other.html", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (document["report"], document["models"], document["missing"]) == ("other.html", ["one", "two"], [])
    assert report(ReportSettings(models=(paths[0],), json=True)) == {"report": f"{paths[0]}/report.html"}
    assert report(ReportSettings(models=(paths[0],), output="mine.html", json=True)) == {"report": "mine.html"}
    assert Path("mine.html").read_text(encoding="utf-8") == Path(f"{paths[0]}/report.html").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"nowhere/x.html cannot be written"):
        report(ReportSettings(models=tuple(paths), output="nowhere/x.html", json=True))


def test_the_page_of_one_run_shows_its_evaluations_too(tmp_path: Path) -> None:
    page = page_of([write_runs(tmp_path)[1]])
    assert section(page, "retrieval").text.count("Pass keys found") == 1
    assert rows_of(section(page, "ruler").all("table")[0])[1] == ["two", "95.0", "85.7", "50.0", "2,048, of 2 tasks"]
    assert "regressed by 5.0%" in section(page, "short").text
    assert "LongPPL" in section(page, "longppl").text


# ------------------------------------------------------------------------------------------------- nothing breaks it


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    page = page_of(write_runs(tmp_path, {"one": {"evaluation/passkey.json": passkey({1024: 1.0}, seed=5)}}))
    assert not [tag for tag in ("script", "link", "iframe", "img", "object", "embed", "base") if page.all(tag)]
    ids = [each["id"] for each in page.all() if "id" in each.attributes]
    assert len(set(ids)) == len(ids)
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        assert len(svg["aria-label"]) > 20
    for found in page.all("table"):
        assert found.attributes.get("aria-label") or page.id(found["aria-labelledby"])
        assert all("scope" in heading.attributes for heading in found.all("th"))


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    changes = {
        "evaluation/passkey.json": passkey({1024: 1.0}, data=HOSTILE, model=HOSTILE, seed=HOSTILE, keys=HOSTILE),
        "evaluation/topics.json": listed("topics", {5: 1.0}, data=[HOSTILE]),
        "evaluation/ruler.json": ruler({1024: 1.0}, average_over=[HOSTILE])
        | {"left_out": [{"task": HOSTILE, "reason": HOSTILE}]},
        "evaluation/short.json": short({1: 2.0}, {1: 3.0}, data=HOSTILE, baseline=HOSTILE),
        "evaluation/longppl.json": longppl(1.0, 2.0, evaluator=HOSTILE, data=HOSTILE),
        "evaluation/perplexity.json": perplexities(HOSTILE, TRAINED, data=HOSTILE, model=HOSTILE),
    }
    page = page_of(write_runs(tmp_path, {"one": changes}))
    assert not page.all("script")
    assert not page.all("img")
    assert not [name for each in page.all() for name in each.attributes if name.startswith("on")]
    assert page.text.replace("\ufffd", "").count(HOSTILE.replace("\x07", "")) > 8


@pytest.mark.parametrize("seed", range(25))
def test_no_content_of_the_files_makes_it_fail(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    changes = {name: {} for name in WORSE}
    for name, changed in changes.items():
        for file, piece in pieces(name).items():
            if file.startswith("evaluation/"):
                changed[file] = spoiled(piece, rng)
    page = page_of(write_runs(tmp_path, changes))
    for shape in (each for svg in page.all("svg") for each in svg.all()):
        for name in ("x", "y", "width", "height", "fill-opacity", "cx", "cy"):
            if name in shape.attributes:
                assert math.isfinite(float(shape[name]))
    for command in (command.text for command in page.all("pre")):
        assert command.startswith("longlora eval")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"3"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    paths = write_runs(tmp_path)
    (Path(paths[1]) / "evaluation" / "passkey.json").write_bytes(content)
    page = page_of(paths)
    assert "two, evaluation/passkey.json" in section(page, "left-out").text
    assert "Pass keys of two" in section(page, "missing").text

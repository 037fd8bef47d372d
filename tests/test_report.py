"""The report: its numbers are the run's, its pictures are drawn to scale, and nothing a run holds can break it."""

import csv
import dataclasses
import importlib.resources
import io
import json
import math
import random
import re
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from html_pages import Element, Page, value
from report_runs import CONTEXTS, perplexities, plain, whole_run, write_run

from longlora import cli
from longlora.errors import UserError
from longlora.report import attention_picture
from longlora.report.models import read_models
from longlora.report.page import render, write_report
from longlora.report.recipe import OF_THIS_RUN
from longlora.report.sections import SECTIONS
from longlora.settings import PATTERNS

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}{% raw %}&amp;]]>\x07"


# -------------------------------------------------------------------------------------------------- reading the page


def page_of(folder: Path, pieces: dict[str, Any]) -> Element:
    return Page(render(read_models([write_run(folder, pieces)]))).root


def table(page: Element, name: str) -> dict[str, list[Element]]:
    """First cell of each row of the table -> the cells behind it."""
    found = page.id(f"{name}-table")
    assert found is not None
    rows = [[cell for cell in row.children if isinstance(cell, Element)] for row in found.all("tr")]
    return {row[0].text.strip(): row[1:] for row in rows}


def label_of(file: dict[str, Any], run: str = "mine") -> str:
    """What the page of the run directory `run` calls one of its perplexity files."""
    return {"base model": "demo, as it was", "longlora": run}.get(file["label"], f"demo, {file['label']}")


# ------------------------------------------------------------------------------------------------------- the numbers


def test_perplexity_table_holds_the_numbers_of_the_json_and_marks_the_best(tmp_path):
    pieces = whole_run()
    rows = table(page_of(tmp_path / "mine", pieces), "perplexity")
    files = [piece for name, piece in pieces.items() if "perplexity" in name]
    assert [value(cell) for cell in rows["model"]] == list(CONTEXTS)
    for file in files:
        cells = rows[label_of(file)]
        assert [value(cell) for cell in cells] == [result["perplexity"] for result in file["results"]]
        for cell, result in zip(cells, file["results"], strict=True):
            assert float(cell.all("data")[0].text) == pytest.approx(result["perplexity"], rel=2e-3)
            others = [r["perplexity"] for f in files for r in f["results"] if r["context"] == result["context"]]
            assert ("best" in cell.classes) == (result["perplexity"] == min(others))
    assert [cell.text for cell in rows["tokens scored"]] == ["402,113"] * 5
    assert [cell.text for cell in rows["documents"]] == ["35"] * 5
    order = [label for label in rows if label in [label_of(file) for file in files]]
    assert order == ["demo, as it was", "demo, YaRN, not trained", "demo, PI, not trained", "mine"]


def test_order_in_the_files_is_the_order_of_the_rows(tmp_path):
    pieces = whole_run()
    for place, name in enumerate(("untrained-linear", "trained", "untrained", "base")):
        pieces[f"evaluation/perplexity-{name}.json"]["order"] = place
    rows = list(table(page_of(tmp_path / "mine", pieces), "perplexity"))
    assert rows[1:5] == ["demo, PI, not trained", "mine", "demo, YaRN, not trained", "demo, as it was"]


def test_the_other_tables_hold_the_numbers_of_the_json(tmp_path):
    pieces = whole_run()
    page = page_of(tmp_path, pieces)
    summary, costs = pieces["evaluation/summary.json"], pieces["evaluation/costs.json"]

    trained = table(page, "trainable")
    groups = summary["trainable"]["groups"]
    assert [value(trained[name][0]) for name in ("embeddings", "LoRA", "norms")] == list(groups.values())
    assert "the first group’s; at the peak embeddings have 4e-5." in page.text  # which is LoRA's, as norms' is
    assert value(trained["frozen"][0]) == summary["trainable"]["parameters"] - sum(groups.values())
    assert trained["embeddings"][2].text == "4e-5"

    cost = table(page, "cost")
    for row in costs["rows"]:
        full, s2 = row["full"], row["s2"]
        time, memory = s2["seconds"] / full["seconds"], s2["memory_bytes"] / full["memory_bytes"]
        cells = [value(cell) for cell in cost[f"{row['length']:,}"][1:]]
        assert cells == [full["seconds"], s2["seconds"], time, full["memory_bytes"], s2["memory_bytes"], memory]
    longest = [float(cell["style"].removeprefix("--share: ")) for cell in page.id("cost-table").all("td", "bar")]
    most = costs["rows"][-1]["full"]
    parts = [(kind, what) for what in most for kind in ("full", "s2")]
    assert longest == pytest.approx(
        [row[kind][what] / most[what] for row in costs["rows"] for kind, what in parts], abs=1e-3
    )

    loss = {int(name.replace(",", "")): cells for name, cells in table(page, "loss").items() if name != "step"}
    recorded = {record["step"]: record for record in pieces["metrics.jsonl"] if "loss" in record}
    assert {1, 300} <= loss.keys()
    for step, cells in loss.items():
        assert value(cells[0]) == recorded[step]["loss"]
        assert value(cells[2]) == recorded[step]["learning_rate"]
    assert value(loss[300][1]) == pytest.approx(3.17)


def test_the_first_sentences_hold_the_numbers_of_the_json(tmp_path):
    page = page_of(tmp_path, whole_run())
    headline = page.all("h1")[0].text
    assert "at 4,096 tokens is 23.10 after training" in headline
    assert "the base model has 24.37 at its own 512 and 310.3 at 4,096" in headline
    (conclusion,) = page.all("ul", "conclusion")
    assert "good" in conclusion.classes
    assert f"{100 * (1 - 23.104 / 24.3712):.1f}% lower" in conclusion.text
    decisive = page.all("dl", "decisive")[0].text
    assert "over positions stretched alone (YaRN, not trained)" in decisive
    assert f"perplexity {100 * (1 - 23.104 / 28.1):.0f}% lower, from 28.10" in decisive
    (done,) = page.all("p", "done")
    for said in ("8 times", "512 to 4,096", "groups of 1,024", "rank 8", "1,150,208 of 5,865,728", "300 steps"):
        assert said in done.text


@pytest.mark.parametrize(
    ("base", "untrained", "trained", "said", "mood"),
    [
        ((24.0, 300.0), (26.0, 28.0), (24.1, 24.02), "does not gain from it", None),
        ((24.0, 300.0), (26.0, 28.0), (24.1, 27.0), "does not gain from the longer window: perplexity is 12%", "bad"),
        ((24.0, 22.0), (24.0, 22.0), (24.0, 22.5), "did not help", "bad"),
        ((24.0, 300.0), (24.0, 21.0), (24.0, 22.5), "training made it worse", None),
        ((24.0, 300.0), (24.0, 22.5), (24.0, 22.5), "training made no difference", None),
        ((24.0, math.inf), (24.0, math.nan), (24.0, 22.5), "The longer window helps", "good"),
        ((24.0, 300.0), (26.0, 28.0), (24.0, math.inf), "lower learning rate", "bad"),
        ((24.0, 300.0), (26.0, 28.0), (26.4, 23.0), "perplexity 10% higher, from 24.00", "good"),
    ],
)
def test_the_conclusion_follows_from_the_numbers(tmp_path, base, untrained, trained, said, mood):
    pieces = whole_run()
    for name, values in (("base", base), ("untrained", untrained), ("trained", trained)):
        pieces[f"evaluation/perplexity-{name}.json"] = perplexities(name, values, (512, 4096))
    del pieces["evaluation/perplexity-untrained-linear.json"]
    page = page_of(tmp_path, pieces)
    (conclusion,) = page.all("ul", "conclusion")
    assert said in conclusion.text + " ".join(each.text for each in page.all("dl", "decisive"))
    assert conclusion.classes == ["conclusion", *([mood] if mood else [])]


def sums(of_documents: Any, text: str = "one") -> dict[str, Any]:
    """Sums of documents with 100 scored tokens each, from their losses in nats a token."""
    tokens = [100] * len(of_documents)
    return {"text": text, "document_nll": [100 * nll for nll in of_documents], "document_tokens": tokens}


def with_documents(pieces: dict[str, Any], name: str, shift: float, context: int, text: str = "one") -> None:
    """Losses of four documents that differ much, all of them higher by `shift` (and a little) than they might be."""
    nll = [shift + each for each in (2.001, 3.002, 4.0, 2.997)]
    for row in pieces[f"evaluation/perplexity-{name}.json"]["results"]:
        if row["context"] == context:
            row |= sums(nll, text) | {"perplexity": math.exp(sum(nll) / 4), "low": 9.5, "high": 40.5}


def test_what_a_person_decides_by_has_intervals_over_the_same_documents(tmp_path):
    pieces = whole_run()
    for name, shift in (("base", 2.0), ("untrained", 0.05), ("untrained-linear", 1.0), ("trained", 0.0)):
        with_documents(pieces, name, shift, 4096)
    with_documents(pieces, "base", 0.0, 512)
    with_documents(pieces, "trained", 0.01, 512)
    pieces["evaluation/perplexity-trained.json"]["results"][1]["document_nll"][0] += 4  # one document alone is worse
    page = page_of(tmp_path, pieces)
    said = {row.all("dt")[0].text: row.all("dd")[0].text for row in page.all("dl", "decisive")[0].all("div")}
    assert list(said) == [
        "Gain at 4,096 tokens over positions stretched alone (YaRN, not trained)",
        "Gain at 4,096 tokens over the base model",
        "Gain at 4,096 tokens over the base model in its own window",
        "Change in the old window",
        "Cost",
    ]
    # every document fell by 0.05 nats: 1 - exp(-0.05), with no doubt left, though the documents are far from alike
    gain = said["Gain at 4,096 tokens over positions stretched alone (YaRN, not trained)"]
    assert gain.startswith("perplexity 4.9% lower (95%: 4.9% to 4.9%), from ")
    # 0.01 more in three documents and 0.05 in one: Student's t with three degrees of freedom
    mean, half = 0.02, 3.182446 * 0.01
    low, high = (100 * (math.exp(end) - 1) for end in (mean - half, mean + half))
    expected = f"perplexity {100 * (math.exp(mean) - 1):.1f}% higher (95%: {low:.1f}% to {high:.1f}%)"
    assert said["Change in the old window"].startswith(f"{expected}, from ")
    assert said["Cost"] == "7 min 1 s, 4,915,200 tokens, 3.1 GiB of memory"
    bars = charts(page, "perplexity")[0].all("line", "bar")
    assert len(bars) == 6


def test_points_of_different_texts_are_not_joined(tmp_path):
    pieces = whole_run()
    names = [name.partition("-")[2].removesuffix(".json") for name in pieces if "perplexity" in name]
    for name in names:
        for context in CONTEXTS:
            with_documents(pieces, name, 0.0, context, "one" if context < 2048 else "another")
    page = page_of(tmp_path / "apart", pieces)
    for svg in charts(page, "perplexity"):
        ends = [re.findall(r"[ML]([\d.]+),", path["d"]) for path in svg.all("path", "line")]
        assert {len(dict.fromkeys(each)) for each in ends} == {2, 3}
        assert len(ends) == 2 * len(names)
    assert "no line joins them" in page.text
    for name in names:
        for context in CONTEXTS:
            with_documents(pieces, name, 0.0, context)
    page = page_of(tmp_path / "joined", pieces)
    assert len(charts(page, "perplexity")[0].all("path", "line")) == len(names)
    assert "no line joins them" not in page.text


def test_every_table_has_its_csv(tmp_path):
    pieces = whole_run()
    with_documents(pieces, "trained", 0.0, 4096)
    page = page_of(tmp_path / "mine", pieces)
    links = [link for link in page.all("a") if link["href"].startswith("data:text/csv")]
    assert len(links) == len(page.all("table"))
    (perplexity,) = [link for link in links if link["download"] == "perplexity-table.csv"]
    rows = list(csv.DictReader(io.StringIO(unquote(perplexity["href"].partition(",")[2]))))
    by_model = {row["model"]: row for row in rows}
    assert float(by_model["demo, as it was"]["512"]) == 24.3712
    assert float(by_model["mine"]["4096 low"]) == 9.5
    assert by_model["demo, as it was"]["4096 low"] == ""


# ------------------------------------------------------------------------------------------------------ the pictures


def charts(page: Element, section: str) -> list[Element]:
    heading = page.id(section)
    assert heading is not None
    assert heading.parent
    return [svg for figure in heading.parent.all("figure") for svg in figure.all("svg")]


def scale(svg: Element, axis: str, logarithmic: bool) -> Any:
    """Value -> pixel of an axis, from two of its ticks, as a reader would take it off the picture."""
    labels = [
        (float(text.text.replace(",", "")), float(text[axis]) - (4 if axis == "y" else 0))
        for text in svg.all("text")
        if text["text-anchor"] == ("end" if axis == "y" else "middle")
        and re.fullmatch(r"[\d,.]+", text.text)
        and not text.classes
    ]
    (low, low_at), (high, high_at) = labels[0], labels[-1]
    turn = math.log if logarithmic else float
    return lambda value: low_at + (turn(value) - turn(low)) / (turn(high) - turn(low)) * (high_at - low_at)


@pytest.mark.parametrize("spread", ["narrow", "wide"])
def test_perplexity_chart_is_drawn_to_scale(tmp_path, spread):
    pieces = whole_run()
    if spread == "narrow":
        del pieces["evaluation/perplexity-base.json"], pieces["evaluation/perplexity-untrained-linear.json"]
    drawn = charts(page_of(tmp_path / "mine", pieces), "perplexity")
    assert len(drawn) == (4 if spread == "wide" else 2)  # for a page and for a phone; with a close-up where lines crowd
    for svg in drawn:
        full = "close up" not in svg["aria-label"]
        across, down = scale(svg, "x", True), scale(svg, "y", spread == "wide" and full)
        expected = {
            (label_of(file), row["context"]): row["perplexity"]
            for name, file in pieces.items() if "perplexity" in name for row in file["results"]
        }  # fmt: skip
        seen = {}
        for dot in svg.all("circle"):
            label, context = re.fullmatch(r"(.*), ([\d,]+) tokens: .*", dot.text).groups()
            seen[label, int(context.replace(",", ""))] = (float(dot["cx"]), float(dot["cy"]))
        assert (seen.keys() == expected.keys()) if full else (seen.keys() < expected.keys())
        for key, (x, y) in seen.items():
            assert x == pytest.approx(across(key[1]), abs=0.1)
            assert y == pytest.approx(down(expected[key]), abs=0.1)
        (mark,) = svg.all("line", "mark")
        assert float(mark["x1"]) == pytest.approx(across(512), abs=0.1)


def sees(cut: Any, i: int, j: int, n: int, g: int) -> bool:
    """Whether token i sees token j, from the definition of the pattern and nothing else."""
    if cut.kind == "full" or n <= g:
        return j <= i
    if cut.kind == "rolled":
        i, j = (i - g // 2) % n, (j - g // 2) % n
    blocks = {
        "plain": lambda t: t // g,
        "rolled": lambda t: t // g,
        "shifted": lambda t: (t + g - g // 2) // g,
        "dilated": lambda t: (t // (g * cut.dilation), t % cut.dilation),
        "strided": lambda t: t % math.ceil(n / g),
    }
    if cut.kind == "scatter":
        from longlora.attention.patterns import partition

        reads = partition(cut, n, g).reads  # the draw, which only the partition can tell
        drawn = any(read.query_start <= i < read.query_stop and a <= j < b for read in reads for a, b in read.pieces)
        return drawn or (j <= i and i // (g // 2) == j // (g // 2))
    return j <= i and blocks[cut.kind](i) == blocks[cut.kind](j)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_attention_picture_shows_the_pattern(tmp_path, pattern):
    from longlora.attention.patterns import head_sets

    pieces = whole_run()
    pieces["evaluation/summary.json"]["attention"]["pattern"] = pattern
    drawn = charts(page_of(tmp_path, pieces), "attention")
    layers = (0,) if pattern == "scatter" else (0, 1)
    cuts = list(dict.fromkeys(each.cut for layer in layers for each in head_sets(pattern, 4, 4, layer)))
    assert len(drawn) == len(cuts)
    for svg, cut in zip(drawn, cuts, strict=True):
        path = "".join(shape["d"] for shape in svg.all("path"))
        cells = {(int(float(y) // 12), int(float(x) // 12)) for x, y in re.findall(r"M([\d.]+) ([\d.]+)h", path)}
        assert cells == {(i, j) for i in range(16) for j in range(16) if sees(cut, i, j, 16, 4)}
        assert bool(svg.all("path", "leak")) == (cut.kind == "rolled")


def boxes(svg: Element) -> list[tuple[str, float, float, float]]:
    """Each text of a picture with its left and right end and baseline, in a sans-serif font of 12 pixels."""
    found = []
    for text in svg.all("text"):
        width = 12 * sum(0.63 if letter.isdigit() else 0.54 for letter in text.text)
        start = float(text["x"]) - {"start": 0, "middle": width / 2, "end": width}[text["text-anchor"]]
        found.append((text.text, start, start + width, float(text["y"])))
    return found


def test_no_text_of_a_picture_runs_out_of_it_or_into_another(tmp_path):
    """With close lines, long labels and neighbouring windows, on a page and on a phone."""
    pieces = whole_run()
    pieces["evaluation/summary.json"]["positions"]["previous_context"] = 1024
    for number in range(9):
        label = f"a long label, number {number}, " * 3
        pieces[f"evaluation/perplexity-other{number}.json"] = perplexities(label, [20 + number / 50] * 5)
    page = page_of(tmp_path, pieces)
    drawn = [svg for svg in page.all("svg") if svg.all("text")]
    assert len(drawn) == 2 * (2 + 2)
    for svg in drawn:
        _, _, width, height = map(float, svg["viewbox"].split())
        texts = boxes(svg)
        for at, (words, left, right, baseline) in enumerate(texts):
            assert left >= -1, words
            assert right <= width + 1, words
            assert 8 <= baseline <= height, words
            for other, other_left, other_right, other_baseline in texts[at + 1 :]:
                apart = right <= other_left or other_right <= left or abs(baseline - other_baseline) >= 12
                assert apart, f"{words!r} runs into {other!r}"


def assert_drawn_with_numbers(page: Element) -> None:
    """No place or size in a picture is NaN or infinite, which a browser would leave out without a word."""
    for shape in page.all():
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "d", "points", "viewbox"):
            assert not re.search("nan|inf", shape.attributes.get(name) or ""), (shape.tag, shape.attributes)


# ------------------------------------------------------------------------------------- what is there, what is missing


SECTION_IDS = ("perplexity", "attention", "training", "trainable", "cost", "do-it", "use-it", "settings")


def sections(page: Element) -> set[str]:
    return {name for name in SECTION_IDS if page.id(name)}


def test_a_whole_run_has_every_section_and_leaves_nothing_out(tmp_path):
    page = page_of(tmp_path, whole_run())
    assert sections(page) == set(SECTION_IDS)
    assert page.id("left-out") is None


@pytest.mark.parametrize(
    ("without", "gone", "why"),
    [
        (("evaluation/perplexity",), {"perplexity"}, "Perplexity: nothing was measured"),
        (("metrics",), {"training"}, "Loss curve: no step was recorded"),
        (("evaluation/summary",), {"trainable"}, "What trained"),
        (("evaluation/summary", "evaluation/costs"), {"trainable", "cost"}, "Cost"),
        (("adapter",), {"use-it"}, "no adapter/ or model/"),
        (("evaluation", "metrics", "adapter"), {"perplexity", "training", "trainable", "cost", "use-it"}, "Loss curve"),
    ],
)
def test_a_missing_piece_leaves_its_section_out_with_a_sentence(tmp_path, without, gone, why):
    pieces = {name: piece for name, piece in whole_run().items() if not name.startswith(without)}
    page = page_of(tmp_path, pieces)
    assert sections(page) == set(SECTION_IDS) - gone
    left_out = page.id("left-out")
    assert left_out is not None
    assert why in left_out.parent.text


def test_without_costs_the_training_time_is_still_told(tmp_path):
    pieces = whole_run()
    del pieces["evaluation/costs.json"]
    section = page_of(tmp_path, pieces).id("cost").parent
    assert {float(datum["value"]) for datum in section.all("data")} == {421.25, 11012.5, 3328599654}
    assert "longlora bench attention" in section.text


def test_settings_that_say_almost_nothing_are_enough(tmp_path):
    page = page_of(tmp_path, {"settings.yaml": {"model": "some/model"}})
    assert "some/model" in page.all("h1")[0].text
    assert sections(page) == {"settings"}


def test_a_full_fine_tuning_is_used_as_a_plain_model(tmp_path):
    pieces = {name: piece for name, piece in whole_run().items() if not name.startswith("adapter")}
    pieces["model/config.json"] = {"num_attention_heads": 4}
    snippet = page_of(tmp_path, pieces).id("snippet").text
    assert "peft" not in snippet
    assert json.dumps(str(tmp_path / "model")) in snippet


def test_measurements_that_cannot_be_compared_are_said_to_be_so(tmp_path):
    assert not re.search("with care|Not to be compared", page_of(tmp_path / "same", whole_run()).text)
    pieces = whole_run()
    pieces["evaluation/perplexity-base.json"]["stride"] = 128
    text = page_of(tmp_path / "rows", pieces).text
    assert "Not to be compared with the figures above: stride at 256 128, not 256" in text
    pieces = whole_run()
    for name in pieces:
        if "perplexity" in name:
            pieces[name]["results"][0]["documents"] = 50
    page = page_of(tmp_path / "columns", pieces)
    assert "compare the columns with care" in page.text
    assert "Not to be compared" not in page.text


@pytest.mark.parametrize("make", ["nothing", "empty", "file", "list", "broken"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, make):
    folder = tmp_path / "run"
    if make == "file":
        folder.write_text("x")
    elif make != "nothing":
        folder.mkdir()
        if make != "empty":
            (folder / "settings.yaml").write_text("- a\n- b\n" if make == "list" else "a: [\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="run"):
        write_report(folder)
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------------------------------------- bad and hostile input


def test_infinite_and_undefined_perplexities_are_named_not_drawn(tmp_path):
    pieces = whole_run()
    pieces["evaluation/perplexity-trained.json"] = perplexities("longlora", (5e9, 0.0, None, math.inf, math.nan))
    pieces["evaluation/perplexity-base.json"] = perplexities("base model", (24.0, 25.0, "?", -math.inf, 10**400))
    pieces["metrics.jsonl"] = [{"step": n, "loss": math.nan if n > 5 else 3.0} for n in range(1, 11)]
    page = page_of(tmp_path / "mine", pieces)
    cells = table(page, "perplexity")["mine"]
    assert [cell.all("data")[0].text for cell in cells] == ["5 × 10⁹", "0.00", "not a number", "∞", "not a number"]
    assert "at 4,096 tokens is not a number" in page.all("h1")[0].text
    section = page.id("perplexity").parent
    assert "mine at 2,048 tokens; mine at 4,096 tokens" in section.text
    assert "5 of the recorded losses are no numbers" in page.text
    assert_drawn_with_numbers(page)


def test_no_finite_perplexity_and_no_finite_loss_draw_no_chart(tmp_path):
    pieces = {name: piece for name, piece in whole_run().items() if "perplexity" not in name}
    pieces["evaluation/perplexity-trained.json"] = perplexities("longlora", [math.inf] * 5)
    pieces["metrics.jsonl"] = [{"step": 1, "loss": math.inf}]
    page = page_of(tmp_path, pieces)
    assert charts(page, "perplexity") == []
    assert page.id("training") is None
    assert "none of the 1 recorded losses is a number" in page.text


def with_hostile_words(value: Any) -> Any:
    """Every string that is not a name the reader goes by, made hostile; keys of free tables too."""
    if isinstance(value, dict):
        kept = ("pattern", "method", "score")
        return {
            name + (HOSTILE if name in ("lora", "torch") else ""): part if name in kept else with_hostile_words(part)
            for name, part in value.items()
        }
    if isinstance(value, list):
        return [with_hostile_words(part) for part in value]
    return HOSTILE + value if isinstance(value, str) else value


def test_hostile_words_stay_words(tmp_path):
    pieces = {name: with_hostile_words(piece) for name, piece in whole_run().items()}
    pieces["settings.yaml"]["train"] = ["lora", HOSTILE]
    for pattern in ("shift", HOSTILE):
        pieces["evaluation/summary.json"]["attention"]["pattern"] = pattern
        page = page_of(tmp_path, pieces)
        assert not page.all("script")
        assert not page.all("img")
        assert not [name for each in page.all() for name in each.attributes if name.startswith("on")]
        shown = HOSTILE.replace("\x07", "")
        text = page.text.replace("\x07", "").replace("\ufffd", "")
        assert text.count(shown) > 20
        for section in ("perplexity", "trainable", "cost", "settings"):
            assert shown in page.id(section).parent.text.replace("\x07", "").replace("\ufffd", ""), section
        assert "\x07" not in page.text  # a control character is no HTML


def test_nothing_is_loaded_from_anywhere(tmp_path):
    html = render(read_models([write_run(tmp_path, whole_run())]))
    page = Page(html).root
    assert not [tag for tag in ("script", "link", "iframe", "img", "object", "embed", "base") if page.all(tag)]
    for element in page.all():
        for name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster", "background"):
            if not element.attributes.get(name, "").startswith("data:text/csv;"):
                assert name not in element.attributes
    (style,) = page.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    (policy,) = [each for each in page.all("meta") if each.attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"].startswith("default-src 'none'")


def test_every_picture_says_in_words_what_it_shows(tmp_path):
    page = page_of(tmp_path, whole_run())
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        assert len(svg["aria-label"]) > 20
    for found in page.all("table"):
        named = found.attributes.get("aria-label") or page.id(found["aria-labelledby"])
        assert named
        assert all("scope" in heading.attributes for heading in found.all("th"))
    assert len({each["id"] for each in page.all() if "id" in each.attributes}) == sum(
        "id" in each.attributes for each in page.all()
    )


WRONG = [None, True, 0, -1, 1e308, 1e-308, math.nan, math.inf, 10**400, "", HOSTILE, [], [1, "a", {}], {}, {"a": {}}]


def spoiled(value: Any, rng: random.Random) -> Any:
    """`value` with a few of its parts, at any depth, gone or replaced by what does not belong there."""
    if rng.random() < 0.06:
        return rng.choice(WRONG)
    if isinstance(value, dict):
        return {name: spoiled(part, rng) for name, part in value.items() if rng.random() > 0.03}
    return [spoiled(part, rng) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(40))
def test_no_content_of_the_files_makes_it_fail(tmp_path, seed):
    rng = random.Random(seed)
    pieces = whole_run()
    pieces["metrics.jsonl"] = pieces["metrics.jsonl"][::20]
    pieces = {name: spoiled(plain(piece), rng) for name, piece in pieces.items()}
    for name, needed in (("settings.yaml", dict), ("metrics.jsonl", list)):
        if not isinstance(pieces[name], needed):
            pieces[name] = needed()
    assert_drawn_with_numbers(page_of(tmp_path, pieces))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"3"])
def test_a_file_that_is_no_json_is_named(tmp_path, content):
    folder = write_run(tmp_path, whole_run())
    for name in ("evaluation/perplexity-base.json", "evaluation/summary.json", "adapter/config.json"):
        (folder / name).write_bytes(content)
    (folder / "metrics.jsonl").write_bytes(content)
    text = Page(render(read_models([folder]))).root.text
    for name in ("evaluation/perplexity-base.json", "evaluation/summary.json", "adapter/config.json"):
        assert f"{name} cannot be read" in text


# -------------------------------------------------------------------------------------------- written, and used again


def test_write_report_writes_the_page_whole_and_leaves_nothing_beside_it(tmp_path):
    folder = write_run(tmp_path, whole_run())
    before = {path.name for path in folder.iterdir()}
    (folder / "report.html").write_text("an older page")
    path = write_report(str(folder))
    assert path == folder / "report.html"
    assert path.read_text(encoding="utf-8") == render(read_models([folder]))
    assert {each.name for each in folder.iterdir()} == before | {"report.html"}


def test_a_page_that_cannot_be_written_is_a_sentence_and_leaves_nothing(tmp_path):
    folder = write_run(tmp_path, whole_run())
    (folder / "report.html").mkdir()
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=r"report\.html cannot be written"):
        write_report(folder)
    assert sorted(folder.iterdir()) == before


def test_the_command_gives_the_settings_of_the_run(tmp_path):
    """Parsed by the command line itself, it comes to the same settings, but for those of this run's own model."""
    changed = {
        "method": "linear", "pattern": "dilated", "group_size": 700, "train": ["lora", "norm"], "rank": 16,
        "alpha": 32.5, "packing": "isolate", "prefer_long": True, "gradient_checkpointing": False, "lr": 3e-4,
        "norm_lr": 1e-3, "schedule": "cosine", "contexts": [512, 4096], "batch": 4, "seed": 7, "max_documents": 9,
    }  # fmt: skip
    own = {"data": ["a folder", "b"], "text_field": "body", "cache": "/tmp/x", "revision": "abc", "resume": True}
    pieces = whole_run()
    pieces["settings.yaml"] |= changed | own
    command = page_of(tmp_path, pieces).id("command").text
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["longlora", "extend", "YOUR_MODEL"]
    _, parsed = cli.parse(words[1:])

    def flat(settings: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for field in dataclasses.fields(settings):
            part = getattr(settings, field.name)
            found |= flat(part) if dataclasses.is_dataclass(part) else {field.name: plain(part)}
        return found

    recorded = {name: plain(value) for name, value in pieces["settings.yaml"].items()}
    compared = {name: part for name, part in flat(parsed).items() if name not in OF_THIS_RUN}
    assert compared == {name: recorded[name] for name in compared}
    assert flat(parsed)["context"] == 4096
    assert flat(parsed)["data"] == ["YOUR_DOCUMENTS"]
    assert "--seed 7" in command
    assert "--weight-decay" not in command  # as it comes, and so not said


def test_the_python_that_it_shows_gives_the_trained_model(tmp_path, tiny_model, tiny_tokenizer):
    import torch

    from longlora.model.adapters import add_adapters
    from longlora.model.positions import extend_positions
    from longlora.model.saving import save_adapter

    torch.manual_seed(0)
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    extend_positions(model, 256, "yarn")
    model = add_adapters(model, rank=2, train=("norm", "embed"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    run = tmp_path / "a \"run\" of 'mine'"
    run.mkdir()
    save_adapter(model, run / "adapter", tiny_tokenizer())
    (run / "settings.yaml").write_text(f"model: {tmp_path / 'base'}\ncontext: 256\n")
    names: dict[str, Any] = {}
    exec(Page(render(read_models([run]))).root.id("snippet").text, names)

    tokens = torch.randint(0, 97, (1, 200))
    with torch.no_grad():
        expected, shown = (each.eval()(input_ids=tokens).logits for each in (model, names["model"]))
    torch.testing.assert_close(shown, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(expected, base(input_ids=tokens).logits, atol=0.1)


def test_an_adapter_on_an_adapter_is_to_be_merged(tmp_path):
    pieces = whole_run()
    pieces["adapter/adapter_config.json"]["base_model_name_or_path"] = str(tmp_path / "below")
    pieces["below/adapter_config.json"] = {}
    page = page_of(tmp_path, pieces)
    assert page.id("snippet") is None
    merge = shlex.split(page.id("merge").text)
    assert cli.parse(merge[1:])[1].model == str(tmp_path)


def test_every_section_has_its_template_in_the_package():
    templates = importlib.resources.files("longlora.report") / "templates"
    for name in [*(f"{section}.html.j2" for section in SECTIONS), "report.html.j2", "style.css"]:
        assert (templates / name).is_file()


def test_the_picture_keeps_the_groups_share_of_the_context():
    for group, expected in ((1024, 4), (4096, 16), (2048, 8), (1, 2), (9000, 16)):
        assert attention_picture.group_in_picture(group, 4096) == expected

"""The study of a pretrained model: each arm once, on one text, compared by document and prompt; it goes on."""

import json

import pytest

from longlora.errors import UserError
from longlora.reproduction import real_model as study
from longlora.reproduction.command import reproduce
from longlora.settings import CorpusSettings, ExtendSettings, PositionSettings, ReproduceSettings


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for kind, count in (("train", 6), ("validation", 3)):
        (folder / kind).mkdir()
        for number in range(count):
            lines = (f"def value_{n}(x):\n    return x * {n + number}\n" for n in range(number, number + 52))
            (folder / kind / f"{number}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(study, "DEPTHS", 2)
    monkeypatch.setattr(study, "TRIALS", 1)
    monkeypatch.setattr(study, "DOCUMENTS", 3)
    monkeypatch.setattr(study, "find_spec", lambda name: None)


def settings(documents, tmp_path, **more):
    return ReproduceSettings(
        name="real-model",
        data=(str(documents / "train"),),
        evaluation_data=(str(documents / "validation"),),
        context=640,
        steps=2,
        batch=1,
        output=str(tmp_path / "out"),
        json=True,
        **more,
    )


def test_arms_are_run_once_and_compared_on_one_text(documents, tmp_path, small, monkeypatch):
    only = ("base", "yarn", "yarn-best", "yarn-full")
    made = reproduce(settings(documents, tmp_path, only=only))
    arms = {arm["name"]: arm for arm in made["arms"]}
    assert list(arms) == ["base", "yarn", "yarn-best", "yarn-full"]
    assert made["left"] == []
    assert made["missing"] == ["ruler, which needs longlora[eval]"]
    for name, arm in arms.items():
        assert [point["context"] for point in arm["perplexity"]] == [128, 512, 640]
        assert [point["context"] for point in arm["passkey"]] == [256, 512, 576, 640]
        assert all(point["trials"] == 2 for point in arm["passkey"])
        assert all(point["low"] < point["perplexity"] < point["high"] for point in arm["perplexity"])
        assert [point["tokens"] for point in arm["perplexity"]] == [
            point["tokens"] for point in arms["base"]["perplexity"]
        ]
        compared = name not in ("base", "yarn-full")
        assert all((point["change"] is not None) == compared for point in arm["perplexity"] + arm["passkey"])

    # what a change is, from the files themselves
    def read(name):
        return json.loads((tmp_path / "out" / "arms" / name / "evaluation" / "perplexity.json").read_text())["results"]

    own, full = read("yarn-best")[-1], read("yarn-full")[-1]
    assert arms["yarn-best"]["perplexity"][-1]["change"]["value"] == pytest.approx(
        own["perplexity"] / full["perplexity"] - 1
    )
    assert own["text"] == full["text"]
    assert arms["yarn-best"]["pairs"] < arms["yarn-full"]["pairs"]
    page = (tmp_path / "out" / "real-model.md").read_text()
    assert "YaRN, a third of the layers full" in page
    assert len((tmp_path / "out" / "real-model.csv").read_text().splitlines()) == 1 + 4 * (3 + 4)

    def again(*_):
        raise AssertionError("a finished arm is not run again")

    monkeypatch.setattr(study, "run_job", again)
    monkeypatch.setattr(study, "MEASURES", dict.fromkeys(("perplexity", "passkey"), again))
    assert reproduce(settings(documents, tmp_path, only=only))["arms"] == made["arms"]


def test_what_time_did_not_allow_is_named(documents, tmp_path, small):
    made = reproduce(settings(documents, tmp_path, only=("base", "yarn-best"), minutes=0.0))
    assert made["left"][:2] == ["perplexity of base", "perplexity of yarn-best"]
    assert "Not run yet" in (tmp_path / "out" / "real-model.md").read_text()


def test_the_arms_are_what_they_say():
    known = study.arms(60)
    positions, corpus = PositionSettings(context=16384), CorpusSettings(data=("stdlib",))
    base = ExtendSettings(model="demo", output="x", positions=positions, corpus=corpus)
    trained = {name: arm.cell(base, 0).settings.attention for name, arm in known.items() if arm.trained}
    assert known["yarn-full-pairs"].steps == pytest.approx(1 / 3 + 2 / 3 / 4)
    assert trained["ntk-best-last"].full_attention_steps == 6
    assert known["ntk-best-last"].method == "ntk"
    assert trained["yarn-shift"].tokens_per_group(16384) == 4096
    assert trained["yarn-full"].pattern == "full"
    assert next(iter(known)) == "base"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"only": ("yarn-bset",)}, ["yarn-bset", "Did you mean 'yarn-best'?"]),
        ({"seeds": (0, 1)}, ["--seeds", "no effect"]),
        ({"jobs": 2}, ["--jobs"]),
    ],
)
def test_mistakes(documents, tmp_path, more, words):
    with pytest.raises(UserError) as caught:
        reproduce(settings(documents, tmp_path, **more))
    assert [word for word in words if word not in str(caught.value)] == []

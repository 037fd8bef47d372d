"""What `longlora extend` measures for so many forward tokens."""

import pytest

from longlora.evaluation.budget import affordable
from longlora.evaluation.windows import windows
from longlora.settings import AttentionSettings, CorpusSettings, ExtendSettings, PerplexitySettings, PositionSettings
from longlora.settings import TrainingSettings as Training

CONTEXTS = (4096, 8192, 16384, 32768)


@pytest.mark.parametrize("budget", [10**4, 10**6, 10**7, 7 * 10**7, 10**9])
def test_within_the_budget(budget: int) -> None:
    lengths = [40_000 + 7_000 * number for number in range(60)] + [3000]
    found = affordable(lengths, PerplexitySettings(contexts=CONTEXTS), budget)
    assert [way.contexts for way in found.ways] == [(context,) for context in CONTEXTS]
    assert {way.min_document_tokens for way in found.ways} == {32768}
    (documents,) = {way.max_documents for way in found.ways}
    read = sum(
        window.end - window.begin
        for way in found.ways
        for length in lengths[:documents]
        for window in windows(min(length, found.document_tokens or length), way.contexts[0], way.stride, way.score)
    )
    assert found.tokens_read == read
    assert read <= budget or documents == 2
    assert documents >= 2


def test_what_it_buys() -> None:
    """The paper's training, 1,000 steps of 64 rows of 32,768: a tenth of it in three measurements."""
    lengths = [200_000] * 100
    settings = PerplexitySettings(contexts=CONTEXTS)
    paper = affordable(lengths, settings, 1000 * 64 * 32768 // 30)
    assert [way.stride for way in paper.ways] == [512, 1024, 2048, 4096]
    assert paper.document_tokens == 65536
    # 121 + 57 + 25 + 9 windows of 4,096 to 32,768 tokens: 1,667,072 tokens a document
    assert paper.ways[0].max_documents == 1000 * 64 * 32768 // 30 // 1_667_072 == 41
    scarce = affordable(lengths, settings, 4_000_000)
    assert [way.stride for way in scarce.ways] == [context - 1 for context in CONTEXTS], (
        "each token is still scored once"
    )
    assert scarce.ways[0].max_documents == 15
    plenty = affordable(lengths, settings, 10**10)
    assert (plenty.document_tokens, plenty.ways[0].max_documents) == (None, 100)
    own = affordable(lengths, PerplexitySettings(contexts=CONTEXTS, stride=256, max_documents=3), 10**12)
    assert ({way.stride for way in own.ways}, own.ways[0].max_documents) == ({256}, 3)


def test_a_tenth_of_what_is_trained() -> None:
    given = {
        "model": "demo",
        "output": "x",
        "positions": PositionSettings(context=4096),
        "attention": AttentionSettings(),
        "corpus": CorpusSettings(data=("stdlib",)),
        "training": Training(steps=100, batch=8),
    }
    assert ExtendSettings(**given).tokens_to_evaluate() == 100 * 8 * 4096 // 10
    assert ExtendSettings(**given, evaluation_tokens=5).tokens_to_evaluate() == 5
    assert ExtendSettings(**given, perplexity=PerplexitySettings(stride=256)).tokens_to_evaluate() > 10**12


def test_the_last_tokens_alone() -> None:
    settings = PerplexitySettings(contexts=(2048, 8192, 16384), last_tokens=4096)
    found = affordable([20_000] * 5, settings, 3 * (16 * 2048 + 8192 + 16384))
    assert [(way.contexts, way.stride) for way in found.ways] == [((2048,), 256), ((8192,), 4096), ((16384,), 4096)]
    assert {(way.max_documents, way.min_document_tokens, way.last_tokens) for way in found.ways} == {(3, 16384, 4096)}
    assert found.tokens_read == 3 * (16 * 2048 + 8192 + 16384)

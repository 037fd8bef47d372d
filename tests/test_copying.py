"""Distances of copies against a naive search; perplexity by distance against full logits; recall on made-up models."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora.errors import UserError
from longlora.evaluation.copying import CUE, PASSAGE, copy_distances, perplexity_by_distance, recall, repeated_passages
from longlora.evaluation.perplexity import perplexity
from longlora.settings import PerplexitySettings


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 5))
def test_copy_distance_is_that_of_the_nearest_same_n_gram(ids, n):
    expected = []
    for at in range(len(ids)):
        gram = ids[at - n + 1 : at + 1] if at >= n - 1 else None
        places = [back for back in range(n - 1, at) if gram is not None and ids[back - n + 1 : back + 1] == gram]
        expected.append(at - places[-1] if places else 0)
    assert copy_distances(np.array(ids), n).tolist() == expected


def test_perplexity_by_distance_is_a_partition_of_perplexity_and_equals_full_logits(tiny_model):
    model = tiny_model("llama", max_position_embeddings=64).eval()
    generator = np.random.default_rng(0)
    documents = []
    for _ in range(2):
        text = generator.integers(0, 50, 150)
        text[70:90], text[110:130] = text[10:30], text[75:95]
        documents.append(text)
    context, stride, edges, n = 64, 16, (20, 40), 3
    found = perplexity_by_distance(model, documents, context, stride, edges, n)
    assert [(sort.nearest, sort.farthest) for sort in found] == [(0, 1), (1, 20), (20, 40), (40, None)]

    sums, counts = np.zeros(4), np.zeros(4, dtype=int)
    for ids in documents:
        for target in range(1, len(ids)):
            # the windows of `--score last`, from the definition: the first one that reaches the target
            window = max(0, math.ceil((target + 1 - context) / stride))
            begin = window * stride
            read = ids[begin : target + 1]
            logits = model(torch.tensor(read[None])).logits[0, -2].double()
            loss = -logits.log_softmax(-1)[ids[target]].item()
            gram = read[-n:].tolist()
            backs = [d for d in range(1, len(read) - n + 1) if read[len(read) - n - d : len(read) - d].tolist() == gram]
            # only the nearest copy in the whole document counts; one outside the window is none
            earlier = [d for d in range(1, target - n + 2) if ids[target - n + 1 - d : target + 1 - d].tolist() == gram]
            distance = backs[0] if backs and backs[0] == earlier[0] else 0
            sort = 0 if distance == 0 else 1 if distance < 20 else 2 if distance < 40 else 3
            sums[sort] += loss
            counts[sort] += 1
    assert [sort.tokens for sort in found] == counts.tolist()
    assert counts[3] > 0
    for sort, nll in zip(found, sums, strict=True):
        assert sort.nll == pytest.approx(nll, rel=1e-5)
        assert sort.perplexity is None or sort.perplexity == pytest.approx(math.exp(nll / sort.tokens), rel=1e-5)
    (whole,) = perplexity(model, documents, PerplexitySettings(contexts=(context,), stride=stride), progress=False)
    assert whole.tokens == counts.sum()
    assert whole.nll == pytest.approx(sum(sort.nll for sort in found) / whole.tokens, rel=1e-5)


class Copier(torch.nn.Module):
    """Predicts what followed the nearest earlier place of the last three tokens within `reach`, else token 0."""

    def __init__(self, reach):
        super().__init__()
        self.reach, self.anything = reach, torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, logits_to_keep, use_cache):
        assert not use_cache
        ids = input_ids[0].tolist()
        predicted = []
        for at in range(len(ids)):
            last = ids[at - 2 : at + 1]
            backs = [b for b in range(at - 1, max(1, at - self.reach - 1), -1) if ids[b - 2 : b + 1] == last]
            predicted.append(ids[backs[0] + 1] if backs else 0)
        logits = torch.nn.functional.one_hot(torch.tensor(predicted), 100_000).float()[None, -logits_to_keep:]
        return type("Output", (), {"logits": logits})


def unlike_documents():
    """Documents of tokens that never repeat, so that only a repeated passage can be copied."""
    return [np.arange(1 + 2000 * number, 2001 + 2000 * number) for number in range(6)]


def test_recall_is_one_within_the_reach_of_the_model_and_none_beyond_it():
    found = recall(Copier(reach=600), unlike_documents(), (100, 500, 700, 1200), 9, 0, 2048)
    assert [(point.distance, point.accuracy, point.trials) for point in found] == [
        (100, 1.0, 9),
        (500, 1.0, 9),
        (700, 0.0, 9),
        (1200, 0.0, 9),
    ]


def test_repeated_passages_stand_at_the_distance_and_fit_the_context():
    for distance in (PASSAGE, 100, 777, 1500, 1900):
        rows = repeated_passages(unlike_documents(), distance, 20, 3, 2048)
        assert sum(len(begins) for _, begins in rows) == 20
        for row, begins in rows:
            assert len(row) <= 2048
            assert begins[-1] + PASSAGE == len(row)
            for begin in begins:
                assert np.array_equal(row[begin : begin + PASSAGE], row[begin - distance : begin - distance + PASSAGE])
        again = repeated_passages(unlike_documents(), distance, 20, 3, 2048)
        assert all(np.array_equal(a[0], b[0]) for a, b in zip(rows, again, strict=True))
    assert CUE < PASSAGE


def test_a_distance_that_does_not_fit_and_documents_that_are_too_short_are_named():
    with pytest.raises(UserError, match=r"distance 2,001: it must be from 48 to 2,000 tokens"):
        repeated_passages(unlike_documents(), 2001, 1, 0, 2048)
    with pytest.raises(UserError, match=r"no document has the 1,048 tokens"):
        repeated_passages([np.arange(900)], 1000, 1, 0, 2048)

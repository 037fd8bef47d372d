"""Which documents are kept away from training, and that none of their tokens is trained on."""

import numpy as np
import pytest

from longlora.corpus.holding_out import held_out_documents
from longlora.corpus.packing import describe, pack
from longlora.corpus.tokens import TokenizedCorpus


def corpus_of(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    names = [f"document-{number}" for number in range(len(lengths))]
    return TokenizedCorpus(np.arange(offsets[-1], dtype=np.uint32), offsets, names, int(offsets[-1]) - 1)


def test_one_long_document_in_sixteen_is_held_out():
    corpus = corpus_of([10] * 100 + [50] * 64)
    chosen = held_out_documents(corpus, context=40)
    assert len(chosen) == 4
    assert chosen.min() >= 100


def test_the_choice_goes_by_name_not_by_place():
    corpus = corpus_of([50] * 40)
    names = {corpus.names[index] for index in held_out_documents(corpus, 40)}
    backwards = TokenizedCorpus(corpus.tokens, corpus.offsets, corpus.names[::-1], corpus.largest_token)
    assert {backwards.names[index] for index in held_out_documents(backwards, 40)} == names


@pytest.mark.parametrize("documents", [1, 2, 3])
def test_few_documents_are_all_trained_on(documents):
    assert len(held_out_documents(corpus_of([50] * documents), 40)) == 0


def test_short_documents_serve_where_long_ones_are_too_few():
    assert len(held_out_documents(corpus_of([50, 10, 10, 10, 10]), 40)) == 1


@pytest.mark.parametrize("packing", ["concatenate", "isolate"])
def test_no_held_out_token_is_in_a_training_row(packing):
    corpus = corpus_of([7, 30, 45, 12, 60, 33, 41, 52])
    kept = held_out_documents(corpus, 20)
    chosen = np.setdiff1d(np.arange(len(corpus)), kept)
    rows = pack(corpus, documents=chosen, context=20, packing=packing)
    seen = {int(t) for row in (rows[i] for i in range(len(rows))) for t in row["input_ids"][row["labels"] != -100]}
    held = {int(t) for index in kept for t in corpus.document(index)}
    assert not seen & held
    facts = describe(rows)
    assert facts["tokens"] == sum(len(corpus.document(index)) for index in chosen)
    assert facts["documents"] == len(chosen)

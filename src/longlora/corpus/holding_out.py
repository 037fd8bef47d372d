"""Documents kept away from training, to measure on."""

import zlib

import numpy as np

from longlora.corpus.tokens import TokenizedCorpus

ONE_IN = 16
"""One long document in this many is held out."""

FEWEST = 4
"""With fewer documents than this none is held out: it would be too much of the data."""

MOST = 256
"""No more documents than this are held out."""


def held_out_documents(corpus: TokenizedCorpus, context: int) -> np.ndarray:
    """Indices, ascending, of the documents to measure on; empty when there are too few to spare one.

    Chosen by the CRC-32 of the name, so that a file stays on its side when others come or go, and among the documents
    of at least `context` tokens where there are enough: only those can be measured at that context.
    """
    indices = np.arange(len(corpus))
    long = indices[np.diff(corpus.offsets) >= context]
    candidates = long if len(long) >= FEWEST else indices
    if len(candidates) < FEWEST:
        return candidates[:0]
    checksums = np.fromiter(
        (zlib.crc32(corpus.names[index].encode()) for index in candidates), np.uint32, len(candidates)
    )
    by_name = candidates[np.argsort(checksums, kind="stable")]
    return np.sort(by_name[: min(max(1, len(candidates) // ONE_IN), MOST)])

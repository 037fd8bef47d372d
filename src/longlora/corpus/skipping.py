"""Positions that skip, so that short rows reach over a long context (PoSE, arXiv 2309.10400, section 3).

A row of N tokens is cut in two at a random place, and the second chunk is moved on by a random number of positions:

    positions   0 1 2 3 4 | 19 20 21          N = 8, context 32

Each distance below the context comes up between some pair of tokens, at the cost of rows of N tokens.
"""

import random

import numpy as np


def skipped_positions(length: int, context: int, seed: str) -> np.ndarray:
    """(length,) int64 positions, rising, below `context`: two chunks, the second moved on; equal seeds skip alike.

    >>> skipped_positions(6, 100, "0")
    array([ 0,  1,  2, 13, 14, 15])
    """
    generator = random.Random(seed)
    cut = generator.randint(1, length)
    skip = generator.randint(0, context - length)
    positions = np.arange(length, dtype=np.int64)
    positions[cut:] += skip
    return positions

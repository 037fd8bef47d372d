"""Examples of very different lengths packed into rows, each of them kept whole and apart from the others.

Three examples `aaaaaa`, `bbb` and `cc` (an answer in capitals) at a context of 6; `x` is a label of -100:

    input_ids     a a a a A A | b b B c C
    labels        x x x x A A | x x B x C
    position_ids  0 1 2 3 4 5 | 0 1 2 0 1

Attention and positions begin again with each example, so that S2-Attn sees each by itself and one of at most a group
of tokens gets full attention. A row is as long as what is in it: padding is only made for rows that share a batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from longlora.corpus.conversations import Example
from longlora.corpus.packing import IGNORED, best_fit_decreasing


class PackedExamples(Dataset[dict[str, Tensor]]):
    """Rows of whole examples."""

    def __init__(self, examples: Sequence[Example], rows: Sequence[Sequence[int]]) -> None:
        """
        Args:
            examples: the examples.
            rows: which of them each row is made of.
        """
        self.examples, self.rows = examples, rows
        self.tokens = sum(len(examples[index].tokens) for row in rows for index in row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Row `index`: `input_ids`, `labels` and `position_ids`, (n,) int64.

        Raises:
            IndexError: there is no such row.
        """
        examples = [self.examples[each] for each in self.rows[index]]
        row = {
            "input_ids": [example.tokens.astype(np.int64) for example in examples],
            "labels": [example.labels(IGNORED) for example in examples],
            "position_ids": [np.arange(len(example.tokens)) for example in examples],
        }
        return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in row.items()}


def pack_examples(examples: Sequence[Example], context: int, seed: int, together: bool = True) -> PackedExamples:
    """Rows of at most `context` tokens by best-fit decreasing, in an order shuffled with `seed`.

    Args:
        examples: each of at most `context` tokens.
        context: most tokens of a row.
        seed: of the shuffle, which also decides which examples of one length share a row.
        together: several examples may share a row; otherwise each has its own.
    """
    generator = np.random.default_rng(seed)
    if not together:
        return PackedExamples(examples, [[index] for index in generator.permutation(len(examples)).tolist()])
    order = generator.permutation(len(examples))
    row_of_place = best_fit_decreasing(np.array([len(examples[index].tokens) for index in order]), context)
    rows: list[list[int]] = [[] for _ in range(row_of_place.max() + 1)]
    for index, row in zip(order.tolist(), row_of_place.tolist(), strict=True):
        rows[row].append(index)
    return PackedExamples(examples, [rows[row] for row in generator.permutation(len(rows))])


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch (B, n) of rows of several lengths; where they differ there is padding, and a mask that says so."""
    batch = {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=padding)
        for name, padding in (("input_ids", 0), ("labels", IGNORED), ("position_ids", 0))
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    if (lengths != lengths[0]).any():
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch

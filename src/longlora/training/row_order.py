"""The rows of each optimiser step: the same whatever the number of processes, and each row once an epoch."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from longlora.corpus.packing import IGNORED


class FilledUp(Dataset[dict[str, Tensor]]):
    """`rows`, and behind the last of them one that nothing is learned from."""

    def __init__(self, rows: Dataset[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(cast(Any, self.rows))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < len(self):
            return self.rows[index]
        row = dict(self.rows[0])
        labels = row.get("labels", row["input_ids"])
        return row | {"labels": torch.full_like(labels, IGNORED)}


class RowOrder(Sampler[int]):
    """Indices of an epoch, shuffled as Accelerate's seeded sampler does, filled up to whole batches of all processes.

    Without the filling the processes would be given the first rows again in the last step of an epoch.

    Args:
        rows: how many there are; `rows` itself is the index of the empty one.
        together: rows that all processes hold at a time.
        seed: of the order, with the epoch; None takes the rows as they stand.
        epoch: says which epoch begins.
        device_batch: rows that a process is given at a time, neighbours in this order.
        shared_by: neighbouring processes that are given the same ones.
    """

    def __init__(
        self,
        rows: int,
        together: int,
        seed: int | None,
        epoch: Callable[[], int],
        device_batch: int = 1,
        shared_by: int = 1,
    ) -> None:
        self.rows, self.together, self.seed, self.epoch = rows, together, seed, epoch
        self.device_batch, self.shared_by = device_batch, shared_by

    def __len__(self) -> int:
        return -(-self.rows // self.together) * self.together * self.shared_by

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.rows))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + self.epoch())
            order = torch.randperm(self.rows, generator=generator).tolist()
        order += [self.rows] * (len(self) // self.shared_by - self.rows)
        for first in range(0, len(order), self.device_batch):
            yield from order[first : first + self.device_batch] * self.shared_by

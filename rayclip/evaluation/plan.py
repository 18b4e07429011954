"""What is still to do: shards of the samples that no result file holds yet."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayclip.evaluation.cell import Cell
from rayclip.store import Store


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Some samples of a cell, by position in the data set; small enough to lose."""

    cell: Cell
    positions: tuple[int, ...]

    @property
    def name(self) -> str:
        """Result file: first and last position, and a hash of all, so that no two sets of samples share a file."""
        digest = hashlib.sha256(np.asarray(self.positions, dtype=np.int64).tobytes()).hexdigest()[:8]
        return f"cells/{self.cell.id}/{self.positions[0]:08d}-{self.positions[-1]:08d}-{digest}.parquet"

    @property
    def cost(self) -> int:
        return self.cell.cost * len(self.positions)


def chosen_positions(count: int, limit: int | None) -> np.ndarray:
    """All positions, or `limit` of them at even distances: every part of a file that is sorted by class is met."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit


def missing_shards(cell: Cell, positions: Sequence[int] | np.ndarray, store: Store, shard_size: int) -> list[Shard]:
    """The positions that no result file of the cell holds, cut into shards. Any shard size resumes any other's work."""
    done = store.read_tables(store.names(f"cells/{cell.id}", ".parquet"), ["position"])
    have = set() if done is None else set(done["position"].to_pylist())
    todo = [int(p) for p in positions if p not in have]
    return [Shard(cell=cell, positions=tuple(todo[i : i + shard_size])) for i in range(0, len(todo), shard_size)]

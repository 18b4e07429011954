"""Plan the outstanding work: shards of the samples that no result file holds yet."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rayclip.evaluation.cell import Cell, positions_of
from rayclip.evaluation.costs import Costs
from rayclip.evaluation.saving import can_save, parts_of, saved_positions
from rayclip.evaluation.schedule import Queue
from rayclip.store import Store

Writes = Literal["verdicts", "both", "images"]  # what a shard leaves: verdicts, adversarial images, or both

_LARGE, _SMALL = 1 / 4, 1 / 48  # share of each worker's total time: the longest shards, and those for the end
_TAIL = 1 / 3  # share of a cell's samples that are cut into small shards


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Some samples of a cell, by position in the data set; small enough that losing one costs little."""

    cell: Cell
    positions: tuple[int, ...]
    writes: Writes = "verdicts"

    @property
    def name(self) -> str:
        """Return the result file, named by first and last position and a hash of all: no two sets share it."""
        return f"cells/{self.cell.id}/{self._file}"

    @property
    def images_name(self) -> str:
        """Return the file of its saved images."""
        return f"{parts_of(self.cell)}/{self._file}"

    @property
    def _file(self) -> str:
        digest = hashlib.sha256(np.asarray(self.positions, dtype=np.int64).tobytes()).hexdigest()[:8]
        return f"{self.positions[0]:08d}-{self.positions[-1]:08d}-{digest}.parquet"


@dataclass(frozen=True, kw_only=True)
class Shards:
    """A lazy sequence of shards: the outstanding samples of a cell, `size` per shard.

    Cells without any result share one array of positions: a million shards take a few megabytes.
    """

    cell: Cell
    positions: np.ndarray
    size: int
    writes: Writes = "verdicts"

    def __len__(self) -> int:
        return -(-len(self.positions) // self.size)

    def __getitem__(self, number: int) -> Shard:
        if not 0 <= number < len(self):
            raise IndexError(number)
        mine = self.positions[number * self.size : (number + 1) * self.size]
        return Shard(cell=self.cell, positions=tuple(mine.tolist()), writes=self.writes)

    def __iter__(self) -> Iterator[Shard]:
        return (self[number] for number in range(len(self)))

    def queue(self, seconds: float) -> Queue:
        """Return these shards as a queue for the schedule, at so many expected seconds per sample.

        A worker keeps loaded the model, and the model with a class set.
        """
        cell = self.cell
        victim = (cell.protocol.template, cell.protocol.resize, cell.scorer.describe(), cell.data_fingerprint)
        return Queue(
            samples=len(self.positions), size=self.size, needs=(cell.model_fingerprint, victim), seconds=seconds
        )


def record_name(cell: Cell) -> str:
    """Return the name of the file that describes a cell."""
    return f"cells/{cell.id}/cell.json"


def chosen_positions(count: int, limit: int | None) -> np.ndarray:
    """Return all positions, or `limit` evenly spaced ones, so that a file sorted by class is sampled throughout."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit


def missing_shards(cell: Cell, positions: Sequence[int] | np.ndarray, store: Store, shard_size: int) -> Shards:
    """Return shards of the positions that no result file of the cell holds, of whatever shard size."""
    done = store.read_tables(store.names(f"cells/{cell.id}", ".parquet"), {"position": int})
    left = np.asarray(positions)
    if done is not None:
        left = left[~np.isin(left, done["position"].to_numpy())].astype(np.int32)
    return Shards(cell=cell, positions=left, size=shard_size)


def outstanding(
    cells: Sequence[Cell],
    positions: Mapping[str, np.ndarray],
    store: Store,
    shard_size: int,
    *,
    save_images: bool = False,
) -> list[Shards]:
    """Return the missing shards of each unfinished cell, at its positions (`positions_of`); two names of one model are
    one cell.

    Args:
        save_images: whether a cell is unfinished, too, as long as adversarial images have not been saved.
    """
    found = []
    for cell in {cell.id: cell for cell in cells}.values():
        wanted = positions_of(cell, positions)
        judging = missing_shards(cell, wanted, store, shard_size)
        if save_images and can_save(cell):
            saved, judged = saved_positions(cell, store), np.setdiff1d(wanted, judging.positions)
            left = judged[:0] if saved is None else judged[~np.isin(judged, saved)].astype(np.int32)
            found.append(Shards(cell=cell, positions=left, size=shard_size, writes="images"))
            judging = replace(judging, writes="both")
        found.append(judging)
    return [shards for shards in found if len(shards)]


def missing_samples(work: Sequence[Shards]) -> dict[str, int]:
    """Return the number of samples to do of each cell, by its id; those that are only to be saved included."""
    found: dict[str, int] = {}
    for shards in work:
        found[shards.cell.id] = found.get(shards.cell.id, 0) + len(shards.positions)
    return found


def resized(work: Sequence[Shards], size: int) -> list[Shards]:
    """Return the work with at most `size` samples per shard."""
    return [replace(shards, size=size) for shards in work]


def cut(work: Sequence[Shards], costs: Costs, workers: int, smallest: int) -> list[Shards]:
    """Return the work with smaller shards where they would be long compared to each worker's total (`cut_cells`); of at
    least `smallest` samples, to fill a batch."""
    samples = [len(shards.positions) for shards in work]
    seconds = [costs.seconds(shards.cell) for shards in work]
    pieces = cut_cells(samples, seconds, [shards.size for shards in work], workers, smallest)
    found = []
    for shards, parts in zip(work, pieces, strict=True):
        start = 0
        for count, size in parts:
            found.append(replace(shards, positions=shards.positions[start : start + count], size=size))
            start += count
    return found


def cut_cells(
    samples: Sequence[int], seconds: Sequence[float], sizes: Sequence[int], workers: int, smallest: int
) -> list[list[tuple[int, int]]]:
    """Return for each cell its parts as (samples, shard size), so that workers do not wait for each other at the end.

    No shard takes more than a fraction of total/workers. The last samples of a cell come in still smaller shards, which
    fill the gaps at the end of the run.

    Args:
        samples, seconds, sizes: of each cell: samples, expected seconds per sample, maximum samples per shard.
        smallest: minimum samples per shard.
    """
    share = sum(n * s for n, s in zip(samples, seconds, strict=True)) / workers
    pieces = []
    for count, each, size in zip(samples, seconds, sizes, strict=True):
        least = max(1, min(size, smallest))
        large, small = (
            max(least, min(size, int(part * share / each)) if each > 0 else size) for part in (_LARGE, _SMALL)
        )
        if workers == 1:
            large = small = size
        tail = int(count * _TAIL) if small < large < count else 0
        pieces.append([(n, size) for n, size in ((count - tail, large), (tail, small)) if n])
    return pieces

"""Save adversarial images as a prepared data set, which every model and every other tool can read.

Images are saved as PNG, so that they are rounded to 8 bits and judged again: an attack that needs finer values than
that exists in memory only. Workers write the images of each shard as one file beside its verdicts; `write_set` joins
the files of a cell in the order of the samples, so that the set does not depend on the workers.

Shapes: B batch, C H W image.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rayclip.data import open_data
from rayclip.data.images import Resize
from rayclip.data.manifest import SAVED, Manifest, read_manifest
from rayclip.data.prepare import Request, prepare
from rayclip.data.prepared import ids_file
from rayclip.data.shardwriter import npy_bytes
from rayclip.data.sources import Record, Source
from rayclip.evaluation.cell import Cell
from rayclip.evaluation.examples import pngs, to_8_bits
from rayclip.store import Store
from rayclip.types import UserError

SETS = "adversarial"  # folder of the sets, beside `cells`
SPLIT = "test"
_IMAGE = "image"  # column of the encoded images; the others are small
SAVED_COLUMNS = (_IMAGE, "saved_pred", "saved_linf", "saved_l2")  # of `saved_columns`
_SMALL = ("position", "sample_id", "label", "clean_pred", "adv_pred", *SAVED_COLUMNS[1:])
_AT_ONCE = 128  # images that `save_adversarial` judges at once
_OPEN = 2  # parts that stay in memory while a set is written


class SavedSet(NamedTuple):
    """A set of adversarial images.

    Attributes:
        place: its folder or URI, for `--data`.
        samples: number of images, those that the attack did not change included.
        successes: samples that were right before the attack and wrong after it.
        surviving: successes that are still wrong with pixels of 8 bits.
        right: samples that are right with pixels of 8 bits, and before the attack.
    """

    place: str
    samples: int
    successes: int
    surviving: int
    right: int

    @property
    def accuracy(self) -> float:
        """Accuracy on the saved images, in percent."""
        return 100 * self.right / self.samples

    def __str__(self) -> str:
        return (
            f"{self.surviving:,} of {self.successes:,} successes survive rounding to 8 bits ({self.samples:,} images "
            f"in {self.place})"
        )


def saved_columns(
    images_BCHW: Tensor, clean_BCHW: Tensor | None, predict: Callable[[Tensor], Tensor]
) -> dict[str, np.ndarray]:
    """Return adversarial images as PNG with what has become of them: prediction and distance from the clean image.

    Args:
        images_BCHW, clean_BCHW: pixels in [0, 1], before rounding; without the clean ones, distances are 0.
        predict: the classifier that judges, `pixels (B, C, H, W) -> classes (B,)`.
    """
    rounded_BCHW = to_8_bits(images_BCHW).float() / 255  # as a reader of the file gets them
    delta = (rounded_BCHW - (rounded_BCHW if clean_BCHW is None else clean_BCHW)).flatten(1)
    with torch.no_grad():
        found = {"saved_pred": predict(rounded_BCHW), "saved_linf": delta.abs().amax(1), "saved_l2": delta.norm(dim=1)}
    return {_IMAGE: np.array(pngs(images_BCHW), dtype=object), **{k: v.cpu().numpy() for k, v in found.items()}}


def write_part(store: Store, name: str, columns: Mapping[str, Any]) -> None:
    """Write the images of one shard, with those columns of its verdicts that belong to them, atomically."""
    store.write_table(name, _table(columns))


def _table(columns: Mapping[str, Any]) -> pa.Table:
    return pa.table({**{key: columns[key] for key in _SMALL}, _IMAGE: pa.array(columns[_IMAGE], pa.binary())})


def parts_of(cell: Cell) -> str:
    """Return the folder of the files that workers write."""
    return f"cells/{cell.id}/{SETS}"


def set_name(cell: Cell) -> str:
    """Return the name of a cell's set: data set, attack and model as tables show them, and the cell."""
    written = f"{cell.dataset}_{cell.attack_label}_{cell.model.rstrip('/').rpartition('/')[2]}_{cell.id[:8]}"
    return re.sub(r"[^\w.-]+", "-", written).lstrip(".-")


def can_save(cell: Cell) -> bool:
    """Return whether a cell's attack changes images."""
    return cell.attack.needs_eps


def saved_positions(cell: Cell, store: Store) -> np.ndarray | None:
    """Return the positions whose images have been saved; None if those of the whole data set have."""
    if _whole(read_manifest(store.child(SETS).child(set_name(cell)))):
        return None
    return np.concatenate([np.zeros(0, np.int64), *(_column(store, name, "position") for name in _parts(cell, store))])


def write_set(cell: Cell, store: Store) -> SavedSet:
    """Join what has been saved of a cell into a prepared data set `adversarial/NAME`; one that is complete is kept.

    Raises a `UserError` if a file is damaged, or the disk is full.
    """
    place = store.child(SETS).child(set_name(cell))
    before = read_manifest(place)
    if not _whole(before):
        data = open_data(cell.data, SPLIT, cell.protocol.names)
        native = cell.protocol.resolution == "native"
        texts = store.read_json(f"texts/{cell.texts_id}.json") if cell.attack.changes_texts else None
        source = SavedImages(
            [functools.partial(store.open, name) for name in _parts(cell, store)],
            class_names=data.raw_names,
            about={
                **{key: value for key, value in cell.record().items() if key not in ("class_names", "code")},
                "cell": cell.id,
                "of": len(data),
            },
            resize=data.resize if native else "square",
            budget=cell.eps,
        )
        join(source, cell.class_names, store.child(SETS), set_name(cell), before)
        if texts is not None:
            place.write_json("texts.json", texts)
        before = read_manifest(place)
        if _whole(before):
            store.delete_folder(parts_of(cell))
    assert before is not None
    return _described(before, place)


def save_adversarial(
    folder: str,
    images_BCHW: Tensor,
    labels_B: Tensor,
    class_names: Sequence[str],
    *,
    before_B: Tensor,
    after_B: Tensor,
    predict: Callable[[Tensor, Sequence[int]], Tensor],
    clean_BCHW: Tensor | None = None,
    about: Mapping[str, Any] | None = None,
    budget: float | None = None,
) -> SavedSet:
    """Write adversarial images as a prepared data set in `folder`: `rayclip eval --data FOLDER`, or
    `datasets.load_dataset("parquet", data_files="FOLDER/test-*.parquet")`. A set that was saved there is replaced.

    Args:
        images_BCHW: adversarial pixels in [0, 1].
        labels_B: true classes, indices into `class_names`.
        before_B, after_B: predicted classes before and after the attack.
        predict: the classifier that was attacked, which judges again what was rounded to 8 bits:
            `pixels (b, C, H, W), places of these images in the batch -> classes (b,)`.
        clean_BCHW: pixels before the attack, for distances.
        about: where the images come from, as JSON values, for the manifest.
        budget: in pixel units, of an l_inf ball; if rounding leaves it, the set has a note on that.

    Raises:
        UserError: fewer than two classes, a label that is none of them, or a folder with something else in it.
    """
    store, count = Store(folder), len(images_BCHW)
    if len(class_names) < 2 or not count or not 0 <= labels_B.min() <= labels_B.max() < len(class_names):
        raise UserError(f"{count} images cannot be saved: their labels have to be indices into the class names.")
    tables = []
    for index in torch.arange(count).split(_AT_ONCE):
        places, there = index.tolist(), index.to(images_BCHW.device)
        images, clean = images_BCHW[there].float(), None if clean_BCHW is None else clean_BCHW[there].float()
        given = {"label": labels_B, "clean_pred": before_B, "adv_pred": after_B}
        found = {name: column.cpu()[index].numpy() for name, column in given.items()}
        found |= dict.fromkeys(("position", "sample_id"), index.numpy())
        saved = saved_columns(images, clean, lambda rounded, places=places: predict(rounded, places))  # type: ignore[misc]
        tables.append(_table(found | saved))
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(tables), buffer)
    data = buffer.getvalue()
    source = SavedImages(
        [lambda: pa.BufferReader(data)],
        class_names=class_names,
        about={**(about or {}), "of": count, "content": hashlib.sha256(data).hexdigest()[:16]},
        resize="square",
        budget=budget,
    )
    join(source, tuple(class_names), store.parent, store.name, read_manifest(store))
    return _described(read_manifest(store), store)


class SavedImages(Source):
    """Saved images of one cell, in the order of their positions.

    Args:
        parts: open the files that `write_part` has written.
        about: what the manifest says of their origin.
        resize: how they are resized to the input of a model of another size.
        budget: of the attack, in pixel units.
    """

    def __init__(
        self,
        parts: Sequence[Callable[[], Any]],
        *,
        class_names: Sequence[str],
        about: Mapping[str, Any],
        resize: Resize,
        budget: float | None,
    ) -> None:
        self.class_names, self._parts = tuple(class_names), parts
        tables = [_read(part, _SMALL) for part in parts]
        rows = pa.concat_tables(tables)
        columns = {name: rows[name].to_numpy() for name in _SMALL}
        places = np.concatenate([np.stack([np.full(len(t), i), np.arange(len(t))], 1) for i, t in enumerate(tables)])
        _, first = np.unique(columns["position"], return_index=True)
        self._places = places[first].tolist()
        self._rows = {name: column[first] for name, column in columns.items()}
        was_right, labels = self._rows["clean_pred"] == self._rows["label"], self._rows["label"]
        broken, saved = was_right & (self._rows["adv_pred"] != labels), self._rows["saved_pred"] != labels
        far = float(self._rows["saved_linf"].max())
        self.ids = self._rows["sample_id"].astype(np.int64)
        self.ids_file = npy_bytes(self.ids)
        self._about = {
            **about,
            "kind": SAVED,
            "resize": resize,
            "samples": len(self.ids),
            "successes": int(broken.sum()),
            "surviving": int((broken & saved).sum()),
            "right": int((was_right & ~saved).sum()),
            "linf": far,
            "l2": float(self._rows["saved_l2"].max()),
            "ids": hashlib.sha256(self.ids_file).hexdigest(),
        }
        ball = (about.get("protocol") or {}).get("norm", "linf")
        if budget is not None and ball == "linf" and far > budget + 1e-6:
            self.notes = (
                f"Rounding to 8 bits moves pixels by up to {255 * far:.3g}/255, beyond the budget of "
                f"{255 * budget:.3g}/255: take a budget of whole 255ths.",
            )

    def describe(self) -> dict[str, Any]:
        return dict(self._about)

    def splits(self) -> dict[str, int | None]:
        return {SPLIT: len(self._places)}

    def records(self, split: str, start: int = 0) -> Iterator[Record]:
        loaded = functools.lru_cache(_OPEN)(lambda number: _read(self._parts[number], (_IMAGE,))[_IMAGE])
        for i in range(start, len(self._places)):
            number, row = self._places[i]
            image = loaded(number)[row]
            yield Record(path=f"{self.ids[i]}.png", read=image.as_py, label=int(self._rows["label"][i]))


def join(source: SavedImages, class_names: tuple[str, ...], root: Store, name: str, before: Manifest | None) -> None:
    """Write a source as the data set `name` below `root`, unless it is there; replace one with fewer of the samples."""
    replaced = before is not None and before.source.get("kind") == SAVED and before.source != source.describe()
    if before is None or replaced:
        root.child(name).write(ids_file(SPLIT), source.ids_file)
    prepare(Request(name=name, class_names=class_names, splits=[SPLIT], force=replaced), source, root)


def _parts(cell: Cell, store: Store) -> list[str]:
    return store.names(parts_of(cell), ".parquet")


def _column(store: Store, name: str, column: str) -> np.ndarray:
    return _read(functools.partial(store.open, name), (column,))[column].to_numpy()


def _read(opened: Callable[[], Any], columns: Sequence[str]) -> pa.Table:
    try:
        with opened() as file:
            return pq.read_table(file, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"a file of saved images is damaged ({str(error).splitlines()[0]}): delete it, run again."
        ) from error


def _whole(manifest: Manifest | None) -> bool:
    """Return whether a set holds every sample of its data set, so that nothing can be added."""
    return manifest is not None and manifest.splits[SPLIT].rows == manifest.source["of"]


def _described(manifest: Manifest | None, place: Store) -> SavedSet:
    assert manifest is not None
    return SavedSet(place.root, *(manifest.source[key] for key in ("samples", "successes", "surviving", "right")))

"""Read result folders cell by cell: records as they were written, verdicts as one bit per sample.

Shapes: N samples of a cell.
"""

import contextlib
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from rayclip.evaluation.retrieval import Recall
from rayclip.store import Store
from rayclip.tracking.spool import logged_runs
from rayclip.types import Cut, UserError

_COLUMNS = ["position", "label", "clean_pred", "adv_pred"]
_RECORD = ("model", "model_fingerprint", "dataset", "data_fingerprint", "class_names", "protocol")
_UNSAID = {"resize": "antialias"}  # defaults for older results without the setting
_MANY = 1000  # from this many cells on, read with several processes
LINEAGE = "lineage"  # folder with the records of models, beside `cells`
_PAIRS = "retrieval"  # folder with retrieval results, beside `cells`


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """The verdicts of a cell: per sample whether the model is right both before and after the attack.

    Attributes:
        positions_N: positions in the data set, ascending; cells of the same samples share the array.
        packed: eight verdicts per byte (`numpy.packbits`).
    """

    positions_N: np.ndarray
    packed: np.ndarray

    @classmethod
    def of(cls, positions_N: np.ndarray, right_N: np.ndarray) -> "Verdicts":
        return cls(positions_N=positions_N, packed=np.packbits(right_N))

    @property
    def n(self) -> int:
        return len(self.positions_N)

    @property
    def right(self) -> np.ndarray:
        """The verdicts as bool, `(N,)`."""
        return np.unpackbits(self.packed, count=self.n).view(bool)

    @property
    def count(self) -> int:
        """Number of samples that are right."""
        return int(np.bitwise_count(self.packed).sum())


def shared(verdicts: Sequence[Verdicts]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the positions that all `verdicts` have in common, and the verdicts of each at these (bool)."""
    positions = verdicts[0].positions_N
    if all(v.positions_N is positions for v in verdicts):
        return positions, [v.right for v in verdicts]
    for v in verdicts[1:]:
        positions = np.intersect1d(positions, v.positions_N, assume_unique=True)
    return positions, [v.right[np.searchsorted(v.positions_N, positions)] for v in verdicts]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as the results know it: specification, label, and the lineage of a checkpoint (`rayclip.json`)."""

    fingerprint: str
    spec: str
    label: str
    lineage: Mapping[str, Any] | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """Training configuration; empty for a model that we did not train."""
        return (self.lineage or {}).get("config") or {}

    @property
    def method(self) -> str | None:
        return (self.config.get("method") or {}).get("name")

    @property
    def shots(self) -> int | None:
        """Training images per class; None for all of them, or without training."""
        return self.config.get("shots")

    @property
    def trained_on(self) -> str | None:
        """Name of the training data."""
        return ((self.lineage or {}).get("data") or {}).get("name") or self.config.get("data")


@dataclass(frozen=True, kw_only=True)
class JudgedCell:
    """An evaluated cell: its record (`Cell.record`), its verdicts, and the store that holds them.

    Attributes:
        code: version and commit that computed it.
        run: MLflow run that logged it; empty if unknown.
        cut: texts that were truncated.
    """

    id: str
    store: Store
    model: Model
    dataset: str
    data: str
    data_fingerprint: str
    attack: str
    defense: str
    scorer: str
    protocol: Mapping[str, Any]
    verdicts: Verdicts
    code: str = ""
    run: str = ""
    cut: Cut = field(default_factory=Cut)


@dataclass(frozen=True, kw_only=True)
class JudgedPairs:
    """A retrieval result (`retrieval.Task.record`): a model on image-caption pairs under an attack."""

    id: str
    model: Model
    dataset: str
    data_fingerprint: str
    attack: str
    protocol: Mapping[str, Any]
    recalls: tuple[Recall, ...]
    cut: Cut = field(default_factory=Cut)


@dataclass(kw_only=True)
class Results:
    """All results in some folders.

    Attributes:
        cells, pairs: in no particular order.
        class_names: by data fingerprint.
        order: names of models in the order of the tables that runs have printed.
        notes: remarks about the folders for the reader of the report.
        trackers: MLflow addresses of the cells' runs, each a store or server with the experiment.
    """

    cells: list[JudgedCell] = field(default_factory=list)
    pairs: list[JudgedPairs] = field(default_factory=list)
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trackers: list[str] = field(default_factory=list)

    @property
    def names(self) -> dict[str, str]:
        """Display name by model fingerprint."""
        models = [cell.model for cell in self.cells] + [pairs.model for pairs in self.pairs]
        return short_names(list({model.fingerprint: model for model in models}.values()))


def read_results(
    places: Sequence[str],
    tell: Callable[[int, int], None] = lambda done, total: None,
    only: Mapping[str, set[str]] | None = None,
) -> Results:
    """Read result folders (or URIs), including the parts of a sweep below them.

    Args:
        only: fingerprints of the models to read, by place; all models for places that are missing in it.
        tell: progress callback, called with the numbers of cells read and in total.

    Raises:
        UserError: no results there, or a damaged file.
    """
    stores = [(store, (only or {}).get(place)) for place in dict.fromkeys(places) for store in _with_results(place)]
    todo = [(store, cell, models) for store, models in stores for cell in store.child("cells").folders()]
    gathered = _Gathered()
    for store, _ in stores:
        gathered.results.order += _printed_order(store)
    with _fetched(todo) as fetched:
        for done, ((store, cell, _), found) in enumerate(zip(todo, fetched, strict=True), 1):
            gathered.add(store, cell, found)
            tell(done, len(todo))
    for store, models in stores:
        for name in store.names(_PAIRS, ".json"):
            gathered.add_pairs(store, name, models)
    if not gathered.found and not gathered.results.pairs:
        why = "".join(f" ({note})" for note in gathered.results.notes[:1])
        named = ", ".join(places)
        raise UserError(f"{named} holds no verdicts yet{why}: run rayclip eval --out {places[0]} to its end.")
    gathered.results.cells = list(gathered.found.values())
    return gathered.results


def _with_results(place: str) -> list[Store]:
    store, kinds = Store(place), {"cells", _PAIRS}
    try:
        folders = store.folders()
        if kinds & set(folders):
            return [store]
        parts = [store.child(name) for name in folders]
        found = [part for part in parts if kinds & set(part.folders())]
    except OSError as error:
        raise UserError(f"'{place}' cannot be read: {error}") from error
    if not found:
        raise UserError(f"'{place}' holds no results: give a folder that rayclip eval or a sweep has written.")
    return found


@dataclass(frozen=True, kw_only=True)
class _Fetched:
    """A cell as read from its files, small enough to be sent between processes.

    `positions` is only a count if they are 0, 1, 2 …; without verdicts both arrays are None, and `note` may say why.
    """

    record: Mapping[str, Any] = field(default_factory=dict)
    positions: np.ndarray | int | None = None
    packed: np.ndarray | None = None
    note: str | None = None


def _fetch(job: tuple[Store, str, set[str] | None]) -> _Fetched:
    store, cell, models = job
    record = _json(store, f"cells/{cell}/cell.json")
    if record is None:
        return _Fetched(note=f"{store.root}/cells/{cell} has no cell.json and is left out")
    absent = [key for key in _RECORD if key not in record]
    if absent:
        raise UserError(f"{store.root}/cells/{cell}/cell.json is damaged (no {absent[0]}): delete it and run again.")
    if models is not None and record["model_fingerprint"] not in models:
        return _Fetched()
    table = store.read_tables(store.names(f"cells/{cell}", ".parquet"), _COLUMNS)
    if table is None or not len(table):
        return _Fetched(note=f"{record['dataset']} under {record['protocol']['attack']} has no verdicts yet")
    position, label, clean, adversarial = (table[name].to_numpy() for name in _COLUMNS)
    right = (clean == label) & (adversarial == label)
    if not (np.diff(position) > 0).all():  # shards of several runs may overlap
        position, first = np.unique(position, return_index=True)
        right = right[first]
    whole = position[0] == 0 and position[-1] == len(position) - 1
    return _Fetched(record=record, positions=len(position) if whole else position, packed=np.packbits(right))


@contextlib.contextmanager
def _fetched(todo: Sequence[tuple[Store, str, set[str] | None]]) -> Iterator[Iterator[_Fetched]]:
    """Yield an iterator over the cells in order; many local cells are read in parallel, one process per core."""
    cores = min(os.cpu_count() or 1, 8)
    if len(todo) < _MANY or cores == 1 or not all(store.is_local for store, _, _ in todo):
        yield map(_fetch, todo)
        return
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        yield pool.imap(_fetch, todo, chunksize=32)


class _Gathered:
    """Collects cells into `Results`, with one copy of whatever many cells share."""

    def __init__(self) -> None:
        self.results = Results()
        self.found: dict[str, JudgedCell] = {}
        self._positions: dict[bytes, np.ndarray] = {}
        self._counted: dict[int, np.ndarray] = {}
        self._models: dict[str, Model] = {}
        self._asked: set[tuple[str, str]] = set()
        self._runs: dict[str, dict[str, str]] = {}

    def add(self, store: Store, cell: str, fetched: _Fetched) -> None:
        if fetched.note is not None:
            self.results.notes.append(fetched.note)
        if fetched.positions is None or fetched.packed is None:
            return
        verdicts = Verdicts(positions_N=self._shared(fetched.positions), packed=fetched.packed)
        if cell in self.found:
            verdicts = self._union(self.found[cell].verdicts, verdicts)
        record, protocol = fetched.record, {**_UNSAID, **fetched.record["protocol"]}
        self.results.class_names.setdefault(record["data_fingerprint"], tuple(record["class_names"]))
        self.found[cell] = JudgedCell(
            id=cell,
            store=store,
            model=self._model(store, record["model_fingerprint"], record["model"]),
            dataset=record["dataset"],
            data=record.get("data", record["dataset"]),
            data_fingerprint=record["data_fingerprint"],
            attack=record.get("attack_label") or _label(protocol),
            defense=record.get("defense_label") or protocol.get("defense", "none"),
            scorer=record.get("scorer_label") or protocol.get("scorer", "template"),
            protocol=protocol,
            verdicts=verdicts,
            code=" ".join([*record.get("code", {}).values()]),
            run=self._run(store, cell),
            cut=Cut.read(record),
        )

    def _run(self, store: Store, cell: str) -> str:
        if store.root not in self._runs:
            address, runs = logged_runs(store)
            self._runs[store.root] = runs
            if runs and address not in self.results.trackers:
                self.results.trackers.append(address)
        return self._runs[store.root].get(cell, "")

    def add_pairs(self, store: Store, name: str, models: set[str] | None) -> None:
        record = _json(store, name)
        try:
            if models is None or record["model_fingerprint"] in models:
                pairs = JudgedPairs(
                    id=PurePosixPath(name).stem,
                    model=self._model(store, record["model_fingerprint"], record["model"]),
                    dataset=record["dataset"],
                    data_fingerprint=record["data_fingerprint"],
                    attack=record["attack_label"],
                    protocol={**_UNSAID, **record["protocol"]},
                    recalls=tuple(Recall(**recall) for recall in record["recalls"]),
                    cut=Cut.read(record),
                )
                self.results.pairs += [pairs] * all(pairs.id != other.id for other in self.results.pairs)
        except (KeyError, TypeError) as error:
            raise UserError(f"{store.root}/{name} is damaged ({error}): delete it and run again.") from None

    def _shared(self, positions: np.ndarray | int) -> np.ndarray:
        if isinstance(positions, int):
            if positions not in self._counted:
                self._counted[positions] = self._shared(np.arange(positions))
            return self._counted[positions]
        return self._positions.setdefault(positions.tobytes(), positions)

    def _union(self, one: Verdicts, two: Verdicts) -> Verdicts:
        position, first = np.unique(np.concatenate([one.positions_N, two.positions_N]), return_index=True)
        return Verdicts.of(self._shared(position), np.concatenate([one.right, two.right])[first])

    def _model(self, store: Store, fingerprint: str, spec: str) -> Model:
        """Return a model; where folders have several names for it, the first label is used."""
        known = self._models.get(fingerprint)
        if (store.root, fingerprint) not in self._asked and (known is None or known.label == known.spec):
            self._asked.add((store.root, fingerprint))
            record = _json(store, f"{LINEAGE}/{fingerprint}.json") or {}
            spec = known.spec if known is not None else spec
            lineage = record.get("lineage") or (known.lineage if known is not None else None)
            known = Model(fingerprint=fingerprint, spec=spec, label=record.get("label") or spec, lineage=lineage)
            self._models[fingerprint] = known
        return self._models[fingerprint]


def _json(store: Store, name: str) -> Any:
    try:
        return store.read_json(name)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{store.root}/{name} is damaged: delete it and run again.") from error


def _printed_order(store: Store) -> list[str]:
    rows = _json(store, "results.json") or []
    return list(dict.fromkeys(row["model"] for row in rows if "model" in row))


def _label(protocol: Mapping[str, Any]) -> str:
    """Return a label for an attack whose record has none."""
    steps = f"-{protocol['steps']}" if "steps" in protocol else ""
    eps = f"_eps{str(protocol['eps']).removesuffix('/255')}" if "eps" in protocol else ""
    return f"{protocol['attack']}{steps}{eps}"


def examples(cell: JudgedCell, kind: str) -> pa.Table | None:
    """Return the `images`, `features` or `attention` kept of a cell's first samples; None if there are none."""
    return cell.store.read_tables([_example(cell, kind)]) if has_examples(cell, kind) else None


def has_examples(cell: JudgedCell, kind: str) -> bool:
    return cell.store.size(_example(cell, kind)) is not None


def _example(cell: JudgedCell, kind: str) -> str:
    return f"cells/{cell.id}/examples/{kind}.parquet"


def texts(cell: JudgedCell) -> list[dict[str, str]]:
    """Return the kept prompts before and after a text attack (`class`, `clean`, `adversarial`)."""
    return _json(cell.store, f"cells/{cell.id}/examples/texts.json") or []


def short_names(models: Sequence[Model]) -> dict[str, str]:
    """Return a unique display name per model fingerprint: the label, or the specification with a folder's name only."""
    wanted = {m.fingerprint: m.label if m.label != m.spec else model_name(m.spec) for m in models}
    for again in (lambda m: m.spec, lambda m: f"{m.spec} ({m.fingerprint[:6]})"):
        names = list(wanted.values())
        alike = {f for f, name in wanted.items() if names.count(name) > 1}
        wanted |= {m.fingerprint: again(m) for m in models if m.fingerprint in alike}
    return wanted


def model_name(spec: str) -> str:
    """Return the folder name of a checkpoint's specification; other specifications unchanged."""
    kind, colon, path = spec.partition(":")
    return PurePosixPath(path).name if colon and kind in ("local-dir", "prompted") else spec


def natural(text: str) -> list[Any]:
    """Return a natural sort key: `5-shot` sorts before `50-shot`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]

"""Read result folders cell by cell: records as they were written, verdicts sample by sample."""

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rayclip.data.leases import holders_in
from rayclip.evaluation.recall import Recall
from rayclip.reports.model import Model, short_names
from rayclip.reports.records import CellRecord, ModelRecord, PairsRecord, check
from rayclip.reports.verdicts import Verdicts
from rayclip.store import Store
from rayclip.types import Cut, UserError

_COLUMNS = dict.fromkeys(("position", "label", "clean_pred", "adv_pred"), int)
_UNSAID = {"resize": "antialias"}  # defaults for older results without the setting
_AT_ONCE = 16  # cells read at once; on an object store every file is a request
LINEAGE = "lineage"  # folder with the records of models, beside `cells`
_PAIRS = "retrieval"  # folder with retrieval results, beside `cells`
LoggedRuns = Callable[[Store], tuple[str, Mapping[str, str]]]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A model on a data set under an attack. `cut` counts the texts that were truncated."""

    id: str
    model: Model
    dataset: str
    data_fingerprint: str
    attack: str
    protocol: Mapping[str, Any]
    cut: Cut


@dataclass(frozen=True, kw_only=True)
class JudgedCell(Judged):
    """An evaluated cell: its record (`Cell.record`), its verdicts, and the store that holds them.

    Attributes:
        code: version and commit that computed it.
        run: MLflow run that logged it; empty if unknown.
    """

    store: Store
    data: str
    defense: str
    scorer: str
    verdicts: Verdicts
    code: str
    run: str


@dataclass(frozen=True, kw_only=True)
class JudgedPairs(Judged):
    """A retrieval result (`retrieval.Task.record`) on image-caption pairs."""

    recalls: tuple[Recall, ...]


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
    def models(self) -> dict[str, Model]:
        """Models by fingerprint."""
        judged: list[Judged] = [*self.cells, *self.pairs]
        return {each.model.fingerprint: each.model for each in judged}

    @property
    def names(self) -> dict[str, str]:
        """Display name by model fingerprint."""
        return short_names(list(self.models.values()))


def read_results(
    places: Sequence[str],
    tell: Callable[[int, int], None] = lambda done, total: None,
    only: Mapping[str, set[str]] | None = None,
    logged: LoggedRuns = lambda store: ("", {}),
) -> Results:
    """Read result folders (or URIs), including the parts of a sweep below them.

    Args:
        tell: progress callback, called with the numbers of cells read and in total.
        only: fingerprints of the models to read, by place; all models for places that are missing in it.
        logged: returns where a folder's results were logged (store or server, and experiment), and the id of the run
            that logged each cell, by cell id.

    Raises:
        UserError: no results there, or a damaged file.
    """
    stores = [(store, (only or {}).get(place)) for place in dict.fromkeys(places) for store in _with_results(place)]
    todo = [(store, cell, models) for store, models in stores for cell in store.child("cells").folders()]
    reader, busy = _Reader(logged), [_Busy(store) for store, _ in stores]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done, found in enumerate(pool.map(lambda cell: _read_cell(*cell), todo), 1):
            reader.add_cell(found)
            tell(done, len(todo))
    for store, models in stores:
        printed = store.read_json("results.json", list) or []
        models_printed = (row.get("model") for row in printed if isinstance(row, dict))
        reader.results.order += dict.fromkeys(name for name in models_printed if isinstance(name, str))
        for name in store.names(_PAIRS, ".json"):
            reader.add_pairs(store, name, models)
    results = reader.results
    results.notes += [note for each in busy if (note := each.note())]
    results.cells = list(reader.cells.values())
    if not results.cells and not results.pairs:
        why = "".join(f" ({note})" for note in results.notes[:1])
        named = ", ".join(places)
        raise UserError(f"{named} holds no verdicts yet{why}: run rayclip eval --out {places[0]} to its end.")
    return results


class _Busy:
    """The work of other commands in a folder that is read, looked up before and after reading."""

    def __init__(self, store: Store) -> None:
        self._store, self._before = store, holders_in(store)

    def note(self) -> str:
        """Return a remark on the cells that may be there in part; empty if there are none."""
        found: dict[str, set[str]] = {}
        for holder in (*self._before, *holders_in(self._store)):
            found.setdefault(str(holder), set()).update(holder.holds | holder.wants)
        here = set(self._store.child("cells").folders())
        who = [holder for holder, names in found.items() if names & here]
        cells = set[str]().union(*found.values()) & here
        return (
            f"{len(cells)} of the cells in {self._store.root} are unfinished, and their numbers are of fewer samples: "
            f"{' and '.join(who)} evaluates them at this moment"
            if cells
            else ""
        )


def _with_results(place: str) -> list[Store]:
    store, kinds = Store(place), {"cells", _PAIRS}
    try:
        folders = store.folders()
        parts = [store] if kinds & set(folders) else [store.child(name) for name in folders]
        found = [part for part in parts if part is store or kinds & set(part.folders())]
    except OSError as error:
        raise UserError(f"'{place}' cannot be read: {error}") from error
    if not found:
        raise UserError(f"'{place}' holds no results: give a folder that rayclip eval or a sweep has written.")
    return found


class _ReadCell(NamedTuple):
    """A cell as its files have it, with the positions of its samples, ascending, and the verdicts there."""

    store: Store
    id: str
    record: Mapping[str, Any]
    positions_N: np.ndarray
    right_N: np.ndarray


def _read_cell(store: Store, cell: str, models: set[str] | None) -> _ReadCell | str | None:
    """Return a cell, a remark why it cannot be shown, or None if it is of another model than `models`."""
    record = store.read_json(f"cells/{cell}/cell.json")
    if record is None:
        return f"{store.root}/cells/{cell} has no cell.json and is left out"
    check(record, CellRecord, store, f"cells/{cell}/cell.json")
    if models is not None and record["model_fingerprint"] not in models:
        return None
    table = store.read_tables(store.names(f"cells/{cell}", ".parquet"), _COLUMNS)
    if table is None or not len(table):
        return f"{record['dataset']} under {record['protocol']['attack']} has no verdicts yet"
    position, label, clean, adversarial = (table[name].to_numpy() for name in _COLUMNS)
    right = (clean == label) & (adversarial == label)
    if not (np.diff(position) > 0).all():  # shards of several runs may overlap
        position, first = np.unique(position, return_index=True)
        right = right[first]
    return _ReadCell(store, cell, record, position, right)


class _Reader:
    """Collects cells into `Results`, with one copy of whatever many cells share."""

    def __init__(self, logged: LoggedRuns) -> None:
        self.results = Results()
        self.cells: dict[str, JudgedCell] = {}
        self._logged = functools.cache(logged)
        self._positions: dict[bytes, np.ndarray] = {}
        self._models: dict[str, Model] = {}
        self._asked: set[tuple[str, str]] = set()

    def add_cell(self, cell: _ReadCell | str | None) -> None:
        if isinstance(cell, str):
            self.results.notes.append(cell)
        if not isinstance(cell, _ReadCell):
            return
        verdicts = self._verdicts(cell.positions_N, cell.right_N)
        if cell.id in self.cells:  # in two folders
            known = self.cells[cell.id].verdicts
            position, first = np.unique(np.concatenate([known.positions_N, cell.positions_N]), return_index=True)
            verdicts = self._verdicts(position, np.concatenate([known.right_N, cell.right_N])[first])
        record, protocol = cell.record, {**_UNSAID, **cell.record["protocol"]}
        tracker, runs = self._logged(cell.store)
        self.results.trackers += [tracker] * (bool(runs) and tracker not in self.results.trackers)
        self.results.class_names.setdefault(record["data_fingerprint"], tuple(record["class_names"]))
        self.cells[cell.id] = JudgedCell(
            **self._judged(cell.store, cell.id, record),
            attack=record.get("attack_label") or _label(protocol),
            store=cell.store,
            data=record.get("data", record["dataset"]),
            defense=record.get("defense_label") or protocol.get("defense", "none"),
            scorer=record.get("scorer_label") or protocol.get("scorer", "template"),
            verdicts=verdicts,
            code=" ".join([*record.get("code", {}).values()]),
            run=runs.get(cell.id, ""),
        )

    def add_pairs(self, store: Store, name: str, models: set[str] | None) -> None:
        record, id_, known = store.read_json(name), PurePosixPath(name).stem, {pairs.id for pairs in self.results.pairs}
        check(record, PairsRecord, store, name)
        if (models is None or record["model_fingerprint"] in models) and id_ not in known:
            recalls = tuple(Recall(**{f.name: recall[f.name] for f in fields(Recall)}) for recall in record["recalls"])
            judged = self._judged(store, id_, record)
            self.results.pairs.append(JudgedPairs(**judged, attack=record["attack_label"], recalls=recalls))

    def _judged(self, store: Store, id_: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return what cells and retrieval results have in common."""
        return {
            "id": id_,
            "model": self._model(store, record["model_fingerprint"], record["model"]),
            "dataset": record["dataset"],
            "data_fingerprint": record["data_fingerprint"],
            "protocol": {**_UNSAID, **record["protocol"]},
            "cut": Cut.read(record),
        }

    def _verdicts(self, positions_N: np.ndarray, right_N: np.ndarray) -> Verdicts:
        shared = self._positions.setdefault(positions_N.tobytes(), positions_N)
        return Verdicts(positions_N=shared, right_N=right_N)

    def _model(self, store: Store, fingerprint: str, spec: str) -> Model:
        """Return a model; where folders have several names for it, the first label is used."""
        known = self._models.get(fingerprint)
        if (store.root, fingerprint) not in self._asked and (known is None or known.label == known.spec):
            self._asked.add((store.root, fingerprint))
            name = f"{LINEAGE}/{fingerprint}.json"
            record = store.read_json(name) or {}
            check(record, ModelRecord, store, name)
            spec = known.spec if known is not None else spec
            lineage = record.get("lineage") or (known.lineage if known is not None else None)
            known = Model(fingerprint=fingerprint, spec=spec, label=record.get("label") or spec, lineage=lineage)
            self._models[fingerprint] = known
        return self._models[fingerprint]


def _label(protocol: Mapping[str, Any]) -> str:
    """Return a label for an attack whose record has none."""
    steps = f"-{protocol['steps']}" if "steps" in protocol else ""
    eps = f"_eps{str(protocol['eps']).removesuffix('/255')}" if "eps" in protocol else ""
    return f"{protocol['attack']}{steps}{eps}"


def confidences(cell: JudgedCell) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the confidence of each attacked sample's prediction, 0..1, and whether it is right; None if the cell, or a
    part of it, is older than confidences in result files."""
    names = {"adv_confidence": float, **dict.fromkeys(("position", "label", "adv_pred"), int)}
    files = cell.store.names(f"cells/{cell.id}", ".parquet")
    if not all("adv_confidence" in cell.store.column_names(file) for file in files):
        return None
    table = cell.store.read_tables(files, names)
    if table is None:
        return None
    confidence, position, label, predicted = (table[name].to_numpy() for name in names)
    _, first = np.unique(position, return_index=True)
    return confidence[first], (label == predicted)[first]


def examples(cell: JudgedCell, kind: str) -> pa.Table:
    """Return the `images`, `features` or `attention` kept of a cell's first samples."""
    return cell.store.read_tables([f"cells/{cell.id}/examples/{kind}.parquet"])


def has_examples(cell: JudgedCell, kind: str) -> bool:
    return cell.store.size(f"cells/{cell.id}/examples/{kind}.parquet") is not None


def texts(cell: JudgedCell) -> list[dict[str, str]]:
    """Return the kept prompts before and after a text attack (`class`, `clean`, `adversarial`)."""
    return cell.store.read_json(f"cells/{cell.id}/examples/texts.json", list) or []

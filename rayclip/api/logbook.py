"""Log sweeps, trainings and evaluations to the tracker: what is logged, and under which names.

Experiment = study; parent run = sweep, child = trial, grandchild = evaluation.
"""

import dataclasses
import hashlib
import json
import re
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayclip.attacks.bert import TextSettings
from rayclip.data import ImageSet
from rayclip.evaluation import Cell, Store
from rayclip.evaluation.aggregate import worst_accuracy
from rayclip.evaluation.retrieval import RecallRow, Task
from rayclip.models import load_model
from rayclip.models.checkpoint import read_lineage
from rayclip.models.zeroshot import TEMPLATE
from rayclip.progress import say
from rayclip.reports import example_grid, result_tables
from rayclip.reports.table import Varying, across, rows_json
from rayclip.tracking.names import file_part, key_part
from rayclip.tracking.spool import RUNS, Spool
from rayclip.types import Row, Tracker, redacted

TABLE = "results_table.json"
HOW_TO_READ = """
**Runs**: a sweep is the parent of its trials, a trial the parent of the evaluations of its checkpoint. Tags:
`rayclip.kind` (`sweep`, `train`, `eval`, `retrieval`, …), `rayclip.model` (fingerprint of the weights),
`rayclip.data.NAME` (of the data), `rayclip.results` (the folder with every sample's verdict).

**Metrics**, in percent: `clean/DATA`, `robust/ATTACK_epsN/DATA`, `worst/DATA` (the worst case: right under every
attack, per sample; of several budgets one each, `worst_epsN/DATA`), `avg/…` over the data sets.

- Compare: mark runs, *Compare*, parallel coordinates over `method.name`, `shots`, `method.attack.eps` and `worst/…`.
- Search: `tags."rayclip.kind" = 'eval' and metrics."worst/digits" > 30`.
- Tables of several runs side by side: *Evaluation*, `results_table.json`. Pictures: *Model metrics*, image grids.
- Checkpoints: *Models*, a version each; `champion` has the best worst-case accuracy, the mean of several budgets' ones.
""".strip()


class Logbook:
    """Tracker runs by key, saved beside the results so that a resumed command continues in the same runs.

    Without a tracker every method does nothing, and runs are None.
    """

    def __init__(self, store: Store, tracker: Tracker | None, about: str = "") -> None:
        """
        Args:
            about: the question of the study, in Markdown.
        """
        self.tracker, self._store, self._about = tracker, store, about
        saved = store.read_json(RUNS) or {}
        same = tracker is not None and saved.get("tracker") == tracker.address
        self._runs: dict[str, str] = saved["runs"] if same else {}
        self._logged: list[str] = saved["logged"] if same else []
        self._cells: dict[str, str] = saved["cells"] if same else {}  # by cell id, the last run that logged it

    @classmethod
    def has_logged_to(cls, store: Store, address: str) -> bool:
        """Return whether an earlier command has logged the results in this store to this tracker."""
        return (store.read_json(RUNS) or {}).get("tracker") == address

    @classmethod
    def has_to_end(cls, store: Store, key: str) -> bool:
        """Return whether an earlier command opened a run of this key, in any tracker, and did not end it."""
        saved = store.read_json(RUNS) or {}
        return key in saved.get("runs", {}) and key not in saved["logged"]

    @property
    def spool(self) -> Spool | None:
        """The queue on disk where workers put entries to be logged; None without a tracker."""
        return None if self.tracker is None else Spool(self._store)

    def deliver(self) -> None:
        """Send the entries that workers have queued."""
        if self.tracker is not None:
            self.tracker.deliver()

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *error: object) -> None:
        left = 0 if self.tracker is None else self.tracker.close()
        if left:
            say(
                "note",
                f"MLflow does not answer: {left} entries wait in {self._store.root}/spool and are delivered by the "
                "same command, or by the next one with the same results folder.",
            )

    def open(
        self,
        name: str,
        *,
        key: str | None = None,
        parent: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str | None:
        """Return the run of this key (default: the name), started by an earlier command or now."""
        if self.tracker is None:
            return None
        key = key or name
        if not self._knows(key):
            self._runs[key] = uuid.uuid4().hex
            self._save()  # before the run starts: if we are killed here, the next command continues in it
            tags = {"rayclip.results": self._store.root, **(tags or {})}
            self.tracker.start(self._runs[key], name, parent=parent, params=params, tags=tags)
            if parent is None:
                self.tracker.describe(self._runs[key], f"{self._about}\n\n{HOW_TO_READ}".strip(), study=True)
        return self._runs[key]

    def _knows(self, key: str) -> bool:
        return self.tracker is not None and key in self._runs and self.tracker.exists(self._runs[key])

    def _has_logged(self, key: str) -> bool:
        """Return whether everything has been logged to the run of this key."""
        return key in self._logged and self._knows(key)

    def has_begun(self, key: str) -> bool:
        """Return whether an earlier command opened the run of this key and did not end it."""
        return key not in self._logged and self._knows(key)

    def end(self, key: str) -> None:
        """Finish the run of this key and record that everything has been logged to it."""
        if self.tracker is not None:
            self._end(key)

    def _end(self, key: str) -> None:
        self.finish(self._runs[key])
        self._logged.append(key)
        self._save()

    def _save(self) -> None:
        assert self.tracker is not None
        kept = {"tracker": self.tracker.address, "runs": self._runs, "logged": self._logged, "cells": self._cells}
        self._store.write_json(RUNS, kept)

    def finish(self, run: str | None, *, failed: bool = False) -> None:
        if self.tracker is not None and run is not None:
            self.tracker.finish(run, failed=failed)

    def trains_on(self, run: str | None, data: ImageSet, spec: str, drawn: Mapping[str, Any] | None = None) -> None:
        """Log the training data; for a few-shot run also the drawn images, as the artifact `data/drawn.json`."""
        if self.tracker is None or run is None:
            return
        about = {"spec": spec, "images": len(data), "classes": len(data.class_names)}
        self.tracker.data(run, data.name, data.fingerprint, "training", about)
        if drawn is not None:
            self._files(run, {"data/drawn.json": json.dumps(drawn, indent=1, ensure_ascii=False) + "\n"})

    def checkpoint(self, run: str | None, path: Path, spec: str, name: str, folder: str = "checkpoint") -> None:
        """Log a finished checkpoint: its files in the run, and a new version of the study's registered model.

        Args:
            path: local folder of its files.
            spec: its model specification.
            name: of the version.
        """
        if self.tracker is None or run is None:
            return
        lineage = read_lineage(path) or {}
        data, config = lineage.get("data") or {}, lineage.get("config") or {}
        kind = spec.partition(":")[0]
        tags = {
            "rayclip.model": load_model(f"{kind}:{path}").fingerprint(),
            "rayclip.name": name,
            "rayclip.method": (config.get("method") or {}).get("name", ""),
            "rayclip.data": data.get("fingerprint", ""),
            "rayclip.spec": redacted(spec),
        }
        about = {
            "class_names": data.get("class_names", []),
            "template": config.get("template", TEMPLATE),
            "description": f"`{name}`: {tags['rayclip.method']} on {data.get('name')}, from `{config.get('model')}`",
            "tags": tags,
        }
        self.tracker.checkpoint(run, path, folder, about)

    def evaluation(
        self,
        name: str,
        parent: str | None,
        rows: Sequence[Row],
        cells: Sequence[Cell],
        warnings: Sequence[str] = (),
        trial: str | None = None,
    ) -> None:
        """Log one model's evaluation as a run, once: metrics, the table, adversarial texts and pictures.

        Args:
            warnings: about the measurement; their number is a tag, so that such runs can be searched for.
            trial: the run that trained the model; the numbers are logged there too, beside its settings.
        """
        if self.tracker is None:
            return
        digest = hashlib.sha256(json.dumps([[r.cell for r in rows], rows[0].n]).encode()).hexdigest()[:12]
        key = f"{name} {digest}"
        if self._has_logged(key):
            return
        run = self.open(
            name,
            key=key,
            parent=parent,
            params={"model": rows[0].model, "scorer": rows[0].scorer, "defense": rows[0].defense} | attack_params(rows),
            tags={"rayclip.kind": "eval", "rayclip.protocol": digest, "rayclip.model": cells[0].model_fingerprint}
            | {f"rayclip.data.{c.dataset}": c.data_fingerprint for c in cells}
            | {"rayclip.warnings": str(len(warnings))},
        )
        assert run is not None
        for place in [run] if trial is None else [run, trial]:
            self.tracker.metrics(place, [(metric, value, 0) for metric, value in metric_names(rows).items()])
            self.tracker.table(place, [flat_row(r, {}) for r in rows], TABLE)
            self.tracker.describe(place, markdown(rows, {}))
        for cell in {cell.dataset: cell for cell in cells}.values():
            images = max(row.n for row in rows if row.dataset == cell.dataset)
            about = {"spec": cell.data, "images": images, "classes": len(cell.class_names)}
            self.tracker.data(run, cell.dataset, cell.data_fingerprint, "evaluation", about)
        for picture, png in self._pictures(name, cells).items():
            self.tracker.image(run, picture, png)
        files = {"results.json": rows_json(rows)} | self._texts(cells)
        if warnings:
            files["warnings.txt"] = "".join(f"{w}\n" for w in warnings)
        self._files(run, files)
        accuracies = worst_case(rows)
        if accuracies is not None:
            self.tracker.rank(run, _shared_protocol(rows), {cells[0].model_fingerprint: accuracies})
        self._cells |= {cell.id: run for cell in cells}
        self._end(key)

    def retrieval(self, task: Task, rows: Sequence[RecallRow]) -> None:
        """Log one model's retrieval under one attack as a run, once: metrics and the table."""
        name = f"retrieval {task.model}" + ("" if task.attack_label == "clean" else f" {task.attack_label}")
        key = f"{name} {task.id}"
        if self.tracker is None or self._has_logged(key):
            return
        run = self.open(
            name,
            key=key,
            params={"model": task.model, "data": task.dataset}
            | {f"retrieval.{k}": v for k, v in task.describe().items()},
            tags={"rayclip.kind": "retrieval", "rayclip.protocol": task.id, "rayclip.model": task.model_fingerprint}
            | {f"rayclip.data.{task.dataset}": task.data_fingerprint},
        )
        assert run is not None
        self.tracker.metrics(run, [(metric, value, 0) for metric, value in recall_names(rows).items()])
        self.tracker.table(run, [flat_row(r, {}) for r in rows], TABLE)
        self._end(key)

    def summary(self, run: str | None, rows: Sequence[Row], labels: Mapping[str, str]) -> None:
        """Log a sweep's table in the sweep's own run, and finish it."""
        if self.tracker is not None and run is not None:
            self.tracker.table(run, [flat_row(r, labels) for r in rows], TABLE)
            self.tracker.describe(run, markdown(rows, labels))
            self._files(run, {"table.md": markdown(rows, labels), "results.json": rows_json(rows)})
            self.finish(run)

    def _pictures(self, name: str, cells: Sequence[Cell]) -> dict[str, bytes]:
        """Return grids of adversarial images as PNG bytes, by `DATA-ATTACK`."""
        pictures = {}
        for cell in cells:
            images = f"cells/{cell.id}/examples/images.parquet"
            if self._store.size(images) is not None:
                title = f"{name.removeprefix('eval ')} on {cell.dataset}: {cell.attack_label}"
                grid = example_grid(self._store.read_tables([images]), cell.class_names, title)
                pictures[f"{file_part(cell.dataset)}-{file_part(cell.attack_label)}"] = grid
        return pictures

    def _texts(self, cells: Sequence[Cell]) -> dict[str, str]:
        """Return the contents of the files of adversarial prompts, by file name."""
        files = {}
        for cell in cells:
            texts = self._store.read(f"texts/{cell.texts_id}.json") if isinstance(cell.attack, TextSettings) else None
            if texts is not None:
                files[f"texts/{file_part(cell.dataset)}-{file_part(cell.attack_label)}.json"] = texts.decode()
        return files

    def _files(self, run: str, files: Mapping[str, str]) -> None:
        assert self.tracker is not None
        with tempfile.TemporaryDirectory(prefix="rayclip-") as folder:
            for name, content in files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.encode("utf-8", "backslashreplace"))
            self.tracker.artifact(run, Path(folder))


def metric_names(rows: Sequence[Row]) -> dict[str, float]:
    """Return the metrics of an evaluation by name.

    The names are `clean/DATA`, `robust/ATTACK/DATA`, `worst/DATA` (with several budgets `worst_epsN/DATA`) and, with
    several data sets, `avg/ATTACK` for each attack that was run on all of them.
    """
    values: dict[str, float] = {}
    by_attack: dict[str, list[float]] = {}
    for row in rows:
        kind = row.attack if row.attack == "clean" or row.is_worst else f"robust/{_attack_part(row.attack)}"
        values[f"{kind}/{key_part(row.dataset)}"] = row.top1
        by_attack.setdefault(row.attack, []).append(row.top1)
    datasets = len({row.dataset for row in rows})
    if datasets > 1:
        values |= {
            f"avg/{_attack_part(attack)}": sum(v) / len(v) for attack, v in by_attack.items() if len(v) == datasets
        }
    return values


def attack_params(rows: Sequence[Row]) -> dict[str, Any]:
    """Return every attack's settings as parameters; a setting that varies lists its values with their data sets."""
    protocols: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if not row.is_worst:
            protocols.setdefault(row.attack, {})[row.dataset] = row.protocol
    return {
        f"attack.{attack}.{key}": str(value) if isinstance(value, Varying) else value
        for attack, by_dataset in protocols.items()
        for key, value in across(by_dataset).items()
    }


def _attack_part(label: str) -> str:
    """Return an attack's label as part of a metric name: blanks and slashes become `_`."""
    return key_part(re.sub("[ /]", "_", label))


def worst_case(rows: Sequence[Row]) -> float | None:
    """Return `worst_accuracy` of a checkpoint.

    None if nothing was attacked, or if a defence or another scorer than the template took part: such numbers are not
    the checkpoint's alone.
    """
    if any((row.defense, row.scorer) != ("none", "template") for row in rows):
        return None
    return worst_accuracy(rows)


def _shared_protocol(rows: Sequence[Row]) -> str:
    """Return a hash of everything that one model's numbers depend on, except for the model."""
    stands_on = sorted([r.dataset, r.attack, r.n, json.dumps(r.protocol, sort_keys=True)] for r in rows)
    return hashlib.sha256(json.dumps(stands_on).encode()).hexdigest()[:12]


def recall_names(rows: Sequence[RecallRow]) -> dict[str, float]:
    """Return recalls by metric name, `clean/tr_at_1/DATA` or `robust/ATTACK/tr_at_1/DATA` (MLflow allows no `@`)."""
    kind = {r.attack: "clean" if r.attack == "clean" else f"robust/{r.attack}" for r in rows}
    return {f"{kind[r.attack]}/{r.direction}_at_{r.k}/{key_part(r.dataset)}": r.recall for r in rows}


def markdown(rows: Sequence[Row], labels: Mapping[str, str]) -> str:
    return "\n".join(table.markdown() for table in result_tables(rows, labels))


def flat_row(row: Row | RecallRow, labels: Mapping[str, str]) -> dict[str, Any]:
    """Return a row as a flat dictionary of scalars, the protocol as JSON."""
    flat = dataclasses.asdict(row)
    return flat | {"model": labels.get(row.model, row.model), "protocol": json.dumps(flat["protocol"])}

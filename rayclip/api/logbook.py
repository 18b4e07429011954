"""Log sweeps, trainings and evaluations: what is logged, and under which names.

Experiment = study; parent run = sweep, child = trial, grandchild = evaluation.
"""

import dataclasses
import functools
import hashlib
import json
import re
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from rayclip import code_version
from rayclip.data import ImageSet
from rayclip.evaluation import Cell
from rayclip.evaluation.aggregate import worst_accuracy
from rayclip.evaluation.retrieval import RecallRow, Task
from rayclip.models import load_model
from rayclip.models.checkpoint import read_lineage
from rayclip.models.zeroshot import TEMPLATE
from rayclip.progress import say
from rayclip.reports.examples import example_grid
from rayclip.reports.formats import grid_markdown
from rayclip.reports.notes import Varying, merge_protocols
from rayclip.reports.rows import markdown_tables, rows_json
from rayclip.reports.seeds import spread, tables_of_seeds, training_grid
from rayclip.settings import BUDGETS
from rayclip.store import Store
from rayclip.tracking.deliverer import Deliverer
from rayclip.tracking.journal import Journal
from rayclip.tracking.names import file_part, key_part
from rayclip.training import TrainConfig
from rayclip.types import Row
from rayclip.units import format_budget

_P = ParamSpec("_P")
_T = TypeVar("_T")
TABLE = "results_table.json"
# Settings of an evaluation, not of its attacks
_SHARED = (
    "seed resolution resize class_names template scorer attacked_scorer defense aim draws judgements precision protocol"
).split()
HOW_TO_READ = """
**Runs**: a sweep is the parent of its trials, a trial the parent of the evaluations of its checkpoint. Tags:
`rayclip.kind` (`sweep`, `train` for its trials and the untouched model, `eval`, `retrieval`, …), `rayclip.model`
(fingerprint of the weights), `rayclip.data.NAME` (of the data), `rayclip.results` (the folder with every sample's
verdict).

**Metrics**, in percent: `clean/DATA`, `robust/ATTACK_epsN/DATA`, `worst/DATA` (the worst case: right under every
attack, per sample; of several budgets one each, `worst_epsN/DATA`), `avg/…` over the data sets. `rounded/…` is robust
accuracy on images that were saved with 8 bits, `validate/…` accuracy on held-out training images.

- Compare: mark runs, *Compare*, parallel coordinates over `method.name`, `shots`, `method.eps` and `worst/…`.
- Search: `tags."rayclip.kind" = 'eval' and metrics."worst/digits" > 30`.
- Tables of several runs side by side: *Evaluation*, `results_table.json`. Pictures: *Model metrics*, image grids.
- Checkpoints: *Models*, a version each; `champion` has the best worst-case accuracy, the mean of several budgets' ones.
""".strip()


def _alone(method: Callable[Concatenate["Logbook", _P], _T]) -> Callable[Concatenate["Logbook", _P], _T]:
    """Let no other command log meanwhile, and read first what they have logged."""

    @functools.wraps(method)
    def call(self: "Logbook", *args: _P.args, **options: _P.kwargs) -> _T:
        with self.journal.alone():
            self._known.read_on(self.journal)
            return method(self, *args, **options)

    return call


class Logbook:
    """Log runs by key to the journal beside the results: a resumed command goes on in the runs that it finds there."""

    def __init__(
        self, journal: Journal, deliverer: Deliverer | None = None, experiment: str = "", about: str = ""
    ) -> None:
        """
        Args:
            deliverer: to the tracker; without one, events wait in the journal.
            experiment: the study's name.
            about: the question of the study, in Markdown."""
        self.journal, self._deliverer, self._experiment, self._about = journal, deliverer, experiment, about
        self._known = journal.history(deliverer.experiment.address if deliverer else None)

    @property
    def store(self) -> Store:
        """The result folder."""
        return self.journal.store

    def _add(self, kind: str, run: str, **content: Any) -> None:
        """Append an event, unless an earlier command has: the same command again changes nothing."""
        if self._known.is_new(kind, run, content):
            self.journal.add(kind, run, **content)

    def deliver(self) -> None:
        """Send what driver and workers have logged, if there is a tracker and it answers."""
        if self._deliverer is not None:
            self._deliverer.deliver()

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *error: object) -> None:
        left = 0 if self._deliverer is None else self._deliverer.close()
        if left:
            say(
                "note",
                f"MLflow does not answer: {left} events wait in {self.store.root}/journal and are delivered by "
                "the same command, by the next one with the same results folder, or by `rayclip log`.",
            )

    @_alone
    def open(
        self,
        name: str,
        *,
        key: str | None = None,
        parent: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        cells: Sequence[Cell] = (),
    ) -> str:
        """Return the run of this key (default: the name), started by an earlier command or now; `cells` are those it
        logs."""
        key = key or name
        if not self._knows(key):
            run = self._known.runs[key] = uuid.uuid4().hex
            self._add(
                "start",
                run,
                key=key,
                name=name,
                parent=parent,
                params={key: _param(key, value) for key, value in (params or {}).items()},
                tags={"rayclip.results": self.store.root, **_source(), **(tags or {})},
                cells=[cell.id for cell in cells],
                experiment=self._experiment,
            )
            if parent is None:
                self._add("describe", run, text=f"{self._about}\n\n{HOW_TO_READ}".strip(), study=True)
            self.deliver()
        return self._known.runs[key]

    def _knows(self, key: str) -> bool:
        run = self._known.runs.get(key)
        return run is not None and (self._deliverer is None or self._deliverer.has(run))

    def has_begun(self, key: str, *, complete: bool = False) -> bool:
        """Return whether an earlier command opened the run of this key and did not (or did) log everything to it."""
        self._known.read_on(self.journal)
        return self._knows(key) and (self._known.runs[key] in self._known.complete) == complete

    def end(self, key: str) -> None:
        """Finish the run of this key and record that everything has been logged to it."""
        self.finish(self._known.runs[key], complete=True)
        self._known.complete.add(self._known.runs[key])

    def finish(self, run: str, *, failed: bool = False, complete: bool = False) -> None:
        self._add("finish", run, failed=failed, complete=complete or run in self._known.complete)
        self.deliver()

    def trains_on(self, run: str, data: ImageSet, spec: str, drawn: Mapping[str, Any] | None = None) -> None:
        """Log the training data; for a few-shot run also the drawn images, as the artifact `data/drawn.json`."""
        about = {"spec": spec, "images": len(data), "classes": len(data.class_names)}
        self._add("data", run, name=data.name, digest=data.fingerprint, context="training", about=about)
        if drawn is not None:
            self._files(run, {"data/drawn.json": json.dumps(drawn, indent=1, ensure_ascii=False) + "\n"})

    def checkpoint(self, run: str, path: Path, spec: str, name: str, folder: str = "checkpoint") -> None:
        """Log a finished checkpoint: its files in the run, and a new version of the study's registered model.

        Args:
            path: local folder of its files.
            spec: its model specification.
            name: of the version.
        """
        lineage = read_lineage(path) or {}
        data, config = lineage.get("data") or {}, lineage.get("config") or {}
        kind, _, place = spec.partition(":")
        tags = {
            "rayclip.model": load_model(f"{kind}:{path}").fingerprint(),
            "rayclip.name": name,
            "rayclip.method": (config.get("method") or {}).get("name", ""),
            "rayclip.data": data.get("fingerprint", ""),
            "rayclip.spec": spec,
        }
        about = {
            "class_names": data.get("class_names", []),
            "template": config.get("template", TEMPLATE),
            "description": f"`{name}`: {tags['rayclip.method']} on {data.get('name')}, from `{config.get('model')}`",
            "tags": tags,
        }
        self._add("checkpoint", run, place=self.journal.relative(place), folder=folder, about=about)

    @_alone
    def evaluation(
        self,
        name: str,
        parent: str | None,
        rows: Sequence[Row],
        cells: Sequence[Cell],
        warnings: Sequence[str] = (),
        trial: str | None = None,
    ) -> str:
        """Log one model's evaluation as a run, once, and return it: metrics, the table, adversarial texts, pictures.

        Args:
            warnings: about the measurement; their number is a tag, so that such runs can be searched for.
            trial: the run of the model itself; the numbers are logged there too, beside its settings.
        """
        digest = _digest([[r.cell for r in rows], rows[0].n])
        key = f"{name} {digest}"
        if self.has_begun(key, complete=True):
            return self._known.runs[key]
        run = self.open(
            name,
            key=key,
            parent=parent,
            params={"model": rows[0].model, "scorer": rows[0].scorer, "defense": rows[0].defense} | attack_params(rows),
            tags={"rayclip.kind": "eval", "rayclip.protocol": digest, "rayclip.model": cells[0].model_fingerprint}
            | {f"rayclip.data.{c.dataset}": c.data_fingerprint for c in cells}
            | {"rayclip.warnings": str(len(warnings))},
            cells=cells,
        )
        for each in [run] if trial is None else [run, trial]:
            self._numbers(each, metric_names(rows), rows)
            self._add("describe", each, text=markdown_tables(rows, {}), study=False)
        for cell in {cell.dataset: cell for cell in cells}.values():
            images = max(row.n for row in rows if row.dataset == cell.dataset)
            about = {"spec": cell.data, "images": images, "classes": len(cell.class_names)}
            self._add("data", run, name=cell.dataset, digest=cell.data_fingerprint, context="evaluation", about=about)
        files, pictures = {"results.json": rows_json(rows)}, {}
        for cell in cells:
            place = f"{file_part(cell.dataset)}-{file_part(cell.attack_label)}"
            examples = f"cells/{cell.id}/examples/images.parquet"
            if self.store.size(examples) is not None:
                title = f"{name.removeprefix('eval ')} on {cell.dataset}: {cell.attack_label}"
                pictures[place] = example_grid(self.store.read_tables([examples]), cell.class_names, title)
            texts = self.store.read(f"texts/{cell.texts_id}.json") if cell.attack.changes_texts else None
            if texts is not None:
                files[f"texts/{place}.json"] = texts.decode()
        for picture, png in pictures.items():
            self._add("image", run, key=picture, file=self.journal.keep(png, ".png"))
        if warnings:
            files["warnings.txt"] = "".join(f"{w}\n" for w in warnings)
        self._files(run, files)
        accuracy = worst_case(rows)
        if accuracy is not None:
            # Of everything that the numbers depend on, except for the model
            stands_on = sorted([r.dataset, r.attack, r.n, json.dumps(r.protocol, sort_keys=True)] for r in rows)
            accuracies = {cells[0].model_fingerprint: accuracy}
            self._add("rank", run, protocol=_digest(stands_on), accuracies=accuracies)
        self.end(key)
        return run

    def rounded(self, run: str, rows: Sequence[Row], accuracies: Mapping[str, float]) -> None:
        """Log accuracies on saved images, by cell, as `rounded/ATTACK/DATA`; also to a run that is complete."""
        names = [(name, row) for row in rows if row.cell in accuracies for name in metric_names([row])]
        values = [[name.replace("robust/", "rounded/"), accuracies[row.cell], 0] for name, row in names]
        if values:
            self._add("metrics", run, values=values)
            self.deliver()

    @_alone
    def retrieval(self, task: Task, rows: Sequence[RecallRow]) -> None:
        """Log one model's retrieval under one attack as a run, once: metrics and the table."""
        name = f"retrieval {task.model}" + ("" if task.attack_label == "clean" else f" {task.attack_label}")
        key = f"{name} {task.id}"
        if self.has_begun(key, complete=True):
            return
        run = self.open(
            name,
            key=key,
            params={"model": task.model, "data": task.dataset}
            | {f"retrieval.{k}": v for k, v in task.describe().items()},
            tags={"rayclip.kind": "retrieval", "rayclip.protocol": task.id, "rayclip.model": task.model_fingerprint}
            | {f"rayclip.data.{task.dataset}": task.data_fingerprint},
        )
        self._numbers(run, recall_names(rows), rows)
        self.end(key)

    def summary(self, run: str, rows: Sequence[Row], labels: Mapping[str, str], groups: Mapping[str, str] = {}) -> None:
        """Log a sweep's table in the sweep's own run, and finish it; `groups` as in `tables_of_seeds`."""
        tables = tables_of_seeds(rows, labels, groups)
        self._numbers(run, {}, rows, labels)
        self._add("describe", run, text=tables, study=False)
        self._files(run, {"table.md": tables, "results.json": rows_json(rows)})
        self.finish(run)

    def page(self, run: str, text: str, files: Mapping[str, bytes]) -> None:
        """Log a text in Markdown and files in a run, and finish it."""
        self._add("describe", run, text=text, study=False)
        self._files(run, files)
        self.finish(run)

    def seeds(self, run: str, numbers: Mapping[str, Mapping[str, float]]) -> None:
        """Log trainings that differ in their seed in the run above them, and finish it: `train/loss_mean`,
        `train/loss_sd`, and the table."""
        for name, (mean, sd) in spread(list(numbers.values())).items():
            key = f"{'train' if name == 'loss' else 'validate'}/{key_part(name.replace(' ', '_'))}"
            self._add("metrics", run, key=key, values=[[f"{key}_mean", mean, 0], [f"{key}_sd", sd, 0]])
        self._add("describe", run, text=grid_markdown(training_grid(numbers)), study=False)
        self.finish(run)

    def _numbers(
        self, run: str, metrics: Mapping[str, float], rows: Sequence[Row | RecallRow], labels: Mapping[str, str] = {}
    ) -> None:
        if metrics:
            self.journal.metrics(run, [(name, value, 0) for name, value in metrics.items()])
        self._add("table", run, name=TABLE, rows=[flat_row(row, labels) for row in rows])

    def _files(self, run: str, files: Mapping[str, str] | Mapping[str, bytes]) -> None:
        contents = {n: c if isinstance(c, bytes) else c.encode("utf-8", "backslashreplace") for n, c in files.items()}
        kept = {name: self.journal.keep(content) for name, content in contents.items()}
        self._add("artifact", run, folder="", files=kept)


def untouched_params(model: str, trials: Sequence[TrainConfig]) -> dict[str, Any]:
    """Return the untouched model's parameters among trials: what they have in common, with no method and no shots."""
    settings = [config.flat().items() for config in trials]
    shared = {key: value for key, value in (settings or [{}.items()])[0] if not key.startswith(("method.", "recipe."))}
    shared = dict(item for item in shared.items() if all(item in each for each in settings))
    # Written like the others' budgets: MLflow's parallel coordinates leave out a number among texts
    return shared | {"model": model, "method.name": "untouched", "method.eps": "0/255", "shots": 0}


def metric_names(rows: Sequence[Row]) -> dict[str, float]:
    """Return metrics by name: `clean/DATA`, `robust/ATTACK/DATA`, `worst/DATA` (of several budgets `worst_epsN/DATA`),
    and `avg/ATTACK` of the attacks that were run on all of several data sets."""
    values: dict[str, float] = {}
    by_attack: dict[str, list[float]] = {}
    for row in rows:
        label = key_part(re.sub("[ /]", "_", row.attack))
        kind = row.attack if row.attack == "clean" or row.is_worst else f"robust/{label}"
        values[f"{kind}/{key_part(row.dataset)}"] = row.top1
        by_attack.setdefault(f"avg/{label}", []).append(row.top1)
    datasets = len({row.dataset for row in rows})
    averages = {name: sum(v) / len(v) for name, v in by_attack.items() if len(v) == datasets > 1}
    return values | averages


def attack_params(rows: Sequence[Row]) -> dict[str, Any]:
    """Return settings as parameters: `protocol.KEY` for what all attacks share, `attack.ATTACK.KEY` for the rest; one
    that varies lists its values with their data sets."""
    protocols: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if not row.is_worst:
            protocols.setdefault(row.attack, {})[row.dataset] = row.protocol
    settings = {
        attack: {key: str(v) if isinstance(v, Varying) else v for key, v in merge_protocols(by_dataset).items()}
        for attack, by_dataset in protocols.items()
    }
    first = next(iter(settings.values()))
    shared = {k: first[k] for k in _SHARED if k in first and all(s.get(k) == first[k] for s in settings.values())}
    params = {f"protocol.{key}": value for key, value in shared.items()}
    for attack, found in settings.items():
        params |= {f"attack.{attack}.{key}": value for key, value in found.items() if key not in shared}
    return params


def worst_case(rows: Sequence[Row]) -> float | None:
    """Return `worst_accuracy` of a checkpoint; None if nothing was attacked, or if the numbers are not the checkpoint's
    alone, since a defence or another scorer took part."""
    if any((row.defense, row.scorer) != ("none", "template") for row in rows):
        return None
    return worst_accuracy(rows)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def recall_names(rows: Sequence[RecallRow]) -> dict[str, float]:
    """Return recalls by metric name, `clean/tr_at_1/DATA` or `robust/ATTACK/tr_at_1/DATA` (MLflow allows no `@`)."""
    kind = {r.attack: "clean" if r.attack == "clean" else f"robust/{r.attack}" for r in rows}
    return {f"{kind[r.attack]}/{r.direction}_at_{r.k}/{key_part(r.dataset)}": r.recall for r in rows}


def flat_row(row: Row | RecallRow, labels: Mapping[str, str]) -> dict[str, Any]:
    """Return a row as a flat dictionary of scalars, the protocol as JSON."""
    flat = dataclasses.asdict(row)
    return flat | {"model": labels.get(row.model, row.model), "protocol": json.dumps(flat["protocol"])}


def _param(key: str, value: Any) -> str:
    """Return a parameter as people write it, budgets as fractions."""
    is_budget = isinstance(value, float) and key.rpartition(".")[2] in BUDGETS
    return format_budget(value) if is_budget else str(value)


def _source() -> dict[str, str]:
    """Return tags with the program that logs and its code version; the UI shows them as a run's source."""
    code, program = code_version(), " ".join(Path(sys.argv[0]).parts[-2:])
    tags = {"rayclip.version": code["version"], "mlflow.source.name": program, "mlflow.source.type": "LOCAL"}
    return tags | ({"mlflow.source.git.commit": code["commit"]} if "commit" in code else {})

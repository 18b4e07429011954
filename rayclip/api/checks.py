"""Validate a request before any work starts: the settings of an evaluation, the models and data, a training run."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from rayclip.api.request import Evaluation
from rayclip.attacks import Attack, attack_as_described
from rayclip.data import ImageSet, Names, PairSet, Resolution, locate, open_data
from rayclip.data.captions import bind_captions
from rayclip.data.images import mixed_sizes
from rayclip.data.sampling import webdataset_draw
from rayclip.evaluation import Cell, Protocol, chosen_positions, make_cells
from rayclip.evaluation.cell import counted, default_substitutes, positions_of
from rayclip.methods import SMALL_BELOW, Method, Recipe
from rayclip.models import Clip, load_model
from rayclip.models.exact import has_batch_norm
from rayclip.models.loading import patch_size
from rayclip.models.named import allow as allow_named
from rayclip.progress import Display, say
from rayclip.reports.results import Results
from rayclip.training import TrainConfig
from rayclip.training.config import check_shares
from rayclip.training.held_out import split
from rayclip.types import UserError
from rayclip.units import format_budget

_SMALL_L2 = 0.1  # papers use 0.25 and more
_SILENT_S = 2.0  # shorter checks print no progress


class Opened:
    """Cache of the models and data opened while one call is validated: the trials of a sweep share their base model.

    Args:
        given: models in memory by specification, which are not loaded.
    """

    def __init__(self, *, quiet: bool = False, given: Mapping[str, Clip] = MappingProxyType({})) -> None:
        self._quiet, self._given = quiet, given
        self._model: tuple[str, Clip] | None = None
        self._fingerprints: dict[str, str] = {}
        self._data: dict[tuple[str, str, str], ImageSet] = {}
        self._said: set[str] = set()

    def note(self, sentence: str, kind: Literal["note", "warning"] = "note") -> None:
        """Print a note about the results, once for all trials of a sweep."""
        if sentence not in self._said:
            self._said.add(sentence)
            say(kind, sentence)

    def model(self, spec: str) -> Clip:
        """Load a model; only the last one stays in memory."""
        if spec in self._given:
            return self._given[spec]
        if self._model is None or self._model[0] != spec:
            self._model = spec, load_model(spec)
        return self._model[1]

    def fingerprint(self, spec: str) -> str:
        if spec not in self._fingerprints:
            self._fingerprints[spec] = self.model(spec).fingerprint()
        return self._fingerprints[spec]

    def data(self, spec: str, role: Literal["train", "test"], resolution: Resolution, names: Names) -> ImageSet:
        """Open a data set, check it for damaged images and mixed sizes, and print its notes."""
        key = spec, role, names
        if key not in self._data:
            data = open_data(spec, role, names)
            self.check(data)
            for note in data.notes:
                say("note", f"{data.name}: {note}")
            self._data[key] = data
        if resolution == "native" and self._data[key].native_size is None:
            raise mixed_sizes(self._data[key])
        return self._data[key]

    def check(self, data: ImageSet | PairSet) -> None:
        """Check every image of files that have not been checked before; show progress if that takes long."""
        began = time.monotonic()
        with Display(quiet=self._quiet) as display:

            def tell(done: int, total: int) -> None:
                if time.monotonic() - began > _SILENT_S:
                    display.update(f"check {data.name}", done, total)

            data.check(tell)


def is_small(model: str) -> bool:
    """Return whether the model is too small for the papers' learning rates."""
    return sum(p.numel() for p in load_model(model).parameters()) < SMALL_BELOW


def choose_recipe(
    method: Method, model: str, *, small: bool, whole_warmup: bool, overrides: Mapping[str, Any]
) -> Recipe:
    """Return the method's recipe for small models, or the published one for this model; its warm-up at full length if
    `whole_warmup`."""
    if small:
        return dataclasses.replace(method.small, **overrides)
    found = method.recipe_for(patch_size(model))
    return dataclasses.replace(found, **{"warmup_whole": whole_warmup, **overrides})


def check_training(config: TrainConfig, workers: int, opened: Opened) -> TrainConfig:
    """Validate a training configuration, as `train` would; return it with default substitutes and fingerprints filled
    in."""
    method = config.method.with_default_substitutes(default_substitutes(bundled=config.data == "digits"))
    config = dataclasses.replace(config, data=locate(config.data))
    data = opened.data(config.data, "train", config.resolution, config.names)
    trained, _ = split(data, config.shots, config.seed, config.validate)
    check_shares(len(trained), config.recipe.batch_size, workers)
    method = bind_captions(method, config.data, data.class_names, data.other_names)
    clip = opened.model(config.model)
    method.check(clip)
    if config.validate is not None:
        attacks = [a.pinned().for_classes(len(data.class_names)) for a in config.validate.attacks]
        attacks = [bind_captions(attack, config.data, data.class_names, data.other_names) for attack in attacks]
        for attack in attacks:
            attack.check(clip)
        config = dataclasses.replace(config, validate=dataclasses.replace(config.validate, attacks=tuple(attacks)))
    if has_batch_norm(clip):
        opened.note(
            f"{config.model}: BatchNorm keeps the statistics that it came with, so that a step on several workers, or "
            "in parts, is a step on one big batch."
        )
    if method.learns_prompt:
        allow_named(config.model)  # the learned prompt's files will name it
    _warn_of_cut(config, method, data, opened)
    return dataclasses.replace(
        config,
        method=method,
        model_fingerprint=opened.fingerprint(config.model),
        data_fingerprint=data.fingerprint,
    )


def _warn_of_cut(config: TrainConfig, method: Method, data: ImageSet, opened: Opened) -> None:
    """Warn once if the training texts are longer than what the model or the text attack reads."""
    clip = method.wrap_model(opened.model(config.model), config.seed)
    prompts = method.prompts(data.class_names, clip.template or config.template)
    of, texts = f"{config.model} on {data.name}", f"of {len(set(prompts)):,} texts"
    cut, unread = len(clip.cut_texts(prompts)), method.count_cut(clip, prompts)
    if cut:
        opened.note(
            f"{of}: {cut:,} {texts} that {method.name} trains on are longer than the {clip.room} tokens that the "
            "model reads, and cut there.",
            "warning",
        )
    if unread:
        opened.note(
            f"{of}: BERT-Attack does not read {unread:,} {texts} to their end, whose words stay as they are: raise "
            f"{method.name}:max_length.",
            "warning",
        )


def plan_all(
    models: Sequence[str], evaluations: Sequence[Evaluation], opened: Opened
) -> tuple[list[Cell], dict[str, np.ndarray]]:
    """Return `plan_cells` of several evaluations merged, without duplicates, model by model. Where they use different
    samples of the same data, positions are by cell (`evaluation.cell.positions_of`); what several ask for is one cell
    with the samples of all."""
    cells: dict[tuple[str, ...], Cell] = {}
    positions: dict[str, np.ndarray] = {}
    for evaluation in [part for each in evaluations for part in each.by_resolution()]:
        found, where = plan_cells(models, evaluation, opened)
        known = {cell.id for cell in cells.values()}
        for cell in found:
            wanted, before = where[cell.data], positions.get(cell.data)
            if before is not None and not np.array_equal(before, wanted):
                both = np.union1d(positions_of(cell, positions), wanted) if cell.id in known else wanted
                positions[cell.id] = both
        cells |= {(cell.model, cell.dataset, cell.id): cell for cell in found}  # two data sets may have equal files
        positions = where | positions
    return sorted(cells.values(), key=lambda cell: list(models).index(cell.model)), positions


def plan_cells(
    models: Sequence[str], evaluation: Evaluation, opened: Opened
) -> tuple[list[Cell], dict[str, np.ndarray]]:
    """Open every model and data set; return the cells, and the sample positions to evaluate by data specification."""
    protocol = evaluation.protocol
    if not evaluation.data:
        raise UserError("no data set is named: give --data a name or a .parquet file.")
    for attack in evaluation.attacks:
        if attack.ball == "l2" and attack.eps is None and 0 < max(protocol.budgets, default=0) < _SMALL_L2:
            say(
                "note",
                f"{attack.name} measures its budget in l_2, where {format_budget(max(protocol.budgets))} over a whole "
                f"image is next to nothing: write {attack.name}:eps=128/255.",
            )
    specs = [locate(spec) for spec in evaluation.data]
    datasets = [(spec, opened.data(spec, "test", protocol.resolution, protocol.names)) for spec in specs]
    names = [data.name for _, data in datasets]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"two data sets share the name '{twice[0]}', which tables could not tell apart: rename a file.")
    cells: list[Cell] = []
    for spec in dict.fromkeys(models):
        new = make_cells(
            [(spec, opened.fingerprint(spec))],
            datasets,
            evaluation.attacks,
            protocol,
            evaluation.defenses,
            evaluation.aims,
            evaluation.scorers,
            evaluation.made_against,
        )
        if not cells:  # a source of substitutes that opens for one model opens for all
            for attack in {c.attack for c in new}:
                attack.check(opened.model(spec))
        for defense in {d for chain in (*evaluation.defenses, *(a.source for a in evaluation.aims)) for d in chain}:
            defense.check(opened.model(spec))
        cells += counted(new, opened.model(spec))
    return cells, {spec: _positions(data, evaluation, opened) for spec, data in datasets}


def _positions(data: ImageSet, evaluation: Evaluation, opened: Opened) -> np.ndarray:
    """Return the positions of the samples that an evaluation uses."""
    limit = evaluation.limit
    if evaluation.subset == "even" or limit is None or limit >= len(data):
        return chosen_positions(len(data), limit)
    archives = data.archives()
    if not archives:
        opened.note(
            f"{data.name}: not prepared from a WebDataset, whose archives decide which images RobustVLM draws; the "
            "same draw from its own order takes others."
        )
    return webdataset_draw(archives or (len(data),), limit)


def evaluations_of(results: Results) -> list[Evaluation]:
    """Rebuild the evaluations behind results (no defence, template scorer), to evaluate another model alike. Raise a
    `UserError` if an attack's settings cannot be recovered."""
    sizes: dict[str, int] = {}
    found: dict[tuple[str, Protocol], dict[tuple[str, float | None], Attack]] = {}
    for cell in results.cells:
        if (cell.scorer, cell.defense) != ("template", "none"):
            continue
        sizes[cell.data] = max(sizes.get(cell.data, 0), cell.verdicts.n)
        said = cell.protocol
        protocol = Protocol(
            seed=said["seed"],
            resolution=said["resolution"],
            resize=said["resize"],
            names=said["class_names"],
            template=said["template"],
            precision=said["precision"],
        )
        attack = attack_as_described(said)
        key = json.dumps(attack.describe(), sort_keys=True), attack.eps
        found.setdefault((cell.data, protocol), {})[key] = attack
    return [
        Evaluation(data=[data], attacks=list(attacks.values()), protocol=protocol, limit=sizes[data])
        for (data, protocol), attacks in found.items()
    ]

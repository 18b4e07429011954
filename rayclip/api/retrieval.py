"""Evaluate image-to-text and text-to-image retrieval."""

import functools
from collections.abc import Sequence

import torch

from rayclip.api.checks import Opened
from rayclip.api.evaluating import logging
from rayclip.api.request import Where
from rayclip.attacks import Attack
from rayclip.attacks.clean import Clean
from rayclip.data import Resolution, open_pairs
from rayclip.data.images import mixed_sizes
from rayclip.data.leases import Leases
from rayclip.evaluation import Protocol, Store
from rayclip.evaluation.alarms import cut_alarms
from rayclip.evaluation.cell import budgets_for
from rayclip.evaluation.retrieval import RecallRow, make_task, read_recalls, run_task
from rayclip.models.checkpoint import model_record
from rayclip.models.resizing import Resize, check_resize
from rayclip.progress import Display, say
from rayclip.reports.recalls import recall_grids
from rayclip.reports.results import LINEAGE
from rayclip.reports.to_terminal import show


def evaluate_retrieval(
    models: Sequence[str],
    data: str,
    where: Where,
    *,
    limit: int | None = None,
    resolution: Resolution = "model",
    resize: Resize = "antialias",
    attacks: Sequence[Attack] = (Clean(),),
    eps: float | tuple[float, ...] | None = None,
    seed: int = 0,
) -> list[RecallRow]:
    """Evaluate recall at 1, 5, 10 of models on image-caption data (`open_pairs`), in this process.

    Results are written to disk, logged to the tracker and returned; what is in `where.out` is not computed again.

    Args:
        attacks: attacks on pairs (`attacks.pairs`); an attack with a stop rule needs `stop="final"`.
        eps: budget in pixel units of the attacks that set none themselves; with several budgets, each of these attacks
            is run at each budget.

    Raises:
        UserError: bad arguments, before anything is written.
    """
    check_resize(resize, resolution)
    opened = Opened(quiet=where.quiet)
    pairs = open_pairs(data)
    opened.check(pairs)
    if resolution == "native" and pairs.native_size is None:
        raise mixed_sizes(pairs)
    specs = list(dict.fromkeys(models))
    budgets = Protocol(eps=eps).budgets
    found_tasks = [
        make_task(
            (m, opened.fingerprint(m)),
            pairs,
            limit=limit,
            resolution=resolution,
            resize=resize,
            attack=attack,
            eps=budget,
            seed=seed,
        )
        for m in specs
        for attack in attacks
        for budget in budgets_for(attack, budgets)
    ]
    tasks = list({(task.model, task.id): task for task in found_tasks}.values())
    for attack in {task.attack for task in tasks}:
        attack.check(opened.model(specs[-1]))
    store = Store(where.out)
    found = [read_recalls(task, store) for task in tasks]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[RecallRow] = []
    with where.logbook(store) as logbook, Display(quiet=where.quiet) as display, Leases(store) as leases:
        for spec in specs:
            name = f"{LINEAGE}/{opened.fingerprint(spec)}.json"
            if store.size(name) is None:  # keep the label that an evaluation may have written
                store.write_json(name, model_record(spec, None))
        for task, mine in zip(tasks, found, strict=True):
            if mine is None:
                with leases.hold(task.id, "evaluating the same"):
                    if read_recalls(task, store) is None:  # else another command has meanwhile
                        clip = opened.model(task.model).to(device)
                        update = functools.partial(display.update, f"{task.model} {task.attack_label}")
                        run_task(task, clip, pairs, store, where.pool.largest_batch(0), update)
                mine = read_recalls(task, store)
                assert mine is not None
            with logging(store):
                logbook.retrieval(task, mine)
            rows += mine
    for sentence in cut_alarms(rows):
        say("warning", sentence)
    return rows


def show_retrieval(rows: Sequence[RecallRow]) -> None:
    """Print the tables to standard output."""
    show(recall_grids(rows))

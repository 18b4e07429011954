"""Choose which models and which examples figures show, of more than fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rayclip.reports.results import JudgedCell
from rayclip.reports.section import Attack, Section, Subject

_ASKED = 4  # maximum number of models to look for files of; on an object store each is a request


def choose_subjects(section: Section, most: int) -> list[Subject]:
    """Return at most `most` subjects to draw, in their order: an untouched one and the best."""
    chosen = sort_by_interest(section)[:most]
    return [s for s in section.subjects if s in chosen]


def sort_by_interest(section: Section) -> list[Subject]:
    """Sort subjects: an untouched model first, the others by the accuracy that models are ranked by, best first."""
    found = section.ranked(section.overall, section.main)
    untouched = [s for s in section.subjects if s.is_untouched][:1]
    others = [s for s in section.subjects if s not in untouched]
    return untouched + sorted(others, key=lambda s: found[s].top1 if s in found else -1.0, reverse=True)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A cell of which the evaluation kept examples."""

    subject: Subject
    dataset: str
    attack: Attack
    cell: JudgedCell


def choose_examples(section: Section, kinds: Sequence[str], has: Callable[[JudgedCell], bool]) -> list[Example]:
    """Choose what to show: an untouched model and the best one, on one data set, under one attack.

    The attack is the strongest, of the first of these kinds of attack, for which the evaluation kept examples of both
    (`has` tells of which cells it kept them); where there is none of both, examples of one model are returned.
    """
    best: list[Example] = []
    attacks = [a for kind in kinds for a in reversed(section.attacks) if a.kind == kind]
    interesting = sort_by_interest(section)
    for subjects in (interesting[:2], interesting[:_ASKED]):
        for attack in attacks:
            for dataset in section.datasets:
                found = [
                    Example(subject=subject, dataset=dataset, attack=attack, cell=entry.cells[0])
                    for subject in subjects
                    if (entry := section.get(subject, dataset, attack)) is not None and has(entry.cells[0])
                ]
                if len(found) >= min(2, len(subjects)):
                    return found[:2]
                best = best or found
    return best

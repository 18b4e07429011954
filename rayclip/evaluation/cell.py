"""Cells: one model on one data set under one attack and one protocol. A cell's id names its results on disk."""

import hashlib
import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from rayclip import PROTOCOL, code_version
from rayclip.attacks import Attack
from rayclip.attacks.substitutes import TOKEN_TABLE
from rayclip.data import ImageSet, Names, Resolution
from rayclip.data.captions import bind_captions
from rayclip.data.spec import published_name
from rayclip.defenses import IGNORE, Aim, Chain, chain_label, describe_chain, fitting, is_random, pinned
from rayclip.models import TEMPLATE, Clip, Precision
from rayclip.models.resizing import Resize, check_resize
from rayclip.models.scorers import DEFAULT, Scorer
from rayclip.names import check_template
from rayclip.types import Cut, UserError
from rayclip.units import format_budget

MadeAgainst = Literal["own", "template"]

DEFAULT_MASKED_LM = "bert-base-uncased"


def hash_of(*decisive: Any) -> str:
    """Return the name of a result that these JSON values decide on: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The settings that all cells of an evaluation share.

    Attributes:
        eps: budget of the attacks that set none of their own, in pixel units; with several budgets, these run at each.
        seed: seed of the attacks' random starts.
        resolution: `native` or `model` (see `data.images`).
        resize: how `native` images are resized inside the model's forward: `antialias` or `plain` (`models.resizing`).
        names: spelling of the classes: CLIP's curated one, or the data's own (as the reference code).
        template: template of the class prompts.
        judgements: number of draws of a random defence or scorer that judge each adversarial example, which counts as
            right only if all of them are right.
        precision: precision of the attacked model; verdicts always come from the fp32 model (`evaluation.confirm`).
    """

    eps: float | tuple[float, ...] | None = None
    seed: int = 0
    resolution: Resolution = "native"
    resize: Resize = "antialias"
    names: Names = "curated"
    template: str = TEMPLATE
    judgements: int = 1
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        check_resize(self.resize, self.resolution)
        check_template(self.template)

    @property
    def budgets(self) -> tuple[float, ...]:
        """Return `eps` as a tuple, empty if there is none."""
        return self.eps if isinstance(self.eps, tuple) else () if self.eps is None else (self.eps,)


@dataclass(frozen=True, kw_only=True)
class Subject(ABC):
    """Common part of cells and retrieval tasks. Of model and data only the fingerprints enter the id."""

    model: str
    model_fingerprint: str
    dataset: str
    data_fingerprint: str
    attack: Attack

    @property
    def eps(self) -> float | None:
        """Return the attack's budget in pixel units; None if it needs none."""
        return self.attack.eps if self.attack.needs_eps else None

    @property
    def attack_label(self) -> str:
        """Return the attack's name in metrics: `pgd-100_eps1`, `bert`."""
        return self.attack.label_with_budget

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the protocol as every result row carries it."""

    def record(self) -> dict[str, Any]:
        """Return what the file of a result says of it, all that a report needs besides the numbers."""
        return {
            "model": self.model,
            "model_fingerprint": self.model_fingerprint,
            "dataset": self.dataset,
            "data_fingerprint": self.data_fingerprint,
            "attack_label": self.attack_label,
            "protocol": self.describe(),
        }


@dataclass(frozen=True, kw_only=True)
class Cell(Subject):
    """One evaluation: model, data set, attack, defence, scorer and protocol. It yields one number."""

    data: str  # as the user named it
    class_names: tuple[str, ...]
    protocol: Protocol
    defense: Chain = ()
    aim: Aim = IGNORE  # how the attack treats the defence
    scorer: Scorer = DEFAULT  # judges
    attacked: Scorer = DEFAULT  # the scorer that the attack sees
    cut: Cut | None = field(default=None, compare=False)  # truncated texts (`counted`)

    @cached_property
    def id(self) -> str:
        """Return a hash of everything that can change a verdict, including the package's protocol number."""
        return hash_of(self.model_fingerprint, self.data_fingerprint, self.class_names, self.describe())

    @cached_property
    def texts_id(self) -> str:
        """Return an id that is equal for all cells whose attack prepares the same adversarial prompts."""
        template, settings = self.protocol.template, self.attack.describe_prepared()
        scorer = [] if self.scorer == DEFAULT else [self.scorer.describe()]
        return hash_of(PROTOCOL, self.model_fingerprint, self.class_names, template, settings, *scorer)

    @property
    def precision(self) -> Precision:
        """Return the precision of the attacked model; fp32 if the attack changes no image."""
        return self.protocol.precision if self.attack.needs_eps else "fp32"

    @property
    def judgements(self) -> int:
        """Return how often an adversarial example is judged: once if nothing that judges is random."""
        return self.protocol.judgements if is_random(self.defense) or self.scorer.random else 1

    @property
    def attack_label(self) -> str:
        """Return the attack's name in metrics; `pgd-100_eps1_bpda` through a defence."""
        elsewhere = "" if self.attacked == self.scorer else f"_on-{self.attacked.name}"
        return super().attack_label + elsewhere + self.aim.label

    @property
    def title(self) -> str:
        """Return a title for the progress display: model (the end of a path), data set and attack."""
        who = ", ".join([self.model.rpartition("/")[2], *([] if self.scorer == DEFAULT else [self.scorer.label])])
        behind = f" + {chain_label(self.defense)}" if self.defense else ""
        return f"{who}{behind} · {self.dataset} · {self.attack_label}"

    def describe(self) -> dict[str, Any]:
        return {
            "attack": self.attack.name,
            **described_budget(self.attack),
            **self.attack.describe(),
            "seed": self.protocol.seed,
            "resolution": self.protocol.resolution,
            "resize": self.protocol.resize,
            "class_names": self.protocol.names,
            "template": self.protocol.template,
            "scorer": self.scorer.describe(),
            **({} if self.attacked == self.scorer else {"attacked_scorer": self.attacked.describe()}),
            "defense": describe_chain(self.defense),
            **(self.aim.describe() if self.defense else {}),
            **({} if self.judgements == 1 else {"judgements": self.judgements}),
            "precision": self.precision,
            "protocol": PROTOCOL,
        }

    def record(self) -> dict[str, Any]:
        """Return the contents of `cells/<id>/cell.json`."""
        return {
            **super().record(),
            "data": self.data,
            "class_names": self.class_names,
            "defense_label": chain_label(self.defense),
            "scorer_label": self.scorer.label,
            **(Cut() if self.cut is None else self.cut).recorded(),
            "code": code_version(),
        }

    @property
    def cost(self) -> int:
        """Return roughly how many forwards one image takes; the plan sorts by it."""
        query = self.attacked.cost + sum(defense.cost for defense in self._attacked_chain)
        judging = self.scorer.cost + sum(defense.cost for defense in self.defense)
        return judging + self.attack.cost * query * self.aim.draws

    @property
    def images_at_once(self) -> int:
        """Return how many images go through the model at once for one sample: views, crops, an attack's draws."""
        judged, attacked = (
            math.prod(defense.view_count for defense in chain) for chain in (self.defense, self._attacked_chain)
        )
        return max(self.scorer.cost * judged, self.attacked.cost * attacked * self.aim.draws)

    @property
    def _attacked_chain(self) -> Chain:
        return () if self.aim == IGNORE else self.aim.source or self.defense


def counted(cells: Sequence[Cell], clip: Clip) -> list[Cell]:
    """Return the cells of one model with the number of texts that are truncated filled in (`Cell.cut`)."""
    found: dict[tuple[Any, ...], int] = {}

    def once(count: Callable[[], int], *key: Any) -> int:
        if key not in found:
            found[key] = count()
        return found[key]

    def cut(cell: Cell) -> Cut:
        template, attack = clip.template or cell.protocol.template, cell.attack
        prompts = tuple(itertools.chain(*cell.scorer.prompts(cell.class_names, template)))
        attacked = () if cell.attacked == cell.scorer else cell.attacked.prompts(cell.class_names, template)
        texts = (*prompts, *itertools.chain(*attacked, *attack.more_texts(cell.class_names)))
        unread = once(lambda: attack.count_cut(clip, prompts), prompts, hash_of(attack.describe_text()))
        return Cut(once(lambda: len(clip.cut_texts(texts)), texts), unread)

    return [replace(cell, cut=cut(cell)) for cell in cells]


def positions_of(cell: Cell, positions: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the positions of a cell's samples among those by data specification, or by cell id where several
    evaluations use different samples of the data."""
    return positions[cell.id if cell.id in positions else cell.data]


def described_budget(attack: Attack) -> dict[str, Any]:
    """Return the protocol's entries on an attack's budget; none if it needs no budget."""
    if attack.eps is None or not attack.needs_eps:
        return {}
    return {"eps": format_budget(attack.eps), **({} if attack.ball == "linf" else {"norm": attack.ball})}


def budgets_for(attack: Attack, budgets: Sequence[float]) -> Sequence[float | None]:
    """Return those of `budgets` that an attack runs at; (None,) if it has its own or needs none."""
    return budgets if attack.needs_eps and attack.eps is None and budgets else (None,)


def at_budgets(attacks: Sequence[Attack], budgets: Sequence[float]) -> list[Attack]:
    """Return the attacks with their own budgets, and those without one at each of `budgets`; in order, no duplicates.

    Raises a `UserError` if an attack has no budget but needs one, or one that is impossible in its norm.
    """
    return list(dict.fromkeys(attack.within(eps) for attack in attacks for eps in budgets_for(attack, budgets)))


def make_cells(
    models: Sequence[tuple[str, str]],
    datasets: Sequence[tuple[str, ImageSet]],
    attacks: Sequence[Attack],
    protocol: Protocol,
    defenses: Sequence[Chain] = ((),),
    aims: Sequence[Aim] = (IGNORE,),
    scorers: Sequence[Scorer] = (DEFAULT,),
    made_against: Sequence[MadeAgainst] = ("own",),
) -> list[Cell]:
    """Return a cell for every model × scorer × defence × data set × attack, and for every aim at a defended model.

    An attack that sees another classifier than the one that judges (for a defence, another scorer or other random
    numbers) runs to its last step: fooling the one that it sees once says little about the one that judges.

    Args:
        models: (specification, fingerprint) pairs.
        datasets: (specification, opened data set) pairs.
        defenses: chains of defences; the empty chain is the undefended model.
        aims: how attacks treat a defence (see `defenses.Aim`).
        scorers: each of them judges.
        made_against: target of image attacks if the scorer is not the template: the scorer (`own`), or the template.

    Raises:
        UserError: an attack needs a budget and there is none, is not defined for a data set's few classes, or names a
            file that cannot be used.
    """
    attacks = [attack.pinned() for attack in at_budgets(attacks, protocol.budgets)]
    defenses = [pinned(chain) for chain in defenses]
    aims = [replace(aim, source=pinned(aim.source)) for aim in aims]
    return [
        Cell(
            model=spec,
            model_fingerprint=fingerprint,
            data=source,
            dataset=data.name,
            data_fingerprint=data.fingerprint,
            class_names=data.class_names,
            attack=bind_captions(
                attack.with_default_substitutes(default_substitutes(bundled=source == "digits")).for_classes(
                    len(data.class_names)
                ),
                source,
                data.class_names,
                data.other_names,
            ),
            protocol=protocol,
            defense=chain,
            aim=aim,
            scorer=judging,
            attacked=attacked,
        )
        for spec, fingerprint in models
        for scorer in scorers
        for chain in defenses
        for source, data in datasets
        for judging in [
            bind_captions(scorer.for_dataset(published_name(data.name)), source, data.class_names, data.other_names)
        ]
        for attack, aim, attacked in _runs(attacks, chain, aims, judging, made_against)
    ]


def _runs(
    attacks: Sequence[Attack],
    chain: Chain,
    aims: Sequence[Aim],
    scorer: Scorer,
    made_against: Sequence[MadeAgainst],
) -> list[tuple[Attack, Aim, Scorer]]:
    """Return (attack, aim, attacked scorer) of every run against a model behind a chain of defences."""
    aims = list(dict.fromkeys(fitting(aim, chain) for aim in aims))
    runs: list[tuple[Attack, Aim, Scorer]] = []
    for attack in attacks:
        if attack.gives_own_texts and not scorer.takes_own_texts:
            raise UserError(
                f"{attack.name} gives every image texts of its own, which scorer {scorer.name} cannot weigh: leave one "
                "out."
            )
        # Adversarial texts have to be those of the scorer that judges
        targets = made_against if attack.asks_victim and not attack.changes_texts and scorer != DEFAULT else ("own",)
        for aim in aims if attack.asks_victim and chain else (IGNORE,):
            for target in dict.fromkeys(targets):
                attacked = scorer if target == "own" else DEFAULT
                is_judge = not chain and attacked == scorer and not scorer.random
                runs.append((attack if is_judge else attack.to_last_step(), aim, attacked))
    return runs


def default_substitutes(*, bundled: bool) -> str:
    """Return the default source of substitutes: the papers' masked LM; for bundled data, which need no download, a
    table."""
    return TOKEN_TABLE if bundled else DEFAULT_MASKED_LM

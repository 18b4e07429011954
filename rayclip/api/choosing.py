"""Turn what was written, on the command line or in a call, into settings: an evaluation, a training."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rayclip.api.checks import choose_recipe, is_small
from rayclip.api.request import Evaluation
from rayclip.attacks import parse_attacks
from rayclip.data import Names
from rayclip.data.sampling import Subset
from rayclip.data.spec import choose_names, parse_spec, split_resolution
from rayclip.defenses import DRAWS, parse_aims, parse_defenses
from rayclip.evaluation import Protocol
from rayclip.methods import make_method
from rayclip.models import TEMPLATE, Precision
from rayclip.models.resizing import Resize
from rayclip.models.scorers import parse_scorers
from rayclip.names import attack_defaults
from rayclip.store import Store
from rayclip.training import TrainConfig
from rayclip.training.held_out import HeldOut
from rayclip.types import UserError

if TYPE_CHECKING:
    from rayclip.distributed.trials import Trial


def choose_evaluation(
    data: Sequence[str],
    *,
    attacks: str,
    defense: str,
    aim: str,
    draws: int | None,
    judgements: int,
    scorer: str,
    made_against: str,
    eps: tuple[float, ...],
    steps: int,
    step_size: str | float | None,
    limit: int | None,
    subset: Subset,
    substitutes: str,
    resolution: str,
    resize: Resize,
    names: Names,
    template: str | None,
    seed: int,
    precision: Precision,
    all_named: bool = True,
) -> Evaluation:
    """Return an evaluation as written: lists with commas between, settings behind colons.

    Args:
        all_named: whether `resolution` may name only data sets that are evaluated.
    """
    chosen, native = split_resolution(resolution)
    places = [parse_spec(spec).place for spec in data]
    missing = [name for name in native or () if name not in places]
    if missing and all_named:
        raise UserError(f"--resolution {resolution} names {missing[0]}, which --data does not.")
    return Evaluation(
        data=data,
        attacks=parse_attacks(attacks, attack_defaults(steps, step_size, substitutes)),
        protocol=Protocol(
            eps=eps,
            seed=seed,
            judgements=judgements,
            resolution=chosen,
            resize=resize if native is None else "antialias",
            names=names,
            template=template or TEMPLATE,
            precision=precision,
        ),
        limit=limit,
        subset=subset,
        native=[spec for spec, place in zip(data, places, strict=True) if native and place in native],
        native_resize=resize,
        defenses=parse_defenses(defense),
        aims=parse_aims(aim, draws or DRAWS),
        scorers=parse_scorers(scorer),
        made_against=_made_against(made_against),
    )


def choose_trial(
    *,
    method: str,
    model: str,
    data: str,
    out: str,
    shots: int | None,
    attack: str | None,
    eps: float | None,
    steps: int | None,
    step_size: float | None,
    norm: str,
    start: str,
    recipe: Literal["paper", "small"] | None,
    trains: str | None,
    substitutes: str,
    class_names: str,
    changes: Mapping[str, Any],
    settings: Mapping[str, Any],
    small: bool | None = None,
) -> "Trial":
    """Return a training as it was asked for; the method's recipe, by default the one for models of this size.

    Args:
        changes: to the recipe.
        settings: other fields of the configuration; `validate` as text (`HeldOut.parse`).
        small: whether the model is small, if that is known (`checks.is_small`).
    """
    from rayclip.distributed.trials import Trial

    unknown = settings.keys() - fields_of(TrainConfig)
    if unknown:
        raise UserError(f"train has no setting '{min(unknown)}'.")
    source, (data,) = choose_names(class_names, [data])
    small = recipe == "small" or (recipe is None and (is_small(model) if small is None else small))
    chosen = make_method(
        method,
        published=not small,
        defaults={"substitutes": substitutes},
        against=attack,
        eps=eps,
        steps=steps,
        step=step_size,
        norm=norm,
        start=start,
        trains=trains,
    )
    if isinstance(held_out := settings.get("validate"), str):
        settings = {**settings, "validate": HeldOut.parse(held_out, chosen.eps)}
    config = TrainConfig(
        model=model,
        data=data,
        method=chosen,
        shots=shots,
        names=source,
        recipe=choose_recipe(chosen, model, small=small, whole_warmup=recipe == "paper", overrides=changes),
        **settings,
    )
    place = Store(out)
    return Trial(name=place.name, config=config, out=place.root)


def fields_of(kind: type) -> set[str]:
    """Return the names of a dataclass's fields."""
    return {field.name for field in dataclasses.fields(kind)}


def _made_against(text: str) -> list[Any]:
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in ("own", "template"):
            raise UserError(f"--made-against '{word}' is none: use own, template, or both with a comma between.")
    return words

"""Load and wrap models, evaluate them, fine-tune one: what `import rayclip` offers besides attacks.

The command line calls these functions or what they are made of: its checks and defaults are theirs.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from rayclip.api.attacking import Model, read_budget
from rayclip.api.choosing import choose_evaluation, choose_trial, fields_of
from rayclip.api.request import Tracking, Where
from rayclip.data.sampling import Subset
from rayclip.data.spec import choose_names
from rayclip.methods import Recipe
from rayclip.models import Clip, Precision, load_model
from rayclip.models.clip import frozen
from rayclip.models.exact import exact_fp32
from rayclip.models.resizing import Resize
from rayclip.models.wrapped import WrappedClip
from rayclip.names import find_protocol
from rayclip.paths import temporary_folder
from rayclip.types import Row, UserError
from rayclip.units import parse_budgets

if TYPE_CHECKING:
    import pandas

_DEFAULTS = {
    "attacks": "clean,pgd",
    "scorer": "template",
    "steps": 10,
    "subset": "even",
    "resolution": "native",
    "resize": "antialias",
    "class_names": "curated",
}

Budgets = str | float | Sequence[str | float] | None


class Rows(list[Row]):
    """Rows of a result table: each has a number and its protocol."""

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a data frame with a row per number; the settings behind it are columns such as `protocol.steps`."""
        import pandas

        records = []
        for row in self:
            values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
            protocol = values.pop("protocol")
            records.append(values | {f"protocol.{name}": value for name, value in protocol.items()})
        return pandas.DataFrame.from_records(records)


def load(model: str, device: torch.device | str = "cpu") -> Model:
    """Load a model.

    Args:
        model: as on the command line: `digits`, `ViT-B-32:openai`, `local-dir:FOLDER`, `hf-hub:ORG/NAME`, ….

    Raises:
        UserError: there is no such model, or its files are damaged.
    """
    with torch.random.fork_rng(devices=[]):  # building a model draws weights that its files replace
        return Model(load_model(model, device))


def wrap(module: nn.Module, preprocess: Any, tokenizer: Any, name: str | None = None) -> Model:
    """Return a CLIP of your own as a model, whatever you have changed in it: it is called by its own methods alone.

    Args:
        module: one with `encode_image`, `encode_text` and `logit_scale`, as open_clip's and OpenAI's, or with
            `get_image_features`, `get_text_features` and `logit_scale`, as transformers'. It is not copied.
        preprocess: open_clip's or torchvision's `Compose`, an image processor of transformers, or a tuple
            `(mean, std, size)`: normalisation and input size are read from it, and applied by rayclip.
        tokenizer: open_clip's, OpenAI's or transformers'.
        name: in tables; the class's name without one.

    Raises:
        UserError: the module is none of these, or the three do not belong together.
    """
    with exact_fp32(), torch.inference_mode(False):
        return Model(WrappedClip(module, preprocess, tokenizer, f"wrapped:{name or type(module).__name__}"))


def evaluate(
    models: "str | Model | Sequence[str | Model]",
    data: str | Sequence[str] | None = None,
    *,
    protocol: str | None = None,
    attacks: str | None = None,
    defense: str = "none",
    aim: str = "ignore,bpda",
    draws: int | None = None,
    judgements: int = 1,
    scorer: str | None = None,
    made_against: str = "own",
    eps: Budgets = None,
    steps: int | None = None,
    step_size: str | float | None = None,
    limit: int | None = None,
    subset: Subset | None = None,
    substitutes: str = "default",
    resolution: str | None = None,
    resize: Resize | None = None,
    class_names: str | None = None,
    template: str | None = None,
    seed: int = 0,
    precision: Precision = "fp32",
    out: str | None = None,
    cluster: bool | None = None,
    tracking: Tracking | None = None,
    quiet: bool = False,
    verbose: bool = False,
    **pool: Any,
) -> Rows:
    """Attack models on test data and return their accuracies, as `rayclip eval` does with the same options.

    Args:
        models: specifications, or models in memory, which are evaluated as they are.
        data: names of data sets, or files.
        protocol: of the field, `tecoa`, `robustvlm` or `coop`: data, attacks, budgets, … that are not given are its.
        eps: budgets in pixel units, `"1/255,2/255"` or numbers below 1.
        out: folder or URI of the results; what is there is not computed again. None keeps nothing.
        cluster: None evaluates in this process, without Ray; False on a private Ray of this machine, True on the
            running cluster. Models in memory can be evaluated in this process only.
        tracking: where to log, None nowhere.
        pool: `batch_size`, `shard_size`, …: see `rayclip.distributed.resources.PoolSize`.

    Raises:
        UserError: bad arguments, before anything is written.
    """
    specs, given = _named([models] if isinstance(models, str | Model) else models, cluster)
    options = {
        "data": data,
        "attacks": attacks,
        "scorer": scorer,
        "eps": eps,
        "steps": steps,
        "step_size": step_size,
        "limit": limit,
        "subset": subset,
        "resolution": resolution,
        "resize": resize,
        "class_names": class_names,
        "template": template,
    }
    chosen = _follow(protocol, options)
    data = chosen.pop("data")
    if data is None:
        raise UserError("evaluate needs data: name a data set, a file, or a protocol.")
    names, sources = choose_names(chosen.pop("class_names"), [data] if isinstance(data, str) else list(data))
    evaluation = choose_evaluation(
        sources,
        defense=defense,
        aim=aim,
        draws=draws,
        judgements=judgements,
        made_against=made_against,
        eps=_budgets(chosen.pop("eps")),
        substitutes=substitutes,
        names=names,
        all_named=protocol is None,
        **chosen,
        seed=seed,
        precision=precision,
    )
    from rayclip.api.evaluating import evaluate_models
    from rayclip.distributed.resources import PoolSize

    unknown = pool.keys() - fields_of(PoolSize)
    if unknown:
        raise UserError(f"evaluate has no setting '{min(unknown)}'.")
    with _results(out) as folder, _as_they_were(given.values()):
        where = Where(
            out=folder, tracking=tracking, cluster=cluster, pool=PoolSize(**pool), quiet=quiet, verbose=verbose
        )
        return Rows(evaluate_models(specs, evaluation, where, given))


def train(
    *,
    method: str,
    model: "str | Model",
    data: str,
    out: str,
    shots: int | None = None,
    attack: str | None = None,
    eps: str | float | None = None,
    steps: int | None = None,
    step_size: str | float | None = None,
    norm: Literal["linf", "l2"] = "linf",
    start: Literal["random", "zero"] = "random",
    recipe: Literal["paper", "small"] | None = None,
    trains: str | None = None,
    substitutes: str = "default",
    class_names: str = "curated",
    workers: int = 1,
    min_workers: int | None = None,
    cluster: bool = False,
    tracking: Tracking | None = None,
    quiet: bool = False,
    verbose: bool = False,
    **settings: Any,
) -> str:
    """Fine-tune a model on Ray, as `rayclip train` does with the same options; go on with what `out` holds.

    Args:
        model: a specification, or a model that was loaded from one and has not changed since.
        shots: images per class; None for all.
        settings: fields of the recipe (`rayclip.methods.Recipe`: `lr`, `epochs`, …) and of the run
            (`rayclip.training.TrainConfig`: `seed`, `ema`, …).

    Returns:
        The specification of the result, for `load`, `evaluate` and `--model`.

    Raises:
        UserError: bad arguments, before anything is written; or the run failed.
    """
    from rayclip.api.training import fine_tune

    trial = choose_trial(
        method=method,
        model=_unchanged(model),
        data=data,
        out=out,
        shots=shots,
        attack=attack,
        eps=read_budget(eps),
        steps=steps,
        step_size=read_budget(step_size, what="step-size"),
        norm=norm,
        start=start,
        recipe=recipe,
        trains=trains,
        substitutes=substitutes,
        class_names=class_names,
        changes={name: value for name, value in settings.items() if name in fields_of(Recipe)},
        settings={name: value for name, value in settings.items() if name not in fields_of(Recipe)},
    )
    where = Where(
        out=out,
        tracking=tracking,
        cluster=cluster,
        train_workers=workers,
        least_workers=min_workers,
        quiet=quiet,
        verbose=verbose,
    )
    fine_tune(trial, where)
    return trial.model


def _unchanged(model: "str | Model") -> str:
    """Return the specification of a model, which workers load anew."""
    if isinstance(model, str):
        return model
    if isinstance(model.clip, WrappedClip) or load_model(model.spec).fingerprint() != model.clip.fingerprint():
        raise UserError(
            f"'{model.spec}' is in this process's memory, and training runs in others: save its weights, and give the "
            "specification of the file or folder."
        )
    return model.spec


def _named(models: "Iterable[str | Model]", cluster: bool | None) -> tuple[list[str], dict[str, Clip]]:
    """Return the models' specifications, and by specification those that are in memory."""
    specs, given = list[str](), dict[str, Clip]()
    for model in models:
        spec = model if isinstance(model, str) else model.spec
        if not isinstance(model, str):
            if cluster is not None:
                raise UserError(f"'{spec}' is in this process's memory: leave cluster away, or give a specification.")
            if given.get(spec, model.clip) is not model.clip:
                raise UserError(f"two models are named '{spec}': give them names, wrap(…, name='mine').")
            given[spec] = model.clip
        specs.append(spec)
    devices = {str(clip.device) for clip in given.values()}
    if len(devices) > 1:
        raise UserError(f"the models are on {' and '.join(sorted(devices))}: move them to one device.")
    return specs, given


@contextlib.contextmanager
def _results(out: str | None) -> Iterator[str]:
    """Yield the folder of the results, a temporary one if none is named."""
    if out is not None:
        yield out
        return
    with temporary_folder() as folder:
        yield str(folder)


@contextlib.contextmanager
def _as_they_were(models: Iterable[Clip]) -> Iterator[None]:
    """Leave models, random numbers and the precision of products to the caller as they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(exact_fp32())
        stack.enter_context(torch.inference_mode(False))
        for clip in models:
            stack.enter_context(frozen(clip))
        yield


def _follow(protocol: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are given, else the protocol's, else the defaults of `rayclip eval`."""
    named = {} if protocol is None else find_protocol(protocol)
    named = {name: ",".join(value) if isinstance(value, list) else value for name, value in named.items()}
    if "data" in named:
        named["data"] = named["data"].split(",")
    defaults = _DEFAULTS | named
    return {name: defaults.get(name) if value is None else value for name, value in options.items()}


def _budgets(eps: Budgets) -> tuple[float, ...]:
    """Return budgets in pixel units."""
    if isinstance(eps, str):
        return parse_budgets([eps])
    given = [eps] if isinstance(eps, int | float) else list(eps or ())
    return tuple(dict.fromkeys(b for b in (read_budget(one) for one in given) if b is not None))

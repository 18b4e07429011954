"""One sweep with its options: it makes trials and evaluations, and runs them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rayclip.api.grid import Grid, parse_shots
from rayclip.cli.options import check_data, check_models, check_tracking, least_of, split
from rayclip.cli.scales import ELSEWHERE, Options, ScaleName, scales
from rayclip.paths import check_folder, split_places
from rayclip.types import UserError
from rayclip.units import default_step, parse_budget

if TYPE_CHECKING:  # keeps `--help` fast
    from rayclip.api import Found, SweepResult
    from rayclip.api.planning import StudyPlan
    from rayclip.api.request import Evaluation, Where
    from rayclip.attacks import Attack
    from rayclip.data import Resolution
    from rayclip.distributed.search import Validation
    from rayclip.distributed.trials import Trial
    from rayclip.evaluation.cell import MadeAgainst
    from rayclip.methods import Method, Recipe
    from rayclip.models.resizing import Resize
    from rayclip.store import Store


class Run:
    """A sweep with its options: makes trials and evaluations, and runs them.

    Attributes:
        setting: the scale, with the changes by options.
        model: the untouched model's specification.
        data, tests: specifications of the training and test data.
        methods: each with its settings if it has any: `mmcoa:lambda_img=0.3`.
        substitutes: source of BERT-Attack's words; `default` is the default of each data set.
        out: store of all results.
    """

    def __init__(self, name: str, options: Options, differs: Mapping[str, Any], about: str = "") -> None:
        self.name, self.options = name, options
        setting = dataclasses.replace(scales()[options.scale], **differs)
        self.setting = dataclasses.replace(
            setting,
            eps=parse_budget(options.eps) if options.eps else setting.eps,
            shots=",".join(options.shots) or setting.shots,
        )
        model, data = options.model or setting.model, tuple(split_places(options.data)) or setting.data
        if model is None or not data:
            raise UserError("--scale pocket needs --model (local-dir:PATH) and --data (FILE.parquet), takes --test.")
        self.model = model
        own_data = bool(options.data) and options.scale != ScaleName.paper
        tests = tuple(split_places(options.test)) or (() if own_data else setting.test)
        if not tests:
            data = tests = tuple(f"{d}#holdout" if d.endswith(".parquet") else d for d in data)
        self.data, self.tests = data, tests
        # Decided once, so that a part of the digits gets the same substitutes
        bundled = options.substitutes == "default" and data == ("digits",)
        self.substitutes = "clip-table" if bundled else options.substitutes
        self._texts = {"substitutes": self.substitutes, "offset": self.setting.offset}  # of attacks that have them
        out = options.out or f"runs/{name.replace('-', '_')}-{options.scale}"
        check_folder("--out", out)
        if options.models and not Path(options.models).expanduser().is_dir():  # finished models may be read-only
            check_folder("--models", options.models)
        check_tracking(options.tracking_uri)
        points = Grid.read(options.methods, {}, option="--methods").points()
        self.methods = tuple(dict.fromkeys(point.text for point in points))
        check_models([model])
        check_data([*data, *tests])

        from rayclip import api
        from rayclip.store import Store

        self.out = Store(out)
        self._errors: dict[str, str] = {}
        self._planned: list[StudyPlan] = []
        self.tracking = api.Tracking.choose(options.tracking_uri, name, about)

    @property
    def is_paper(self) -> bool:
        return self.options.scale == ScaleName.paper

    def pairs(self) -> list[tuple[str, str, str]]:
        """Return (training data, test data, part) for a sweep that tests on the data set that it trains on."""
        if len(self.data) != len(self.tests):
            raise UserError(f"--data names {len(self.data)} data sets and --test {len(self.tests)}: give one for each.")
        parts = [Path(test).stem if len(self.tests) > 1 else "" for test in self.tests]
        return list(zip(self.data, self.tests, parts, strict=True))

    @property
    def shots(self) -> list[int | None]:
        return list(dict.fromkeys(parse_shots(shot) for shot in split([self.setting.shots])))

    def trials(self) -> list["Trial"]:
        """Return a trial for every method at every number of shots."""
        return [self.trial(label, self.method(name), shots=shots) for label, name, shots in self.grid()]

    def grid(self) -> list[tuple[str, str, int | None]]:
        """Return (label, method, shots) for every method and number of shots; labels omit the shots if there is one."""
        several = len(self.shots) > 1
        return [
            (f"{name} {spell(shots)}" if several else name, name, shots)
            for shots in self.shots
            for name in self.methods
        ]

    def own_trials(self, data: str, part: str = "") -> list["Trial"]:
        """Return a trial for every method on all images of the data set that it will be tested on."""
        own: dict[str, Any] = {"data": data, "part": part, "in_distribution": True}
        return [self.trial(name, self.method(name), **own) for name in self.methods]

    def image_trials(self, **settings: Any) -> list["Trial"]:
        """Return `trials` in SAFT's and TTC's protocol: FT-standard, too, trains only the image encoder (CLIP-FT)."""
        trials = []
        for label, name, shots in self.grid():
            trains = "image" if name.partition(":")[0] == "ft-standard" else None
            trials.append(self.trial(label, self.method(name, settings, trains=trains), shots=shots))
        return trials

    def method(self, name: str, defaults: Mapping[str, Any] | None = None, **settings: Any) -> "Method":
        """Return a method with the sweep's budget and these settings; `defaults` are for methods that have them.

        At `paper`, settings of the method's published code take precedence over the sweep's (AdvPT's own budget).
        """
        from rayclip.methods import METHODS, make_method

        eps = self.setting.eps
        usual: dict[str, Any] = {"eps": eps, "steps": self.setting.train_steps, "step": self.step(eps)}
        published = METHODS.find(name.partition(":")[0]).published if self.is_paper else {}
        if "eps" in published:
            del usual["step"]
        given = {key: value for key, value in settings.items() if value is not None}
        return make_method(name, defaults={**self._texts, **(defaults or {})}, **{**usual, **published, **given})

    def step(self, eps: float) -> float:
        """Return the step size of a training attack with the budget `eps`."""
        return default_step(eps, self.setting.train_steps)

    def resolution(self, data: str) -> "Resolution":
        """Return the resolution at which a data set's images are perturbed."""
        return self.setting.resolution_of(data.partition("#")[0])

    def resize(self, data: str) -> "Resize":
        """Return how images that are perturbed at native size are resized to the model's input."""
        return self.setting.resize if self.resolution(data) == "native" else "antialias"

    def recipe(self, method: "Method") -> "Recipe":
        """Return the scale's recipe for a method: at `paper` the published one with its full warm-up."""
        if self.setting.small_recipe:
            return method.small
        from rayclip.models.loading import patch_size

        return dataclasses.replace(method.recipe_for(patch_size(self.model)), warmup_whole=True)

    def trial(
        self,
        label: str,
        method: "Method",
        *,
        shots: int | None = None,
        data: str | None = None,
        recipe: Mapping[str, Any] | None = None,
        part: str = "",
        in_distribution: bool = False,
        **config: Any,
    ) -> "Trial":
        """Return a training run.

        Args:
            shots: images per class; None for all.
            data: training data; None is the sweep's first.
            recipe: changes to the scale's recipe.
            in_distribution: whether it will be tested on the data set that it trains on.
            part: as in `go`.
            config: other fields of `TrainConfig`.
        """
        from rayclip.distributed.trials import Trial
        from rayclip.store import Store
        from rayclip.training import TrainConfig

        base = self.recipe(method)
        few, all_ = self.setting.few_shot_epochs, self.setting.epochs
        given = None if method.learns_prompt else few if shots else all_  # prompts need all epochs, and are cheap
        if self.is_paper and not in_distribution:
            given = ELSEWHERE.get(method.name)
        length = self.options.epochs or given or base.epochs
        chosen = dataclasses.replace(base, **{"epochs": length, **(recipe or {})})
        data = data or self.data[0]
        resolution = self.resolution(data)
        settings: dict[str, Any] = {
            "model": self.model,
            "data": data,
            "seed": self.options.seed,
            "resolution": "model" if resolution == "clip" else resolution,  # CLIP's way is one of tests
            "resize": self.resize(data),
            "names": self.setting.names,
            "data_workers": self.options.data_workers,
            "save_every_epochs": min(chosen.epochs, self.setting.save_every_epochs),
        }
        full = TrainConfig(method=method, recipe=chosen, shots=shots, **{**settings, **config})
        shared, own = self.options.models, self.results(part).child("models").child(label.replace(" ", "-"))
        place = Store(shared).child(f"{method.name}-{full.digest()}") if shared else own
        return Trial(name=label, config=full, out=place.root)

    def looked_at(self, trial: "Trial", every: int | None) -> "Trial":
        """Return the trial with checkpoints kept every `every` epochs (default: a fifth of all) and at the end."""
        epochs = trial.config.recipe.epochs
        every = every or max(1, epochs // 5)
        config = dataclasses.replace(trial.config, save_every_epochs=every)
        return dataclasses.replace(trial, keep_epochs=(*range(every, epochs, every), epochs), config=config)

    def attacks(self, text: str) -> list["Attack"]:
        """Parse attacks, with the scale's steps and stop rule as defaults."""
        from rayclip.attacks import parse_attacks

        defaults = {"steps": self.setting.test_steps, "stop": self.setting.stop}
        return parse_attacks(text, defaults | self._texts)

    def evaluations(
        self,
        attacks: str,
        *,
        tests: Sequence[str] | None = None,
        eps: float | tuple[float, ...] | None = None,
        defenses: str = "none",
        scorers: str = "template",
        made_against: Sequence["MadeAgainst"] = ("own",),
        aim: str = "ignore,bpda",
        draws: int | None = None,
        limit: int | None = None,
        seed: int | None = None,
    ) -> list["Evaluation"]:
        """Return one evaluation per resolution; test data, budget, limit and seed default to the sweep's.

        Args:
            defenses, scorers, aim, draws: in the syntax of `rayclip eval`.
            made_against: what image attacks optimise against where the scorer is not the template.
        """
        from rayclip.api.request import Evaluation
        from rayclip.defenses import DRAWS, parse_aims, parse_defenses
        from rayclip.evaluation import Protocol
        from rayclip.models.scorers import parse_scorers

        data: dict[Resolution, list[str]] = {}
        for test in tests or self.tests:
            data.setdefault(self.resolution(test), []).append(test)
        return [
            Evaluation(
                data=alike,
                attacks=self.attacks(attacks),
                limit=limit or self.options.limit or self.setting.limit,
                subset=self.setting.subset,
                defenses=parse_defenses(defenses),
                aims=parse_aims(aim, draws or DRAWS),
                scorers=parse_scorers(scorers),
                made_against=made_against,
                protocol=Protocol(
                    eps=eps or self.setting.eps,
                    seed=self.options.seed if seed is None else seed,
                    resolution=resolution,
                    resize=self.resize(alike[0]),
                    names=self.setting.names,
                ),
            )
            for resolution, alike in data.items()
        ]

    def results(self, part: str = "") -> "Store":
        """Return the store for the results of a part of the sweep."""
        return self.out.child(part) if part else self.out

    def where(self, part: str = "") -> "Where":
        """Return where a part of the sweep runs and writes its results."""
        from rayclip.api.request import Where
        from rayclip.distributed.resources import PoolSize

        return Where(
            out=self.results(part).root,
            pool=PoolSize(data_workers=self.options.data_workers),
            tracking=self.tracking,
            cluster=self.options.cluster,
            train_workers=self.options.workers,
            least_workers=least_of(self.options.min_workers, self.options.workers),
            quiet=self.options.quiet,
            verbose=self.options.verbose,
        )

    def go(
        self,
        trials: Sequence["Trial"],
        evaluations: Sequence["Evaluation"],
        *,
        results: Callable[["Trial"], Mapping[str, str]] | None = None,
        others: Mapping[str, str] = {},
        part: str = "",
        show: bool = True,
    ) -> "SweepResult":
        """Train, evaluate and print the table.

        Args:
            results: returns the models to evaluate of a finished trial (`api.sweep`).
            others: further models to evaluate, as {specification: label}.
            part: name of a part of the sweep: a subfolder of the results and a tracker run of its own.
            show: print the table; False leaves that to the caller (method `show`).
        """
        from rayclip import api

        title = f"{self.name} {self.options.scale}{f' {part}' if part else ''}"
        if self.options.plan:
            return self._plan(title, trials, evaluations, part, results, others)
        where, models = self.where(part), results or api.itself
        found = api.sweep(title, trials, evaluations, self.model, where, models, others=others)
        if show:
            self.show(found)
        return found

    def referee(self, labels: Mapping[str, str], parts: Mapping[str, Sequence["Evaluation"]]) -> None:
        """Print, keep and log what evaluations of these models, by part, say of defences (`api.referee`)."""
        from rayclip import api
        from rayclip.reports.to_terminal import show

        places = {self.results(part).root: evaluations for part, evaluations in parts.items()}
        show(api.referee(f"{self.name} {self.options.scale}", labels, places, self.where()))

    def search(
        self,
        trials: Sequence["Trial"],
        validation: "Validation",
        evaluations: Sequence["Evaluation"],
        *,
        reduction: float,
    ) -> None:
        """Search among the trials (`api.search`), and print its tables."""
        from rayclip import api

        title = f"{self.name} {self.options.scale}"
        if self.options.plan:
            self._plan(title, trials, evaluations, at_most=True)
            return
        found = api.search(title, trials, validation, evaluations, self.model, self.where(), reduction=reduction)
        api.show_search(found)
        self.show(found)

    def _plan(
        self,
        title: str,
        trials: Sequence["Trial"],
        evaluations: Sequence["Evaluation"],
        part: str = "",
        results: Callable[["Trial"], Mapping[str, str]] | None = None,
        others: Mapping[str, str] = {},
        *,
        at_most: bool = False,
    ) -> "SweepResult":
        """Print what a part of the sweep takes; return a result without rows."""
        from rayclip import api
        from rayclip.api.planning import plan_study
        from rayclip.cli.grid import show_plan

        print(f"{title}:")
        models = [self.model, *others]
        plan = plan_study(trials, evaluations, models, self.where(part), results or api.itself)
        show_plan(dataclasses.replace(plan, at_most=at_most))
        self._planned.append(plan)
        return api.SweepResult(rows=[], labels={}, errors={})

    def show(self, found: "SweepResult | Found") -> None:
        """Print a table, and record the failed trials for `end`."""
        from rayclip.reports.rows import show_rows

        show_rows(found.rows, found.labels)
        self._errors |= found.errors

    def end(self) -> None:
        """Print where the results are; exit with code 1 if trials failed."""
        from rayclip.progress import say

        if self.options.plan:
            if len(self._planned) > 1:
                from rayclip.api.needs import Needs
                from rayclip.cli.grid import show_needs

                print(f"{self.name} {self.options.scale}, all {len(self._planned)} parts:")
                show_needs(sum((plan.needs for plan in self._planned), Needs()))
            return
        print(f"results: {self.out.root}")
        print(f"MLflow:  rayclip ui --experiment {self.name} --tracking-uri {self.tracking.uri}")
        for name, error in self._errors.items():
            say("error", f"{name} failed: {error}")
        if self._errors:
            raise typer.Exit(1)


def spell(shots: int | None) -> str:
    """Format a number of shots as `5-shot`, or `full` for None."""
    return f"{shots}-shot" if shots else "full"

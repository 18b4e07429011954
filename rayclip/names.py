"""Find attacks, methods, defences, scorers and data sets by name: the package's own, and those of other packages.

Each kind has a registry, which imports what it names. The names and settings of the package's own are also in
`signatures.json`, so that a command line can be checked without importing torch; `python -m rayclip.cli.signatures`
writes it, and a test checks that it is up to date. Settings of other packages' are checked when they are loaded.
"""

import json
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from rayclip.settings import Configurable, FromZero, convert_all, split_chains, split_names, split_one, suggest
from rayclip.types import UserError
from rayclip.units import Norm, parse_budget

ATTACKS_ABOUT = {
    "clean": "no attack",
    "fgsm": "one step of eps along the gradient's sign (Goodfellow et al. 2015)",
    "pgd": "steps along the gradient of the cross-entropy, l_inf or l_2 (Madry et al. 2018)",
    "pgd-l2": "PGD in an l_2 ball",
    "cw": "PGD on the logit margin (Carlini & Wagner 2017)",
    "apgd-ce": "PGD that chooses its step by itself, on the cross-entropy (Croce & Hein 2020)",
    "apgd-dlr": "the same on the difference of logits ratio",
    "apgd-t": "the same on the targeted DLR, toward each of the likeliest wrong classes",
    "fab-t": "looks for the nearest misclassified image (Croce & Hein 2020)",
    "square": "random search over square windows, by scores alone (Andriushchenko et al. 2020)",
    "autoattack": "APGD-CE, APGD-T, FAB-T and Square, each on what survives (Croce & Hein 2020)",
    "apgd-ce+apgd-t": "APGD-CE, and APGD-T on what survives (RobustVLM's attack)",
    "autoattack-seeds": "APGD-CE and APGD-DLR, as SAFT and TTC run it",
    "feature": "moves the image's embedding away from the clean one (FARE, TTC; AdvPT)",
    "semantic": "against several captions per class at once (SAFT)",
    "transfer": "made on another model, judged on this one",
    "uap": "one perturbation from a file, added to every image (X-Transfer, ICML 2025)",
    "bert": "BERT-Attack: changes words of the class prompts (Li et al. 2020)",
    "charmer": "changes characters of the class prompts (Abad Rocamora et al. 2024)",
    "co-attack": "prompts first, then the image away from itself and from them (Zhang et al. 2022)",
    "sga": "prompts and image guided by each other, over scales (Lu et al. 2023)",
    "sep": "image and prompts attacked on their own, judged together (MMCoA's multimodal attack)",
}

DEFENSES_ABOUT = {
    "ttc": "counterattacks images that an attack made falsely stable (Xing et al. 2025)",
    "nac": "TTC with Nesterov momentum",
    "doc": "TTC with random orthogonal steps and a soft gate (AAAI 2026)",
    "csr": "moves images toward their low-pass form where that differs much (2026)",
    "et3": "two steps to lower energy, surer predictions (CVPR 2026)",
    "clipure-cos": "moves the embedding toward that of templates without a class (CLIPure, ICLR 2025)",
    "rtpt": "tunes the prompts' context on random views of each image (R-TPT, CVPR 2025)",
    "rn": "uniform noise",
    "tte": "mean prediction over the image, four crops and their mirror images (Pérez et al. 2021)",
    "anti-adversary": "two steps that make the predicted class surer (Alfarra et al. 2022)",
    "hedge": "steps that raise the loss of all classes together (Wu et al. 2021)",
}

METHODS = tuple(
    "ft-standard tecoa pmg-aft fare tga-zsr saft mmcoa agft sim-clip lore comp-tga leaf advpt apt fap vp".split()
)

DATASETS = tuple(
    (
        "digits cifar10 cifar100 stl10 imagenet caltech101 caltech256 oxford_pets flowers102 fgvc_aircraft "
        "stanford_cars food101 sun397 country211 eurosat dtd pcam tiny_imagenet imagenet_a imagenet_r imagenet_v2 "
        "imagenet_sketch ucf101 mscoco_captions flickr30k flickr8k caltech101-coop oxford_pets-coop flowers102-coop "
        "stanford_cars-coop food101-coop sun397-coop eurosat-coop dtd-coop"
    ).split()
)

T = TypeVar("T")
C = TypeVar("C", bound=Configurable)


class Registry(Mapping[str, T]):
    """Everything of one kind by its `name`: the package's own first, then what other packages offer, loaded when asked
    for."""

    def __init__(self, kind: str, group: str, base: type, own: Iterable[T] = ()) -> None:
        """
        Args:
            kind: for messages, such as `attack`.
            group: the entry points' group is `rayclip.<group>`.
            base: class of everything in the registry, or, of a registry of classes, their base class.
        """
        self.kind, self.group, self._base = kind, f"rayclip.{group}", base
        self._own: dict[str, T] = {}
        for one in own:
            self.register(one)

    def register(self, one: T) -> T:
        """Add one and return it, so that this can decorate a class.

        Raises:
            UserError: the name is taken.
        """
        name = one.name  # type: ignore[attr-defined]
        if name in self._own:
            raise UserError(f"there is {article(self.kind)} named '{name}' already: give yours another name.")
        self._own[name] = one
        return one

    def __getitem__(self, name: str) -> T:
        """Return the one with this name.

        Raises:
            KeyError: there is none; `find` explains.
            UserError: the name has two meanings, or what another package offers under it cannot be used.
        """
        points = [point for point in offered(self.group) if point.name == name]
        refuse_collisions(self.kind, self._own, points)
        if name in self._own:
            return self._own[name]
        if not points:
            raise KeyError(name)
        return self._load(points[0])

    def __iter__(self) -> Iterator[str]:
        return iter(known_names(self.kind, self.group, self._own))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def find(self, name: str) -> T:
        """Return the one with this name.

        Raises:
            UserError: there is none; the message suggests a similar name. Also as `__getitem__`.
        """
        try:
            return self[name]
        except KeyError:
            raise unknown(self.kind, name, self) from None

    def _load(self, point: EntryPoint) -> T:
        offers = f"the entry point '{point.name}' in {self.group} of the package {_package(point)}"
        try:
            one: Any = point.load()
        except Exception as error:
            raise UserError(
                f"{offers} cannot be loaded ({type(error).__name__}: {error}): mend or remove it."
            ) from error
        fits = issubclass(one, self._base) if isinstance(one, type) else isinstance(one, self._base)
        if not fits:
            raise UserError(f"{offers} is no {self.kind}: it has to be {article(self._base.__name__)}.")
        if getattr(one, "name", None) != point.name:
            raise UserError(f"{offers} is named '{getattr(one, 'name', '')}' itself: give both the same name.")
        return one


class Configurables(Registry[type[C]], Generic[C]):
    """A registry of classes with settings, which users write as `pgd:steps=100,step=1/255`."""

    def __init__(
        self,
        kind: str,
        group: str,
        base: type,
        own: Iterable[type[C]] = (),
        *,
        option: str,
        example: str,
        about: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            option, example: for messages: the option of the command line that takes these, and a value of it.
            about: a line on each of the package's own; of the others, it is their docstring's first.
        """
        super().__init__(kind, group, base, own)
        self.option, self.example, self._about = option, example, about or {}

    def about(self, name: str) -> str:
        """Return one line that describes a class."""
        return self._about.get(name) or (self[name].__doc__ or "").strip().split("\n")[0]

    def make(self, text: str, defaults: Mapping[str, Any] | None = None, /, **settings: Any) -> C:
        """Return one with its settings: `make("pgd:steps=100", step=1/255)`.

        Args:
            text: a name, and settings as text, which take precedence over all others.
            defaults: settings for those that have them.
            settings: as values.

        Raises:
            UserError: unknown name or setting, or an invalid value.
        """
        name, written = split_one(text, self.option, self.example)
        return self._configure(name, written, {**self._known(name, defaults or {}), **settings})

    def parse(self, text: str, defaults: Mapping[str, Any] | None = None) -> list[C]:
        """Return those that `text` names with their settings, in that order: `pgd:steps=100,step=1/255,bert`.

        Raises:
            UserError: unknown name or setting, an invalid value, or one named twice with the same settings.
        """
        found = [
            self._configure(name, written, self._known(name, defaults or {}))
            for name, written in split_names(text, self.option, self.example)
        ]
        if len(set(found)) < len(found):
            twice = f"names {article(self.kind)} twice with the same settings"
            raise UserError(f"{self.option} '{text}' {twice}: drop one.")
        return found

    def _configure(self, name: str, written: Mapping[str, str], settings: Mapping[str, Any]) -> C:
        """Return one with `settings` as values, and with those in `written` as text, which take precedence."""
        kind = self.find(name)
        values = convert_all(kind.noun, name, written, kind.settings(), kind.default_norm())
        return kind.with_settings({**settings, **values})

    def _known(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        types = self.find(name).settings()
        return {key: value for key, value in settings.items() if key in types}


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for an unknown name."""
    names = list(known)
    use = "use none or one of" if kind == "defence" else "use one of"
    return UserError(f"unknown {kind} '{name}': {suggest(name, names)}{use} {', '.join(names)}.")


def known_names(kind: str, group: str, own: Iterable[str]) -> list[str]:
    """Return the package's `own` names and those that others offer; raise a `UserError` if two things have one name."""
    points = offered(group)
    refuse_collisions(kind, own, points)
    return [*own, *sorted(point.name for point in points)]


def refuse_collisions(kind: str, own: Iterable[str], points: Iterable[EntryPoint]) -> None:
    """Raise a `UserError` if two things have one name."""
    seen = dict.fromkeys(own, "rayclip")
    for point in points:
        if point.name in seen:
            raise UserError(
                f"two packages offer {article(kind)} named '{point.name}', {seen[point.name]} and {_package(point)}: "
                f"remove one of them, or rename the entry point of {_package(point)} in {point.group}."
            )
        seen[point.name] = _package(point)


def offered(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points in a group; a package that lies on the path twice counts once."""
    return _offered(group, tuple(sys.path))


@cache
def _offered(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(dict.fromkeys(entry_points(group=group)))


def article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value.partition(":")[0]


Kind = Literal["attack", "defence", "scorer", "method"]

FILE = Path(__file__).with_name("signatures.json")
_GROUPS: dict[Kind, str] = {"attack": "attacks", "defence": "defenses", "scorer": "scorers", "method": "methods"}
PLAIN = {"int": int, "from 0": FromZero, "bool": bool, "float": float, "str": str, "floats": tuple[float, ...]}


class Signature(NamedTuple):
    """The settings of an attack, a defence, a scorer or a method, and what an attack needs.

    Attributes:
        settings: name -> type, as `settings.convert_all` takes them.
        needs_eps: whether it is an attack on images, which needs a budget.
        for_pairs: whether it is an attack that `rayclip retrieval` can run.
        norm: norm of its budget, unless its settings choose another.
    """

    settings: Mapping[str, Any]
    needs_eps: bool = False
    for_pairs: bool = False
    norm: Norm = "linf"


@cache
def signatures(kind: Kind) -> dict[str, Signature]:
    """Return the package's own signatures of a kind, by name."""
    found = json.loads(FILE.read_text())[kind]
    return {name: Signature(**{**entry, "settings": _types(entry["settings"])}) for name, entry in found.items()}


def check_attacks(text: str, *, has_budget: bool, on_pairs: bool = False) -> None:
    """Validate the value of `--attacks`.

    Args:
        has_budget: whether `--eps` is given.
        on_pairs: whether the attacks are for retrieval.

    Raises:
        UserError: unknown attack or setting, a value of the wrong type, an attack that needs a budget and has none, or
            for retrieval an attack that cannot run on pairs.
    """
    for name, written in split_names(text, "--attacks", "pgd:steps=100"):
        found = _find("attack", name)
        if found is None:
            continue
        convert_all("attack", name, written, found.settings, found.norm)
        if on_pairs and not found.for_pairs:
            raise not_for_pairs(name, (n for n, s in signatures("attack").items() if s.for_pairs))
        if found.needs_eps and not has_budget and "eps" not in written:
            raise no_budget(name)


def attack_defaults(steps: int, step_size: str | float | None, substitutes: str) -> dict[str, Any]:
    """Return the defaults for settings that attacks do not set; without a step size, each attack has its own."""
    step = parse_budget(step_size, "step-size") if isinstance(step_size, str) else step_size
    return {"steps": steps, "substitutes": substitutes, **({} if step is None else {"step": step})}


def check_defenses(text: str) -> None:
    """Raise a `UserError` if `--defense` has an unknown defence or setting, or a value of the wrong type."""
    for link in (link for chain in split_chains(text) if chain != ["none"] for link in chain):
        ((name, written),) = split_names(link, "--defense", "ttc:eps=4/255")
        found = _find("defence", name)
        if found is not None:
            convert_all("defence", name, written, found.settings)


def check_scorers(text: str) -> None:
    """Raise a `UserError` if `--scorer` has an unknown scorer or setting, or a value of the wrong type."""
    for name, written in split_names(text, "--scorer", "cupl:captions=FILE"):
        found = _find("scorer", name)
        if found is not None:
            convert_all("scorer", name, written, found.settings)


def check_methods(text: str) -> None:
    """Raise a `UserError` if `--methods` has an unknown method or setting, or a value of the wrong type."""
    for name, written in split_names(text, "--methods", "tecoa,mmcoa:lambda_img=0.3"):
        found = _find("method", name)
        if found is not None:
            convert_all("method", name, written, found.settings)


def check_method(text: str) -> None:
    """Raise a `UserError` if `--method` has an unknown method or setting, or a value of the wrong type."""
    split_one(text, "--method", "mmcoa:lambda_img=0.3")
    check_methods(text)


@cache
def protocols() -> dict[str, dict[str, Any]]:
    """Return the field's protocols by name: `about`, and values of the options of `rayclip eval` (`protocols.toml`)."""
    return tomllib.loads((Path(__file__).parent / "protocols.toml").read_text("utf-8"))


def find_protocol(name: str) -> dict[str, Any]:
    """Return the options that a protocol sets. Raises `UserError`: no such protocol."""
    if name not in protocols():
        raise unknown("protocol", name, protocols())
    return {key: value for key, value in protocols()[name].items() if key != "about"}


def check_template(template: str) -> None:
    """Raise a `UserError` unless a template of class prompts has one place for the class's name."""
    if template.count("{}") != 1:
        fault = "several" if "{}" in template else "no"
        raise UserError(
            f"template '{template}' has {fault} {{}} where the class's name goes: write 'a photo of a {{}}', {{}} once."
        )


def no_budget(name: str) -> UserError:
    """Return the error for an attack that needs a budget and has none."""
    return UserError(f"attack '{name}' needs a budget: give --eps, for example --eps 1/255, or {name}:eps=1/255.")


def not_for_pairs(name: str, known: Iterable[str]) -> UserError:
    """Return the error for an attack that cannot run on image-caption pairs."""
    return UserError(f"attack '{name}' is for classification: for retrieval use one of {', '.join(sorted(known))}.")


def _find(kind: Kind, name: str) -> Signature | None:
    """Return the signature of a name; None for a plug-in of another package."""
    ours = signatures(kind)
    known = known_names(kind, f"rayclip.{_GROUPS[kind]}", ours)
    if name not in known:
        raise unknown(kind, name, known)
    return ours.get(name)


def _types(spelled: Mapping[str, str | list[str]]) -> dict[str, Any]:
    return {key: Literal[tuple(value)] if isinstance(value, list) else PLAIN[value] for key, value in spelled.items()}

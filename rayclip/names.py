"""Names and settings of attacks, defences, scorers, methods and data sets, available without importing torch.

`python -m rayclip.cli.signatures` writes `signatures.json` from the registries; a test checks that the two agree.
Plug-ins of other packages are not in the file; their settings are checked when they are loaded.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rayclip.settings import convert_all, split_chains, split_names
from rayclip.types import UserError
from rayclip.units import Norm

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
    "autoattack-seeds": "APGD-CE and APGD-DLR, as SAFT and TTC run it",
    "feature": "moves the image's embedding away from the clean one (FARE, TTC; AdvPT)",
    "semantic": "against several captions a class at once (SAFT)",
    "transfer": "made on another model, judged on this one",
    "bert": "BERT-Attack: changes words of the class prompts (Li et al. 2020)",
    "co-attack": "prompts first, then the image away from itself and from them (Zhang et al. 2022)",
    "sga": "prompts and image guided by each other, over scales (Lu et al. 2023)",
    "sep": "image and prompts attacked on their own, judged together (MMCoA's multimodal attack)",
}

DEFENSES_ABOUT = {
    "ttc": "counterattacks images that an attack made falsely stable (Xing et al. 2025)",
    "rn": "uniform noise",
    "tte": "mean prediction over the image, four crops and their mirror images (Pérez et al. 2021)",
    "anti-adversary": "two steps that make the predicted class surer (Alfarra et al. 2022)",
    "hedge": "steps that raise the loss of all classes together (Wu et al. 2021)",
}

METHODS = ("ft-standard", "tecoa", "pmg-aft", "fare", "tga-zsr", "saft", "mmcoa", "advpt", "vp")

DATASETS = (
    "digits",
    "cifar10",
    "cifar100",
    "stl10",
    "imagenet",
    "caltech101",
    "caltech256",
    "oxford_pets",
    "flowers102",
    "fgvc_aircraft",
    "stanford_cars",
    "food101",
    "sun397",
    "country211",
    "eurosat",
    "dtd",
    "pcam",
    "tiny_imagenet",
    "mscoco_captions",
    "flickr30k",
    "flickr8k",
)

Kind = Literal["attack", "defence", "scorer", "method"]

FILE = Path(__file__).with_name("signatures.json")
_GROUPS: dict[Kind, str] = {"attack": "attacks", "defence": "defenses", "scorer": "scorers", "method": "methods"}
PLAIN = {"int": int, "float": float, "str": str, "floats": tuple[float, ...]}


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
        norm = written.get("norm", found.norm)
        convert_all("attack", name, written, found.settings, "l2" if norm == "l2" else "linf")
        if on_pairs and not found.for_pairs:
            raise not_for_pairs(name, (n for n, s in signatures("attack").items() if s.for_pairs))
        if found.needs_eps and not has_budget and "eps" not in written:
            raise no_budget(name)


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


def check_methods(names: Iterable[str]) -> None:
    """Raise a `UserError` for names of unknown training methods."""
    for name in names:
        _find("method", name)


def no_budget(name: str) -> UserError:
    """Return the error for an attack that needs a budget and has none."""
    return UserError(f"attack '{name}' needs a budget: give --eps, for example --eps 1/255, or {name}:eps=1/255.")


def not_for_pairs(name: str, known: Iterable[str]) -> UserError:
    """Return the error for an attack that cannot run on image-caption pairs."""
    return UserError(f"attack '{name}' is for classification: for retrieval use one of {', '.join(sorted(known))}.")


def unknown(kind: Kind, name: str, known: Iterable[str]) -> UserError:
    """Return the error for an unknown name."""
    use = "use none or one of" if kind == "defence" else "use one of"
    return UserError(f"unknown {kind} '{name}': {use} {', '.join(known)}.")


def _find(kind: Kind, name: str) -> Signature | None:
    """Return the signature of a name; None for a plug-in of another package."""
    ours = signatures(kind)
    if name in ours:
        return ours[name]
    offered = {e.name for e in entry_points(group=f"rayclip.{_GROUPS[kind]}")}
    if name not in offered:
        raise unknown(kind, name, sorted({*ours, *offered}))
    return None


def _types(spelled: Mapping[str, str | list[str]]) -> dict[str, Any]:
    return {key: Literal[tuple(value)] if isinstance(value, list) else PLAIN[value] for key, value in spelled.items()}

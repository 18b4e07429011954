"""Registry of defences by name, and parser of the text form in which users write chains of them:
`ttc:eps=4/255,steps=2+tte`."""

from importlib.metadata import entry_points

from rayclip.defenses.base import Defense
from rayclip.defenses.defended import Aim, Chain
from rayclip.defenses.rn import RandomNoise
from rayclip.defenses.signed import AntiAdversary, Hedge
from rayclip.defenses.ttc import TTC
from rayclip.defenses.tte import TTE
from rayclip.names import DEFENSES_ABOUT, unknown
from rayclip.settings import convert_all, split_chains, split_names
from rayclip.types import UserError

NONE = "none"
DRAWS = 4  # default number of EOT draws

DEFENSES: dict[str, type[Defense]] = {d.name: d for d in (TTC, RandomNoise, TTE, AntiAdversary, Hedge)}


def known_defenses() -> dict[str, type[Defense]]:
    """Return every defence by its name, those that other packages offer through `rayclip.defenses` last."""
    offered = {e.name: e.load() for e in entry_points(group="rayclip.defenses") if e.name not in DEFENSES}
    return {**DEFENSES, **offered}


def about(name: str, kind: type[Defense]) -> str:
    """Return a one-line description of a defence; for another package's, the first line of its docstring."""
    return DEFENSES_ABOUT.get(name) or (kind.__doc__ or "").strip().split("\n")[0]


def parse_defenses(text: str) -> list[Chain]:
    """Parse `"none,ttc:eps=4/255,steps=2+tte,rn"` into chains, in that order. `none` is the empty chain; `+` adds a
    defence that gets the images of the one before it.

    Raises:
        UserError: unknown defence or setting, or an invalid value.
    """
    chains: list[list[Defense]] = []
    for links in split_chains(text):
        if links == [NONE]:
            chains.append([])
        else:
            chains.append([_defense(link) for link in links])
    found = [tuple(chain) for chain in chains]
    if len(set(found)) < len(found):
        raise UserError(f"--defense '{text}' names a defence twice with the same settings: drop one.")
    return found


def _defense(link: str) -> Defense:
    ((name, written),) = split_names(link, "--defense", "ttc:eps=4/255")
    known = known_defenses()
    if name not in known:
        raise unknown("defence", name, sorted(known))
    kind = known[name]
    return kind(**convert_all("defence", name, written, kind.settings()))


def parse_aims(text: str, draws: int) -> list[Aim]:
    """Parse `"ignore,bpda"` into aims, with `draws` for those that attack through the defence.

    Raises:
        UserError: an unknown aim.
    """
    aims: list[Aim] = []
    for word in (w.strip() for w in text.split(",")):
        if word not in ("ignore", "straight", "bpda"):
            raise UserError(f"--aim '{word}' is none: use ignore, straight or bpda, commas between.")
        aims.append(Aim() if word == "ignore" else Aim(gradient=word, draws=draws))  # type: ignore[arg-type]
    return list(dict.fromkeys(aims))

"""Defences by name, and chains of them as users write them: `ttc:eps=4/255,steps=2+tte`."""

from typing import get_args

from rayclip.defenses.base import Defense
from rayclip.defenses.defended import Aim, Chain, Gradient
from rayclip.names import DEFENSES_ABOUT, Configurables
from rayclip.settings import split_chains
from rayclip.types import UserError

NONE = "none"
DRAWS = 4  # default number of EOT draws

DEFENSES: Configurables[Defense] = Configurables(
    "defence",
    "defenses",
    Defense,
    option="--defense",
    example="ttc:eps=4/255",
    about=DEFENSES_ABOUT,
)


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
            chains.append([DEFENSES.make(link) for link in links])
    found = [tuple(chain) for chain in chains]
    if len(set(found)) < len(found):
        raise UserError(f"--defense '{text}' names a defence twice with the same settings: drop one.")
    return found


def parse_aims(text: str, draws: int) -> list[Aim]:
    """Parse `"ignore,bpda,rn:eps=8/255"` into aims, with `draws` for those that attack through a defence; a chain of
    defences, written as for `parse_defenses`, attacks through that one with BPDA, whichever judges.

    Raises:
        UserError: an unknown aim, or no defence of that name.
    """
    aims: list[Aim] = []
    for links in split_chains(text):
        if len(links) == 1 and links[0] in get_args(Gradient):
            aims.append(Aim() if links == ["ignore"] else Aim(gradient=links[0], draws=draws))  # type: ignore[arg-type]
        elif all(link.partition(":")[0] in DEFENSES for link in links):
            source = tuple(DEFENSES.make(link) for link in links)
            aims.append(Aim(gradient="bpda", draws=draws, source=source))
        else:
            known = f"use one or more of {', '.join(get_args(Gradient))}, or a defence to attack through"
            raise UserError(f"--aim '{'+'.join(links)}' is none: {known}.")
    return list(dict.fromkeys(aims))

"""Test-time defences: one file per defence; each wraps a classifier and returns a classifier."""

from rayclip.defenses.base import Defense, Purifier
from rayclip.defenses.defended import IGNORE, Aim, Chain, Defended, chain_label, describe_chain, is_random
from rayclip.defenses.registry import DEFENSES, DRAWS, known_defenses, parse_aims, parse_defenses

__all__ = [
    "DEFENSES",
    "DRAWS",
    "IGNORE",
    "Aim",
    "Chain",
    "Defended",
    "Defense",
    "Purifier",
    "chain_label",
    "describe_chain",
    "is_random",
    "known_defenses",
    "parse_aims",
    "parse_defenses",
]

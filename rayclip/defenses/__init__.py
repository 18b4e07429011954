"""Test-time defences: one file each, a wrapper that makes another classifier of a classifier."""

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

"""Test-time defences: one file per defence; each wraps a classifier and returns a classifier."""

from rayclip.defenses.base import Defense, Purifier
from rayclip.defenses.clipure import CLIPureCos
from rayclip.defenses.csr import CSR
from rayclip.defenses.defended import (
    IGNORE,
    Aim,
    Chain,
    Defended,
    chain_label,
    describe_chain,
    fitting,
    is_random,
    pinned,
)
from rayclip.defenses.et3 import ET3
from rayclip.defenses.registry import DEFENSES, DRAWS, parse_aims, parse_defenses
from rayclip.defenses.rn import RandomNoise
from rayclip.defenses.rtpt import RTPT
from rayclip.defenses.signed import AntiAdversary, Hedge
from rayclip.defenses.ttc import DOC, NAC, TTC
from rayclip.defenses.tte import TTE

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
    "fitting",
    "is_random",
    "parse_aims",
    "parse_defenses",
    "pinned",
]

for _kind in (TTC, NAC, DOC, CSR, ET3, CLIPureCos, RTPT, RandomNoise, TTE, AntiAdversary, Hedge):
    DEFENSES.register(_kind)

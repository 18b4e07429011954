"""Attacks on CLIP: one file per family, and one loop shared by all gradient attacks."""

from rayclip.attacks.apgd import APGDCE, APGDDLR, APGDT
from rayclip.attacks.autoattack import APGDPair, AutoAttack, AutoAttackSeeds
from rayclip.attacks.base import Adversarial, Attack, Samples
from rayclip.attacks.bert import BertAttack
from rayclip.attacks.charmer import Charmer
from rayclip.attacks.clean import Clean
from rayclip.attacks.co_attack import CoAttack
from rayclip.attacks.cw import CW
from rayclip.attacks.fab import FABT
from rayclip.attacks.feature import FeatureAttack
from rayclip.attacks.fgsm import FGSM
from rayclip.attacks.pgd import PGD, PGDL2
from rayclip.attacks.registry import ATTACKS, attack_as_described, make_attack, parse_attacks
from rayclip.attacks.semantic import SemanticEnsemble
from rayclip.attacks.sep import SepAttack
from rayclip.attacks.sga import SGA
from rayclip.attacks.square import Square
from rayclip.attacks.transfer import Transfer
from rayclip.attacks.uap import UniversalPerturbation

__all__ = ["ATTACKS", "Adversarial", "Attack", "Samples", "attack_as_described", "make_attack", "parse_attacks"]

for _kind in (
    Clean,
    FGSM,
    PGD,
    PGDL2,
    CW,
    APGDCE,
    APGDDLR,
    APGDT,
    FABT,
    Square,
    AutoAttack,
    APGDPair,
    AutoAttackSeeds,
    FeatureAttack,
    SemanticEnsemble,
    Transfer,
    UniversalPerturbation,
    BertAttack,
    Charmer,
    SepAttack,
    CoAttack,
    SGA,
):
    ATTACKS.register(_kind)

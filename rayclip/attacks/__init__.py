"""Attacks on CLIP: one file per family, and one loop shared by all gradient attacks."""

from rayclip.attacks.base import Adversarial, Attack, Samples
from rayclip.attacks.registry import ATTACKS, attack_as_described, make_attack, parse_attacks

__all__ = ["ATTACKS", "Adversarial", "Attack", "Samples", "attack_as_described", "make_attack", "parse_attacks"]

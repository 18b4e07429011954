"""Training methods: one file per method, with its loss and the attack it trains against."""

from rayclip.methods.advpt import AdvPT
from rayclip.methods.agft import AGFT
from rayclip.methods.apt import APT
from rayclip.methods.base import SMALL_BELOW, SMALL_MODEL, Batch, ClassTexts, Method, Original, Recipe
from rayclip.methods.fap import FAP
from rayclip.methods.fare import FARE
from rayclip.methods.ft_standard import FTStandard
from rayclip.methods.leaf import LEAF
from rayclip.methods.lore import LORE
from rayclip.methods.mmcoa import MMCoA
from rayclip.methods.pmg_aft import PMGAFT
from rayclip.methods.registry import METHODS, make_method
from rayclip.methods.saft import SAFT
from rayclip.methods.sim_clip import SimCLIP
from rayclip.methods.tecoa import TeCoA
from rayclip.methods.tga_zsr import TGAZSR, CompTGA
from rayclip.methods.vp import VP

__all__ = [
    "METHODS",
    "SMALL_BELOW",
    "SMALL_MODEL",
    "Batch",
    "ClassTexts",
    "Method",
    "Original",
    "Recipe",
    "make_method",
]

_WEIGHTS = (FTStandard, TeCoA, PMGAFT, FARE, TGAZSR, SAFT, MMCoA, AGFT, SimCLIP, LORE, CompTGA, LEAF)
for _kind in (*_WEIGHTS, AdvPT, APT, FAP, VP):
    METHODS.register(_kind)

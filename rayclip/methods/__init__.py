"""Training methods: one file per method, with its loss and the attack it trains against.

The table shows where the papers, their code and this package differ. Published settings are those of the code
(`Method.published`), with its recipe (`Method.recipe_for`): sweeps use them at the scale `paper`, and `rayclip train`
for models of 20 million parameters and more, or with `--recipe paper`. In all other cases, and in Python, the defaults
hold.

method        papers and their code                                 default here                 published
------------  --------------------------------------------------  --------------------------  -----------------------
ft-standard   MMCoA's: both encoders, Adam 1e-6 without a           CE over the class prompts    the same; trains=image
              schedule, CE over the class prompts, 30 epochs.                                    uses the recipe of
              CLIP-FT of SAFT's and TTC's line (TGA-ZSR's code):                                 CLIP-FT
              image encoder, SGD 1e-4, contrastive inside the
              batch, diagonal
tecoa         paper: lr 1e-5, 2 steps; code: 1e-7, 5 steps          2 steps                      lr 1e-5
pmg-aft       code: no temperature, not in the attack either;       form=scaled: temperature     form=published
              divergences summed over the batch. TTC's:             and means
              temperature, means, the first divergence the other
              way round
fare          paper: 2/255 and 4/255. Code: 4/255, AdamW with       4/255, momentum 0.9          the same; sweeps that
              betas 0.9, 0.999, PGD with momentum 0.9, 1400 of                                   compare methods give
              20,000 steps of warm-up                                                            all one budget
tga-zsr       code: patches are normalised over the wrong axis,     each patch normalised        the same
              which moves the gradient by 2 %
saft          code: as tga-zsr's; templates where a class has too   each patch normalised; few   the same
              few captions                                          captions are an error
mmcoa         the inner image attack raises, in the paper, the      against=own (contrastive),   against=pgd (CE),
              contrastive loss, in the code CE over the class       targets=diagonal             targets=diagonal
              prompts; targets: equation 7 by class, code diagonal
advpt         code: 32 tokens, a full stop after the name, 200      16 tokens, no full stop      32 tokens, no full
              epochs on B/32, 100 on B/16 and L/14, one of                                       stop, images at 8/255
              warm-up; images at 8/255 in 10 steps of 1.25·eps/10
vp            code: frame from N(0, 1), 10 tokens after the         frame=empty, tokens=0        frame=normal, tokens=10
              patches (README: 100)

The papers' warm-ups have their published length (`Recipe.warmup_whole`) at the scale `paper` and with `--recipe paper`;
elsewhere they take a tenth of a run at most.
"""

from rayclip.methods.advpt import AdvPT
from rayclip.methods.base import SMALL_BELOW, SMALL_MODEL, Batch, ClassTexts, Method, Original, Recipe
from rayclip.methods.fare import FARE
from rayclip.methods.ft_standard import FTStandard
from rayclip.methods.mmcoa import MMCoA
from rayclip.methods.pmg_aft import PMGAFT
from rayclip.methods.registry import METHODS, make_method
from rayclip.methods.saft import SAFT
from rayclip.methods.tecoa import TeCoA
from rayclip.methods.tga_zsr import TGAZSR
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

for _kind in (FTStandard, TeCoA, PMGAFT, FARE, TGAZSR, SAFT, MMCoA, AdvPT, VP):
    METHODS.register(_kind)

"""Square attack (Andriushchenko, Croce, Flammarion & Hein 2020): random search over square windows, from scores alone.

Shapes: B batch, A samples of it that are being attacked, C H W image, n random numbers per proposal.
"""

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rayclip import rng
from rayclip.attacks.base import Adversarial, Attack, Norm, Prompts, Samples
from rayclip.attacks.geometry import margin, per_image, sizes
from rayclip.models import ZeroShot
from rayclip.types import UserError

# Queries out of 10000 at which the window's share of the image is halved (section 3.3 of the paper); scaled to others.
HALVINGS = (10, 50, 200, 1000, 2000, 4000, 6000, 8000)
# Proposals after which auto-attack's code halves it, whatever the number of queries
OFFICIAL_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
Schedule = Literal["paper", "official"]

_BLOCK = 64  # proposals whose random numbers are drawn at once


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square attack: lowers the margin z_y − max z_j, keeping each proposal that does. Needs no gradient.

    A sample leaves at its first misclassified image; an unbroken one keeps its image of lowest margin.
    `Adversarial.steps_B` is 0, as no gradient is followed.

    Attributes:
        queries: largest number of image forward passes per sample.
        p_init: the first windows' share of the image's pixels, in (0, 1].
        schedule: when that share is halved. `paper`: as in section 3.3, scaled to the number of queries. `official`: as
            in auto-attack's code: not scaled, and after 500 proposals too. `paper` is stronger with few queries and as
            good with many: of 60 digits at 24/255 it leaves 17 unbroken after 1000 queries and 15 after 5000,
            `official` 35 and 14. That code itself leaves 23 after 5000, because none of its windows starts at the last
            row or column; with those windows and our random numbers its images equal ours, pixel by pixel.
        norm: `linf`, or `l2` over all pixels and channels of an image.
    """

    name: ClassVar[str] = "square"
    black_box: ClassVar[bool] = True

    queries: int = 5000
    p_init: float = 0.8
    schedule: Schedule = "paper"
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        if not 0 < self.p_init <= 1:
            raise UserError(f"square: p_init={self.p_init} is a share of the pixels: give one in (0, 1], such as 0.8.")

    @property
    def label(self) -> str:
        return f"{self.name}-{self.queries}" + ("" if self.norm == "linf" else f"_{self.norm}")

    @property
    def cost(self) -> int:
        return self.queries

    def side(self, query: int, height: int, width: int) -> int:
        """Return the window's side at a query (the start is query 0), in pixels."""
        if self.schedule == "official":
            halved = bisect_left(OFFICIAL_HALVINGS, query - 1)
        else:
            halved = bisect_right(HALVINGS, query * 10000 // self.queries)
        share = self.p_init / 2**halved
        return min(max(round(math.sqrt(share * height * width)), 1), height, width)

    @torch.no_grad()
    def craft(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        images, labels, keys, todo = samples
        adversarial, keys = images.clone(), keys.to(images.device, non_blocking=True)
        everyone = torch.arange(len(images), device=images.device)
        queries_B = torch.zeros_like(everyone)
        active = everyone if todo is None else todo.nonzero().squeeze(1)
        clean, label = images[active], labels[active]
        best = candidate = self._initial(clean, keys[active], eps)
        lowest_A = torch.full((len(active),), torch.inf, dtype=images.dtype, device=images.device)
        for query in range(self.queries):
            if not len(active):
                break
            if query:
                turn = (query - 1) % _BLOCK
                if not turn:
                    draws = self._draws(keys, images.shape[1], stream=1 + (query - 1) // _BLOCK)
                side = self.side(query, *images.shape[2:])
                propose = _propose_linf if self.norm == "linf" else _propose_l2
                candidate = propose(clean, best, draws[active, turn], side, eps)
            logits = victim(candidate, active)
            queries_B[active] += 1
            margin_A = margin(logits, label)
            better = margin_A < lowest_A
            best, lowest_A = candidate.where(per_image(better), best), margin_A.where(better, lowest_A)
            broken = logits.argmax(1) != label
            adversarial[active] = torch.where(per_image(broken), candidate, best)
            kept = (~broken).nonzero().squeeze(1)
            if len(kept) < len(active):
                active, clean, label, best, lowest_A = (x[kept] for x in (active, clean, label, best, lowest_A))
        return Adversarial(adversarial, None, torch.zeros_like(queries_B), queries_B)

    def _draws(self, keys_B: Tensor, channels: int, stream: int) -> Tensor:
        """Return the random numbers of `_BLOCK` proposals, `(B, _BLOCK, n)`; in float64, so that a number below 1 times
        an integer stays below that integer.

        l_inf: row, column, and a sign per channel. l_2: row and column twice, an orientation, and a sign per channel.
        """
        count = channels + (2 if self.norm == "linf" else 5)
        return rng.uniform(keys_B, (_BLOCK, count), stream=stream, dtype=torch.float64)

    def _initial(self, clean: Tensor, keys: Tensor, eps: float) -> Tensor:
        """Return the start. l_inf: stripes one pixel wide of ±eps. l_2: a grid of tiles, five along the shorter side,
        each with the pattern."""
        _, channels, height, width = clean.shape
        if self.norm == "linf":
            stripes = _signs(rng.uniform(keys, (channels, 1, width), dtype=clean.dtype))
            return (clean + eps * stripes).clamp(0, 1)
        tile = max(1, min(height, width) // 5)
        rows, columns = -(-height // tile), -(-width // tile)
        signs = _signs(rng.uniform(keys, (channels, rows, columns), dtype=clean.dtype))
        signs = signs.repeat_interleave(tile, 2).repeat_interleave(tile, 3)[..., :height, :width]
        nu = signs * _pattern_on(tile, clean.device, clean.dtype)[0].repeat(rows, columns)[:height, :width]
        return (clean + nu * (eps / _norms(nu))).clamp(0, 1)


def _propose_linf(clean: Tensor, best: Tensor, draws_An: Tensor, side: int, eps: float) -> Tensor:
    """Propose ±eps inside one window, one sign per channel (algorithm 2): ±2·eps from a corner of the ball,
    projected."""
    window = _window(draws_An[:, 0], draws_An[:, 1], side, clean)[0]
    signs = _signs(draws_An[:, 2:]).to(clean)[:, :, None, None]
    return torch.where(window, (clean + eps * signs).clamp(0, 1), best)


def _propose_l2(clean: Tensor, best: Tensor, draws_An: Tensor, side: int, eps: float) -> Tensor:
    """Add the pattern in one window, using the budget of another window and any that is left (algorithm 3)."""
    nu = best - clean
    first, rows, columns = _window(draws_An[:, 0], draws_An[:, 1], side, clean)
    second, _, _ = _window(draws_An[:, 2], draws_An[:, 3], side, clean)
    both = _pattern_on(side, clean.device, clean.dtype)
    both = both / both[0].norm()
    turned = (draws_An[:, 4] < 0.5).long()
    eta = both[turned[:, None, None], rows[:, :, None], columns[:, None, :]][:, None] * first
    signs = _signs(draws_An[:, 5:]).to(clean)[:, :, None, None]
    tiny = torch.finfo(clean.dtype).tiny
    inside = nu * first
    fresh = signs * eta + inside / _plane_norms(inside).clamp_min(tiny)
    unused = (eps**2 - _norms(nu).square()).clamp_min(0)
    budget = (_plane_norms(nu * (first | second)).square() + unused / clean.shape[1]).sqrt()
    fresh = fresh * (budget / _plane_norms(fresh).clamp_min(tiny))
    nu = torch.where(first, fresh, torch.where(second, 0, nu))
    nu = nu * (eps / _norms(nu).clamp_min(tiny)).clamp(max=1)  # against rounding
    return (clean + nu).clamp(0, 1)


def pattern(side: int) -> Tensor:
    """Return two bumps of opposite sign side by side, `(side, side)` float64 on the CPU (equation 2 and the text after
    it)."""
    left = side // 2
    return torch.cat((_bump(side, left), -_bump(side, side - left)), dim=1)


@lru_cache(maxsize=64)
def _pattern_on(side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the pattern and its transpose, `(2, side, side)`, kept where they are used."""
    return torch.stack((pattern(side), pattern(side).T)).to(device, dtype)


def _bump(height: int, width: int) -> Tensor:
    """Return a bump with entries `Σ_{k=0..M} 1/(n+1−k)²` at (r, s), `n = ⌊height/2⌋`; M is n minus the number of the
    ring that (r, s) is in, 0 in the middle."""
    n = height // 2
    sums = (1 / torch.arange(n + 1, 0, -1, dtype=torch.float64).square()).cumsum(0)
    r = (torch.arange(height) - n).abs()[:, None]
    s = (torch.arange(width) - width // 2).abs()[None, :]
    return sums[n - torch.maximum(r, s)]


def _window(row_A: Tensor, column_A: Tensor, side: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a square at a random place: mask `(A, 1, H, W)`, and each pixel's row and column in it, clamped to its
    edge."""
    found = []
    for draw_A, extent in ((row_A, like.shape[2]), (column_A, like.shape[3])):
        start = (draw_A * (extent - side + 1)).long()
        found.append(torch.arange(extent, device=like.device) - start[:, None])
    inside_r, inside_c = ((at >= 0) & (at < side) for at in found)
    rows, columns = (at.clamp(0, side - 1) for at in found)
    return (inside_r[:, :, None] & inside_c[:, None, :])[:, None], rows, columns


def _signs(uniform: Tensor) -> Tensor:
    return 1 - 2 * (uniform < 0.5).to(uniform.dtype)


def _norms(x: Tensor) -> Tensor:
    return per_image(sizes(x, "l2"))


def _plane_norms(x: Tensor) -> Tensor:
    return x.flatten(2).norm(dim=2)[:, :, None, None]

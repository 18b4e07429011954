"""Random numbers per sample, independent of batch, worker and device.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), a counter-based generator,
written in torch integer arithmetic: every sample has its own 64-bit key, so its noise is the same in any batch, shard
or cluster, on a CPU and on a GPU, and resuming needs no saved state. Its 170 operations are one kernel on a GPU
(`fused`, which other chains of elementwise operations use, too).
"""

import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, as int64
_WEYL = (0x9E3779B9, 0xBB67AE85)

P = ParamSpec("P")
R = TypeVar("R")


def fused(chain: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function whose first argument is a tensor, so that a GPU runs it as few kernels (`torch.compile`).

    On a CPU, and where torch.compile does not work (no Triton, no compiler), the function itself runs. Its bits are the
    same in both, as long as it adds nothing to an inexact product, which a GPU would round once and not twice. No
    gradient passes, and autocast does not apply. Any size will do; of other Python numbers each needs a compilation of
    its own (pass a tensor instead), which takes a machine's first process seconds, and is kept on disk.
    """
    compiled = functools.cache(lambda: torch.compile(chain, dynamic=True))
    failed: list[Exception] = []

    @functools.wraps(chain)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        if failed or not (isinstance(first, Tensor) and first.is_cuda):
            return chain(*args, **kwargs)
        try:
            with torch.no_grad(), torch.autocast("cuda", enabled=False):
                return compiled()(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # those of compilers have no class in common
            failed.append(error)
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            warnings.warn(f"{chain.__name__} is slower than it could be: torch.compile fails ({reason})", stacklevel=2)
            return chain(*args, **kwargs)

    return run


def sample_keys(samples: Iterable[int], *context: object) -> Tensor:
    """Return one 64-bit key per sample: a hash of the sample's id and of `context` (run seed, data set, attack, ...).

    The keys are `(B,)` int64 on the CPU.
    """
    tail = "\x1f".join(str(part) for part in context)
    digests = (hashlib.blake2b(f"{i}\x1f{tail}".encode(), digest_size=8).digest() for i in samples)
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64)


def subkeys(keys_B: Tensor, context: str) -> Tensor:
    """Derive the samples' keys for one part of an attack, so that its noise differs from that of other parts."""
    digest = hashlib.blake2b(context.encode(), digest_size=8).digest()
    return keys_B ^ int.from_bytes(digest, "little", signed=True)


def numbered(keys: Tensor, numbers: Tensor) -> Tensor:
    """Derive the samples' keys for draws with these numbers; keys and int64 numbers must broadcast."""
    return keys + (numbers + 1) * _GOLDEN  # wraps around; neighbouring keys serve Philox as well as any others


class Draws:
    """The random draws of a stochastic classifier for the samples of a batch.

    When the classifier is evaluated, a sample's draw is always the same. When it is attacked, every query of a sample
    draws anew, counted per sample, and never repeats the draw used for evaluation.

    Args:
        keys_B: one 64-bit key per sample, on the device of the pixels.
        attacked: whether the classifier is being attacked, see above.
        count: K, draws per query.
    """

    def __init__(self, keys_B: Tensor, *, attacked: bool, count: int = 1) -> None:
        self._keys_B, self._attacked, self._count = keys_B, attacked, count
        self._asked_B = torch.zeros_like(keys_B)

    def of(self, index: Tensor | None, images: int) -> Tensor:
        """Return the keys for the next query, `(B, K)`.

        Args:
            index: positions in the batch of the queried samples; None for the whole batch in order.
            images: number of queried images.
        """
        if index is None and images != len(self._keys_B):
            raise ValueError(f"{images} images of a batch of {len(self._keys_B)}: pass their index")
        rows = slice(None) if index is None else index
        keys_B = self._keys_B[rows]
        if not self._attacked:
            return subkeys(keys_B, "judge")[:, None]
        first_B = self._asked_B[rows] * self._count
        self._asked_B[rows] += 1
        turns_BK = first_B[:, None] + torch.arange(self._count, device=keys_B.device)
        return numbered(subkeys(keys_B, "attack")[:, None], turns_BK)


def philox(counters_N4: Tensor, keys_N2: Tensor) -> Tensor:
    """Apply the Philox4x32-10 bijection to 32-bit words held in int64. `(..., 4)`, `(..., 2)` -> `(..., 4)`."""
    c0, c1, c2, c3 = counters_N4.unbind(-1)
    k0, k1 = keys_N2.unbind(-1)
    for _ in range(10):
        # 32 × 32 bits fill 64: the product wraps into the sign, and shift-and-mask reads the high word back exactly.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return torch.stack((c0, c1, c2, c3), -1)


def uniform(keys_B: Tensor, shape: tuple[int, ...], *, stream: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return uniform numbers in [0, 1), `(B, *shape)`, that depend only on each sample's key and `stream`."""
    stream_1 = torch.full((1,), stream, dtype=torch.int64, device=keys_B.device)
    return _uniform(keys_B, stream_1, math.prod(shape), dtype).view(-1, *shape)


@fused
def _uniform(keys_B: Tensor, stream_1: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    blocks = -(-count // 4)
    index = torch.arange(blocks, device=keys_B.device)
    zero = torch.zeros_like(index)
    counters = torch.stack((index, zero + stream_1, zero, zero), -1)
    keys = torch.stack((keys_B & _MASK, keys_B >> 32 & _MASK), -1)
    words = philox(counters.expand(len(keys_B), -1, -1), keys[:, None].expand(-1, blocks, -1))
    # 24 bits: every value is exact in float32
    return (words.flatten(1)[:, :count] >> 8).to(dtype).mul_(2.0**-24)


def gaussian(keys_B: Tensor, shape: tuple[int, ...], *, stream: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normal numbers, `(B, *shape)`, by the Box-Muller transform of the streams `stream` and
    `stream + 1`."""
    radius = (-2 * (1 - uniform(keys_B, shape, stream=stream, dtype=dtype)).log()).sqrt()
    return radius * (2 * math.pi * uniform(keys_B, shape, stream=stream + 1, dtype=dtype)).cos()

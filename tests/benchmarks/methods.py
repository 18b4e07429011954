"""One training step of each method against a plain step written from the formulas: seconds, and the same loss.

    python tests/benchmarks/methods.py                                        # two CPU cores: minutes a plain step
    python tests/benchmarks/methods.py --device cuda --batch 256 --classes 1000 --precision bf16 --methods mmcoa

The plain steps do what public code does: all class prompts (SAFT: all captions) go through the text encoder at every
attack step and again in the loss, `loss.backward()` in the attack computes the gradients of all weights, BERT-Attack
runs once per image of the batch with a forward per word, attention has forwards of its own; all in fp32. Both sides
have the same random-weight ViT-B/32, batch, random starts, losses and optimiser. Their losses agree up to what rounding
does to the signs of an attack's gradient. A step of ours does not count what is made once a run (fixed texts).
"""

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import plain_bert, two_hundred_names, vit_b_32
from rayclip.attacks.substitutes import substitute_source
from rayclip.methods import METHODS, Batch, ClassTexts, Method, Original, make_method
from rayclip.models import TEMPLATE, Clip
from rayclip.models.clip import frozen
from rayclip.models.fast import fast_copy, refresh
from rayclip.rng import sample_keys, uniform
from rayclip.training.loop import make_optimizer

_TOKENIZER = open_clip.get_tokenizer("ViT-B-32")


class Plain:
    """One step of a method, as a script of the field would do it."""

    def __init__(self, method: Method, clip: Clip, batch: Batch, args: argparse.Namespace) -> None:
        assert batch.original is not None
        self.method, self.clip, self.batch, self.original = method, clip, batch, batch.original.clip
        self.x, self.y = batch.pixels_BCHW, batch.labels_B
        self.prompts = batch.texts.prompts
        clip.requires_grad_(True).train()
        trained = list(clip.parameters()) if method.trains == "all" else clip.parameters_of("image")
        self.optimizer = make_optimizer(method.recipe, trained)

    def step(self) -> float:
        loss = getattr(self, self.method.name.replace("-", "_"))()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def texts(self, clip: Clip) -> Tensor:
        return self.encode(clip, self.prompts)

    def encode(self, clip: Clip, prompts: list[str]) -> Tensor:
        """All 77 positions of each prompt, whatever the package would leave out."""
        model: Any = clip.model
        return model.encode_text(_TOKENIZER(prompts).to(clip.device), normalize=True)

    def pgd(self, raise_loss: Callable[[Tensor], None]) -> Tensor:
        """`raise_loss(pixels)` runs the backward pass of the loss, summed over the batch."""
        eps, step = self.method.eps, self.method.step_length
        delta = (2 * uniform(self.batch.keys_B, tuple(self.x.shape[1:])) - 1) * eps
        delta = (self.x + delta).clamp(0, 1) - self.x
        self.clip.eval()
        for _ in range(self.method.steps):
            pixels = (self.x + delta).clamp(0, 1).requires_grad_()
            raise_loss(pixels)
            assert pixels.grad is not None
            delta = (delta + step * pixels.grad.sign()).clamp(-eps, eps)
            delta = ((self.x + delta).clamp(0, 1) - self.x).detach()
        self.clip.train()
        return (self.x + delta).clamp(0, 1)

    def logits(self, pixels: Tensor, texts_KD: Tensor) -> Tensor:
        return self.clip.scale * self.clip.encode_image(pixels) @ texts_KD.T

    def cross_entropy(self, pixels: Tensor, texts_KD: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(self.logits(pixels, texts_KD), self.y, reduction=reduction)

    def raise_cross_entropy(self, pixels: Tensor) -> None:
        self.cross_entropy(pixels, self.texts(self.clip), "sum").backward()

    def ft_standard(self) -> Tensor:
        return self.cross_entropy(self.x, self.texts(self.clip))

    def tecoa(self) -> Tensor:
        return self.cross_entropy(self.pgd(self.raise_cross_entropy), self.texts(self.clip))

    def pmg_aft(self) -> Tensor:
        adversarial, texts = self.pgd(self.raise_cross_entropy), self.texts(self.clip)
        with torch.no_grad():
            f0 = self.original
            original = (f0.scale * f0.encode_image(adversarial) @ self.texts(f0).T).softmax(1)
        logits, clean = self.logits(adversarial, texts), self.logits(self.x, texts).softmax(1)
        divergences = [F.kl_div(logits.log_softmax(1), p, reduction="batchmean") for p in (original, clean)]
        return F.cross_entropy(logits, self.y) + divergences[0] + divergences[1]

    def fare(self) -> Tensor:
        with torch.no_grad():
            original = self.original.encode_image(self.x, normalize=False)

        def distance(pixels: Tensor) -> Tensor:
            return (self.clip.encode_image(pixels, normalize=False) - original).square().sum(1)

        return distance(self.pgd(lambda pixels: distance(pixels).sum().backward())).mean()

    def attention(self, clip: Clip, pixels: Tensor, texts: Tensor, sets: int) -> Tensor:
        """A forward of its own for the tokens."""
        tower: Any = clip.model.visual
        tokens = tower.ln_post(tower.transformer(tower._embeds((pixels - clip.mean) / clip.std)))[:, 1:] @ tower.proj
        side = int(tokens.shape[1] ** 0.5)
        # The cosines of all captions are averaged before they are scaled, as in SAFT's code
        score = torch.stack(
            [(F.normalize(tokens, dim=-1) * t[self.y][:, None]).sum(-1) for t in texts.chunk(sets)]
        ).mean(0)
        low, high = score.amin(1, keepdim=True), score.amax(1, keepdim=True)
        grid = ((score - low) / (high - low)).view(-1, 1, side, side)
        return F.interpolate(grid, size=(224, 224), mode="bilinear").flatten(1)

    def guided(self, adversarial: Tensor, texts: Tensor, sets: int) -> Tensor:
        with torch.no_grad():
            original = self.attention(self.original, self.x, self.texts(self.original), sets)
        changed = (self.attention(self.clip, adversarial, texts, sets) - original).norm(dim=1).mean()
        kept = (self.attention(self.clip, self.x, texts, sets) - original).norm(dim=1).mean()
        by_set = [self.cross_entropy(adversarial, own) for own in texts.chunk(sets)]
        return torch.stack(by_set).mean() + 0.08 * changed + 0.05 * kept

    def tga_zsr(self) -> Tensor:
        return self.guided(self.pgd(self.raise_cross_entropy), self.texts(self.clip), 1)

    def saft(self) -> Tensor:
        sets: int = self.method.sets  # type: ignore[attr-defined]
        own = len(self.prompts) // sets

        def raise_loss(pixels: Tensor) -> None:
            image = self.clip.encode_image(pixels)
            for i in range(sets):  # one set's graph at a time: all five want 20 GB
                texts = self.encode(self.clip, self.prompts[i * own : (i + 1) * own])
                loss = F.cross_entropy(self.clip.scale * image @ texts.T, self.y, reduction="sum") / sets
                loss.backward(retain_graph=i + 1 < sets)

        adversarial = self.pgd(raise_loss)
        with torch.no_grad():  # to the plain step's advantage, and for the same reason
            texts = self.texts(self.clip)
        return self.guided(adversarial, texts, sets)

    def contrast(self, pixels: Tensor, texts_BD: Tensor, reduction: str = "mean") -> Tensor:
        logits = self.logits(pixels, texts_BD)
        own = torch.arange(len(logits), device=logits.device)
        return F.cross_entropy(logits, own, reduction=reduction) + F.cross_entropy(logits.T, own, reduction=reduction)

    def mmcoa(self) -> Tensor:
        adversarial = self.pgd(lambda pixels: self.contrast(pixels, self.texts(self.clip)[self.y], "sum").backward())
        prompts = [self.prompts[c] for c in self.y.tolist()]
        source = substitute_source(self.clip, "clip-table", k=10, threshold=0.3, offset="correct")
        changed = plain_bert(self.clip, prompts, source.candidates([prompt.lower().split() for prompt in prompts]))
        images = self.contrast(adversarial, self.texts(self.clip)[self.y])
        return 0.5 * images + 0.5 * self.contrast(self.x, self.encode(self.clip, changed))


class Ours:
    """One step as the train loop does it."""

    def __init__(self, method: Method, clip: Clip, batch: Batch, args: argparse.Namespace) -> None:
        self.method, self.clip, self.batch, self.precision = method, clip, batch, args.precision
        clip.requires_grad_(False).train()
        trained: list[nn.Parameter] = list(clip.parameters()) if method.trains == "all" else clip.parameters_of("image")
        for p in trained:
            p.requires_grad_(True)
        self.optimizer = make_optimizer(method.recipe, trained)
        self.attacked = clip
        if args.precision == "bf16":
            self.attacked = fast_copy(clip, "fp16")
            assert batch.original is not None
            original = replace(batch.original, copied=fast_copy(batch.original.clip, "fp16"))
            self.batch = replace(batch, original=original)

    def step(self) -> float:
        bf16 = self.precision == "bf16"
        if bf16:
            refresh(self.attacked)
        with torch.autocast(self.clip.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            with frozen(self.clip):
                batch = self.method.attack(self.attacked, self.batch)
            loss, _ = self.method.loss(self.clip, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def make_batch(method: Method, clip: Clip, original: Clip, size: int, names: list[str]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    prompts = method.prompts(names, TEMPLATE)
    return Batch(
        pixels_BCHW=torch.rand(size, 3, 224, 224, generator=generator).to(clip.device),
        labels_B=torch.randint(len(names), (size,), generator=generator).to(clip.device),
        keys_B=sample_keys(range(size), 0, "benchmark").to(clip.device),
        texts=ClassTexts(clip, prompts, trainable=method.trains == "all"),
        total=size,
        original=Original(clip=original, texts=ClassTexts(original, prompts, trainable=False)),
    )


def timed(step: Callable[[], float], args: argparse.Namespace) -> tuple[float, float]:
    """(loss, seconds)"""
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    began = clock()
    loss = step()  # reading the loss waits for the device
    if args.device == "cuda":
        torch.cuda.synchronize()
    return loss, clock() - began


def compare(name: str, base: Clip, original: Clip, args: argparse.Namespace, names: list[str]) -> None:
    defaults = {"captions": "templates", "substitutes": "clip-table"}  # of methods that have them
    method = make_method(name, defaults=defaults, eps=1 / 255, step=1 / 255)

    def once(kind: type[Plain] | type[Ours]) -> tuple[float, float]:
        clip = copy.deepcopy(base)
        return timed(kind(method, clip, make_batch(method, clip, original, args.batch, names), args).step, args)

    once(Ours)  # warm
    found = [once(Ours) for _ in range(args.repeats)]
    ours, seconds = found[0][0], statistics.median(took for _, took in found)
    plain, plain_seconds = once(Plain)
    print(
        f"{name:<12}{plain_seconds:>10.2f}{seconds:>10.2f}{plain_seconds / seconds:>8.1f}×{plain:>11.5f}{ours:>11.5f}"
        f"{abs(plain - ours) / abs(plain):>10.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(n for n in METHODS if hasattr(Plain, n.replace("-", "_"))))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of our step")
    parser.add_argument("--repeats", type=int, default=3, help="of our step")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, for one thread on a busy machine"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    words = two_hundred_names()
    names = [words[i % len(words)] + ("" if i < len(words) else f" {i // len(words)}") for i in range(args.classes)]
    base, original = vit_b_32(args.device), vit_b_32(args.device, seed=1).requires_grad_(False)
    print(f"device {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {args.batch},")
    print(f"{args.classes} class prompts, plain fp32, ours {args.precision}; ViT-B/32 with random weights")
    print(f"{'':<12}{'plain s':>10}{'ours s':>10}{'ratio':>9}{'plain loss':>11}{'our loss':>11}{'differ':>10}")
    for name in args.methods.split(","):
        compare(name, base, original, args, names)


if __name__ == "__main__":
    main()

"""Each attack against a plain loop written from the formulas, in one process: speed, forwards, and the same verdicts.

    python tests/benchmarks/attacks.py --model local-dir:POCKET_CLIP --data cifar10-test.parquet [--robust MODEL]
    python tests/benchmarks/attacks.py                    # random-weight ViT-B/32 and the bundled digits

MODEL of `--robust` is an adversarially trained one; for pocket-clip a minute or two of training makes it:

    rayclip train --method tecoa --model local-dir:POCKET_CLIP --data cifar10-train.parquet --shots 100 --epochs 4 \\
        --eps 1/255 --steps 3 --lr 1e-4 --trains image --out ROBUST                # then --robust local-dir:ROBUST

The plain loops do what public code does, on the plain open_clip model: class prompts go through the text encoder at its
full length at every step, `loss.backward()` computes the gradients of all weights, every image takes every step,
BERT-Attack goes prompt by prompt with one forward a word and one a substitute. The substitutes themselves, for which
public code asks a language model, are found for the plain loop before its clock starts, and within ours.

Prints images (or prompts) per second of both, their ratio, and of both: images through the image encoder, images in its
backward, forwards of the text encoder, and positions in them. Where other work runs beside it, take `--threads 1
--clock cpu`, which compares processor time. The random-weight ViT-B/32 gets 8 images, 10 steps and 40 class names.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rayclip.attacks import Samples, make_attack
from rayclip.attacks.bert import UNKNOWN, divergence
from rayclip.attacks.substitutes import STOP_WORDS, substitute_source
from rayclip.data import batch_pixels, open_data
from rayclip.models import Clip, ZeroShot, load_model
from rayclip.rng import sample_keys, uniform
from rayclip.units import format_budget, parse_budget


@dataclass
class Counts:
    """What an encoder was given."""

    images: int = 0
    backward: int = 0
    text_forwards: int = 0
    positions: int = 0

    def __str__(self) -> str:
        return f"{self.images:>7} {self.backward:>7} {self.text_forwards:>6} {self.positions:>8}"


@contextmanager
def counting(clip: Clip) -> Iterator[Counts]:
    """Counts what a model is asked for within the block."""
    with _Counting(clip) as mode:
        yield mode.counts


class _Counting(TorchFunctionMode):
    """Looks at two norms of a model; hooks on them would change which forward pass it takes."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.counts = Counts()
        self.image: Tensor = clip.get_parameter("model.visual.ln_pre.weight")
        self.text: Tensor = clip.get_parameter("model.transformer.resblocks.0.ln_1.weight")

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output, counts = function(*args, **(kwargs or {})), self.counts
        if function is F.layer_norm:
            weight, rows = args[2] if len(args) > 2 else (kwargs or {})["weight"], args[0].shape
            if weight is self.image:
                counts.images += rows[0]
                if output.requires_grad:
                    output.register_hook(lambda g: setattr(counts, "backward", counts.backward + len(g)))
            if weight is self.text:
                counts.text_forwards += 1
                counts.positions += rows[0] * rows[1]
        return output


class Plain:
    """An open_clip model as public code uses it."""

    def __init__(self, clip: Clip) -> None:
        self.clip, self.model = clip, clip.model
        self.side = (clip.image_size, clip.image_size)

    def images(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-2:] != self.side:
            pixels = F.interpolate(pixels, self.side, mode="bicubic", antialias=True)
        return self.model.encode_image((pixels - self.clip.mean) / self.clip.std, normalize=True)  # type: ignore[operator]

    def texts(self, texts: list[str]) -> Tensor:
        tokens = self.clip._tokenizer(texts).to(self.clip.device)
        return self.model.encode_text(tokens, normalize=True)  # type: ignore[operator]


def plain_iterates(
    clip: Clip, prompts: list[str], images: Tensor, labels: Tensor, keys: Tensor, eps: float, step: float, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and then PGD's iterates from the random start to the last: image embeddings, logits."""
    plain = Plain(clip)
    with torch.no_grad():
        features = plain.images(images)
        yield features, features @ plain.texts(prompts).T
    for p in clip.parameters():
        p.requires_grad_(True)
    delta = (2 * uniform(keys, tuple(images.shape[1:])) - 1) * eps
    delta = (images + delta).clamp(0, 1) - images
    for done in range(steps + 1):
        x = (images + delta).clamp(0, 1).detach().requires_grad_()
        features = plain.images(x)
        logits = clip.model.logit_scale.exp() * features @ plain.texts(prompts).T  # type: ignore[operator]
        yield features.detach(), logits.detach()
        if done == steps:
            break
        F.cross_entropy(logits, labels, reduction="sum").backward()
        assert x.grad is not None
        delta = (delta + step * x.grad.sign()).clamp(-eps, eps)
        delta = ((images + delta).clamp(0, 1) - images).detach()
        clip.zero_grad(set_to_none=True)
    for p in clip.parameters():
        p.requires_grad_(False)


def plain_pgd(
    clip: Clip, prompts: list[str], images: Tensor, labels: Tensor, keys: Tensor, eps: float, step: float, steps: int
) -> list[bool]:
    """Who is right after PGD: an image is broken at the first iterate that fools the model."""
    right = torch.ones_like(labels, dtype=torch.bool)
    for _, logits in plain_iterates(clip, prompts, images, labels, keys, eps, step, steps):
        right &= logits.argmax(1) == labels
    return right.tolist()


@torch.no_grad()
def plain_bert(clip: Clip, prompts: list[str], substitutes: list[list[list[str]]]) -> list[str]:
    """BERT-Attack, prompt by prompt, with one forward for each word and each substitute."""
    plain, changed = Plain(clip), []
    for prompt, candidates in zip(prompts, substitutes, strict=True):
        words = prompt.lower().split()
        clean = plain.texts([" ".join(words)])[0]
        importance = []
        for i in range(len(words)):
            masked = plain.texts([" ".join([*words[:i], UNKNOWN, *words[i + 1 :]])])[0]
            importance.append(float(divergence(clean, masked)))
        order = sorted(range(len(words)), key=lambda i: -importance[i])
        target = next((i for i in order if words[i] not in STOP_WORDS and candidates[i]), None)
        best, gain = prompt.lower(), -1.0
        for new in candidates[target] if target is not None else []:
            assert target is not None
            other = " ".join([*words[:target], new, *words[target + 1 :]])
            found = float(divergence(clean, plain.texts([other])[0]))
            if found > gain:
                best, gain = other, found
        changed.append(best)
    return changed


clock = time.perf_counter


def measure(clip: Clip, work: Callable[[], object]) -> tuple[object, float, Counts]:
    """Result, seconds, and counts."""
    with counting(clip) as counts:
        if clip.device.type == "cuda":
            torch.cuda.synchronize()
        began = clock()
        result = work()
        if clip.device.type == "cuda":
            torch.cuda.synchronize()
        return result, clock() - began, counts


def report(name: str, count: int, plain: tuple[object, float, Counts], ours: tuple[object, float, Counts]) -> None:
    same = plain[0] == ours[0]
    print(
        f"{name:<40}{count / plain[1]:>9.2f}{count / ours[1]:>10.2f}{plain[1] / ours[1]:>8.1f}×"
        f"   {plain[2]} |{ours[2]}   {'same' if same else 'DIFFERENT'}",
        flush=True,
    )


def bench_pgd(
    title: str, clip: Clip, names: tuple[str, ...], images: Tensor, labels: Tensor, eps: float, steps: int
) -> None:
    victim = ZeroShot(clip, names)
    keys = sample_keys(range(len(images)), 0, "benchmark").to(images.device)
    step = 1 / 255

    def ours() -> list[bool]:
        victim = ZeroShot(clip, names)  # embeds the class prompts, once
        with torch.no_grad():
            before = victim(images).argmax(1) == labels
        attack = make_attack("pgd", steps=steps, step=step)
        found = attack.run(victim, Samples(images, labels, keys, before), eps=eps)
        with torch.no_grad():
            return (before & (victim(found.images_BCHW).argmax(1) == labels)).tolist()

    def plain() -> list[bool]:
        return plain_pgd(clip, victim.prompts, images, labels, keys, eps, step, steps)

    name = f"{title} pgd-{steps} eps {format_budget(eps)}"
    report(name, len(images), measure(clip, plain), measure(clip, ours))


def bench_texts(title: str, clip: Clip, names: tuple[str, ...], images: Tensor, steps: int) -> None:
    """BERT-Attack over all class prompts, and Sep-Attack of a batch of images with it.

    The images have none of these classes: their labels are what the model says of them.
    """
    victim = ZeroShot(clip, names)
    with torch.no_grad():
        labels = victim(images).argmax(1)
    attack = make_attack("bert", substitutes="clip-table")
    attack.prepare(ZeroShot(clip, names[:2]))  # the token table's neighbours are found once a model

    def ours() -> list[str]:
        return list(make_attack("bert", substitutes="clip-table").prepare(victim) or ())

    source = substitute_source(clip, "clip-table", k=10, threshold=0.3, offset="correct")
    substitutes = source.candidates([prompt.lower().split() for prompt in victim.prompts])

    def plain() -> list[str]:
        return plain_bert(clip, victim.prompts, substitutes)

    report(f"{title} bert, {len(names)} prompts", len(names), measure(clip, plain), measure(clip, ours))

    keys = sample_keys(range(len(images)), 0, "benchmark").to(images.device)
    eps = step = 1 / 255

    def ours_sep() -> list[bool]:
        victim = ZeroShot(clip, names)
        sep = make_attack("sep", substitutes="clip-table", steps=steps, step=step)
        found = sep.run(victim, Samples(images, labels, keys, None), eps=eps, prompts=sep.prepare(victim))
        with torch.no_grad():
            return (victim.logits(victim.embed(found.images_BCHW), found.text_KD).argmax(1) == labels).tolist()

    def plain_sep() -> list[bool]:
        # The image attack is blind to the text attack: every iterate is judged against the changed prompts.
        with torch.no_grad():
            texts = Plain(clip).texts(plain_bert(clip, victim.prompts, substitutes))
        right = torch.ones_like(labels, dtype=torch.bool)
        for features, _ in plain_iterates(clip, victim.prompts, images, labels, keys, eps, step, steps):
            right &= (features @ texts.T).argmax(1) == labels
        return right.tolist()

    report(f"{title} sep-{steps}, {len(names)} classes", len(images), measure(clip, plain_sep), measure(clip, ours_sep))


def vit_b_32(device: str, seed: int = 0) -> Clip:
    """Random weights of the usual architecture."""
    torch.manual_seed(seed)
    model = open_clip.create_model("ViT-B-32", pretrained=None)
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    config = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": preprocess}
    return Clip(model, config, open_clip.get_tokenizer("ViT-B-32"), "ViT-B-32 (random)").to(device).eval()


def main() -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--robust", help="an adversarially trained model for the same data")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--eps", nargs="+", default=["1/255", "4/255"])
    parser.add_argument("--only", choices=["pgd", "texts"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip-vit", action="store_true", help="leave the random-weight ViT-B/32 out")
    parser.add_argument("--skip-model", action="store_true", help="leave MODEL out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    print(f"device {args.device}, {args.threads} threads, {args.clock} time, torch {torch.__version__}, fp32")
    print(
        f"{'':<40}{'plain/s':>9}{'ours/s':>10}{'ratio':>9}   images, backward, text forwards, positions: plain | ours"
    )
    data = open_data(args.data, "test")
    chosen = torch.linspace(0, len(data) - 1, args.images).round().int().tolist()
    images = batch_pixels(data, chosen, "native", 0).to(args.device).float() / 255
    labels = torch.from_numpy(data.labels[chosen]).to(args.device)
    words = two_hundred_names()
    budgets = [parse_budget(eps) for eps in args.eps]
    models = [] if args.skip_model else [(args.model.split("/")[-1], args.model)]
    models += [(f"robust {args.robust.split('/')[-1]}", args.robust)] if args.robust else []
    for title, spec in models:
        clip = load_model(spec, args.device)
        if args.only != "texts":
            for eps in budgets:
                bench_pgd(title, clip, data.class_names, images, labels, eps, args.steps)
        if args.only != "pgd" and spec != args.robust:
            bench_texts(title, clip, words, images[:32], 10)
    if not args.skip_vit:
        vit = vit_b_32(args.device)
        with torch.no_grad():  # a model of random weights is right about what it says
            labels = ZeroShot(vit, data.class_names)(images[:8]).argmax(1)
        if args.only != "texts":
            for eps in budgets:
                bench_pgd("ViT-B/32", vit, data.class_names, images[:8], labels, eps, 10)
        if args.only != "pgd":
            bench_texts("ViT-B/32", vit, words[:40], images[:4], 2)


def two_hundred_names() -> tuple[str, ...]:
    """TinyImageNet's, which the package holds."""
    from rayclip.data.registry import _curated

    names = _curated()["tiny_imagenet"]
    return tuple(names.values() if isinstance(names, dict) else names)


if __name__ == "__main__":
    main()

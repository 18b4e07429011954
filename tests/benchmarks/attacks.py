"""Each attack against a plain loop written from the formulas, in one process: speed, forwards, and the same verdicts.

    python tests/benchmarks/attacks.py --model local-dir:POCKET_CLIP --data cifar10-test.parquet [--robust MODEL]
    python tests/benchmarks/attacks.py                    # random-weight ViT-B/32 and the bundled digits

The plain loops do what public code does: class prompts go through the text encoder at every step, `loss.backward()`
computes the gradients of all weights, every image takes every step, BERT-Attack goes prompt by prompt and word by word.
Prints images (or prompts) per second of both, their ratio, and the encoder's forwards and backwards.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import open_clip
import torch
from torch import Tensor

from rayclip.attacks import Samples, make_attack
from rayclip.attacks.bert import UNKNOWN, divergence
from rayclip.attacks.substitutes import STOP_WORDS, substitute_source
from rayclip.data import batch_pixels, open_data
from rayclip.models import Clip, ZeroShot, load_model
from rayclip.rng import sample_keys, uniform


@dataclass
class Counts:
    """Rows through the encoders. A backward through the image encoder counts the images it is computed for."""

    image: int = 0
    text: int = 0
    backward: int = 0

    def __str__(self) -> str:
        return f"{self.image:>7} {self.backward:>9} {self.text:>7}"


@contextmanager
def counting(clip: Clip) -> Iterator[Counts]:
    """Counts what a model is asked for within the block."""
    counts = Counts()

    def image(module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts.image += len(inputs[0])
        if output.requires_grad:
            output.register_hook(lambda g: setattr(counts, "backward", counts.backward + len(g)))

    encode_text = clip.encode_text

    def text(tokens: Tensor, **how: bool) -> Tensor:
        counts.text += len(tokens)
        return encode_text(tokens, **how)

    handle = clip.model.visual.register_forward_hook(image)  # type: ignore[union-attr]
    clip.encode_text = text  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        handle.remove()
        del clip.encode_text


def plain_iterates(
    clip: Clip, prompts: list[str], images: Tensor, labels: Tensor, keys: Tensor, eps: float, step: float, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """PGD's iterates from the random start to the last, each with its logits."""
    for p in clip.parameters():
        p.requires_grad_(True)
    delta = (2 * uniform(keys, tuple(images.shape[1:])) - 1) * eps
    delta = (images + delta).clamp(0, 1) - images
    for done in range(steps + 1):
        x = (images + delta).clamp(0, 1).detach().requires_grad_()
        logits = clip.scale * clip.encode_image(x) @ clip.embed_texts(prompts).T
        yield x.detach(), logits.detach()
        if done == steps:
            break
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        assert x.grad is not None
        delta = (delta + step * x.grad.sign()).clamp(-eps, eps)
        delta = ((images + delta).clamp(0, 1) - images).detach()
        clip.zero_grad(set_to_none=True)
    for p in clip.parameters():
        p.requires_grad_(False)


def plain_pgd(
    clip: Clip, prompts: list[str], images: Tensor, labels: Tensor, keys: Tensor, eps: float, step: float, steps: int
) -> Tensor:
    """Right after PGD, `(B,)` bool: an image is broken at the first iterate that fools the model."""
    with torch.no_grad():
        right = (clip.encode_image(images) @ clip.embed_texts(prompts).T).argmax(1) == labels
    for _, logits in plain_iterates(clip, prompts, images, labels, keys, eps, step, steps):
        right &= logits.argmax(1) == labels
    return right


@torch.no_grad()
def plain_bert(clip: Clip, prompts: list[str]) -> list[str]:
    """BERT-Attack, prompt by prompt, with one forward for each word and each substitute."""
    source = substitute_source(clip, "clip-table", k=10, threshold=0.3, offset="correct")
    changed = []
    for prompt in prompts:
        words = prompt.lower().split()
        clean = clip.embed_texts([" ".join(words)])[0]
        ((*candidates,),) = source.candidates([words])
        importance = []
        for i in range(len(words)):
            masked = clip.embed_texts([" ".join([*words[:i], UNKNOWN, *words[i + 1 :]])])[0]
            importance.append(float(divergence(clean, masked)))
        order = sorted(range(len(words)), key=lambda i: -importance[i])
        target = next((i for i in order if words[i] not in STOP_WORDS and candidates[i]), None)
        best, gain = prompt.lower(), -1.0
        for new in candidates[target] if target is not None else []:
            assert target is not None
            other = " ".join([*words[:target], new, *words[target + 1 :]])
            found = float(divergence(clean, clip.embed_texts([other])[0]))
            if found > gain:
                best, gain = other, found
        changed.append(best)
    return changed


def measure(clip: Clip, work: Callable[[], object]) -> tuple[object, float, Counts]:
    """Result, seconds, and counts."""
    with counting(clip) as counts:
        if clip.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = work()
        if clip.device.type == "cuda":
            torch.cuda.synchronize()
        return result, time.perf_counter() - began, counts


def report(name: str, count: int, plain: tuple[object, float, Counts], ours: tuple[object, float, Counts]) -> None:
    same = plain[0] == ours[0]
    print(
        f"{name:<34}{count / plain[1]:>9.2f}{count / ours[1]:>10.2f}{plain[1] / ours[1]:>8.1f}×"
        f"   {plain[2]} |{ours[2]}   {'same' if same else 'DIFFERENT'}"
    )


def bench_pgd(title: str, clip: Clip, names: tuple[str, ...], images: Tensor, labels: Tensor, steps: int) -> None:
    victim = ZeroShot(clip, names)
    keys = sample_keys(range(len(images)), 0, "benchmark").to(images.device)
    eps = step = 1 / 255

    def ours() -> list[bool]:
        victim = ZeroShot(clip, names)  # embeds the class prompts, once
        with torch.no_grad():
            before = victim(images).argmax(1) == labels
        attack = make_attack("pgd", steps=steps, step=step)
        found = attack.run(victim, Samples(images, labels, keys, before), eps=eps)
        with torch.no_grad():
            return (before & (victim(found.images_BCHW).argmax(1) == labels)).tolist()

    def plain() -> list[bool]:
        return plain_pgd(clip, victim.prompts, images, labels, keys, eps, step, steps).tolist()

    ours()  # warm
    report(f"{title} pgd-{steps}", len(images), measure(clip, plain), measure(clip, ours))


def bench_texts(title: str, clip: Clip, names: tuple[str, ...], images: Tensor, labels: Tensor, steps: int) -> None:
    """BERT-Attack over all class prompts, and Sep-Attack of a batch of images with it."""
    victim = ZeroShot(clip, names)
    attack = make_attack("bert", substitutes="clip-table")
    attack.prepare(ZeroShot(clip, names[:2]))  # the token table's neighbours are found once a model

    def ours() -> list[str]:
        return list(make_attack("bert", substitutes="clip-table").prepare(victim) or ())

    def plain() -> list[str]:
        return plain_bert(clip, victim.prompts)

    report(f"{title} bert, {len(names)} prompts", len(names), measure(clip, plain), measure(clip, ours))

    keys = sample_keys(range(len(images)), 0, "benchmark").to(images.device)
    eps = step = 1 / 255

    def ours_sep() -> list[bool]:
        victim = ZeroShot(clip, names)
        sep = make_attack("sep", substitutes="clip-table", steps=steps, step=step, stop="final")
        found = sep.run(victim, Samples(images, labels, keys, None), eps=eps, prompts=sep.prepare(victim))
        with torch.no_grad():
            return (victim.logits(victim.embed(found.images_BCHW), found.text_KD).argmax(1) == labels).tolist()

    def plain_sep() -> list[bool]:
        # The image attack is blind to the text attack: its last iterate is judged against the changed prompts.
        *_, (last, _) = plain_iterates(clip, victim.prompts, images, labels, keys, eps, step, steps)
        with torch.no_grad():
            texts = clip.embed_texts(plain_bert(clip, victim.prompts))
            return ((clip.encode_image(last) @ texts.T).argmax(1) == labels).tolist()

    report(f"{title} sep-{steps}, {len(names)} classes", len(images), measure(clip, plain_sep), measure(clip, ours_sep))


def vit_b_32(device: str, seed: int = 0) -> Clip:
    """Random weights of the usual architecture."""
    torch.manual_seed(seed)
    model = open_clip.create_model("ViT-B-32", pretrained=None)
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    config = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": preprocess}
    return Clip(model, config, open_clip.get_tokenizer("ViT-B-32"), "ViT-B-32 (random)").to(device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--robust", help="an adversarially trained model for the same data")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip-vit", action="store_true", help="leave the random-weight ViT-B/32 out")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"device {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32")
    print(f"{'':<34}{'plain/s':>9}{'ours/s':>10}{'ratio':>9}   forwards, backwards, texts: plain | ours   verdicts")
    data = open_data(args.data, "test")
    chosen = torch.linspace(0, len(data) - 1, args.images).round().int().tolist()
    images = batch_pixels(data, chosen, "native", 0).to(args.device).float() / 255
    labels = torch.from_numpy(data.labels[chosen]).to(args.device)
    clip = load_model(args.model, args.device)
    bench_pgd(args.model.split("/")[-1], clip, data.class_names, images, labels, args.steps)
    if args.robust:
        robust = load_model(args.robust, args.device)
        bench_pgd(f"robust {args.robust.split('/')[-1]}", robust, data.class_names, images, labels, args.steps)
    words = two_hundred_names()
    few, label = images[:16], torch.arange(16, device=args.device)
    bench_texts(args.model.split("/")[-1], clip, words, few, label, 10)
    if not args.skip_vit:
        vit = vit_b_32(args.device)
        bench_pgd("ViT-B/32", vit, data.class_names, images[:4], labels[:4], 10)
        bench_texts("ViT-B/32", vit, words, images[:4], label[:4], 10)


def two_hundred_names() -> tuple[str, ...]:
    """TinyImageNet's, which the package holds."""
    from rayclip.data.classnames import _curated

    names = _curated()["tiny_imagenet"]
    return tuple(names.values() if isinstance(names, dict) else names)


if __name__ == "__main__":
    main()

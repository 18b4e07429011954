"""Every training method against the untouched model, under the same attacks, over several seeds.

    python tests/benchmarks/all_methods.py                                                 # digits
    python tests/benchmarks/all_methods.py --model local-dir:POCKET_CLIP --data cifar10-train.parquet --lr 2e-4 \\
        --test cifar10-test.parquet --eps 1/255 --shots 100 --limit 200 --epochs 3 --captions captions.csv \\
        --methods tecoa,pmg-aft,fare,tga-zsr,saft,mmcoa
    python tests/benchmarks/all_methods.py --out tests/golden/methods_digits.json          # renews the golden file

One process a run, one thread each. Prints accuracy in percent, mean over the seeds ± half of largest less smallest, and
the cosine of clean test features with the untouched model's.

On CIFAR-10 learned prompts want more: `--methods vp --shots 500 --lr 0.01 --batch 32 --epochs 8` (half an hour a seed)
and `--methods advpt --shots 500 --lr 0.01 --epochs 200` (6 minutes).
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rayclip.attacks import Samples, make_attack
from rayclip.data import batch_pixels, open_data
from rayclip.data.captions import bind_captions
from rayclip.methods import METHODS, make_method
from rayclip.models import Clip, ZeroShot, load_model
from rayclip.rng import sample_keys
from rayclip.training import TrainConfig, train
from rayclip.training.loop import Progress
from rayclip.units import format_budget, parse_budget

UNTOUCHED = "untouched"
TRAIN_STEPS = 3
ATTACKS: dict[str, dict[str, Any]] = {
    "fgsm": {},
    "pgd-10": {"steps": 10},
    "cw-10": {"steps": 10},
    "autoattack-seeds": {"iterations": 20},
    "bert": {"substitutes": "clip-table"},
    "sep-10": {"steps": 10, "substitutes": "clip-table"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs of a table share. Budgets in pixel units."""

    model: str = "digits"
    data: str = "digits"
    test: str = "digits"
    eps: float = 32 / 255
    shots: int | None = None
    limit: int | None = None
    epochs: int | None = None
    lr: float | None = None
    batch: int | None = None
    captions: str = ""
    attacks: str = ",".join(ATTACKS)


class Alone:
    """A host that keeps nothing."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def resume_from(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext(None)

    def report(self, progress: Progress, save: Callable[[Path], None] | None) -> None:
        pass


def trained(name: str, seed: int, setting: Setting) -> Clip:
    """A method's result: its recipe for small models, `TRAIN_STEPS` attack steps, half its epochs unless told."""
    names = open_data(setting.data, "train").class_names
    step = max(1 / 255, 2.5 * setting.eps / TRAIN_STEPS)
    texts = {"substitutes": "clip-table", "captions": setting.captions}
    method = make_method(name, defaults=texts, eps=setting.eps, steps=TRAIN_STEPS, step=step)
    small = method.small
    recipe = dataclasses.replace(
        small,
        epochs=setting.epochs or max(2, small.epochs // 2),
        lr=setting.lr or small.lr,
        batch_size=setting.batch or small.batch_size,
    )
    return train(
        TrainConfig(
            model=setting.model,
            data=setting.data,
            method=bind_captions(method, setting.data, names),
            recipe=recipe,
            shots=setting.shots,
            seed=seed,
        ),
        Alone(),
    )


def judged(clip: Clip, setting: Setting) -> dict[str, float]:
    """Accuracy in percent, clean and under each attack; and how near clean features stay to the untouched model's."""
    data = open_data(setting.test, "test")
    count = min(len(data), setting.limit or len(data))
    positions = [i * len(data) // count for i in range(count)]
    images = batch_pixels(data, positions, "native", clip.image_size).float() / 255
    labels, ids = torch.from_numpy(data.labels[positions]), data.ids[positions].tolist()
    victim = ZeroShot(clip, data.class_names)
    with torch.no_grad():
        right = victim(images).argmax(1) == labels
        near = F.cosine_similarity(load_model(setting.model).encode_image(images), clip.encode_image(images))
    found = {"clean": 100 * right.float().mean().item()}
    for name in setting.attacks.split(","):
        settings = ATTACKS[name]
        step = {"step": max(1 / 255, 2.5 * setting.eps / settings["steps"])} if "steps" in settings else {}
        attack = make_attack(name.removesuffix("-10"), **settings, **step).for_classes(len(data.class_names))
        samples = Samples(images, labels, sample_keys(ids, 0, "table", attack.name), right)
        made = attack.run(victim, samples, eps=setting.eps, prompts=attack.prepare(victim))
        with torch.no_grad():
            holds = right & (made.logits(victim, labels).argmax(1) == labels)
        found[name] = 100 * holds.float().mean().item()
    return {name: round(value, 2) for name, value in found.items()} | {"cosine": round(near.mean().item(), 4)}


def measure(name: str, seed: int, setting: Setting) -> dict[str, float]:
    torch.set_num_threads(1)
    return judged(load_model(setting.model) if name == UNTOUCHED else trained(name, seed, setting), setting)


def table(results: dict[str, list[dict[str, float]]], eps: float) -> str:
    """Markdown, a row a method."""
    names = list(results[UNTOUCHED][0])
    lines = [f"| eps {format_budget(eps)} | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for method, runs in results.items():
        cells = []
        for name in names:
            values = [run[name] for run in runs]
            digits = 3 if name == "cosine" else 1
            spread = f" ±{(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.{digits}f}{spread}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Setting):
        whole = ("shots", "limit", "epochs", "batch")
        kind = int if field.name in whole else {"eps": parse_budget, "lr": float}.get(field.name, str)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write every number as JSON")
    args = parser.parse_args()
    setting = Setting(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Setting)})
    methods = args.methods.split(",")
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        jobs = {UNTOUCHED: [pool.submit(measure, UNTOUCHED, 0, setting)]}
        jobs |= {name: [pool.submit(measure, name, seed, setting) for seed in range(args.seeds)] for name in methods}
        results = {}
        for name, runs in jobs.items():
            results[name] = [run.result() for run in runs]
            print(name, json.dumps(results[name]), flush=True)
    print(table(results, setting.eps))
    if args.out:
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(runs)}" for name, runs in results.items())
        args.out.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()

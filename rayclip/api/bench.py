"""Measure attacks, training steps and a whole evaluation on this machine, beside plain loops (`rayclip bench`).

The plain loops do what public code does, in fp32: all class prompts go through the text encoder at every step, at its
full length, gradients of all weights are computed, and every image takes every step.
"""

import copy
import functools
import io
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rayclip import __version__
from rayclip.api.evaluating import evaluate_models, spent
from rayclip.api.request import Evaluation, Tracking, Where
from rayclip.attacks import Attack, Samples
from rayclip.attacks.pgd import PGD
from rayclip.data import batch_pixels, open_data
from rayclip.evaluation import Protocol
from rayclip.evaluation.confirm import run_confirmed
from rayclip.evaluation.costs import Hardware
from rayclip.methods import Batch, ClassTexts, Method, Original
from rayclip.methods.tecoa import TeCoA
from rayclip.models import TEMPLATE, Clip, ZeroShot, fast_copy, load_model
from rayclip.models.clip import frozen
from rayclip.models.exact import use_exact_fp32
from rayclip.models.lora import Lora
from rayclip.paths import temporary_folder
from rayclip.rng import sample_keys, uniform
from rayclip.training.loop import choose_trainable, make_optimizer
from rayclip.training.step import LossOf, attack_and_backward, autocast_to, copy_to_attack
from rayclip.types import UserError

RANDOM = ":random"  # ends the name of an open_clip architecture with random weights
_REPEATS = 3
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Settings of a benchmark.

    Attributes:
        model: a model specification, or `NAME:random`, an architecture of open_clip with random weights.
        data: test images and classes; a model of random weights is taken to be right about them.
        batch: images per batch.
        precisions: of the attacked copy and of training.
        whole: whether to measure a whole evaluation, on Ray and with MLflow, too; a random model has none.
    """

    model: str
    data: str
    attacks: Sequence[Attack]
    methods: Sequence[Method]
    eps: float
    batch: int
    precisions: Sequence[Any]
    device: str
    compiled: bool = False
    whole: bool = True


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Rate of one attack, of one training step (`kind` is `method`), or of decoding.

    Attributes:
        images_per_s: images attacked, trained on or decoded in a second, the median of three runs.
        share: of the machine's measured rate of matrix products in this precision.
        gigabytes: most memory allocated on a GPU; None on CPUs.
        waits: times that the host waited for the GPU; None on CPUs.
        judging: share of the time that fp32 takes to confirm what a reduced or compiled copy found.
        plain_per_s: images per second of the plain loop; None where there is none.
    """

    kind: str
    name: str
    precision: str
    images_per_s: float
    share: float | None = None
    gigabytes: float | None = None
    waits: int | None = None
    judging: float | None = None
    plain_per_s: float | None = None


@dataclass(kw_only=True)
class BenchResult:
    """A machine's rates.

    Attributes:
        matrix: floating-point operations per second in products of large matrices, by precision.
        copy: bytes per second read and written by a copy in memory.
        whole: of a whole evaluation: seconds in `all` and in its `pool` of workers, and the number of `workers`.
    """

    about: dict[str, Any]
    matrix: dict[str, float]
    copy: float
    rates: list[Rate] = field(default_factory=list)
    whole: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bench(asked: Bench, on_rate: Callable[[Rate], None] = lambda rate: None) -> BenchResult:
    """Measure; `on_rate` is told each rate as soon as it is known.

    Raises:
        UserError: no such model or data, fewer images than a batch, or a GPU is asked for and there is none.
    """
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; take --device cpu.")
    use_exact_fp32()
    device = torch.device(asked.device)
    data = open_data(asked.data, "test")
    if len(data) < asked.batch:
        raise UserError(f"'{asked.data}' has {len(data)} images, fewer than a batch of {asked.batch}: lower --batch.")
    clip = _open(asked.model, device)
    result = BenchResult(
        about={
            **asdict(Hardware.here(device)),
            "torch": str(torch.__version__),
            "rayclip": __version__,
            "model": asked.model,
            "data": asked.data,
            "batch": asked.batch,
            "eps": asked.eps,
            "compiled": asked.compiled,
        },
        matrix=_matrix_rates(asked.precisions, device),
        copy=_copy_rate(device),
    )

    def note(rate: Rate) -> None:
        result.rates.append(rate)
        on_rate(rate)

    note(Rate(kind="data", name="decode-jpeg", precision="", images_per_s=_decode_rate(clip.image_size)))
    positions = np.linspace(0, len(data) - 1, asked.batch).round().astype(int).tolist()
    images = batch_pixels(data, positions, "native", clip.image_size).to(device).float() / 255
    victim = ZeroShot(clip, data.class_names)
    labels = torch.from_numpy(data.labels[positions]).to(device)
    if asked.model.endswith(RANDOM):
        with torch.no_grad():
            labels = victim(images).argmax(1)
    keys = sample_keys(data.ids[positions].tolist(), 0, "bench").to(device)
    samples = Samples(images, labels, keys)
    for attack in asked.attacks:
        for precision in asked.precisions:
            note(_attack_rate(attack.within(asked.eps), victim, samples, precision, asked, result.matrix))
    for method in asked.methods:
        for precision in (p for p in asked.precisions if p != "fp16"):
            note(_method_rate(method, clip, data.class_names, samples, precision, asked, result.matrix))
    if asked.whole and not asked.model.endswith(RANDOM):
        result.whole = _whole(asked)
    return result


def _open(spec: str, device: torch.device) -> Clip:
    if not spec.endswith(RANDOM):
        return load_model(spec, device)
    name = spec.removesuffix(RANDOM)
    config = open_clip.get_model_config(name)
    if config is None:
        raise UserError(f"open_clip has no architecture '{name}': see open_clip.list_models().")
    torch.manual_seed(0)
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    model = open_clip.create_model(name, pretrained=None)
    about = {"model_cfg": config, "preprocess_cfg": preprocess}
    return Clip(model, about, open_clip.get_tokenizer(name), spec).to(device).eval()


def _seconds(work: Callable[[], Any], device: torch.device, repeats: int = _REPEATS, warm: int = 1) -> float:
    """Return the median time of some work, after it has run `warm` times."""
    took = []
    for i in range(warm + repeats):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= warm:
            took.append(time.perf_counter() - began)
    return statistics.median(took)


def _matrix_rates(precisions: Sequence[str], device: torch.device) -> dict[str, float]:
    n, found = 8192 if device.type == "cuda" else 1024, {}
    for name in precisions:
        a, b = (torch.randn(n, n, device=device).to(_DTYPES[name]) for _ in range(2))
        found[name] = 20 * n**3 / _seconds(functools.partial(_multiply, a, b), device)
    return found


def _multiply(a: Tensor, b: Tensor) -> None:
    for _ in range(10):
        a @ b


def _copy_rate(device: torch.device) -> float:
    source = torch.zeros(1 << (28 if device.type == "cuda" else 24), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _decode_rate(size: int) -> float:
    """Return how many JPEGs of 500×375 pixels one process decodes and resizes to the model's input in a second."""
    coarse = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)

    def decode() -> None:
        for _ in range(20):
            with Image.open(io.BytesIO(file.getvalue())) as image:
                image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)

    return 20 / _seconds(decode, torch.device("cpu"))


@contextmanager
def _counting_waits(device: torch.device) -> Iterator[list[Any]]:
    """Collect torch's warnings about operations that make the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            found[:] = [each for each in found if "synchroniz" in str(each.message)]


def _measure(work: Callable[[], Any], count: int, device: torch.device, peak: float) -> dict[str, Any]:
    """Return the fields of a `Rate` that work on `count` images has."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = _seconds(work, device)
    with FlopCounterMode(display=False) as counter:
        work()
    found = {"images_per_s": count / seconds, "share": counter.get_total_flops() / seconds / peak}
    if device.type != "cuda":
        return found
    with _counting_waits(device) as waits:
        work()
    return found | {"gigabytes": torch.cuda.max_memory_allocated(device) / 1e9, "waits": len(waits)}


def _attack_rate(
    attack: Attack, victim: ZeroShot, samples: Samples, precision: Any, asked: Bench, matrix: dict[str, float]
) -> Rate:
    device, count = victim.clip.device, len(samples.labels_B)
    prompts = attack.prepare(victim)
    reduced = precision != "fp32" or asked.compiled
    target = victim
    if reduced:
        target = victim.with_clip(fast_copy(victim.clip, precision, compiled=asked.compiled))
    found = _measure(lambda: attack.run(target, samples, prompts=prompts), count, device, matrix[precision])
    if reduced:
        confirmed = _seconds(
            lambda: run_confirmed(attack, victim, target, samples, eps=asked.eps, prompts=prompts), device
        )
        found["judging"] = max(0.0, 1 - count / found["images_per_s"] / confirmed)
    if type(attack) is PGD and attack.norm == "linf" and precision == "fp32":
        own = copy.deepcopy(victim.clip).requires_grad_(True)
        found["plain_per_s"] = count / _seconds(
            lambda: _plain_pgd(own, victim.prompts, samples, attack), device, repeats=1, warm=0
        )
    return Rate(kind="attack", name=attack.label, precision=precision, **found)


def _method_rate(
    method: Method,
    clip: Clip,
    class_names: Sequence[str],
    samples: Samples,
    precision: Any,
    asked: Bench,
    matrix: dict[str, float],
) -> Rate:
    device, count = clip.device, len(samples.labels_B)
    own = method.wrap_model(copy.deepcopy(clip), 0)
    prompts = method.prompts(class_names, own.template or TEMPLATE)
    chosen, lora = choose_trainable(own, method), None if method.lora is None else Lora(own, method.lora, 0)
    auxiliary = method.auxiliary(own, 0).to(device)
    trained = [*(chosen if lora is None else lora.factors), *auxiliary.parameters()]
    optimizer = make_optimizer(method.recipe, trained)
    texts = ClassTexts(clip, prompts, trainable=False)
    copied = functools.partial(copy_to_attack, precision=precision, compiled=asked.compiled)
    base = Original(clip=clip, texts=texts, copied=copied(clip)) if method.needs_original else None
    batch = Batch(
        pixels_BCHW=samples.images_BCHW,
        labels_B=samples.labels_B,
        keys_B=samples.keys_B,
        texts=ClassTexts(own, prompts, trainable=method.trains_texts),
        total=count,
        original=base,
        auxiliary=auxiliary,
    )
    if method.prepares:
        with frozen(own):
            batch = replace(batch, prepared_BD=method.prepare(own, batch).float())
    module, attacked = LossOf(own, method, auxiliary), copied(own)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        attack_and_backward(module, own, method, batch, 1, lambda: autocast_to(precision, device), attacked)
        if lora is not None:
            lora.take_gradients()
        optimizer.step()
        if lora is not None:
            lora.apply()

    found = _measure(step, count, device, matrix[precision])
    if type(method) is TeCoA:
        plain = copy.deepcopy(clip).requires_grad_(True)
        step_plain = make_optimizer(method.recipe, list(plain.parameters()))
        attack = PGD(eps=method.eps, step=method.step_length, steps=method.steps, stop="final")
        found["plain_per_s"] = count / _seconds(
            lambda: _plain_step(plain, prompts, samples, attack, step_plain), device, repeats=1
        )
    return Rate(kind="method", name=method.name, precision=precision, **found)


def _plain_logits(clip: Clip, prompts: Sequence[str], pixels_BCHW: Tensor) -> Tensor:
    size = (clip.image_size, clip.image_size)
    if pixels_BCHW.shape[-2:] != size:
        pixels_BCHW = F.interpolate(pixels_BCHW, size, mode="bicubic", antialias=True)
    model: Any = clip.model
    image_BD = model.encode_image((pixels_BCHW - clip.mean) / clip.std, normalize=True)
    tokens_KL = clip.tokenize(prompts)
    text_KD = model.encode_text(F.pad(tokens_KL, (0, clip.room - tokens_KL.shape[1])), normalize=True)
    return model.logit_scale.exp() * image_BD @ text_KD.T


def _plain_pgd(clip: Clip, prompts: Sequence[str], samples: Samples, attack: PGD) -> Tensor:
    """PGD from its formula: gradients of all weights, every image every step."""
    clean_BCHW, labels_B, keys_B, _ = samples
    eps, step = attack.eps or 0.0, attack.step or 0.0
    delta = (2 * uniform(keys_B, tuple(clean_BCHW.shape[1:])) - 1) * eps
    for _ in range(attack.steps):
        pixels = (clean_BCHW + delta).clamp(0, 1).requires_grad_()
        F.cross_entropy(_plain_logits(clip, prompts, pixels), labels_B, reduction="sum").backward()
        assert pixels.grad is not None
        delta = (pixels.detach() - clean_BCHW + step * pixels.grad.sign()).clamp(-eps, eps)
        clip.zero_grad(set_to_none=True)
    return (clean_BCHW + delta).clamp(0, 1)


def _plain_step(clip: Clip, prompts: Sequence[str], samples: Samples, attack: PGD, optimizer: Any) -> None:
    """A step of TeCoA from its formula."""
    adversarial = _plain_pgd(clip, prompts, samples, attack)
    F.cross_entropy(_plain_logits(clip, prompts, adversarial), samples.labels_B).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _whole(asked: Bench) -> dict[str, float]:
    """Return the seconds of a whole evaluation of the attacks, and of its pool of actors."""
    with temporary_folder() as folder:
        where = Where(out=f"{folder}/results", tracking=Tracking.choose(f"sqlite:///{folder}/mlflow.db", "bench"))
        evaluation = Evaluation(data=[asked.data], attacks=asked.attacks, protocol=Protocol(eps=asked.eps))
        began = time.perf_counter()
        evaluate_models([asked.model], evaluation, replace(where, quiet=True))
        took = time.perf_counter() - began
        last = spent(where.out)[2][-1]
    return {"all": took, "pool": last["wall"], "workers": last["workers"]}

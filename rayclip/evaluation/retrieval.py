"""Image-text retrieval: recall at k in both directions, for clean and for attacked pairs.

Pairs are embedded, and recall is computed from the embeddings. An attack changes the pairs before they are embedded
(`attacks.pairs`); attacked images and attacked captions are compared with each other.

Shapes: I images, T captions, D embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rayclip import PROTOCOL
from rayclip.attacks import Attack
from rayclip.attacks.clean import Clean
from rayclip.attacks.pairs import AdversarialPairs, PairAttack, PairVictim, check_for_pairs
from rayclip.data import PairSet, Resolution, batch_pixels
from rayclip.evaluation.aggregate import wilson
from rayclip.evaluation.cell import Subject, default_substitutes, described_budget, hash_of
from rayclip.evaluation.examples import prepare_texts
from rayclip.evaluation.plan import chosen_positions
from rayclip.evaluation.recall import Direction, Embedded, Recall, recall_of
from rayclip.models import Clip
from rayclip.models.exact import use_exact_fp32
from rayclip.models.resizing import Resize, check_resize
from rayclip.rng import sample_keys
from rayclip.store import Store
from rayclip.types import Cut, UserError

AS_WRITTEN = "captions as written"


@dataclass(frozen=True, kw_only=True)
class RecallRow:
    """One number of a retrieval table with its protocol. Recall and interval are in percent.

    The Wilson interval assumes independent queries; captions of one image are not, so that for IR it is too narrow.
    """

    model: str
    dataset: str
    attack: str
    direction: Direction
    k: int
    n: int
    recall: float
    ci_low: float
    ci_high: float
    protocol: dict[str, Any]
    result: str
    cut_texts: int = 0
    cut_for_substitutes: int = 0


@dataclass(frozen=True, kw_only=True)
class Task(Subject):
    """A retrieval evaluation: one model on one set of pairs under one attack with its budget and step filled in."""

    images: int  # that take part, evenly spaced over the data, with all their captions
    captions: int
    resolution: Resolution = "model"
    resize: Resize = "antialias"
    attack: Attack = field(default_factory=Clean)
    seed: int = 0  # of the attack's random numbers

    def __post_init__(self) -> None:
        check_resize(self.resize, self.resolution)

    @property
    def changes_pairs(self) -> bool:
        return self.attack.needs_eps or self.attack.changes_texts

    @property
    def id(self) -> str:
        return hash_of(self.model_fingerprint, self.data_fingerprint, self.describe())

    @property
    def file(self) -> str:
        return f"retrieval/{self.id}.json"

    @property
    def texts_file(self) -> str:
        """Return the file of the adversarial captions; attacks that prepare the same captions share it."""
        prepared = self.attack.describe_prepared()
        digest = hash_of(PROTOCOL, self.model_fingerprint, self.data_fingerprint, self.images, prepared)
        return f"retrieval/texts/{digest}.json"

    def describe(self) -> dict[str, Any]:
        image_attack: dict[str, Any] = {}
        if self.eps is not None:
            classes = "the images, by the mean embedding of their captions"
            image_attack = {**described_budget(self.attack), "classes": classes, "seed": self.seed}
        return {
            "attack": self.attack.name,
            **image_attack,
            **self.attack.describe(),
            "images": self.images,
            "captions": self.captions,
            "text": "adversarial captions" if self.attack.changes_texts else AS_WRITTEN,
            "resolution": self.resolution,
            "resize": self.resize,
            "ties": "against the query",
            "defense": "none",
            "precision": "fp32",
            "protocol": PROTOCOL,
        }


@torch.no_grad()
def embed_pairs(
    clip: Clip,
    pairs: PairSet,
    batch_size: int = 128,
    progress: Callable[[int, int], None] | None = None,
    *,
    positions: Sequence[int] | None = None,
    resolution: Resolution = "model",
    attack: Callable[[Tensor, int], AdversarialPairs] | None = None,
) -> Embedded:
    """Embed images and all their captions, on the model's device.

    Args:
        batch_size: images, and captions, per forward.
        progress: called with (encoded so far, total), images and captions together.
        positions: the images that take part, in this order; None for all.
        resolution: see `batch_pixels`.
        attack: returns what to embed instead of a batch of images, given the index of its first (`PairAttack`).

    Raises:
        UserError: an image cannot be read, or images differ in size at `native` resolution.
    """
    chosen = list(range(len(pairs))) if positions is None else [int(p) for p in positions]
    owner_T = torch.tensor([i for i, p in enumerate(chosen) for _ in pairs.captions[p]], device=clip.device)
    total = len(chosen) + len(owner_T)
    tell = progress or (lambda done, total: None)
    images: list[Tensor] = []
    texts: list[str] = []
    for i in range(0, len(chosen), batch_size):
        part = chosen[i : i + batch_size]
        pixels = batch_pixels(pairs, part, resolution, clip.image_size).to(clip.device).float() / 255
        batch = AdversarialPairs(pixels, [pairs.captions[p] for p in part]) if attack is None else attack(pixels, i)
        images.append(clip.encode_image(batch.images_BCHW))
        texts += [caption for own in batch.captions for caption in own]
        tell(i + len(part), total)
    captions = []
    for i in range(0, len(texts), batch_size):
        captions.append(clip.embed_texts(texts[i : i + batch_size]))
        tell(min(len(chosen) + i + batch_size, total), total)
    return Embedded(image_ID=torch.cat(images), text_TD=torch.cat(captions), owner_T=owner_T)


def make_task(
    model: tuple[str, str],
    pairs: PairSet,
    *,
    limit: int | None = None,
    resolution: Resolution = "model",
    resize: Resize = "antialias",
    attack: Attack | None = None,
    eps: float | None = None,
    seed: int = 0,
) -> Task:
    """Make a task, with the attack's budget and substitutes filled in.

    Args:
        model: (specification, fingerprint).
        limit: maximum number of images that take part; None for all.

    Raises:
        UserError: the attack does not work on pairs, or it needs a budget and there is none.
    """
    attack = (attack or Clean()).with_default_substitutes(default_substitutes(bundled=False))
    check_for_pairs(attack)
    attack = attack.within_on_pairs(eps)
    positions = chosen_positions(len(pairs), limit)
    return Task(
        model=model[0],
        model_fingerprint=model[1],
        dataset=pairs.name,
        data_fingerprint=pairs.fingerprint,
        images=len(positions),
        captions=sum(len(pairs.captions[p]) for p in positions),
        resolution=resolution,
        resize=resize,
        attack=attack,
        seed=seed,
    )


def run_task(
    task: Task,
    clip: Clip,
    pairs: PairSet,
    store: Store,
    batch_size: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Compute a task's recalls in fp32 with TF32 off, and write them to its file.

    Raises:
        UserError: as of `embed_pairs`.
        FloatingPointError: the model gives embeddings that are not finite.
    """
    use_exact_fp32()
    clip = clip.eval().with_resize(task.resize)
    positions = chosen_positions(len(pairs), task.images).tolist()
    embedded = embed_pairs(
        clip,
        pairs,
        batch_size,
        progress,
        positions=positions,
        resolution=task.resolution,
        attack=_bind(task, clip, pairs, positions, store) if task.changes_pairs else None,
    )
    try:
        recalls = recall_of(embedded)
    except FloatingPointError as error:
        where = f"model '{task.model}' on '{task.dataset}' under {task.attack_label}"
        raise FloatingPointError(f"{where}: {error}.") from error
    captions = [caption for p in positions for caption in pairs.captions[p]]
    cut = Cut(len(clip.cut_texts(captions)), task.attack.count_cut(clip, captions))
    store.write_json(task.file, {**task.record(), **cut.recorded(), "recalls": [asdict(r) for r in recalls]})


def _bind(task: Task, clip: Clip, pairs: PairSet, positions: Sequence[int], store: Store) -> PairAttack:
    """Bind the attack to these pairs; its adversarial captions are read from the store, or made and stored there."""
    victim = PairVictim(clip, [pairs.captions[p] for p in positions])
    has_texts = task.attack.describe_prepared() is not None
    prompts = prepare_texts(task.attack, victim, store, task.texts_file) if has_texts else None
    # As for classification: the start of an image's noise depends on the attack's kind, not on its eps or steps.
    keys = sample_keys(pairs.ids[list(positions)].tolist(), task.seed, task.data_fingerprint, task.attack.name)
    return PairAttack(attack=task.attack, victim=victim, keys_I=keys, prompts=prompts, eps=task.eps or 0.0)


def read_recalls(task: Task, store: Store) -> list[RecallRow] | None:
    """Return a task's rows from its result on disk; None if there is none. Raise a `UserError` if it is damaged."""
    try:
        stored = store.read_json(task.file, dict)
        if stored is None:
            return None
        found, cut = [Recall(**recall) for recall in stored["recalls"]], Cut.read(stored)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"result file {store.root}/{task.file} is damaged: delete it and run again.") from error
    return [
        RecallRow(
            model=task.model,
            dataset=task.dataset,
            attack=task.attack_label,
            direction=each.direction,
            k=each.k,
            n=each.n,
            recall=100 * each.right / each.n,
            ci_low=wilson(each.right, each.n)[0],
            ci_high=wilson(each.right, each.n)[1],
            protocol=task.describe(),
            result=task.id,
            cut_texts=cut.texts,
            cut_for_substitutes=cut.substitutes,
        )
        for each in found
    ]

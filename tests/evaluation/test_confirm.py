"""What an attack finds on a fast copy of the model counts only if the model itself is fooled."""

import numpy as np
import pytest
import torch

from attacks.test_gradient import SETTINGS, balanced, batch, build
from rayclip.attacks import Samples, parse_attacks
from rayclip.data import open_data
from rayclip.evaluation import Evaluator, Protocol, Store, chosen_positions, make_cells, missing_shards
from rayclip.evaluation.confirm import run_confirmed
from rayclip.models import fast_copy, load_model

EPS = 8 / 255
STOPPING = [
    s for s in SETTINGS if s["name"] in ("pgd", "sep", "sga", "square", "autoattack", "fab-t") and "norm" not in s
]


def both(settings, fast_of):
    """The samples, the judge, the attack's result by way of a fast copy, and its result on the judge."""
    victim, attack = balanced(), build(settings)
    images, labels, todo, keys = batch(victim)
    todo[:3] = False
    samples, prompts = Samples(images, labels, keys, todo), attack.prepare(victim)
    through = run_confirmed(attack, victim, fast_of(victim), samples, eps=EPS, prompts=prompts)
    return samples, victim, through, attack.run(victim, samples, eps=EPS, prompts=prompts)


def blind(victim):
    """A copy that is fooled by every image: its class weights are those of the next class."""
    other = victim.with_clip(victim.clip)
    other.text_KD = victim.text_KD.roll(1, 0)
    return other


@pytest.mark.parametrize("settings", [s for s in STOPPING if s.get("stop") != "final"], ids=str)
def test_what_fools_only_the_copy_is_attacked_again(settings):
    samples, victim, through, alone = both(settings, blind)
    with torch.no_grad():
        verdicts = [r.logits(victim, samples.labels_B).argmax(1) for r in (through, alone)]
    if settings["name"] not in ("sep", "sga"):  # their verdicts are against texts, by which the copy is not fooled
        assert torch.equal(through.images_BCHW, alone.images_BCHW) and torch.equal(through.steps_B, alone.steps_B)
    assert torch.equal(*(v != samples.labels_B for v in verdicts))
    assert (through.queries_B >= alone.queries_B).all()
    assert torch.equal(through.images_BCHW[:3], samples.images_BCHW[:3])


@pytest.mark.ci
@pytest.mark.parametrize(
    ("settings", "compiled"), [(s, False) for s in STOPPING] + [(s, True) for s in STOPPING[:2]], ids=str
)
def test_attacks_in_reduced_precision_are_about_as_strong(settings, compiled):
    """Compiled without code generation, which takes a minute a shape on a CPU."""
    kind = {"compiled": True, "backend": "aot_eager"} if compiled else {"precision": "bf16"}
    samples, victim, through, alone = both(settings, lambda v: v.with_clip(fast_copy(v.clip, **kind)))
    assert (through.images_BCHW - samples.images_BCHW).abs().max() <= EPS + 1e-6
    with torch.no_grad():
        broken = [r.logits(victim, samples.labels_B).argmax(1) != samples.labels_B for r in (through, alone)]
    assert broken[1].any() and (broken[0] != broken[1]).sum() <= (0 if compiled else 3)


def test_an_evaluation_in_reduced_precision_is_cells_of_its_own(tmp_path):
    data, store = open_data("digits", "test"), Store(str(tmp_path))
    model, attacks = ("digits", load_model("digits").fingerprint()), parse_attacks("clean,pgd:step=8/255,steps=5", {})
    kinds = [Protocol(eps=EPS), Protocol(eps=EPS, precision="bf16")]
    (clean, full), (same_clean, reduced) = [make_cells([model], [("digits", data)], attacks, p) for p in kinds]
    assert clean.id == same_clean.id and full.id != reduced.id
    assert full.describe() == reduced.describe() | {"precision": "fp32"}
    for cell in (full, reduced):
        for shard in missing_shards(cell, chosen_positions(445, 60), store, 60):
            Evaluator(store).run(shard)
    tables = [store.read_tables(store.names(f"cells/{c.id}", ".parquet")).sort_by("position") for c in (full, reduced)]
    one, other = ([t[name].to_numpy() for name in ("clean_margin", "adv_margin")] for t in tables)
    assert np.array_equal(one[0], other[0]), "clean verdicts are the fp32 model's"
    assert ((one[1] > 0) != (other[1] > 0)).sum() <= 2 and not np.array_equal(one[1], other[1])

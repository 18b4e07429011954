"""AutoAttack: which parts run, on whom, and what the result says of it."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from attacks.test_gradient import CLASSES, balanced, batch
from rayclip import rng
from rayclip.attacks import Attack, Samples, autoattack, make_attack
from rayclip.attacks.autoattack import AutoAttack
from rayclip.attacks.base import Adversarial, Norm
from rayclip.data import batch_pixels, open_data
from rayclip.evaluation import Protocol, make_cells
from rayclip.models import ZeroShot, load_model
from rayclip.rng import sample_keys


@dataclass(frozen=True, kw_only=True)
class Breaks(Attack):
    """Breaks the samples it is told to, and notes who was left when its turn came."""

    name: ClassVar[str]
    norm: Norm = "linf"
    targets: int = 9
    seen: ClassVar[list]

    def craft(self, victim, samples, *, eps, prompts=None):
        self.seen.append((self.name, samples.todo_B.clone(), samples.keys_B.clone()))
        mine = samples.todo_B & (torch.arange(len(samples.labels_B)) % 4 == self.breaks)
        images = torch.where(mine.view(-1, 1, 1, 1), self.enemies, samples.images_BCHW)
        count = samples.todo_B.long()
        return Adversarial(images, None, count * (self.breaks + 1), count * 10)


@pytest.fixture
def parts(monkeypatch):
    """Four attacks in the places of the paper's, of which the nth breaks every fourth image from the nth on."""
    seen, names = [], ("apgd-ce", "apgd-t", "fab-t", "square")
    kinds = {n: type(n, (Breaks,), {"name": n, "breaks": place, "seen": seen}) for place, n in enumerate(names)}
    monkeypatch.setattr(autoattack, "ATTACKS", kinds)
    monkeypatch.setattr(AutoAttack, "PARTS", names)
    return seen


def test_each_part_runs_on_what_still_holds(parts, monkeypatch):
    victim = balanced()
    images, labels, todo, keys = batch(victim, 16)
    todo[5] = False
    other = [next(int(j) for j in range(16) if labels[j] != labels[i]) for i in range(16)]
    monkeypatch.setattr(Breaks, "enemies", images[other], raising=False)
    result = make_attack("autoattack").run(victim, Samples(images, labels, keys, todo), eps=0.99)
    assert [name for name, _, _ in parts] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    for place, (_, left, _) in enumerate(parts):
        assert left.tolist() == [i % 4 >= place and i != 5 for i in range(16)]
    noise = [keys_B for _, _, keys_B in parts]
    assert all((a != b).all() for i, a in enumerate(noise) for b in noise[:i])
    assert result.part_B.tolist() == [0 if i == 5 else i % 4 + 1 for i in range(16)]
    assert result.steps_B.tolist() == [0 if i == 5 else sum(range(1, i % 4 + 2)) for i in range(16)]
    assert result.queries_B.tolist() == [0 if i == 5 else 11 * (i % 4 + 1) for i in range(16)]
    assert torch.equal(result.images_BCHW[5], images[5])
    assert all(torch.equal(result.images_BCHW[i], images[other[i]]) for i in range(16) if i != 5)


def test_parts_after_the_last_sample_broke_do_not_run(parts, monkeypatch):
    victim = balanced()
    images, labels, todo, keys = batch(victim, 4)
    todo[1:] = False
    monkeypatch.setattr(Breaks, "enemies", images[[1 + int((labels[1:] != labels[0]).nonzero()[0])] * 4], raising=False)
    make_attack("autoattack").run(victim, Samples(images, labels, keys, todo), eps=0.99)
    assert [name for name, _, _ in parts] == ["apgd-ce"]


@pytest.mark.parametrize(
    ("classes", "standard", "seeds"),
    [
        (None, "apgd-ce, apgd-t(9), fab-t(9), square", "apgd-ce, apgd-dlr"),
        (10, "apgd-ce, apgd-t(9), fab-t(9), square", "apgd-ce, apgd-dlr"),
        (5, "apgd-ce, apgd-t(4), fab-t(4), square", "apgd-ce, apgd-dlr"),
        (4, "apgd-ce, apgd-t(3), fab-t(3), square", "apgd-ce, apgd-dlr"),
        (3, "apgd-ce, apgd-dlr, fab-t(2), square", "apgd-ce, apgd-dlr"),
        (2, "apgd-ce, fab-t(1), square", "apgd-ce"),
    ],
)
def test_few_classes_change_the_parts_and_the_result_says_so(classes, standard, seeds):
    for name, expected in (("autoattack", standard), ("autoattack-seeds", seeds)):
        attack = make_attack(name, iterations=7)
        attack = attack if classes is None else attack.for_classes(classes)
        shown = attack.describe()
        assert shown["parts"] == expected and shown["iterations"] == 7 and shown["apgd-ce.restarts"] == 1
        assert attack.label == name  # one column for data sets of any number of classes


@pytest.mark.parametrize("schedule", ["paper", "official"])
def test_squares_schedule_is_passed_on(schedule):
    attack = make_attack("autoattack", **({} if schedule == "paper" else {"schedule": schedule})).for_classes(10)
    *others, square = attack.parts()
    assert square.schedule == schedule and attack.describe()["schedule"] == schedule
    assert not any(hasattr(part, "schedule") for part in others)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", ["autoattack", "autoattack-seeds"])
def test_few_classes_run(name, classes):
    victim = ZeroShot(balanced().clip, CLASSES[:classes])
    images, labels, todo, keys = batch(victim, 6)
    settings = {"queries": 50} if name == "autoattack" else {}
    attack = make_attack(name, iterations=5, **settings)
    result = attack.run(victim, Samples(images, labels, keys, todo), eps=8 / 255)
    assert (result.images_BCHW - images).abs().max() <= 8 / 255 + 1e-6 and result.queries_B.min() > 0


def test_a_cell_names_what_runs_on_its_classes():
    def images(name, classes):
        return name, SimpleNamespace(name=name, fingerprint=name, other_names=(), class_names=tuple("abcdef"[:classes]))

    cells = make_cells(
        [("m", "m")],
        [images("pcam", 2), images("six", 6)],
        [make_attack("autoattack-seeds")],
        Protocol(eps=1 / 255),
    )
    assert [c.attack_label for c in cells] == ["autoattack-seeds_eps1", "autoattack-seeds_eps1"]
    assert [c.describe()["parts"] for c in cells] == ["apgd-ce", "apgd-ce, apgd-dlr"]
    assert cells[0].id != cells[1].id


def left_by_each(clip, data, positions, eps):
    """A function: which images of the positions hold under an attack, `(B,)` bool."""
    victim = ZeroShot(clip, data.class_names)
    images = batch_pixels(data, positions, "native", clip.image_size).float() / 255
    labels, ids = torch.from_numpy(data.labels[positions]), data.ids[positions].tolist()
    with torch.no_grad():
        todo = victim(images).argmax(1) == labels

    def holds(name, **settings):
        samples = Samples(images, labels, sample_keys(ids, 0, "order", name), todo)
        result = make_attack(name, **settings).run(victim, samples, eps=eps)
        with torch.no_grad():
            found = todo & (victim(result.images_BCHW).argmax(1) == labels)
        if result.part_B is not None:
            assert torch.equal(found, todo & (result.part_B == 0))
        return found

    return holds


def check_order(holds, eps, **autoattack):
    """Stronger attacks leave less: AutoAttack ≤ APGD ≤ PGD-100 ≤ PGD-10 ≤ FGSM, up to half a point; worst ≤ each."""
    verdicts = {
        "fgsm": holds("fgsm"),
        "pgd-10": holds("pgd", steps=10, step=max(1 / 255, 2.5 * eps / 10)),
        "pgd-100": holds("pgd", steps=100, step=1 / 255),
        "apgd-ce": holds("apgd-ce"),
        "apgd-dlr": holds("apgd-dlr"),
        "seeds": holds("autoattack-seeds"),
        "autoattack": holds("autoattack", **autoattack),
    }
    left = {name: 100 * found.float().mean().item() for name, found in verdicts.items()}
    print(left)
    assert left["autoattack"] <= left["seeds"] <= min(left["apgd-ce"], left["apgd-dlr"]) + 0.5
    assert left["apgd-ce"] <= left["pgd-100"] + 0.5
    assert left["pgd-100"] <= left["pgd-10"] + 0.5
    assert left["pgd-10"] <= left["fgsm"] + 0.5
    assert left["apgd-ce"] < left["fgsm"]
    worst = 100 * torch.stack(list(verdicts.values())).all(0).float().mean().item()
    assert worst <= min(left.values())


@pytest.mark.ci
def test_the_order_of_the_attacks_on_digits():
    data, eps = open_data("digits", "test"), 24 / 255
    check_order(left_by_each(load_model("digits"), data, list(range(0, 160, 4)), eps), eps, queries=50, iterations=20)


@pytest.mark.slow
def test_the_order_of_the_attacks_on_photographs(shared):
    data, eps = open_data(str(shared / "data/cifar10-test.parquet"), "test"), 2 / 255
    clip = load_model(f"local-dir:{shared / 'models/pocket-clip'}")
    check_order(left_by_each(clip, data, list(range(0, 3000, 50)), eps), eps, queries=50, iterations=20)


def test_the_pair_is_apgd_ce_and_then_apgd_t_on_what_stands():
    victim = balanced()
    images, labels, todo, keys = batch(victim, 8)
    pair = make_attack("apgd-ce+apgd-t:iterations=3")
    found = pair.run(victim, Samples(images, labels, keys, todo), eps=4 / 255)
    stands = todo.clone()
    for place, name in enumerate(("apgd-ce", "apgd-t"), 1):
        part = make_attack(f"{name}:iterations=3")
        one = part.run(victim, Samples(images, labels, rng.subkeys(keys, name), stands), eps=4 / 255)
        broken = stands & (victim(one.images_BCHW).argmax(1) != labels)
        assert torch.equal(found.part_B == place, broken)
        stands &= ~broken
    assert [part.name for part in pair.for_classes(2).parts()] == ["apgd-ce"]


def test_restarts_and_the_stop_rule_are_those_of_its_parts():
    usual, pair = (make_attack("apgd-ce+apgd-t", **settings) for settings in ({}, {"restarts": 2}))
    assert (usual.label, pair.label) == ("apgd-ce_apgd-t", "apgd-ce_apgd-t-x2")
    assert usual.describe()["apgd-ce.restarts"] == 1 and not {"restarts", "stop"} & usual.describe().keys()
    assert {part.restarts for part in pair.parts()} == {2} and pair.cost == 2 * usual.cost
    last = make_attack("autoattack").to_last_step()
    assert [getattr(part, "stop", None) for part in last.parts()] == ["final", "final", "final", None]
    assert last.describe()["stop"] == "final" and not last.stops_early
    assert make_attack("autoattack").describe()["fab-t.stop"] == "first_success"

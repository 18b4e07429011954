"""Transfer: what is made on one model and judged on another."""

import pytest
import torch

from attacks.test_gradient import CLASSES, balanced, batch
from attacks.test_semantic import cell_of
from conftest import tiny_clip
from rayclip.attacks import Samples, make_attack
from rayclip.evaluation import Evaluator, Store, missing_shards
from rayclip.models import ZeroShot, load_model, opening
from rayclip.models.checkpoint import save_checkpoint
from rayclip.types import UserError


@pytest.fixture
def source(tmp_path):
    """A model of another input size than the victim's."""
    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 4}
    save_checkpoint(tiny_clip(seed=3, vision_cfg=vision), tmp_path / "source", {})
    return f"local-dir:{tmp_path / 'source'}"


def test_the_source_is_attacked_and_the_victim_never_asked(source):
    victim = balanced()
    images, labels, todo, keys = batch(victim)
    todo[3] = False
    samples = Samples(images, labels, keys, todo)

    class Refusing(ZeroShot):
        def embed(self, pixels, index=None, *, normalize=True):
            raise AssertionError("the victim was asked")

    attack = make_attack("transfer", source=source, steps=4, step=2 / 255)
    ours = attack.run(Refusing(victim.clip, CLASSES), samples, eps=8 / 255)
    direct = make_attack("pgd", steps=4, step=2 / 255, stop="final").run(
        ZeroShot(load_model(source), CLASSES), samples, eps=8 / 255
    )
    assert torch.equal(ours.images_BCHW, direct.images_BCHW) and torch.equal(ours.queries_B, direct.queries_B)
    assert torch.equal(ours.images_BCHW[3], images[3])


def test_a_model_transferred_to_itself_is_the_attack():
    cells = cell_of("transfer:source=digits,steps=3,stop=first_success"), cell_of("pgd:steps=3")
    assert cells[0].id != cells[1].id
    victim = ZeroShot(load_model("digits"), cells[0].class_names)
    images, labels, todo, keys = batch(victim)
    moved, direct = (c.attack.run(victim, Samples(images, labels, keys, todo), eps=32 / 255) for c in cells)
    assert torch.equal(moved.images_BCHW, direct.images_BCHW)


def test_the_source_is_loaded_once(source, monkeypatch):
    loads = []
    monkeypatch.setattr(opening, "load_model", lambda *a: loads.append(a) or load_model(*a))
    victim = balanced()
    images, labels, todo, keys = batch(victim)
    attack = make_attack("transfer", source=source, steps=1)
    for names in (CLASSES, CLASSES, CLASSES[::-1]):
        attack.run(ZeroShot(victim.clip, names), Samples(images, labels, keys, todo), eps=8 / 255)
    assert len(loads) == 1


def test_what_the_source_is_enters_the_cells_identity(source, tmp_path):
    attack = f"transfer:source={source}"
    cell = cell_of(attack)
    shown = cell.describe()
    assert shown["attack"] == "transfer" and shown["inner"] == "pgd" and shown["steps"] == 3
    assert shown["source"] == load_model(source).fingerprint()
    assert cell.attack_label == "transfer_pgd-3_from_source_eps32"
    save_checkpoint(load_model(source), tmp_path / "copy", {})
    assert cell_of(f"transfer:source=local-dir:{tmp_path / 'copy'}").id == cell.id
    assert make_attack("transfer", source=source).describe()["source"] == shown["source"]

    # the same name for other weights is another cell, and a worker that finds them refuses
    folder = tmp_path / "source"
    save_checkpoint(tiny_clip(seed=4), folder, {})
    assert cell_of(attack).id != cell.id
    store = Store(str(tmp_path / "out"))
    (shard,) = missing_shards(cell, range(4), store, 4)
    with pytest.raises(UserError):
        Evaluator(store).run(shard)
    (shard,) = missing_shards(cell_of(attack), range(4), store, 4)
    Evaluator(store).run(shard)


def test_a_source_that_is_not_there_is_found_when_cells_are_planned():
    with pytest.raises(UserError, match="nowhere"):
        cell_of("transfer:source=local-dir:/nowhere")

"""The semantic-ensemble attack: its objectives written out, its captions from a table to a cell's identity."""

from dataclasses import replace

import pytest
import torch

import naive
from attacks.test_gradient import CLASSES, batch
from conftest import tiny_clip
from rayclip.attacks import Samples, make_attack, parse_attacks
from rayclip.data import open_data
from rayclip.data.captions import Caption, write_captions
from rayclip.evaluation import Evaluator, Protocol, Store, make_cells, missing_shards
from rayclip.models import ZeroShot, load_model
from rayclip.models.captions import FILL_TEMPLATES
from rayclip.types import UserError

TEXTS = tuple(tuple(f"the {n} {name} one" for n in ("first", "second", "third", "last")) for name in CLASSES)


def plain_loss(features, texts_MKD, scale, label, objective):
    losses = []
    for texts in texts_MKD:
        z = naive.scores(features, texts, scale)
        losses.append(naive.cross_entropy(z, label) if objective == "cross_entropy" else -z[label])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("objective", ["cross_entropy", "mean_similarity"])
def test_one_step_follows_the_gradient(objective):
    victim = ZeroShot(tiny_clip(dtype=torch.float64), CLASSES)
    images, labels, todo, keys = batch(victim, n=3)
    attack = make_attack("semantic", objective=objective, sets=3, steps=1, step=0.003, start="zero", stop="final")
    ours = attack.with_texts(TEXTS, CLASSES).run(victim, Samples(images, labels, keys, todo), eps=0.02).images_BCHW
    texts = torch.stack([victim.clip.embed_texts([own[m] for own in TEXTS]) for m in range(3)]).detach()
    scale = victim.clip.scale.item()

    def loss(x, y):
        features = victim.clip.encode_image(x[None], normalize=False)[0].detach()
        return plain_loss(features, texts, scale, y, objective)

    for x, y, moved in zip(images, labels.tolist(), ours, strict=True):
        for place in ((0, 0, 0), (1, 3, 4), (2, 7, 5)):
            d = torch.zeros_like(x)
            d[place] = 1e-5
            slope = loss(x + d, y) - loss(x - d, y)
            assert abs(slope) > 1e-9
            expected = min(max(float(x[place]) + (0.003 if slope > 0 else -0.003), 0), 1)
            assert abs(float(moved[place]) - expected) < 1e-12


def test_captions_are_embedded_once_and_images_once_a_step():
    asked, sizes = [], []

    class Counting(ZeroShot):
        def embed(self, pixels, index=None, *, normalize=True):
            sizes.append(len(pixels))
            return super().embed(pixels, index, normalize=normalize)

    victim = Counting(tiny_clip(), CLASSES)
    images, labels, todo, keys = batch(victim)
    embed_texts = victim.clip.embed_texts
    victim.clip.embed_texts = lambda texts: asked.append(len(texts)) or embed_texts(texts)
    sizes.clear()
    attack = make_attack("semantic", sets=4, steps=3, stop="final")
    for _ in range(3):
        attack.run(victim, Samples(images, labels, keys, todo), eps=4 / 255)
    assert asked == [4 * len(CLASSES)] and sizes == [len(images)] * 9
    attack.with_texts(TEXTS, CLASSES).run(victim, Samples(images, labels, keys, todo), eps=4 / 255)
    assert asked == [20, 20], "other texts are embedded anew"


def test_without_captions_the_templates_are_taken():
    victim = ZeroShot(tiny_clip(), ["Hot_dog", "cat"])
    texts = make_attack("semantic", sets=16).more_texts(victim.class_names)
    assert texts[0] == tuple(t.format("hot dog") for t in FILL_TEMPLATES)


def write(path, classes, captions):
    rows = [
        Caption(class_index=k, class_name=name, rank=r, caption=text, score=None, source="")
        for k, name in enumerate(classes)
        for r, text in enumerate(captions[k], start=1)
    ]
    write_captions(path, rows, {"class_names": list(classes)})
    return path


def cell_of(text, resolution="native"):
    data = open_data("digits", "test")
    model = [("digits", load_model("digits").fingerprint())]
    attacks = parse_attacks(text, {"steps": 3, "step": 16 / 255})
    return make_cells(model, [("digits", data)], attacks, Protocol(eps=32 / 255, resolution=resolution))[0]


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_a_table_of_captions_reaches_the_workers_and_the_cells_identity(tmp_path, ending):
    classes = open_data("digits", "test").class_names
    captions = [[f"a written {name}", f"the number {name}", f"one more {name}"] for name in classes]
    path = write(tmp_path / f"captions.{ending}", classes, captions)
    attack = f"semantic:sets=2,captions={path}"
    cell = cell_of(attack)
    assert cell.attack.texts[1] == ("a written one", "the number one")
    shown = cell.describe()
    assert "texts" not in shown and str(tmp_path) not in str(shown) and shown["sets"] == 2

    # a copy elsewhere is the same cell; a caption that is not used changes nothing; one that is used does
    same = write(tmp_path / "elsewhere.parquet", classes, [own[:2] for own in captions])
    assert cell_of(f"semantic:sets=2,captions={same}").id == cell.id
    captions[3][1] = "something else"
    write(path, classes, captions)
    others = [cell_of(attack).id, cell_of("semantic:sets=2").id, cell_of(attack.replace("sets=2", "sets=3")).id]
    assert len({cell.id, *others}) == 4

    path.unlink()  # the cell has what a worker needs
    store = Store(str(tmp_path / "out"))
    (shard,) = missing_shards(cell, range(8), store, 8)
    assert 0 <= Evaluator(store).run(shard).right < 8


def test_the_bundled_captions_go_by_a_name():
    attack = cell_of("semantic:captions=digits").attack
    assert [len(own) for own in attack.texts] == [5] * 10 and all("seven" in text for text in attack.texts[7])


def test_tables_that_do_not_fit_are_explained(tmp_path):
    classes = open_data("digits", "test").class_names
    captions = [[f"a written {name}", f"the number {name}"] for name in classes]
    captions[4].pop()
    path = write(tmp_path / "captions.parquet", classes, captions)
    with pytest.raises(UserError, match="four"):
        cell_of(f"semantic:sets=2,captions={path}")
    path = write(tmp_path / "other.parquet", CLASSES, TEXTS)
    with pytest.raises(UserError, match="cat"):
        cell_of(f"semantic:captions={path}")
    with pytest.raises(UserError):
        cell_of("semantic:captions=nowhere.parquet")
    unread = make_attack("semantic", captions=str(path))
    with pytest.raises(ValueError):
        unread.describe()
    victim = ZeroShot(tiny_clip(), CLASSES[:3])
    images, labels, todo, keys = batch(victim, n=2)
    for attack in (unread, replace(unread, texts=TEXTS)):
        with pytest.raises(ValueError):
            attack.run(victim, Samples(images, labels, keys, todo), eps=1 / 255)

"""Recall under attack: laws on a tiny model, a fall on real photographs."""

import json

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from conftest import tiny_clip
from data.test_pairs import CAPTIONS, write_pairs
from rayclip.attacks import ATTACKS, make_attack
from rayclip.attacks.pairs import PairAttack, PairVictim
from rayclip.data import open_pairs
from rayclip.evaluation import Store
from rayclip.evaluation.recall import Embedded, recall_of
from rayclip.evaluation.retrieval import make_task, read_recalls, run_task
from rayclip.models import load_model
from rayclip.models.zeroshot import clean_name
from rayclip.reports.recalls import recall_grids
from rayclip.types import UserError

ON_PAIRS = [name for name, kind in ATTACKS.items() if kind.for_pairs]
KNOWN = {"steps": 3, "step": 4 / 255, "stop": "final", "substitutes": "clip-table", "n": 2}


def attack_of(name, **more):
    fields = ATTACKS[name].__dataclass_fields__
    return make_attack(name, **{k: v for k, v in (KNOWN | more).items() if k in fields})


def task_of(clip, pairs, name, eps=8 / 255, seed=0, limit=None, **more):
    model = ("m", clip.fingerprint())
    return make_task(model, pairs, attack=attack_of(name, **more), eps=eps, seed=seed, limit=limit)


@pytest.fixture(scope="module")
def tiny_pairs(tmp_path_factory):
    return open_pairs(write_pairs(tmp_path_factory.mktemp("pairs") / "p.parquet", CAPTIONS))


@pytest.mark.parametrize("name", ON_PAIRS)
def test_results_do_not_depend_on_the_batch_size(name, clip, tiny_pairs, tmp_path):
    task = task_of(clip, tiny_pairs, name)
    found = []
    for size in (1, 2, 128):
        store = Store(str(tmp_path / str(size)))
        run_task(task, clip, tiny_pairs, store, size)
        found.append(read_recalls(task, store))
    assert found[0] == found[1] == found[2]
    assert {(r.direction, r.n) for r in found[0]} == {("tr", 5), ("ir", 8)}
    assert {r.attack for r in found[0]} == {task.attack_label}


@pytest.mark.parametrize("name", ON_PAIRS)
def test_eps_zero_leaves_the_images(name, clip, tiny_pairs, tmp_path):
    """Then PGD's recalls are the clean ones and Sep-Attack's are BERT-Attack's."""

    def counts(name):
        store = Store(str(tmp_path / name))
        task = task_of(clip, tiny_pairs, name, eps=0.0)
        run_task(task, clip, tiny_pairs, store)
        return [(r.direction, r.k, r.recall) for r in read_recalls(task, store)]

    same = {"clean": "clean", "pgd": "clean", "bert": "bert", "sep": "bert", "co-attack": "bert"}
    if name in same:
        assert counts(name) == counts(same[name])


def test_a_result_stands_on_its_attack(clip, tiny_pairs, tmp_path):
    tasks = [
        *(task_of(clip, tiny_pairs, name) for name in ON_PAIRS),
        task_of(clip, tiny_pairs, "pgd", eps=4 / 255),
        task_of(clip, tiny_pairs, "pgd", seed=1),
        task_of(clip, tiny_pairs, "pgd", steps=4),
        task_of(clip, tiny_pairs, "bert", k=3),
        task_of(clip, tiny_pairs, "charmer", k=2),
        task_of(clip, tiny_pairs, "sga", noise=0.1),
    ]
    assert len({t.id for t in tasks}) == len(tasks)
    assert task_of(clip, tiny_pairs, "bert", eps=1 / 255, seed=4).id == task_of(clip, tiny_pairs, "bert").id
    co = task_of(clip, tiny_pairs, "co-attack").describe()
    assert co["eps"] == "8/255" and co["step"] == "4/255" and co["text"] == "adversarial captions"
    assert co["classes"].startswith("the images") and co["text_weight"] == 3 and json.dumps(co)
    assert task_of(clip, tiny_pairs, "sga").describe()["scales"] == (0.5, 0.75, 1.0, 1.25, 1.5)


def test_adversarial_captions_are_made_once_for_all_who_want_the_same(clip, tiny_pairs, tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    run_task(task_of(clip, tiny_pairs, "bert"), clip, tiny_pairs, store)
    (file,) = (tmp_path / "retrieval/texts").glob("*.json")
    texts = json.loads(file.read_text())
    assert [t["clean"] for t in texts] == [c for own in tiny_pairs.captions for c in own]
    monkeypatch.setattr(ATTACKS["bert"], "prepare", lambda *a: pytest.fail("made again"))
    for name in ("sep", "co-attack"):
        task = task_of(clip, tiny_pairs, name)
        monkeypatch.setattr(ATTACKS[name], "prepare", lambda *a: pytest.fail("made again"))
        run_task(task, clip, tiny_pairs, store)
    assert list((tmp_path / "retrieval/texts").glob("*.json")) == [file]


def test_what_cannot_be_is_explained(clip, tiny_pairs):
    model = ("m", clip.fingerprint())
    with pytest.raises(UserError, match="--eps"):
        make_task(model, tiny_pairs, attack=attack_of("sga"))
    with pytest.raises(UserError, match="stop=final"):
        make_task(model, tiny_pairs, attack=make_attack("pgd"), eps=1 / 255)


def test_a_model_that_knows_its_pairs_loses_them():
    """Text weights that are the images' own embeddings: every clean image is right, and attacked ones are not."""
    clip = tiny_clip()
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image_ID = clip.encode_image(images)
    centre = image_ID.mean(0)

    class Knowing(PairVictim):
        def embed_each(self, prompts):
            return F.normalize(image_ID - centre)

    victim = Knowing(clip, [[str(i)] for i in range(20)])
    bound = PairAttack(
        attack=attack_of("pgd", steps=10), victim=victim, keys_I=torch.arange(20), prompts=None, eps=32 / 255
    )
    with torch.no_grad():
        attacked_ID = clip.encode_image(bound(images, 0).images_BCHW)
    clean, attacked = (
        recall_of(Embedded(image_ID=F.normalize(e - centre), text_TD=victim.text_KD, owner_T=torch.arange(20)), (1,))
        for e in (image_ID, attacked_ID)
    )
    assert all(r.right == r.n for r in clean) and all(r.right < r.n / 2 for r in attacked)


def recalls(clip, pairs, store, names, **settings):
    """The rows, and the sum of the recalls by attack."""
    rows, sums = [], {}
    for name in names:
        task = task_of(clip, pairs, name, eps=2 / 255, step=1 / 255, **settings)
        run_task(task, clip, pairs, store)
        found = read_recalls(task, store)
        rows += found
        sums[name] = sum(r.recall for r in found)
    return rows, sums


@pytest.mark.ci
def test_recall_falls_under_every_attack(shared, tmp_path):
    """On photographs of kinds that the model knows, an image a class."""
    table = pq.read_table(shared / "data/tiny_imagenet-val.parquet")
    names = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    first = {label: row for row, label in reversed(list(enumerate(table["label"].to_pylist())))}
    chosen = sorted(first)[::5][:32]
    captions = [[f"This is a photo of a {clean_name(names[c])}", f"a {clean_name(names[c])}."] for c in chosen]
    images = [table["image"][first[c]].as_py()["bytes"] for c in chosen]
    pairs = open_pairs(write_pairs(tmp_path / "p.parquet", captions, images))
    clip = load_model(f"local-dir:{shared / 'models/pocket-clip'}")
    in_linf = [name for name in ON_PAIRS if name != "pgd-l2"]  # whose budget is a length of another kind
    _, sums = recalls(clip, pairs, Store(str(tmp_path)), in_linf, steps=3, scales=(0.5, 1.0))
    assert sums["clean"] > 250, "of 600: far above chance"
    assert all(sums[name] < 0.8 * sums["clean"] for name in sums if name != "clean"), sums
    assert sums["sep"] < min(sums["pgd"], sums["bert"]), sums
    assert sums["sga"] < min(sums["sep"], sums["co-attack"]), sums


@pytest.mark.ci
def test_recall_falls_on_captioned_photographs(shared, tmp_path):
    """The model hardly knows such sentences and is near chance; attacks that see the captions bring it below."""
    pairs = open_pairs(str(shared / "data/flickr8k-500.parquet"))
    clip = load_model(f"local-dir:{shared / 'models/pocket-clip'}")
    names = ("clean", "pgd", "sga")
    rows, sums = recalls(clip, pairs, Store(str(tmp_path)), names, limit=24, steps=2, scales=(1.0,))
    assert all(sums[name] < 0.8 * sums["clean"] for name in sums if name != "clean"), sums
    (table,) = recall_grids(rows)
    assert table.header[0] == "attack"
    assert [name for name, _ in table.rows] == ["clean", "pgd-2 2/255", "sga-2 2/255"]
    assert "pgd-2 2/255, sga-2 2/255: steps 2, step 1/255" in table.caption
    assert "adversarial under sga-2 2/255, model" in table.caption

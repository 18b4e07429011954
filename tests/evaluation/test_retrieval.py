"""Recall against a loop that sorts nothing and a few laws; then a real model on real photographs."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_clip
from data.test_pairs import CAPTIONS, write_pairs
from rayclip.data import batch_pixels, open_pairs
from rayclip.evaluation import Store, recall, wilson
from rayclip.evaluation.recall import KS, Embedded, recall_of
from rayclip.evaluation.retrieval import embed_pairs, make_task, read_recalls, run_task
from rayclip.models import load_model
from rayclip.types import UserError


def naive(similarity, owner, ks):
    """Right answers per direction and k, by the definition: a tie with a wrong candidate counts against the query."""
    images, captions = len(similarity), len(owner)
    right = {}
    for k in ks:
        right["tr", k] = right["ir", k] = 0
        for i in range(images):
            for t in range(captions):
                if owner[t] == i:
                    ahead = sum(owner[u] != i and similarity[i][u] >= similarity[i][t] for u in range(captions))
                    if ahead < k:
                        right["tr", k] += 1
                        break
        for t in range(captions):
            own = similarity[owner[t]][t]
            ahead = sum(i != owner[t] and similarity[i][t] >= own for i in range(images))
            right["ir", k] += ahead < k
    return right


def recall_at(similarity, owner, ks=KS):
    return recall_of(Embedded(image_ID=similarity, text_TD=torch.eye(similarity.shape[1]), owner_T=owner), ks)


def counts(recalls):
    return {(r.direction, r.k): r.right for r in recalls}


@st.composite
def problems(draw):
    """A few images with one to four captions each in any order, similarities of few values: many ties."""
    owner = list(itertools.chain(*([i] * draw(st.integers(1, 4)) for i in range(draw(st.integers(1, 7))))))
    owner = draw(st.permutations(owner))
    values = st.lists(st.integers(-2, 2), min_size=len(owner), max_size=len(owner))
    rows = draw(st.lists(values, min_size=max(owner) + 1, max_size=max(owner) + 1))
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(owner)


@settings(max_examples=80, deadline=None)
@given(problems(), st.integers(1, 9))
def test_recall_is_the_definition(problem, block):
    similarity, owner = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall, "_BLOCK", block)
        found = recall_at(similarity, owner, (1, 2, 5))
    assert counts(found) == naive(similarity.tolist(), owner.tolist(), (1, 2, 5))
    assert {(r.direction, r.n) for r in found} == {("tr", len(similarity)), ("ir", len(owner))}


@settings(max_examples=40, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_rows_never_decides(problem, random):
    similarity, owner = problem
    images, captions = list(range(len(similarity))), list(range(len(owner)))
    random.shuffle(images)
    random.shuffle(captions)
    moved = torch.tensor([images.index(int(i)) for i in owner])[captions]
    assert recall_at(similarity[images][:, captions], moved) == recall_at(similarity, owner)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_recall_grows_with_k_to_everything(problem):
    similarity, owner = problem
    ks = tuple(range(1, len(owner) + 2))
    found = counts(recall_at(similarity, owner, ks))
    for direction, n in (("tr", len(similarity)), ("ir", len(owner))):
        values = [found[direction, k] for k in ks]
        assert values == sorted(values) and values[-1] == n


def test_random_similarities_of_another_size_than_a_block():
    generator = torch.Generator().manual_seed(0)
    owner = torch.randint(40, (300,), generator=generator)
    owner[:40] = torch.arange(40)
    similarity = torch.randn(40, 300, generator=generator)
    similarity[torch.arange(300) % 40, torch.arange(300)] += 1
    assert counts(recall_at(similarity, owner)) == naive(similarity.tolist(), owner.tolist(), (1, 5, 10))


def test_an_embedding_without_content_scores_nothing_and_a_perfect_one_everything():
    owner = torch.arange(20).repeat_interleave(5)
    constant = Embedded(image_ID=torch.ones(20, 4), text_TD=torch.ones(100, 4), owner_T=owner)
    assert {r.right for r in recall_of(constant)} == {0}
    perfect = Embedded(image_ID=torch.eye(20), text_TD=torch.eye(20)[owner], owner_T=owner)
    assert all(r.right == r.n for r in recall_of(perfect))


def test_chance_is_chance():
    """Random embeddings: TR@k near 1 − C(T−c, k)/C(T, k), IR@k near k/I."""
    generator = torch.Generator().manual_seed(1)
    found = counts(recall_at(torch.randn(400, 2000, generator=generator), torch.arange(2000) // 5))
    assert found["ir", 10] / 2000 == pytest.approx(10 / 400, abs=0.012)
    assert found["tr", 10] / 400 == pytest.approx(1 - (1 - 5 / 2000) ** 10, abs=0.025)


def test_nan_and_impossible_owners_are_errors():
    owner = torch.tensor([0, 1])
    with pytest.raises(FloatingPointError):
        recall_at(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), owner)
    for bad in ([0, 0], [0, 2], [-1, 1]):
        with pytest.raises(ValueError):
            recall_at(torch.eye(2), torch.tensor(bad))
    with pytest.raises(ValueError):
        recall_at(torch.eye(2), owner, (0,))


def test_embeddings_are_the_models_in_any_batch_size(clip, tmp_path):
    pairs = open_pairs(write_pairs(tmp_path / "p.parquet", CAPTIONS))
    seen = []
    embedded = embed_pairs(clip, pairs, 2, lambda *at: seen.append(at))
    pixels = batch_pixels(pairs, range(5), "model", 8).float() / 255
    with torch.no_grad():
        torch.testing.assert_close(embedded.image_ID, clip.encode_image(pixels))
        torch.testing.assert_close(embedded.text_TD, clip.embed_texts(list(itertools.chain(*CAPTIONS))))
    assert embedded.owner_T.tolist() == [0, 0, 1, 2, 2, 2, 3, 4]
    assert seen[-1] == (13, 13) and seen == sorted(seen)
    part = embed_pairs(clip, pairs, positions=[0, 2])
    assert part.owner_T.tolist() == [0, 0, 1, 1, 1]
    torch.testing.assert_close(part.image_ID, embedded.image_ID[[0, 2]])
    with pytest.raises(UserError, match="--resolution model"):
        embed_pairs(clip, pairs, resolution="native")


def test_a_result_is_kept_under_what_it_stands_on(clip, tmp_path):
    pairs = open_pairs(write_pairs(tmp_path / "p.parquet", CAPTIONS))
    store = Store(str(tmp_path / "out"))
    task = make_task(("tiny", clip.fingerprint()), pairs)
    assert read_recalls(task, store) is None
    run_task(task, clip, pairs, store)
    rows = read_recalls(task, store)
    assert [(r.direction, r.k, r.n) for r in rows] == [(d, k, n) for d, n in (("tr", 5), ("ir", 8)) for k in (1, 5, 10)]
    first = rows[0]
    assert (first.ci_low, first.ci_high) == wilson(round(first.recall * first.n / 100), first.n)
    assert first.protocol["images"] == 5 and first.protocol["captions"] == 8 and first.attack == "clean"
    others = [
        make_task(("tiny", "another"), pairs),
        make_task(("tiny", clip.fingerprint()), pairs, limit=4),
        make_task(("tiny", clip.fingerprint()), pairs, resolution="native"),
    ]
    assert len({t.id for t in (task, *others)}) == 4
    assert make_task(("other name", clip.fingerprint()), pairs, limit=99).id == task.id
    store.write(task.file, b"{")
    with pytest.raises(UserError, match="damaged"):
        read_recalls(task, store)


def test_a_model_that_gives_nan_is_named(tmp_path):
    clip = tiny_clip()
    torch.nn.init.constant_(clip.model.visual.proj, torch.nan)
    pairs = open_pairs(write_pairs(tmp_path / "p.parquet", CAPTIONS))
    with pytest.raises(FloatingPointError, match=r"tiny.*p"):
        run_task(make_task(("tiny", "x"), pairs), clip, pairs, Store(str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.ci
def test_real_photographs_against_plain_topk(shared):
    pairs = open_pairs(str(shared / "data/flickr8k-500.parquet"))
    assert len(pairs) == 500 and {len(c) for c in pairs.captions} == {5}
    embedded = embed_pairs(load_model(f"local-dir:{shared / 'models/pocket-clip'}"), pairs)
    similarity = embedded.image_ID @ embedded.text_TD.T
    found = counts(recall_of(embedded))
    for k in (1, 5, 10):
        tr = embedded.owner_T[similarity.topk(k, 1).indices] == torch.arange(500)[:, None]
        ir = similarity.T.topk(k, 1).indices == embedded.owner_T[:, None]
        assert abs(found["tr", k] - int(tr.any(1).sum())) <= 1, "up to ties of equal captions"
        assert abs(found["ir", k] - int(ir.any(1).sum())) <= 1
    assert found["ir", 5] > 1.5 * 2500 * 5 / 500, "above chance, though that model never saw a sentence like these"

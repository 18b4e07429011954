"""The folder of real images, where a developer has it: it reads, verifies, is prepared and evaluates."""

import pyarrow.parquet as pq
import pytest

from calling import call
from rayclip.attacks import parse_attacks
from rayclip.data import open_data, open_pairs
from rayclip.evaluation import Evaluator, Protocol, chosen_positions, collect_rows, make_cells, missing_shards
from rayclip.models import load_model
from rayclip.store import Store

LABELLED = {
    "cifar10-test": ("cifar10", "test", 5000),
    "cifar10-train": ("cifar10", "train", 10000),
    "tiny_imagenet-val": ("tiny_imagenet", "val", 5000),
    "tiny_imagenet-train": ("tiny_imagenet", "train", 20000),
}


@pytest.mark.parametrize("file", [pytest.param(f, marks=[pytest.mark.slow] * ("train" in f)) for f in LABELLED])
def test_labelled_images_are_verified_and_prepared(shared, tmp_path, monkeypatch, capsys, file):
    name, split, count = LABELLED[file]
    path = shared / "data" / f"{file}.parquet"
    code, out, _ = call(monkeypatch, capsys, "data", "verify", str(path), "--quiet")
    assert code == 0 and f"every image can be read: {count:,} of" in out
    root = ["--root", str(tmp_path), "--quiet"]
    code, out, _ = call(monkeypatch, capsys, "data", "prepare", name, "--source", "parquet", str(path), *root)
    assert code == 0 and f"{split}: {count:,} images; 1 shard" in out and "set aside" not in out
    assert call(monkeypatch, capsys, "data", "verify", *root)[0] == 0

    raw, prepared = open_data(str(path), "test"), open_data(str(tmp_path / name), split)
    meanings = [[data.class_names[label] for label in data.labels] for data in (raw, prepared)]
    assert meanings[0] == meanings[1]
    rows = pq.read_table(path, columns=["image"])["image"].to_pylist()
    assert all(rows[p]["bytes"] == prepared.encoded[p] for p in range(len(rows)))


@pytest.mark.slow
def test_pocket_clip_has_its_published_accuracy_on_prepared_cifar10(shared, tmp_path, monkeypatch, capsys):
    path = shared / "data" / "cifar10-test.parquet"
    prepare = ["data", "prepare", "cifar10", "--source", "parquet", str(path), "--root", str(tmp_path), "--quiet"]
    assert call(monkeypatch, capsys, *prepare)[0] == 0
    spec = f"local-dir:{shared / 'models' / 'pocket-clip'}"
    place = str(tmp_path / "cifar10")
    data = open_data(place, "test")
    model = (spec, load_model(spec).fingerprint())
    cells = make_cells([model], [(place, data)], parse_attacks("clean", {}), Protocol(resolution="model"))
    store, positions = Store(str(tmp_path / "results")), chosen_positions(len(data), 1000)
    for shard in missing_shards(cells[0], positions, store, 500):
        Evaluator(store).run(shard)
    (row,) = collect_rows(cells, {place: positions}, store)
    assert row.n == 1000 and row.ci_low < 63.7 < row.ci_high  # its README: 63.7 % of all 10,000


@pytest.mark.ci
def test_flickr_pairs_are_verified_prepared_and_retrieved(shared, tmp_path, monkeypatch, capsys):
    path = shared / "data" / "flickr8k-500.parquet"
    code, out, _ = call(monkeypatch, capsys, "data", "verify", str(path), "--quiet")
    assert code == 0 and "every image can be read: 500 with 2,500 captions" in out
    root = ["--root", str(tmp_path), "--quiet"]
    code, out, _ = call(monkeypatch, capsys, "data", "prepare", "flickr8k", "--source", "parquet", str(path), *root)
    assert code == 0 and "test: 500 images" in out and "1,000 are published" in out
    assert call(monkeypatch, capsys, "data", "verify", *root)[0] == 0
    raw, prepared = open_pairs(str(path)), open_pairs(str(tmp_path / "flickr8k"))
    assert raw.captions == prepared.captions
    assert all(bytes(raw.encoded[p]) == prepared.encoded[p] for p in range(500))

    results = []
    for place in (path, tmp_path / "flickr8k"):
        model = ["--model", f"local-dir:{shared / 'models' / 'pocket-clip'}", "--limit", "100"]
        out_folder = ["--out", str(tmp_path / place.name), "--no-tracking", "--quiet"]
        code, out, _ = call(monkeypatch, capsys, "retrieval", *model, "--data", str(place), *out_folder, "--json", "-")
        assert code == 0
        results.append(out)
    recalls = [[line for line in r.splitlines() if '"recall"' in line] for r in results]
    assert recalls[0] == recalls[1] and len(recalls[0]) == 6

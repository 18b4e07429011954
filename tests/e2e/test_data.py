"""Data sets on an object store, read by the nodes of a cluster."""

import hashlib
import json
import subprocess
import sys

import pytest

from calling import run_here
from e2e.alone import evaluate_alone
from e2e.test_commands import verdicts
from rayclip.data import open_data

pytestmark = pytest.mark.e2e


def save_digits(folder, every):
    """Some of the digits as a folder of class folders with train and test, as a user would have their own images."""
    for split in ("train", "test"):
        data = open_data("digits", split)
        for p in range(0, len(data), every):
            path = folder / split / data.class_names[data.labels[p]] / f"{data.ids[p]:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            data.images([p])[0].save(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    save_digits(folder, every=4)
    return folder


@pytest.fixture
def nodes(object_store, tmp_path):
    """Two nodes, each with a cache of its own, that reach the object store."""
    from ray.cluster_utils import Cluster

    def env(name: str) -> dict[str, str]:
        return {"RAYCLIP_CACHE": str(tmp_path / name)}

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "env_vars": env("first")},
    )
    cluster.add_node(num_cpus=1, env_vars=env("second"))
    yield cluster.address, [tmp_path / "first", tmp_path / "second"]
    cluster.shutdown()


@pytest.mark.slow
def test_two_nodes_read_a_prepared_data_set_from_s3(object_store, images, nodes, tmp_path):
    address, caches = nodes
    s3, uri = object_store.place("sets"), object_store.place("sets/own")
    prepare = ["data", "prepare", "own", "--source", "folder", images, "--quiet", "--root"]
    run_here(tmp_path, *prepare, s3)
    run_here(tmp_path, *prepare, tmp_path / "root")
    assert "own" in run_here(tmp_path, "data", "list", "--root", s3).stdout
    assert "as its manifest says" in run_here(tmp_path, "data", "verify", "--root", s3, "--quiet").stdout

    attack = ["--model", "digits", "--attacks", "clean,pgd", "--eps", "32/255", "--steps", "3", "--no-tracking"]
    driver = tmp_path / "driver"
    run_here(
        tmp_path,
        *["eval", *attack, "--data", uri, "--cluster", "--workers", 2, "--shard-size", 10, "--out", "there"],
        RAY_ADDRESS=address,
        RAYCLIP_CACHE=str(driver),
    )
    evaluate_alone(tmp_path / "here", "digits", tmp_path / "root" / "own", "clean,pgd", steps=3)
    assert verdicts(tmp_path / "there") == verdicts(tmp_path / "here")
    assert len(verdicts(tmp_path / "here")) == 2 * len(list(images.glob("test/*/*.png")))

    splits = json.loads((tmp_path / "root" / "own" / "manifest.json").read_text())["splits"]
    [test], [train] = ([shard["sha256"] for shard in splits[split]["shards"]] for split in ("test", "train"))
    # A worker that is up late may find nothing left to do, and then its node needs no images
    assert {test} == {name for cache in caches for name in fetched(cache)}
    assert list(driver.rglob("*.parquet")) == [], "planning needs no images"

    fit = ["train", "--method", "tecoa", "--model", "digits", "--epochs", 1, "--shots", 5, "--steps", 1]
    there = ["--cluster", "--workers", 2, "--no-tracking"]
    run_here(tmp_path, *fit, "--data", uri, "--out", "model", *there, RAY_ADDRESS=address)
    # Each node has one of the two workers
    assert all(fetched(cache) in ([train], sorted([train, test])) for cache in caches), "once each, and no more"
    lineage = json.loads((tmp_path / "model" / "rayclip.json").read_text())
    assert lineage["data"]["fingerprint"] == open_data(str(tmp_path / "root" / "own"), "train").fingerprint


def fetched(cache) -> list[str]:
    """Names of the shards in a node's cache, each the digest of what is in it."""
    copies = sorted(cache.rglob("*.parquet"))
    assert all(hashlib.sha256(c.read_bytes()).hexdigest() == c.stem for c in copies)
    return [c.stem for c in copies]


_PREPARE_MANY = """
import io, json, sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from PIL import Image

folder = sys.argv[1]
generator = np.random.default_rng(0)
images = []
for _ in range(1000):
    buffer = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG", compress_level=1)
    images.append(buffer.getvalue())
names = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
schema = pa.schema([("image", image), ("label", pa.int64())], {"huggingface": json.dumps(names)})
with pq.ParquetWriter(f"{folder}/test.parquet", schema) as writer:
    for k in range(100):
        rows = [{"image": {"bytes": data, "path": f"{k}-{i}.png"}, "label": i % 2} for i, data in enumerate(images)]
        writer.write_table(pa.Table.from_pylist(rows, schema))
"""


@pytest.mark.slow
def test_preparing_100_000_images_stays_below_1_gb(tmp_path):
    subprocess.run([sys.executable, "-c", _PREPARE_MANY, tmp_path], check=True)
    prepare = ["data", "prepare", "many", "--source", "parquet", tmp_path / "test.parquet", "--root", tmp_path]
    command = [sys.executable, "-m", "rayclip", *map(str, prepare), "--quiet"]
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "test: 100,000 images; 2 shards" in done.stdout
    peak_kib = int(done.stdout.splitlines()[-1])
    assert peak_kib < 1_000_000, f"{peak_kib} KiB"

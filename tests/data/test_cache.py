"""A node's copies of remote files."""

import hashlib
import multiprocessing
import os
from pathlib import Path

import pytest

from data.test_data import png, write
from rayclip.data import open_data
from rayclip.data.manifest import File
from rayclip.data.prepare import Request, prepare
from rayclip.data.prepared import local_path
from rayclip.data.sources.parquet_files import open_parquet
from rayclip.store import Store
from rayclip.types import UserError

CONTENT = bytes(range(256)) * 5000


@pytest.fixture
def remote(s3):
    return Store(s3)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def described(content=CONTENT, name="x.parquet"):
    return File(file=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def files(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def _fetch(store, queue):
    queue.put(str(local_path(store, described())))


def test_processes_of_a_node_share_one_copy(remote, cache):
    remote.write("x.parquet", CONTENT)
    queue = multiprocessing.get_context("fork").Queue()
    workers = [multiprocessing.get_context("fork").Process(target=_fetch, args=(remote, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    paths = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(paths) == 1 and files(cache) == [f"{described().sha256}.parquet"]
    assert Path(paths.pop()).read_bytes() == CONTENT
    remote.delete("x.parquet")
    assert local_path(remote, described()).read_bytes() == CONTENT, "what is here needs no store"


def test_other_content_is_refused_and_nothing_of_it_stays(remote, cache):
    remote.write("x.parquet", CONTENT[:-1] + b"?")
    with pytest.raises(UserError, match=r"x\.parquet is not what its manifest says"):
        local_path(remote, described())
    with pytest.raises(UserError, match="cannot be copied"):
        local_path(remote, described(name="y.parquet"))
    assert files(cache) == []


def test_a_cache_that_cannot_be_written_is_explained(remote, monkeypatch, tmp_path):
    remote.write("x.parquet", CONTENT)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYCLIP_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set RAYCLIP_CACHE to a disk with room"):
        local_path(remote, described())


def test_only_what_is_read_is_fetched(remote, cache, tmp_path):
    write(tmp_path / "test.parquet", [0, 1, 2] * 5, [png((i, 0, 0)) for i in range(15)])
    source = open_parquet(tmp_path / "test.parquet", "own")
    request = Request(name="own", class_names=source.class_names, splits=("test",))
    here, there = (prepare(request, source, store) for store in (Store(str(tmp_path / "root")), remote))
    assert here.fingerprint("test") == there.fingerprint("test")
    data = open_data(remote.child("own").root, "test")
    assert [os.path.splitext(f)[1] for f in files(cache)] == [".npy"], "labels are known without images"
    assert data.images([14])[0].getpixel((0, 0)) == (14, 0, 0)
    assert sorted(os.path.splitext(f)[1] for f in files(cache)) == [".npy", ".parquet"]

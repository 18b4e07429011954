"""What `prepare` does beside reading a source: go on after any end, leave nothing half done, refuse what is not its."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from calling import call
from data.pictures import NAMES, SIZES, Pictures, picture, run
from data.test_data import write
from data.test_pairs import CAPTIONS, write_pairs
from rayclip.data import open_data, open_pairs
from rayclip.data.manifest import Manifest, read_manifest
from rayclip.data.prepare import JOURNAL, Layout
from rayclip.data.sources import Record
from rayclip.data.verify import verify
from rayclip.store import Store
from rayclip.types import UserError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared data set; the lock beside it is none of it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def times(folder: Path) -> dict[str, int]:
    """Of what is there to stay: shards, their index and manifest."""
    passing = (".lock", ".part.npy")  # the index of one shard goes when that of its split is written
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if not p.name.endswith(passing)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """What a run without interruptions writes."""
    root = tmp_path_factory.mktemp("whole")
    manifest = run(root, Pictures())
    shards = {split: len(found.shards) for split, found in manifest.splits.items()}
    assert shards == {"train": 8, "test": 5}, "the tests need several shards"
    return content(root / "pictures")


def interrupted(root: Path | str, split: str, number: int, source: Pictures | None = None, **changes) -> Path:
    """A run that ends as Ctrl-C ends it when this picture's turn comes. Some 16 before it are in flight, and lost."""
    source = source or Pictures()
    whole = source.records

    def records(of: str, start: int = 0) -> Iterator[Record]:
        for i, record in enumerate(whole(of, start), start):
            if (of, i) == (split, number):
                raise KeyboardInterrupt
            yield record

    source.records = records
    with pytest.raises(KeyboardInterrupt):
        run(root, source, **changes)
    return Path(root) / "pictures"


# Ends in the middle


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(end, whole, tmp_path):
    folder = tmp_path / "pictures"
    finished: dict[str, int] = {}
    for shards in (2, 9):
        command = [sys.executable, "-m", "data.pictures", tmp_path, "0.02"]
        with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 60
            while len(list(folder.glob("*.parquet"))) < shards or not list(folder.glob(".partial-*")):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(end)
        assert process.returncode != 0
        assert not (folder / "manifest.json").exists()
        with pytest.raises(UserError, match=r"holds no prepared data set: it has no manifest\.json"):
            verify(Store(str(folder)))
        journal = json.loads((folder / JOURNAL).read_text())
        told = {s["file"] for p in journal["splits"].values() for s in p["shards"]}
        now = times(folder)
        assert all(now[file] == written for file, written in finished.items()), "what is finished is not written again"
        finished = {file: now[file] for file in told}
    (folder / ".partial-left").mkdir(exist_ok=True)
    (folder / ".partial-left" / "train-00000.parquet").write_bytes(b"PAR1")
    (folder / f"{JOURNAL}.0123abcd.partial").write_bytes(b"")
    read: list[tuple[str, int]] = []
    run(tmp_path, Pictures(on_read=lambda split, number: read.append((split, number))))
    consumed = {split: p["consumed"] for split, p in journal["splits"].items()}
    assert sorted(read) == [(s, n) for s in sorted(SIZES) for n in range(consumed.get(s, 0), SIZES[s])]
    assert all(times(folder)[file] == written for file, written in finished.items())
    assert content(folder) == whole
    assert [p.name for p in folder.iterdir() if p.is_dir()] == []


@pytest.mark.parametrize(("split", "number"), [("train", 0), ("train", 17), ("train", 39), ("test", 0), ("test", 23)])
@pytest.mark.parametrize("labelled", [True, False])
def test_ctrl_c_at_any_picture_loses_only_the_shard_that_was_being_written(split, number, labelled, tmp_path):
    source = Pictures(labelled=labelled)
    run(tmp_path / "whole", source)
    interrupted(tmp_path, split, number, Pictures(labelled=labelled))
    folder = tmp_path / "pictures"
    before = times(folder)
    assert not any(name.startswith(".partial") or name.endswith(".partial") for name in before)
    assert "manifest.json" not in before
    run(tmp_path, source)
    after = times(folder)
    assert {k: after[k] for k in before if k.endswith(".parquet")} == {
        k: v for k, v in before.items() if k.endswith(".parquet")
    }
    assert content(folder) == content(tmp_path / "whole/pictures")


def test_what_is_set_aside_is_counted_once_over_interruptions(tmp_path):
    bad = (("train", 2), ("train", 30), ("test", 23))
    run(tmp_path / "whole", Pictures(bad=bad))
    interrupted(tmp_path, "train", 32, Pictures(bad=bad))
    manifest = run(tmp_path, Pictures(bad=bad))
    assert {s: (f.rows, f.rejected) for s, f in manifest.splits.items()} == {"train": (38, 2), "test": (23, 1)}
    rejected = pq.read_table(tmp_path / "pictures/rejected.parquet").to_pylist()
    assert [(r["split"], r["row"], r["path"], r["label"], r["reason"]) for r in rejected] == [
        ("train", 2, "train/2.png", 2, "no image file"),
        ("train", 30, "train/30.png", 0, "no image file"),
        ("test", 23, "test/23.png", 2, "no image file"),
    ]
    assert content(tmp_path / "pictures") == content(tmp_path / "whole/pictures")


# The journal


def test_a_run_that_is_killed_between_a_shard_and_the_journal_goes_on(whole, tmp_path):
    folder = interrupted(tmp_path, "train", 0)
    journal = (folder / JOURNAL).read_bytes()
    interrupted(tmp_path, "train", 30)
    assert (folder / "train-00001.parquet").exists()
    (folder / JOURNAL).write_bytes(journal)
    run(tmp_path, Pictures())
    assert content(folder) == whole


def _journal(folder: Path, change) -> None:
    path = folder / JOURNAL
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / JOURNAL).write_bytes(b""),
        lambda f: (f / JOURNAL).write_bytes((f / JOURNAL).read_bytes()[:-20]),
        lambda f: (f / JOURNAL).write_text("[]"),
        lambda f: (f / JOURNAL).write_text("null"),
        lambda f: (f / JOURNAL).write_bytes(b"\xff\xfe"),
        lambda f: (f / JOURNAL).unlink(),
        lambda f: _journal(f, lambda j: j.update(identity="of another run")),
        lambda f: _journal(f, lambda j: j.update(splits=[])),
        lambda f: _journal(f, lambda j: j["splits"]["train"].pop("converted")),
        lambda f: _journal(f, lambda j: j["splits"]["train"].update(more=1)),
        lambda f: _journal(f, lambda j: j["splits"]["train"]["shards"][0].update(file="../outside.parquet")),
        lambda f: (f / "train-00001.parquet").unlink(),
        lambda f: (f / "train-00001.parquet").write_bytes(b"PAR1"),
    ],
    ids="empty cut list null bytes gone other splits missing unknown outside shard-gone shard-cut".split(),
)
def test_a_damaged_journal_costs_time_only(damage, whole, tmp_path):
    folder = interrupted(tmp_path, "test", 22)
    damage(folder)
    if (folder / JOURNAL).exists():
        run(tmp_path, Pictures())
    else:  # then nothing says whose the files are
        with pytest.raises(UserError, match="holds Parquet files that were not prepared here"):
            run(tmp_path, Pictures())
        run(tmp_path, Pictures(), force=True)
    assert content(folder) == whole


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        (Pictures(), {"layout": Layout(shard=9000, group=1500)}),
        (Pictures(), {"class_names": ("a cat", "a dog", "a lemon")}),
        (Pictures(first=7), {}),
        (Pictures(labelled=False), {}),
        (Pictures({"test": 3}, first=7), {}),
    ],
    ids="layout names source captions fewer".split(),
)
def test_shards_of_another_way_of_preparing_do_not_stay(source, changes, tmp_path):
    folder = interrupted(tmp_path, "test", 22)
    run(tmp_path, source, **changes)
    run(tmp_path / "whole", source, **changes)
    assert content(folder) == content(tmp_path / "whole/pictures")


# What is there already


@pytest.mark.parametrize("bad", [(), (("train", 3), ("test", 5))])
def test_a_split_is_added_to_those_that_are_there(bad, tmp_path):
    run(tmp_path / "whole", Pictures(bad=bad))
    run(tmp_path, Pictures(bad=bad), splits=("test",))
    folder, source = tmp_path / "pictures", Pictures(bad=bad)
    for mine in ("mine.parquet", "mine.npy"):
        (folder / mine).write_bytes(b"beside it")
    assert set(read_manifest(Store(str(folder))).splits) == {"test"}
    before = times(folder)
    manifest = run(tmp_path, source)
    after = times(folder)
    kept = [name for name in before if name.startswith(("test-", "index-test"))]
    assert len(kept) == 6
    kept += ["mine.parquet", "mine.npy"]
    assert {n: before[n] for n in kept} == {n: after[n] for n in kept}
    together = read_manifest(Store(str(tmp_path / "whole/pictures")))
    assert {s: manifest.splits[s] for s in SIZES} == dict(together.splits)
    assert verify(Store(str(folder)))[1] == []
    assert run(tmp_path, source, splits=("train",)) == manifest == run(tmp_path, source)
    assert times(folder) == after


def test_another_source_needs_force_and_leaves_nothing_of_the_first(tmp_path):
    folder = tmp_path / "pictures"
    run(tmp_path, Pictures(bad=(("test", 1),)))
    (folder / "README.md").write_text("mine")
    before, other = content(folder), Pictures({"test": 4}, first=500)
    for source, changes in (
        (other, {}),
        (Pictures(), {"class_names": ("a", "b", "c")}),
        (Pictures(labelled=False), {}),
    ):
        with pytest.raises(UserError, match=r"already prepared .* from another source \(pictures\): .*--force"):
            run(tmp_path, source, **changes)
        assert content(folder) == before
    manifest = run(tmp_path, other, force=True)
    assert content(folder).keys() == {"manifest.json", "test-00000.parquet", "index-test.npy", "README.md"}
    assert verify(Store(str(folder))) == (manifest, [])
    assert run(tmp_path, other, force=True) == manifest, "once more"


def test_force_that_is_interrupted_goes_on_without_it(whole, tmp_path):
    run(tmp_path, Pictures(first=7))
    folder = interrupted(tmp_path, "test", 22, force=True)
    assert not (folder / "manifest.json").exists(), "what is replaced is not taken for whole"
    run(tmp_path, Pictures())
    assert content(folder) == whole


def test_a_manifest_of_an_earlier_crash_in_its_last_step_is_made_up_for(whole, tmp_path):
    """Killed after everything but the manifest, or between it and the end of the journal."""
    folder = interrupted(tmp_path, "test", 23)
    journal = (folder / JOURNAL).read_bytes()
    run(tmp_path, Pictures())
    (folder / JOURNAL).write_bytes(journal)
    assert run(tmp_path, Pictures()) == read_manifest(Store(str(folder)))
    (folder / "manifest.json").unlink()
    run(tmp_path, Pictures())
    assert content(folder) == whole


def test_images_set_aside_by_a_run_that_crashed_at_its_end_are_not_counted_for_another_source(tmp_path):
    run(tmp_path, Pictures(bad=(("train", 3),)))
    folder = tmp_path / "pictures"
    (folder / "manifest.json").unlink()
    (folder / JOURNAL).write_text("{}")  # as if of another run
    manifest = run(tmp_path, Pictures({"test": 4}, first=500))
    assert verify(Store(str(folder))) == (manifest, [])
    assert content(folder).keys() == {"manifest.json", "test-00000.parquet", "index-test.npy"}


@pytest.mark.parametrize("name", ["mine.parquet", "train-00000-of-00001.parquet", "rejected.parquet"])
def test_a_folder_with_parquet_of_other_origin_is_not_touched(name, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    write(folder / name, [0, 1, 2])
    before = content(folder)
    with pytest.raises(UserError, match=r"holds Parquet files that were not prepared here: .*--force"):
        run(tmp_path, Pictures())
    assert content(folder) == before


def test_strict_names_the_image_and_keeps_what_is_finished(tmp_path):
    source = Pictures(bad=(("train", 30), ("train", 31)))
    with pytest.raises(UserError, match=r"^train/30\.png of 'pictures' train cannot be used: no image file; without"):
        run(tmp_path, source, strict=True)
    folder = tmp_path / "pictures"
    before = times(folder)
    assert "train-00004.parquet" in before and "manifest.json" not in before
    assert run(tmp_path, source).splits["train"].rejected == 2
    assert {k: v for k, v in times(folder).items() if k in before} == {k: v for k, v in before.items() if k != JOURNAL}


def test_a_split_without_a_usable_image_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"none of the 2 test images .* can be used: test/0\.png: no image file\."):
        run(tmp_path, Pictures({"test": 2}, bad=(("test", 0), ("test", 1))))
    with pytest.raises(UserError, match=r"none of the 0 test images .* can be used \(none found\)"):
        run(tmp_path, Pictures({"test": 0}))
    assert not (tmp_path / "pictures/manifest.json").exists()


def test_threads_and_sizes_of_shards_do_not_change_the_content(tmp_path):
    source = Pictures(bad=(("train", 3),))
    one = run(tmp_path / "1", source, jobs=1)
    many = run(tmp_path / "7", source, jobs=7)
    assert content(tmp_path / "1/pictures") == content(tmp_path / "7/pictures") and one == many
    large = run(tmp_path / "large", source, layout=Layout())
    tables = [
        pq.read_table(sorted((tmp_path / place / "pictures").glob("train-*.parquet"))) for place in ("1", "large")
    ]
    assert tables[0].equals(tables[1]) and len(large.splits["train"].shards) == 1
    file = pq.ParquetFile(tmp_path / "1/pictures/train-00000.parquet")
    assert file.metadata.num_row_groups > 1 and file.metadata.row_group(0).num_rows == 2


# The disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 48 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", place]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_one_sentence_and_it_goes_on_when_there_is_room(whole, small_disk):
    folder = small_disk / "pictures"
    with pytest.raises(UserError, match=r"preparing 'pictures' stopped \(.*No space left.*run again; what is") as error:
        run(small_disk, Pictures())
    assert "\n" not in str(error.value)
    before = times(folder)
    assert "train-00000.parquet" in before and "manifest.json" not in before
    assert not any("partial" in name for name in before), "half a shard takes no room"
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    run(small_disk, Pictures())
    shards = [name for name in before if name.endswith(".parquet")]
    assert {n: times(folder)[n] for n in shards} == {n: before[n] for n in shards}
    assert content(folder) == whole


def test_a_disk_that_cannot_be_written_is_one_sentence(small_disk, monkeypatch, capsys):
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    (small_disk / "pets" / "cat").mkdir(parents=True)
    (small_disk / "pets" / "cat" / "1.png").write_bytes(picture(1))
    (small_disk / "pets" / "dog").mkdir()
    (small_disk / "pets" / "dog" / "2.png").write_bytes(picture(2))
    args = ("data", "prepare", "mine", "--source", "folder", small_disk / "pets", "--root", small_disk, "--quiet")
    (small_disk / "mine").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, out, err = call(monkeypatch, capsys, *args)
    assert (code, out) == (2, "") and err.startswith(f"error: --root {small_disk / 'mine'}: no file can be written")
    assert err.count("\n") == 1
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert call(monkeypatch, capsys, *args)[0] == 0


def test_a_limit_on_the_size_of_files_is_one_sentence(tmp_path, whole):
    program = (
        "import resource, sys\n"
        "from data.pictures import Pictures, run\n"
        "from rayclip.data.prepare import Layout\n"
        "from rayclip.types import UserError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    run(sys.argv[1], Pictures(), layout=Layout(shard=20_000, group=1500))\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", program, tmp_path]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("preparing 'pictures' stopped (") and "File too large" in done.stdout
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    assert set(times(tmp_path / "pictures")) <= {JOURNAL}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    run(tmp_path, Pictures())
    assert content(tmp_path / "pictures") == whole


# Two at once


def test_the_second_of_two_runs_is_told_and_the_first_is_not_disturbed(whole, tmp_path):
    folder = tmp_path / "pictures"
    command = [sys.executable, "-m", "data.pictures", tmp_path, "0.02"]
    with subprocess.Popen(command, env=ENVIRONMENT) as process:
        deadline = time.monotonic() + 60
        while not list(folder.glob(".partial-*/*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        for changes in ({}, {"force": True}):
            with pytest.raises(UserError, match=r"^another run is preparing .*/pictures at this moment: wait for it"):
                run(tmp_path, Pictures(), **changes)
        assert process.poll() is None
        run(tmp_path / "elsewhere", Pictures())
    assert process.returncode == 0
    assert content(folder) == whole == content(tmp_path / "elsewhere/pictures")


# Object stores


@pytest.fixture
def bucket(s3):
    return s3, fs.FileSystem.from_uri(s3)[0]


@pytest.mark.ci
def test_an_object_store_holds_the_same_as_a_folder(bucket, whole, tmp_path, monkeypatch, capsys):
    uri, system = bucket
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    interrupted(uri, "test", 22)
    found = system.get_file_info(fs.FileSelector("bucket/place/pictures"))
    files = {f.base_name: f.mtime for f in found if not f.base_name.endswith(".part.npy")}
    assert JOURNAL in files and "manifest.json" not in files and len(files) == 10
    read: list[tuple[str, int]] = []
    manifest = run(uri, Pictures(on_read=lambda split, number: read.append((split, number))))
    assert {split for split, _ in read} == {"test"} and len(read) < 24
    after = {f.base_name: f.mtime for f in system.get_file_info(fs.FileSelector("bucket/place/pictures"))}
    assert all(after[name] == files[name] for name in files if name != JOURNAL)
    local = Manifest.from_json(whole["manifest.json"], "here")
    assert {s: manifest.fingerprint(s) for s in SIZES} == {s: local.fingerprint(s) for s in SIZES}
    stored = {}
    for name in after:
        with system.open_input_stream(f"bucket/place/pictures/{name}") as stream:
            stored[name] = stream.read()
    assert stored == whole
    data = open_data(f"{uri.replace('place?', 'place/pictures?')}", "test")
    assert np.array_equal(np.asarray(data.images([7])[0]), np.asarray(_opened(picture(7))))
    assert verify(Store(uri).child("pictures"))[1] == []
    code, out, _ = call(monkeypatch, capsys, "data", "list", "--root", uri, "--json")
    assert code == 0 and {"name": "pictures", "prepared": {"train": 40, "test": 24}} in json.loads(out)["data_sets"]
    with pytest.raises(UserError, match="from another source"):
        run(uri, Pictures({"test": 3}, first=7))
    run(uri, Pictures({"test": 3}, first=7), force=True)
    left = {f.base_name for f in system.get_file_info(fs.FileSelector("bucket/place/pictures"))}
    assert left == {"manifest.json", "index-test.npy", "test-00000.parquet"}
    assert not list(tmp_path.glob(".partial-*"))


def _opened(data: bytes):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data))


# Other programs


@pytest.mark.parametrize("labelled", [True, False])
def test_the_datasets_library_reads_a_prepared_folder(labelled, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    sizes, bad = {"train": 40, "val": 7, "test": 24}, (("train", 0), ("test", 3))
    source = Pictures(sizes, bad=bad, labelled=labelled)
    run(tmp_path, source)
    folder = tmp_path / "pictures"
    assert (folder / "rejected.parquet").exists()
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 39, "validation": 7, "test": 23}
    for split, theirs in (("train", "train"), ("val", "validation"), ("test", "test")):
        rows = loaded[theirs]
        expected = [r for n, r in enumerate(source.records(split)) if (split, n) not in bad]
        assert rows.column_names == ["image", "label" if labelled else "captions"]
        if labelled:
            assert rows.features["label"].names == list(NAMES) and rows["label"][:] == [r.label for r in expected]
        else:
            assert [tuple(c) for c in rows["captions"]] == [r.captions for r in expected]
        shown = rows[4]["image"]
        assert np.array_equal(np.asarray(shown), np.asarray(_opened(expected[4].read())))


# The command


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory beside a folder of good and bad inputs."""
    inputs, work = tmp_path / "inputs", tmp_path / "work"
    inputs.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("RAYCLIP_DATA", str(work / "root"))
    monkeypatch.setenv("RAYCLIP_DOWNLOADS", str(work / "downloads"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    write(inputs / "three.parquet", [0, 1, 2] * 2)
    write(inputs / "unnamed.parquet", [0, 1], names=None)
    write_pairs(inputs / "pairs.parquet", CAPTIONS)
    (inputs / "text.parquet").write_text("no parquet")
    for name in ("cat", "dog"):
        (inputs / "pets" / name).mkdir(parents=True)
        (inputs / "pets" / name / "1.png").write_bytes(picture(1))
    (inputs / "empty").mkdir()
    (inputs / "file").write_text("a file")
    (inputs / "damaged" / "dtd").mkdir(parents=True)
    (inputs / "damaged" / "dtd" / "manifest.json").write_text("{}")
    return inputs


PETS = ["--source", "folder", "{i}/pets"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["prepare"], "Missing argument 'NAME...'"),
        (["prepare", "cifar11"], "no data set 'cifar11': did you mean cifar10"),
        (["prepare", "cars"], "did you mean stanford_cars?"),
        (["prepare", "cifar10", "cifar11"], "no data set 'cifar11'"),
        (["prepare", "mine"], "no data set 'mine': there are cifar10"),
        (["prepare", "mine", *PETS, "{i}/empty"], "give one place after --source, not 2"),
        (["prepare", "mine", "yours", *PETS], "is one data set, but 2 are named"),
        (["prepare", *PETS], "name the data set that {i}/pets is"),
        (["prepare", "mine", "{i}/pets"], "--source says what {i}/pets is"),
        (["prepare", "mine", "--source", "folder"], "--source folder needs a path after it"),
        (["prepare", "mine", "--source", "parquet"], "--source parquet needs a path after it"),
        (["prepare", "mine", "--source", "zip", "{i}/pets"], "'zip' is not one of"),
        (["prepare", "mine", "--source", "folder", "{i}/none"], "no such folder: {i}/none"),
        (["prepare", "mine", "--source", "folder", "{i}/empty"], "{i}/empty holds no images"),
        (["prepare", "mine", "--source", "webdataset", "{i}/pets"], "holds no WebDataset"),
        (["prepare", "mine", "--source", "parquet", "{i}/none.parquet"], "no such data file"),
        (["prepare", "mine", "--source", "parquet", "{i}/text.parquet"], "no readable Parquet"),
        (["prepare", "mine", "--source", "parquet", "{i}/unnamed.parquet"], "names no classes"),
        (["prepare", "mine", "--source", "parquet", "{i}/empty"], "holds no Parquet data set"),
        (["prepare", "../mine", *PETS], "give one place after --source, not 2"),
        (["prepare", "my set", *PETS], "'my set' cannot be a data set's name"),
        (["prepare", "-", *PETS], "'-' cannot be a data set's name"),
        (["prepare", "mine", *PETS, "--splits", "train"], "no split 'train' of 'mine' in this source: it has test"),
        (["prepare", "mine", *PETS, "--splits", "evaluated"], "known of their own data sets only"),
        (["prepare", "mine", *PETS, "--splits", ","], "--splits names no split"),
        (["prepare", "mine", *PETS, "--jobs", "0"], "Invalid value for '--jobs'"),
        (["prepare", "mine", *PETS, "--root", "{i}/file"], "--root {i}/file/mine: {i}/file is a file: give a folder"),
        (["prepare", "mine", *PETS, "--root", "ftp://x/y"], "'ftp://x/y/mine' cannot be opened"),
        (["prepare", "mine", "--source", "torchvision", "{i}/pets"], "torchvision has no data set 'mine'"),
        (["prepare", "mine", "--source", "hub"], "no place on the hub is known for 'mine'"),
        (["prepare", "caltech256", "--source", "hub"], "no place on the hub is known for 'caltech256'"),
        (["prepare", "tiny_imagenet", "--source", "torchvision"], "torchvision has no data set 'tiny_imagenet'"),
        (["prepare", "dtd", "--source", "hub"], "could not fetch"),
        (["prepare", "dtd", *PETS], "DTD has 47 classes, but the source holds 2"),
        (["prepare", "dtd", "--source", "parquet", "{i}/three.parquet"], "DTD has 47 classes, but the source holds 3"),
        (
            ["prepare", "dtd", "--source", "parquet", "{i}/pairs.parquet"],
            "needs labelled images, but this source has captions",
        ),
        (["prepare", "dtd", "--source", "torchvision", "{i}/empty"], "torchvision finds no complete DTD"),
        (["prepare", "cifar10", "--source", "torchvision", "{i}/empty", "--splits", "val"], "no split 'val'"),
        (["prepare", "imagenet", *PETS], "is not ImageNet"),
        (["prepare", "tiny_imagenet", *PETS], "TinyImageNet has 200 classes, but the source holds 2"),
        (["prepare", "flickr8k", *PETS], "{i}/pets holds no captions"),
        (["prepare", "flickr8k", "--source", "parquet", "{i}/three.parquet"], "has no captions, a column 'captions'"),
        (["prepare", "dtd", *PETS, "--root", "{i}/damaged"], "DTD has 47 classes"),
        (["prepare", "digits"], "comes with the program"),
        (["list", "--root", "{i}/file"], "{i}/file"),
        (["show"], "Missing argument 'name'"),
        (["show", "cifar11"], "no data set 'cifar11': did you mean cifar10"),
        (["show", "{i}/none.parquet"], "no such data file"),
        (["show", "dtd", "--sheet", "nowhere/sheet.png"], "there is no folder"),
        (["verify"], "nothing is prepared below"),
        (["verify", "dtd"], "holds no prepared data set: it has no manifest.json"),
        (["verify", "dtd", "--root", "{i}/damaged"], "is no manifest of a prepared data set"),
        (["verify", "{i}/none.parquet"], "no such data file"),
        (["verify", "{i}/text.parquet"], "no readable Parquet"),
        (["verify", "--bogus"], "--bogus"),
    ],
    ids=lambda value: "-".join(value).replace("/", "") if isinstance(value, list) else None,
)
def test_bad_arguments_get_one_sentence_and_leave_nothing(here, monkeypatch, capsys, args, says):
    before = sorted(here.rglob("*"))
    code, out, err = call(monkeypatch, capsys, "data", *(a.format(i=here) for a in args))
    assert code == 2
    assert says.format(i=here) in err and out == ""
    assert err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err
    assert list(Path.cwd().iterdir()) == [], "nothing is written"
    assert sorted(here.rglob("*")) == before


def test_own_sets_of_each_kind_by_the_command(here, monkeypatch, capsys):
    def data(*args):
        code, out, err = call(monkeypatch, capsys, "data", *args)
        assert (code, err) == (0, "")
        return out

    data("prepare", "pets", "--source", "folder", here / "pets", "--quiet")
    data("prepare", "three", "--source", "parquet", here / "three.parquet", "--quiet")
    data("prepare", "pairs", "--source", "parquet", here / "pairs.parquet", "--quiet")
    assert open_data("pets", "test").class_names == ("cat", "dog")
    assert open_data("three", "test").labels.tolist() == [0, 1, 2] * 2
    assert open_pairs("pairs").captions == tuple(tuple(c.strip() for c in captions) for captions in CAPTIONS)
    own = [d for d in json.loads(data("list", "--json"))["data_sets"] if d["name"] in ("pets", "three", "pairs")]
    assert [(d["name"], d["prepared"]) for d in own] == [
        ("pairs", {"test": 5}),
        ("pets", {"test": 2}),
        ("three", {"test": 6}),
    ]
    verified = data("verify", "--quiet")
    assert verified.count("as its manifest says") == 3
    assert "dog 1" in data("show", "pets") and "three" in data("list")
    code, _, err = call(monkeypatch, capsys, "data", "prepare", "pets", "--source", "parquet", here / "three.parquet")
    assert code == 2 and "already prepared" in err and err.count("\n") == 1
    code, _, err = call(monkeypatch, capsys, "data", "show", "pets", "--split", "train", "--sheet", "sheet.png")
    assert (
        code == 2
        and "'pets' has no train split, only test: write pets#holdout" in err
        and not Path("sheet.png").exists()
    )
    data("show", "pets", "--sheet", "sheet.png")
    assert Path("sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.ci
def test_ctrl_c_stops_the_command_and_the_same_command_goes_on(tmp_path):
    for number in range(1200):
        folder = tmp_path / "pets" / NAMES[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:04d}.png").write_bytes(picture(number % 50))
    args = ["data", "prepare", "mine", "--source", "folder", tmp_path / "pets", "--root", tmp_path / "root", "--quiet"]
    command = [sys.executable, "-m", "rayclip", *args]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "root/mine").glob(".partial-*/*")):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        first.send_signal(signal.SIGINT)
        out, err = first.communicate(timeout=60)
    assert (first.returncode, out, err) == (130, "", "note: stopped; the same command goes on from here.\n")
    assert not (tmp_path / "root/mine/manifest.json").exists()
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "test: 1,200 images; 1 shard" in done.stdout and done.stderr == ""
    assert len(open_data(str(tmp_path / "root/mine"), "test")) == 1200
    assert content(tmp_path / "root/mine").keys() == {"manifest.json", "test-00000.parquet", "index-test.npy"}

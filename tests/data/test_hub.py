import errno
import socket
import threading

import huggingface_hub
import pytest

from data.hub_forms import WDS_CAPTIONS, WDS_CLASSES, make_parquet, make_wds, picture, write_parquet
from data.hub_server import serve_hub
from rayclip.data.labels import Reading
from rayclip.data.registry import Hub
from rayclip.data.sources.hub import open_hub, parse_hub
from rayclip.types import UserError

WDS = Hub(repo="org/set", form="webdataset", splits={"train": "train", "test": "test"})
PARQUET = Hub(repo="org/set", form="parquet", splits={"train": "train", "test": "test"})


def read(source, split, start=0):
    records = [
        (r.problem, r.read(), r.label if source.class_names else list(r.captions)) for r in source.records(split, start)
    ]
    assert all(problem is None for problem, _, _ in records)
    return [record[1:] for record in records]


@pytest.mark.parametrize("name", [*WDS_CLASSES, *WDS_CAPTIONS])
def test_clip_benchmarks_repositories(hub, name):
    repo = f"clip-benchmark/wds_{name}"
    classes = [f"class {i}" for i in range(WDS_CLASSES.get(name, 0))]
    form = "jpg" if name == "imagenet1k" else "webp"
    splits = {"test": 7} if name in ("imagenet1k", "sun397") else {"train": 4, "test": 7}
    written = make_wds(hub.root / repo, splits, classes, captions=not classes, form=form)
    row = Hub(repo=repo, form="webdataset", splits={s: s for s in splits})
    assert parse_hub(repo) == row
    source = open_hub(row)
    assert source.class_names == tuple(classes)
    assert source.describe() == {"kind": "hub", "repo": repo, "revision": hub.commit(repo), "form": "webdataset"}
    assert source.splits() == dict.fromkeys(splits)
    for split in splits:
        assert read(source, split) == written[split]
    asked = len(hub.requests)
    for start in range(9):
        assert read(source, "test", start) == written["test"][start:]
    assert len(hub.requests) == asked  # all of it from the cache


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("data/{split}-{i:05d}-of-{n:05d}-a1b2.parquet", ("train", "test")),
        ("{split}-{i:05d}-of-{n:05d}.parquet", ("train", "validation")),
        ("plain_text/{split}-{i:05d}-of-{n:05d}.parquet", ("train", "test")),
        ("{split}/{i:04d}.parquet", ("train", "test")),
        ("default/{split}/{i:04d}.parquet", ("train", "valid")),
    ],
)
@pytest.mark.parametrize(
    "form",
    [{}, {"image": "img", "label": "fine_label"}, {"label": "captions", "captions": True}, {"class_names": None}],
)
def test_parquet_repositories(hub, tmp_path, layout, names, form):
    written = make_parquet(
        hub.root / "org/set", dict(zip(names, (7, 6), strict=True)), layout=layout, per_file=3, **form
    )
    ours = ("train", "test" if "test" in names else "val")
    row = parse_hub("org/set")
    assert tuple(row.splits) == ours and row.form == "parquet"
    (tmp_path / "names").write_text("cat\ndog\nlemon\n")
    given = Reading(names=str(tmp_path / "names") if form == {"class_names": None} else None)
    source = open_hub(row, reading=given)
    assert source.class_names == (() if form.get("captions") else ("cat", "dog", "lemon"))
    assert source.describe() == {"kind": "hub", "repo": "org/set", "revision": hub.commit("org/set"), "form": "parquet"}
    assert len(hub.fetched()) == 1 and source.splits() == {ours[0]: None, ours[1]: None}
    assert read(source, ours[1], 4) == written[names[1]][4:]
    assert source.splits() == {ours[0]: None, ours[1]: 6}
    assert read(source, ours[0]) == written[names[0]]
    assert len(hub.fetched()) == 5 == len(set(hub.fetched()))
    assert open_hub(row, reading=given).splits() == {ours[0]: 7, ours[1]: 6}  # from the cache


def test_files_are_downloaded_when_their_records_turn_comes(hub):
    written = make_wds(hub.root / "org/set", {"train": 9, "test": 5})
    source = open_hub(WDS, splits=["train"])
    assert sorted(hub.fetched()) == ["classnames.txt", "train/nshards.txt"]
    records = source.records("train")
    for i, record in enumerate(records):
        assert record.read() == written["train"][i].image
        assert hub.fetched()[2:] == [f"train/{n}.tar" for n in range(i // 3 + 1)]
    with pytest.raises(UserError, match=r"no split 'test'"):
        source.records("test")


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)  # whole chunks are kept
    written = make_wds(hub.root / "org/set", {"train": 6, "test": 3})
    hub.breaks["train/1.tar"] = [1000, 5000]
    assert read(open_hub(WDS), "train") == written["train"]
    ranges = [r for method, path, r in hub.requests if (method, path) == ("GET", "train/1.tar")]
    assert ranges == [None, "bytes=1000-", "bytes=6000-"]


@pytest.mark.parametrize("make", [make_wds, make_parquet])
def test_a_connection_that_stays_broken_goes_on_when_run_again(hub, make):
    written = make(hub.root / "org/set", {"train": 12, "test": 2})
    row = parse_hub("org/set")
    last = next(f for f in hub.files("org/set") if f.startswith(("train/3", "data/train-00002")))
    hub.breaks[last] = [100] + [0] * 20
    got = []
    with pytest.raises(UserError, match=rf"could not fetch org/set/{last} from http.*run again to go on") as caught:
        for record in open_hub(row, splits=["train"]).records("train"):
            got.append((record.read(), record.label))
    assert "\n" not in str(caught.value)
    assert 0 < len(got) < 12 and got == written["train"][: len(got)]
    hub.breaks.clear()
    hub.requests.clear()
    assert read(open_hub(row, splits=["train"]), "train", len(got)) == written["train"][len(got) :]
    assert hub.fetched() == [last]  # and nothing that was there


def test_server_errors_say_what_was_fetched(hub):
    make_wds(hub.root / "org/set", {"train": 4, "test": 4})
    hub.status["test/1.tar"] = 503
    records = open_hub(WDS).records("test")
    assert len([next(records) for _ in range(3)]) == 3
    with pytest.raises(UserError, match=r"answered 503 while fetching org/set/test/1.tar: run again later to go on"):
        next(records)
    hub.status = {"test/1.tar": 429}
    with pytest.raises(UserError, match=r"allows no more requests for now while fetching org/set/test/1.tar: wait"):
        list(open_hub(WDS).records("test"))
    hub.status = {"api": 500}
    with pytest.raises(UserError, match=r"answered 500 while fetching the list of org/set's files: run again later"):
        open_hub(WDS)


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_gated_repositories_say_how_to_get_in(hub, monkeypatch, token):
    written = make_parquet(hub.root / "org/set", {"train": 2, "test": 2})
    hub.gated.add("org/set")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        UserError, match=r"gated or private: ask for access at http.*/datasets/org/set, .*`hf auth login`.*HF_TOKEN"
    ):
        open_hub(PARQUET)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert read(open_hub(PARQUET), "test") == written["test"]


def test_private_and_missing_repositories(hub, monkeypatch):
    written = make_wds(hub.root / "org/set", {"train": 2, "test": 2})
    hub.private.add("org/set")
    for name in ("org/set", "org/none"):
        with pytest.raises(UserError, match=rf"no data set {name} on http.*, or it is private: .*hf auth login"):
            parse_hub(name)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert read(open_hub(WDS), "test") == written["test"]
    with pytest.raises(UserError, match=r"no data set org/none"):
        parse_hub("org/none")


def test_revisions_are_pinned(hub):
    make_wds(hub.root / "org/set", {"train": 3, "test": 5})
    commit = hub.commit("org/set")
    source = open_hub(WDS, revision=commit)
    assert source.describe()["revision"] == commit == open_hub(WDS, revision="main").describe()["revision"]
    with pytest.raises(UserError, match=r"org/set has no revision 'v9': look at http.*/datasets/org/set"):
        open_hub(WDS, revision="v9")
    records = source.records("test")
    next(records)
    make_wds(hub.root / "org/set", {"train": 3, "test": 6})  # the owner changes it, and drops the old revision
    with pytest.raises(UserError, match=r"the revision of org/set that was being read is gone"):
        list(records)
    assert open_hub(WDS).describe()["revision"] != commit


def test_missing_splits_and_files(hub):
    make_wds(hub.root / "org/set", {"train": 3, "test": 5})
    with pytest.raises(UserError, match=r"org/set has no split 'val': it has train, test"):
        open_hub(WDS, splits=["val"])
    with pytest.raises(UserError, match=r"org/set has no split 'dev' at .*: it has test, train"):
        open_hub(Hub(repo="org/set", form="webdataset", splits={"val": "dev"}))
    with pytest.raises(UserError, match=r"org/set has no split 'train' at .*: it has none that is known"):
        open_hub(PARQUET)
    (hub.root / "org/set/test/1.tar").unlink()
    with pytest.raises(UserError, match=r"says 2 files but 1\.tar is missing"):
        open_hub(WDS)
    (hub.root / "org/set/test/nshards.txt").write_text("<html>")
    with pytest.raises(UserError, match=r"org/set/test/nshards.txt must hold the number"):
        open_hub(WDS)


@pytest.mark.parametrize("text", ["set", "", "org/", "/set", "org/a b", "../set"])
def test_names_that_are_none(hub, text):
    with pytest.raises(UserError, match=r"is no data set of the hub: write ORG/NAME"):
        parse_hub(text)


def test_a_repository_of_another_form(hub):
    (hub.root / "org/set").mkdir(parents=True)
    (hub.root / "org/set/images.zip").write_bytes(b"zip")
    with pytest.raises(UserError, match=r"org/set has neither WebDataset .* nor Parquet files"):
        parse_hub("org/set")


def test_configurations(hub):
    first = make_parquet(hub.root / "org/set", {"test": 2}, layout="a/{split}-{i:05d}.parquet")
    make_parquet(hub.root / "org/set", {"test": 3, "train": 1}, layout="b/{split}-{i:05d}.parquet")
    with pytest.raises(UserError, match=r"configurations a, b: give one as org/set/a"):
        parse_hub("org/set")
    with pytest.raises(UserError, match=r"'test' in the configurations a, b"):
        open_hub(PARQUET, splits=["test"])
    assert parse_hub("org/set/a").splits == {"test": "a/test"}
    assert read(open_hub(parse_hub("org/set/a")), "test") == first["test"]
    with pytest.raises(UserError, match=r"org/set/c has neither"):
        parse_hub("org/set/c")
    make_parquet(hub.root / "org/set", {"test": 1}, layout="default/{split}-{i:05d}.parquet")
    assert parse_hub("org/set").splits == {"test": "default/test"}
    assert open_hub(PARQUET, splits=["test"]).splits() == {"test": 1}


def test_text_labels_need_class_names(hub, tmp_path):
    images = [{"bytes": picture(i), "path": None} for i in range(2)]
    write_parquet(hub.root / "org/set/test.parquet", {"image": images, "label": ["dog", "cat"]})
    with pytest.raises(UserError, match="names no classes"):
        open_hub(parse_hub("org/set"))
    (tmp_path / "names").write_text("cat\ndog\n")
    source = open_hub(parse_hub("org/set"), reading=Reading(names=str(tmp_path / "names")))
    assert [r.label for r in source.records("test")] == [1, 0]


@pytest.mark.parametrize("make", [make_wds, make_parquet])
def test_a_damaged_file_says_what_to_delete_and_comes_anew(hub, make):
    """Damage that is on the hub, and damage to the cache afterwards."""
    written = make(hub.root / "org/set", {"train": 9, "test": 1})
    row = parse_hub("org/set")
    last = next(f for f in hub.files("org/set") if f.startswith(("train/2", "data/train-00001")))
    assert read(open_hub(row), "train") == written["train"]
    copy = next((hub.root.parent / "home/hub").glob(f"datasets--org--set/snapshots/*/{last}")).resolve()
    copy.write_bytes(copy.read_bytes()[:700])
    with pytest.raises(UserError, match=rf"{last} is cut off or damaged \(.*\): delete {copy} and run again") as caught:
        list(open_hub(row, splits=["train"]).records("train"))
    assert "\n" not in str(caught.value)
    copy.unlink()
    assert read(open_hub(row), "train") == written["train"]
    (hub.root / "org/set" / last).write_bytes(b"<html>502</html>")
    with pytest.raises(UserError, match=f"{last} is cut off or damaged"):
        list(open_hub(row, splits=["train"]).records("train"))


def test_no_network(hub, monkeypatch):
    make_wds(hub.root / "org/set", {"train": 4, "test": 4})
    source = open_hub(WDS)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{s.getsockname()[1]}")  # nobody listens
        with pytest.raises(UserError, match=r"could not fetch the list of org/set's files from .*check the network"):
            open_hub(WDS)
    hub.breaks["test/0.tar"] = [0] * 20
    with pytest.raises(UserError, match=r"could not fetch org/set/test/0.tar from .*check the network and run again"):
        list(source.records("test"))


def test_offline_mode(hub, monkeypatch):
    make_wds(hub.root / "org/set", {"train": 4, "test": 4})
    source = open_hub(WDS)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for ask in (lambda: open_hub(WDS), lambda: list(source.records("test"))):
        with pytest.raises(UserError, match=r"could not fetch .*: HF_HUB_OFFLINE forbids it; unset it"):
            ask()


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (OSError(errno.ENOSPC, "No space left"), "no space left for org/set/.*HF_HUB_CACHE"),
        (PermissionError(errno.EACCES, "denied", "/cache"), r"could not write .*\(/cache\): set HF_HUB_CACHE"),
        (RuntimeError(""), r"could not fetch .*\(RuntimeError\)"),
    ],
)
def test_trouble_with_the_cache(hub, monkeypatch, error, match):
    make_wds(hub.root / "org/set", {"train": 4, "test": 4})

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match=match):
        open_hub(WDS)


def test_no_thread_is_left(hub):
    make_wds(hub.root / "org/set", {"train": 1, "test": 1})
    before = threading.active_count()
    with serve_hub(hub.root):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before

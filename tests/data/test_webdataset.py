import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.hub_forms import make_wds, picture, write_tar
from rayclip.data.labels import Reading
from rayclip.data.sources.webdataset import open_webdataset
from rayclip.types import UserError


def read(source, split, start=0):
    return [(r.read(), r.label if source.class_names else list(r.captions)) for r in source.records(split, start)]


def one_tar(folder, members, names="cat\ndog\n"):
    """A data set of one tar with these members."""
    write_tar(folder / "test/0.tar", members)
    (folder / "test/nshards.txt").write_text("1\n")
    if names:
        (folder / "classnames.txt").write_text(names)
    return open_webdataset(folder)


@pytest.mark.parametrize("form", ["webp", "png", "jpg", "jpeg"])
@pytest.mark.parametrize("captions", [False, True])
def test_a_folder_is_read_in_order_and_from_any_record_on(tmp_path, form, captions):
    written = make_wds(tmp_path, {"train": 8, "validation": 2, "test": 3}, captions=captions, form=form)
    for start in range(10):
        source = open_webdataset(tmp_path)
        assert read(source, "train", start) == written["train"][start:]
    assert source.class_names == (() if captions else ("cat", "dog", "lemon"))
    assert source.splits() == {"train": None, "val": None, "test": None}
    assert read(source, "val") == written["validation"] and read(source, "test") == written["test"]
    assert [r.path for r in source.records("test")][:2] == [f"test/0.tar/s000000{i}.{form}" for i in (0, 1)]


def test_what_cannot_be_used_says_why_and_nothing_is_left_out(tmp_path):
    image = picture(0)
    source = one_tar(
        tmp_path,
        [
            ("a.cls", b"1"), ("a.webp", image), ("a.json", b"{}"),
            ("b.cls", b"0"),
            ("c.webp", image),
            ("d.cls", b"tensor(1)"), ("d.webp", image),
            ("e.cls", b"0"), ("e.jpg", image), ("e.webp", image),
            ("f.cls", b"dog"), ("f.webp", image),
            ("a.cls", b"0"), ("a.webp", image),
            ("g.cls", b""), ("g.webp", image),
            ("h.cls", b"\xff"), ("h.webp", image),
            ("i.cls", b"0"), ("i.cls", b"1"), ("i.webp", image),
            ("j.cls", b" 1\n"), ("j.webp", b""),
            ("k/a.cls", b"-1"), ("k/a.webp", image),
            ("._x.webp", b"mac"), ("README", b"text"),
            ("../../etc/m.cls", b"1"), ("../../etc/m.WEBP", image),
        ],
    )  # fmt: skip
    records = list(source.records("test"))
    assert [(r.path.removeprefix("test/0.tar/"), r.label, r.problem) for r in records] == [
        ("a.webp", 1, None),
        ("b", 0, "the sample has no image"),
        ("c.webp", None, "the sample has no label files (.cls)"),
        ("d.webp", None, "the label 'tensor(1)' is no number and no class name"),
        ("e.jpg", 0, "the sample has 2 images"),
        ("f.webp", 1, None),
        ("a.webp", 0, "the name 'a' occurs before in test/0.tar"),
        ("g.webp", None, "the label '' is no number and no class name"),
        ("h.webp", None, "h.cls is no UTF-8 text"),
        ("i.webp", None, "the sample has 2 label files (.cls)"),
        ("j.webp", 1, None),
        ("k/a.webp", None, "the sample has no label (-1)"),
        ("../../etc/m.WEBP", 1, None),
    ]
    with pytest.raises(ValueError, match=r"j\.webp is empty"):
        records[10].read()
    assert records[12].read() == image
    for start in range(14):
        again = list(source.records("test", start))
        assert [(r.path, r.problem) for r in again] == [(r.path, r.problem) for r in records[start:]]


def test_captions_without_text_say_so(tmp_path):
    members = [("a.txt", b"one\n\n two \n"), ("a.webp", b"x"), ("b.txt", b" \n"), ("b.webp", b"x"), ("c.webp", b"x")]
    records = list(one_tar(tmp_path, members, names=None).records("test"))
    assert [(r.captions, r.problem) for r in records] == [
        (("one", "two"), None),
        ((), "the sample has no caption"),
        ((), "the sample has no caption files (.txt)"),
    ]
    assert all(r.label is None for r in records)


def test_links_and_strange_names_are_only_names(tmp_path):
    make_wds(tmp_path, {"test": 1})
    with tarfile.open(
        tmp_path / "test/0.tar", "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for name, kind, data in [
            ("folder", tarfile.DIRTYPE, b""),
            ("a.cls", tarfile.REGTYPE, b"1"),
            ("a.webp", tarfile.SYMTYPE, b""),
            ("\udcff.cls", tarfile.REGTYPE, b"1"),
            ("\udcff.webp", tarfile.REGTYPE, b"image"),
            ("n" * 200 + ".cls", tarfile.REGTYPE, b"2"),
            ("n" * 200 + ".webp", tarfile.REGTYPE, b"image"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info, io.BytesIO(data))
    link, strange, long = open_webdataset(tmp_path).records("test")
    with pytest.raises(ValueError, match=r"a.webp is a link"):
        link.read()
    strange.path.encode()  # can be written down
    assert (strange.read(), strange.label, long.read(), long.label) == (b"image", 1, b"image", 2)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 12 * 1024))
def test_a_tar_cut_off_anywhere_gives_what_is_before_and_says_to_fetch_it_again(tmp_path_factory, cut):
    folder = tmp_path_factory.getbasetemp() / "cut"
    if not folder.is_dir():
        make_wds(folder / "whole", {"test": 3})
        make_wds(folder / "cut", {"test": 3})
    whole = (folder / "whole/test/0.tar").read_bytes()
    expected = read(open_webdataset(folder / "whole"), "test")
    (folder / "cut/test/0.tar").write_bytes(whole[:cut])
    got, failed = [], None
    try:
        for record in open_webdataset(folder / "cut").records("test"):
            got.append((record.read(), record.label))
    except UserError as error:
        failed = str(error)
    assert got == expected[: len(got)]
    if failed is None:
        assert got == expected and whole[:cut].rstrip(b"\0") == whole.rstrip(b"\0")
    else:
        assert "test/0.tar is cut off or damaged" in failed and "fetch " in failed and "\n" not in failed


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: [f.unlink() for f in (p / "test").iterdir()], "holds no WebDataset: it needs test/nshards.txt"),
        (lambda p: (p / "test/nshards.txt").write_text("many"), "must hold the number of tar files"),
        (lambda p: (p / "test/nshards.txt").write_text("0"), "must hold the number of tar files"),
        (lambda p: (p / "test/1.tar").unlink(), r"says 2 files but .*1\.tar is missing"),
        (lambda p: (p / "classnames.txt").write_text("cat\n\ndog\n"), "has an empty line, 2"),
        (lambda p: (p / "classnames.txt").write_bytes(b"\xff"), "is no UTF-8 text"),
    ],
)
def test_wrong_folders_are_explained(tmp_path, change, match):
    make_wds(tmp_path, {"test": 5})
    change(tmp_path)
    with pytest.raises(UserError, match=match):
        open_webdataset(tmp_path)


def test_the_description_tells_the_content_and_no_path(tmp_path):
    for name, count in (("a", 4), ("b", 4), ("c", 5)):
        make_wds(tmp_path / name, {"test": count})
    a, b, c = (open_webdataset(tmp_path / name).describe() for name in "abc")
    assert a == b != c and a["kind"] == "webdataset" and str(tmp_path) not in str(a)
    with pytest.raises(UserError, match=r"no such folder"):
        open_webdataset(tmp_path / "d")


def test_captions_can_be_wanted_where_there_are_labels_and_names_given_where_there_are_none(tmp_path):
    one_tar(tmp_path, [("a.cls", b"1"), ("a.txt", b"one"), ("a.webp", b"x")])
    assert next(open_webdataset(tmp_path, captions=True).records("test")).captions == ("one",)
    assert next(open_webdataset(tmp_path).records("test")).label == 1
    (tmp_path / "classnames.txt").rename(tmp_path / "names")
    assert len(open_webdataset(tmp_path, reading=Reading(names=str(tmp_path / "names"))).class_names) >= 2

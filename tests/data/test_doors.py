"""What people have lying about: opened as it is, or told in a sentence that works when it is followed."""

import ast
import io
import json
import os
import re
import shlex
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from PIL import Image

from calling import call
from data import forms
from data.hub_forms import image_structs, make_parquet, make_wds, picture, write_parquet, write_tar
from data.test_data import png, write
from rayclip.cli import request
from rayclip.cli.app import app
from rayclip.data import batch_pixels, open_data, open_pairs
from rayclip.types import UserError

NAMES = ("cat", "dog", "lemon")


def colours(data):
    """The first pixel of every image, which tells the pictures of `hub_forms.picture` apart."""
    return [image.getpixel((0, 0))[:2] for image in data.images(range(len(data)))]


def table(folder, split, count=6, number=0):
    """A data set of the datasets library, labels round the classes, colours from `number` on."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    images = [{"bytes": picture(number + i), "path": None} for i in range(count)]
    return datasets.Dataset.from_dict({"image": images, "label": [i % 3 for i in range(count)]}, features=features)


# Layouts of folders


@pytest.mark.parametrize(
    "layout",
    [
        "{split}-{i:05d}-of-{n:05d}.parquet",
        "data/{split}-{i:05d}-of-{n:05d}.parquet",
        "default/{split}/{i:04d}.parquet",
        "plain_text/{split}-{i:05d}-of-{n:05d}.parquet",
        "plain_text/{split}/{i:04d}.parquet",
        "data/plain_text/{split}/{i:04d}.parquet",
        "{split}/{i:04d}.parquet",
    ],
)
def test_the_hubs_layouts_are_opened(tmp_path, layout):
    make_parquet(tmp_path / "repo", {"train": 7, "test": 6}, layout=layout, per_file=4)
    train, test = (open_data(str(tmp_path / "repo"), role) for role in ("train", "test"))
    assert (len(train), len(test), test.name, test.class_names) == (7, 6, "repo", NAMES)
    assert colours(test) == [(7 + i, 0) for i in range(6)] and test.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_several_configurations_are_named_and_each_opens(tmp_path):
    for config in ("en", "de"):
        make_parquet(tmp_path / config, {"test": 3 if config == "en" else 4}, layout="{split}/{i:04d}.parquet")
    with pytest.raises(
        UserError, match=r"has the configurations de, en: give the folder of one, such as (\S+)\.$"
    ) as c:
        open_data(str(tmp_path), "test")
    told = re.search(r"such as (\S+)\.$", str(c.value)).group(1)
    assert len(open_data(told, "test")) == 4 and len(open_data(str(tmp_path / "en"), "test")) == 3
    (tmp_path / "de").rename(tmp_path / "default")
    assert len(open_data(str(tmp_path), "test")) == 4


def test_what_save_to_disk_writes_is_opened(tmp_path):
    splits = {"train": table(tmp_path, "train", 9), "validation": table(tmp_path, "validation", 4, 50)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "dict", num_shards={"train": 2, "validation": 1})
    splits["validation"].save_to_disk(tmp_path / "one")
    for place, role, count, first in (("dict", "train", 9, 0), ("dict", "test", 4, 50), ("one", "test", 4, 50)):
        data = open_data(str(tmp_path / place), role)
        data.check()
        assert (len(data), data.class_names, data.native_size) == (count, NAMES, (8, 8))
        assert colours(data) == [(first + i, 0) for i in range(count)]
        assert data.labels.tolist() == [i % 3 for i in range(count)]
    (file,) = (tmp_path / "one").glob("*.arrow")
    assert len(open_data(str(file), "test")) == 4
    same = open_data(str(tmp_path / "one"), "test").fingerprint
    table(tmp_path, "validation", 4, 51).save_to_disk(tmp_path / "two")
    assert same == open_data(str(file), "test").fingerprint != open_data(str(tmp_path / "two"), "test").fingerprint
    next((tmp_path / "dict/train").glob("*00001-of-00002.arrow")).unlink()
    with pytest.raises(UserError, match=r"dict/train is not whole \(.*00001-of-00002.arrow is missing\)"):
        open_data(str(tmp_path / "dict"), "train")


def test_an_arrow_file_cut_off_anywhere_is_no_crash(tmp_path):
    table(tmp_path, "test", 3).save_to_disk(tmp_path / "a")
    (file,) = (tmp_path / "a").glob("*.arrow")
    whole = file.read_bytes()
    for cut in range(0, len(whole) - 16, 37):  # the last bytes are the mark of the end
        file.write_bytes(whole[:cut])
        try:
            data = open_data(str(tmp_path / "a"), "test")
            data.check()
        except UserError as error:
            assert "\n" not in str(error)
        else:
            raise AssertionError(f"{cut} of {len(whole)} bytes were enough for {len(data)} rows")


def test_a_missing_file_of_several_is_told(tmp_path):
    make_parquet(tmp_path, {"test": 9}, per_file=3)
    (tmp_path / "data/test-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match=r"holds 2 of the 3 files test-\*-of-00003: number 1 is missing"):
        open_data(str(tmp_path), "test")


def test_the_test_split_is_not_mixed_with_the_validation_split(tmp_path):
    make_parquet(tmp_path, {"validation": 4, "test": 3}, layout="{split}-{i}.parquet")
    assert len(open_data(str(tmp_path), "test")) == 3 and len(open_data(str(tmp_path), "val")) == 4


def test_files_that_name_no_split_are_taken_whole(tmp_path):
    make_parquet(tmp_path, {"part": 16}, layout="{split}-{i}.parquet", per_file=5)
    assert len(open_data(str(tmp_path), "test")) == len(open_data(str(tmp_path), "train")) == 16
    assert len(open_data(f"{tmp_path}#holdout", "train")) == 13


def test_what_is_divided_has_only_the_two_parts(tmp_path):
    make_parquet(tmp_path, {"train": 16, "val": 3})
    for part in ("#holdout", "#validation", "#holdout#validation"):
        with pytest.raises(UserError, match="has no val split"):
            open_data(f"{tmp_path}{part}", "val")
        with pytest.raises(UserError, match="has no val split"):
            open_data(f"digits{part}", "val")
    assert [len(open_data(f"{tmp_path}#validation", role)) for role in ("train", "test")] == [13, 3]


# Columns


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("image", "label"),
        ("img", "labels"),
        ("jpg", "fine_label"),
        ("png", "coarse_label"),
        ("webp", "cls"),
        ("jpeg", "class"),
        ("picture", "target"),
        ("image", "kind"),
        ("picture", "kind"),
    ],
)
def test_the_only_column_of_its_kind_is_read(tmp_path, image, label):
    make_parquet(tmp_path, {"test": 4}, image=image, label=label)
    data = open_data(str(tmp_path), "test")
    assert data.labels.tolist() == [0, 1, 2, 0] and data.class_names == NAMES and len(colours(data)) == 4


def test_two_columns_that_could_be_meant_are_named_and_either_can_be_chosen(tmp_path):
    columns = {"img": image_structs([picture(0), picture(1)]), "fine_label": [2, 1], "coarse_label": [0, 1]}
    features = {name: {"names": list(NAMES), "_type": "ClassLabel"} for name in ("fine_label", "coarse_label")}
    made = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(made, tmp_path / "c.parquet")
    path = str(tmp_path / "c.parquet")
    with pytest.raises(
        UserError, match="has the columns fine_label and coarse_label, and each could be the label"
    ) as c:
        open_data(path, "test")
    told = re.findall(r"(\S+#label=\S+?)[ .]", str(c.value) + " ")
    assert [open_data(t.rstrip("."), "test").labels.tolist() for t in told] == [[2, 1], [0, 1]]
    prints = {open_data(t.rstrip("."), "test").fingerprint for t in told}
    assert len(prints) == 2
    with pytest.raises(UserError, match=r"has no column 'none' that can be the label \(its columns: img, "):
        open_data(f"{path}#label=none", "test")
    with pytest.raises(UserError, match=r"'#lable=x' behind .* means nothing: there are #image=…, #label=…"):
        open_data(f"{path}#lable=x", "test")


# Images


def encoded(mode, form):
    buffer = io.BytesIO()
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8)
    image = (
        Image.fromarray(pixels * 1024)
        if mode == "I;16"
        else Image.fromarray((pixels * 4).astype(np.uint8)).convert(mode)
    )
    image.save(buffer, form)
    return buffer.getvalue()


KINDS = [
    ("L", "png"),
    ("I;16", "png"),
    ("P", "png"),
    ("1", "png"),
    ("LA", "png"),
    ("RGBA", "png"),
    ("L", "jpeg"),
    ("CMYK", "jpeg"),
    ("P", "gif"),
]


@pytest.mark.parametrize("column", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_images_of_every_mode_as_plain_bytes(tmp_path, column):
    images = [encoded(mode, form) for mode, form in KINDS]
    columns = {"image": pa.array(images, column), "label": [i % 3 for i in range(len(images))]}
    data = open_data(str(write_parquet(tmp_path / "x.parquet", columns, NAMES)), "test")
    data.check()
    pixels = batch_pixels(data, range(len(images)), "native", 8).float()
    assert pixels.shape == (len(KINDS), 3, 8, 8)
    grey = pixels[[0, 1, 4, 5]].mean(1)
    assert (grey - grey[0]).abs().max() <= 1  # 16 bits are scaled, not cut off


def paths_table(folder, kind, names=NAMES, count=4, at="imgs"):
    """Rows that name image files instead of holding them."""
    for i in range(count):
        forms.put(folder / at / f"{i}.png", picture(i))
    paths = [f"{at}/{i}.png" for i in range(count)]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = {
        "text": pa.array(paths),
        "path only": pa.array([{"bytes": None, "path": p} for p in paths], struct),
        "no bytes": pa.array([{"path": p} for p in paths], pa.struct([("path", pa.string())])),
        "null bytes": pa.array(
            [{"bytes": None, "path": p} for p in paths], pa.struct([("bytes", pa.null()), ("path", pa.string())])
        ),
        "some": pa.array([{"bytes": None if i % 2 else picture(i), "path": p} for i, p in enumerate(paths)], struct),
        "absolute": pa.array([str(folder / p) for p in paths]),
    }[kind]
    return write_parquet(folder / "t.parquet", {"image": column, "label": [i % 3 for i in range(count)]}, names)


@pytest.mark.parametrize("kind", ["text", "path only", "no bytes", "null bytes", "some", "absolute"])
def test_image_files_are_found_beside_the_file_that_names_them(tmp_path, monkeypatch, capsys, kind):
    path = paths_table(tmp_path / "d", kind)
    monkeypatch.chdir(tmp_path)  # not here
    data = open_data(str(path), "test")
    data.check()
    assert colours(data) == [(i, 0) for i in range(4)]
    before = data.fingerprint
    assert call(monkeypatch, capsys, "data", "prepare", "p", "--source", "parquet", path, "--root", "r", "--quiet")[
        0
    ] in (0, None)
    prepared = open_data("r/p", "test")
    assert colours(prepared) == [(i, 0) for i in range(4)] and prepared.labels.tolist() == [0, 1, 2, 0]
    (tmp_path / "d/imgs/1.png").write_bytes(picture(200, size=9))
    assert open_data(str(path), "test").fingerprint != before  # another image is other data


@pytest.mark.parametrize("statistics", [True, False])
def test_a_file_that_only_a_later_row_names_is_part_of_the_data(tmp_path, statistics):
    forms.put(tmp_path / "late.png", picture(3))
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": picture(0), "path": "0.png"}, {"bytes": None, "path": "late.png"}]
    features = {"label": {"names": list(NAMES), "_type": "ClassLabel"}}
    made = pa.table({"image": pa.array(rows, struct), "label": [0, 1]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(made, tmp_path / "t.parquet", write_statistics=statistics)
    before = open_data(str(tmp_path / "t.parquet"), "test")
    assert colours(before) == [(0, 0), (3, 0)]
    forms.put(tmp_path / "late.png", picture(4))
    assert open_data(str(tmp_path / "t.parquet"), "test").fingerprint != before.fingerprint


@pytest.mark.parametrize(("file", "classes"), [("flabel", 10), ("blabel", 2), ("pathonly", 10), ("strpath", 10)])
def test_the_users_files(shared, tmp_path, file, classes):
    source = shared / f"inputs/data_advice_that_fails/{file}.parquet"
    if not source.is_file():
        pytest.skip(f"no file {source}")
    path = forms.put(tmp_path / source.name, source.read_bytes()) and tmp_path / source.name
    if "path" in file:
        with pytest.raises(UserError, match=r"and there is no .*imgs/0\.png: put the files there"):
            open_data(str(path), "test")
        for i in range(40):
            forms.put(tmp_path / f"imgs/{i}.png", picture(i))
    data = open_data(str(path), "test")
    data.check()
    assert (
        np.bincount(data.labels).tolist()
        == [len(data) // classes] * classes
        == [len(data) // len(data.class_names)] * classes
    )


@pytest.mark.parametrize("kind", ["text", "path only", "no bytes", "null bytes"])
def test_image_files_that_are_not_there_are_told(tmp_path, kind):
    path = paths_table(tmp_path, kind)
    for i in range(4):
        (tmp_path / f"imgs/{i}.png").unlink()
    with pytest.raises(
        UserError, match=r"holds no images, only paths of image files, and there is no .*imgs/0\.png: put"
    ):
        open_data(str(path), "test")


# Advice: each sentence that names a command is followed, and what it promises is opened


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("RAYCLIP_DATA", str(tmp_path / "root"))
    return tmp_path / "in"


@pytest.fixture
def rayclip(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "500")  # no path is folded, however long the temporary folder's is

    def run(*args):
        code, out, err = call(monkeypatch, capsys, *args, *["--quiet"] * (args[:2] == ("data", "prepare")))
        return code or 0, out, err

    return run


def _names(folder):
    return str(forms.put(folder / "names.txt", "cat\ndog\nlemon\n") and folder / "names.txt")


def _tars(folder, names=True):
    make_wds(folder / "w", {"test": 4})
    if not names:
        (folder / "w/classnames.txt").unlink()
    return folder / "w"


def _one_tar(folder):
    members = [(f"{i}.{end}", data) for i in range(3) for end, data in (("cls", b"%d" % i), ("png", picture(i)))]
    return write_tar(folder / "shard-000000.tar", members)


def _class_folders(folder):
    for i, name in enumerate(NAMES):
        forms.put(folder / f"pets/{name}/a.png", png((i, 0, 0)))
    return folder / "pets"


def _unlabelled(folder):
    folder.mkdir()
    return Path(write(folder / "x.parquet", [0, -1, 2]))


def _from_1(folder):
    folder.mkdir()
    return Path(write(folder / "1 to 3.parquet", [1, 2, 3]))


def _damaged(folder):
    folder.mkdir()
    return Path(write(folder / "x.parquet", [0, 1, 2], [png("red"), b"no image", png("blue")]))


def _lost(folder):
    path = paths_table(folder, "text")
    (folder / "imgs/1.png").unlink()
    return path


def _lost_columns(folder):
    columns = {"img": image_structs([picture(0), b"", picture(2)]), "fine": [1, 2, 3], "coarse": [9, 9, 9]}
    path = write_parquet(folder / "x.parquet", columns, NAMES, label="fine")
    return f"{path}#label=fine#labels-from=1#names={_names(folder)}"


PREPARED = {  # what is given to `eval`: images that are there after the advice
    "WebDataset": (_tars, 4),
    "WebDataset without names": (lambda p: _tars(p, names=False), 4),
    "one tar": (_one_tar, 3),
    "class folders": (_class_folders, 3),
    "images without labels": (_unlabelled, 2),
    "labels from 1": (_from_1, 3),
    "damaged image": (_damaged, 2),
    "lost image file": (_lost, 3),
    "chosen columns and a damaged image": (_lost_columns, 2),
}


@pytest.mark.parametrize("case", PREPARED)
def test_the_command_in_the_sentence_works(here, rayclip, saved_clip, case):
    make, count = PREPARED[case]
    place = str(make(here))
    code, out, err = rayclip(
        "eval", "--model", saved_clip, "--data", place, "--attacks", "clean", "--out", "o", "--no-tracking"
    )
    assert (code, out) == (2, "") and err.count("\n") == 1 and list(Path.cwd().iterdir()) == []
    program, *args = shlex.split(re.search(r"`(rayclip data prepare .+?)`", err).group(1))
    if "FILE" in args:
        args[args.index("FILE")] = _names(here)
    code, out, err = rayclip(*args)
    assert (program, code, err) == ("rayclip", 0, "")
    data = open_data(args[2], "test")
    assert len(data) == count and data.class_names == NAMES


ASKED = {  # what is given to `eval`: what the sentence says to write instead
    "labels from 1": (lambda p: _from_1(p), r"write (.+#labels-from=1), or"),
    "no names": (
        lambda p: write_parquet(
            p / "x.parquet", {"image": image_structs([picture(i) for i in range(3)]), "label": [0, 1, 2]}
        ),
        r"or (\S+#names=FILE);",
    ),
    "no split of that kind": (lambda p: make_parquet(p, {"train": 15}) and p, r"write (\S+#holdout) to"),
    "configurations": (
        lambda p: [make_parquet(p / c, {"test": 3}, layout="{split}-{i}.parquet") for c in "ab"] and p,
        r"such as (\S+)\.$",
    ),
    "unknown label column": (
        lambda p: write_parquet(
            p / "x.parquet", {"image": image_structs([picture(i) for i in range(3)]), "y": ["cat", "dog", "lemon"]}
        ),
        r"with (\S+#label=COLUMN)\.$",
    ),
    "unknown image column": (
        lambda p: write_parquet(
            p / "x.parquet",
            {"y": [picture(i) for i in range(3)], "z": [picture(0)] * 3, "label": ["cat", "dog", "lemon"]},
        ),
        r"name it with (\S+#image=COLUMN);",
    ),
}


@pytest.mark.parametrize("case", ASKED)
def test_what_to_write_instead_is_opened(here, rayclip, saved_clip, case):
    make, instead = ASKED[case]
    place = str(make(here))
    code, _, err = rayclip(
        "eval", "--model", saved_clip, "--data", place, "--attacks", "clean", "--out", "o", "--no-tracking"
    )
    assert code == 2 and err.count("\n") == 1
    told = re.search(instead, err.strip()).group(1).replace("COLUMN", "y").replace("FILE", _names(here))
    data = open_data(told, "test")
    data.check()
    assert data.class_names == NAMES and len(data) in (2, 3)


def test_the_missing_split_of_a_prepared_set(here, rayclip):
    make_parquet(here / "p", {"train": 15})
    assert rayclip("data", "prepare", "own", "--source", "parquet", str(here / "p"))[0] == 0
    with pytest.raises(UserError, match=r"'own' has no test split, only train: write own#holdout to keep"):
        open_data("own", "test")
    assert [len(open_data("own#holdout", role)) for role in ("train", "test")] == [12, 3]
    other = str(here.parent / "elsewhere")
    rayclip("data", "prepare", "b", "--source", "parquet", str(here / "p"), "--root", other)
    with pytest.raises(UserError, match=rf"write {other}/b#holdout to keep"):
        open_data(f"{other}/b", "test")
    assert len(open_data(f"{other}/b#holdout", "test")) == 3


# The command line: --class-names FILE, commas and ~


def test_class_names_commas_and_home_on_the_command_line(here, rayclip, saved_clip, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    bare = {"image": image_structs([picture(i) for i in range(3)]), "label": [0, 1, 2]}
    write_parquet(here / "a,b.parquet", bare)
    names = _names(here)
    asked = []

    def seen(models, evaluation, where):
        asked.append(evaluation)
        raise UserError("seen")

    monkeypatch.setattr("rayclip.api.evaluate_models", seen)
    command = ["eval", "--model", saved_clip, "--attacks", "clean", "--out", "o", "--no-tracking"]

    def evaluation(*options):
        assert rayclip(*command, *options)[2] == "error: seen\n"
        return asked.pop()

    found = evaluation("--data", "~/a,b.parquet,digits", "--class-names", "~/names.txt")
    assert found.data == [f"{here}/a,b.parquet#names={names}", f"digits#names={names}"]
    assert found.protocol.names == "curated" and open_data(found.data[0], "test").class_names == NAMES
    assert evaluation("--data=~/a,b.parquet#names=~/names.txt").data == [f"{here}/a,b.parquet#names={names}"]
    assert open_data("~/a,b.parquet#names=~/names.txt", "test").class_names == NAMES
    assert evaluation("--data", "digits", "--class-names", "raw").protocol.names == "raw"
    code, _, err = rayclip(*command, "--data", "digits", "--class-names", "raww")
    assert code == 2 and "--class-names raww is none of curated and raw, and no file: give a file with" in err


@pytest.mark.parametrize("command", ["list", "verify", "show"])
def test_home_is_meant_in_roots_and_files(here, rayclip, monkeypatch, command):
    monkeypatch.setenv("HOME", str(here))
    here.mkdir()
    write(here / "x.parquet", [0, 1, 2])
    code, _, err = rayclip("data", "prepare", "own", "--source", "parquet", "~/x.parquet", "--root=~/r")
    assert (code, err) == (0, "") and (here / "r/own/manifest.json").is_file()
    names = {"list": [], "verify": ["own"], "show": ["own", "--sheet=~/s.png"]}[command]
    code, out, err = rayclip("data", command, *names, "--root=~/r")
    assert (code, err) == (0, "") and "own" in out
    assert (here / "s.png").is_file() == (command == "show")
    monkeypatch.setenv("RAYCLIP_DATA", "~/r")
    assert len(open_data("own", "test")) == len(open_data("~/x.parquet", "test")) == 3
    assert not (Path.cwd() / "~").exists()


def test_pairs_lie_in_the_same_layouts(tmp_path):
    make_parquet(tmp_path / "repo", {"test": 3}, label="captions", captions=True)
    assert len(open_pairs(str(tmp_path / "repo"))) == 3
    os.symlink(tmp_path / "repo/data/test-00000-of-00001.parquet", tmp_path / "a.parquet")
    with pytest.raises(UserError, match="leave out what follows the #"):
        open_pairs(f"{tmp_path}/a.parquet#labels-from=1")
    with pytest.raises(UserError, match="has captions and no labels: use `rayclip retrieval`"):
        open_data(f"{tmp_path}/a.parquet", "test")


# Every command that a sentence of these rooms names can be run as it is written


def named_commands():
    """Commands between backticks in the texts of `rayclip.data` and of its command line, values filled in."""
    folder = Path(request.__file__).parents[1]
    for file in sorted([*(folder / "data").rglob("*.py"), folder / "cli" / "data.py"]):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                text = "".join(part.value if isinstance(part, ast.Constant) else "x" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            for command in re.findall(r"`(rayclip [^`]+)`", text):
                yield file.relative_to(folder).as_posix(), " ".join(command.split())


@pytest.mark.parametrize(("file", "command"), sorted(set(named_commands())))
def test_commands_that_are_named_can_be_parsed(file, command):
    words = shlex.split(command)[1:]
    found = typer.main.get_command(app)
    while words and hasattr(found, "commands"):
        found = found.commands[words.pop(0)]
    if words:  # else a mention of the command, not a line to type
        found.make_context("rayclip", [w.replace("CONFIG", "x") for w in words])


def test_the_command_that_adds_a_split_works(here, rayclip, monkeypatch):
    forms.make("tiny_imagenet_folder", here, monkeypatch)
    assert rayclip("data", "prepare", "tiny_imagenet", "--source", "folder", here, "--splits", "val")[0] == 0
    with pytest.raises(UserError, match="of 'tiny_imagenet' only val is prepared") as caught:
        open_data("tiny_imagenet", "train")
    args = shlex.split(re.search(r"`rayclip (.+?)` adds", str(caught.value)).group(1))
    assert rayclip(*[str(here) if word == "PLACE" else word for word in args])[0] == 0
    assert (len(open_data("tiny_imagenet", "train")), len(open_data("tiny_imagenet", "test"))) == (400, 300)


def test_the_command_that_tells_more_of_a_damaged_set_works(here, rayclip):
    make_parquet(here / "p", {"test": 6})
    rayclip("data", "prepare", "b", "--source", "parquet", str(here / "p"), "--root", str(here / "r s"))
    (here / "r s/b/test-00000.parquet").write_bytes(b"short")
    with pytest.raises(UserError) as caught:
        open_data(str(here / "r s/b"), "test").images([0])
    args = shlex.split(re.search(r"`rayclip (.+?)` tells more", str(caught.value)).group(1))
    code, out, err = rayclip(*args)
    assert code == 2 and "test-00000.parquet has 5 bytes" in out and "--force" in err


def test_a_clone_without_its_large_files_is_told(tmp_path, here, rayclip):
    path = tmp_path / "test-0.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(UserError, match=r"only says where Git LFS has it, run `git lfs pull`"):
        open_data(str(path), "test")
    code, _, err = rayclip("data", "prepare", "x", "--source", "parquet", path)
    assert code == 2 and "run `git lfs pull`" in err


def test_a_folder_called_parquet_is_a_folder(tmp_path):
    make_parquet(tmp_path / "x.parquet", {"part": 7}, layout="{split}-{i}.parquet", per_file=3)
    assert len(open_data(str(tmp_path / "x.parquet"), "test")) == 7

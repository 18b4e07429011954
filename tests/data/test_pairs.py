import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.test_data import png
from rayclip.data import batch_pixels, open_pairs
from rayclip.types import UserError

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_pairs(path, captions, images=None, kind=None, column="captions", row_group=2):
    """A Parquet file of pairs; images are single colours of several sizes, red = number of the row."""
    images = images or [png((i, 0, 0), (12 + i % 3, 12)) for i in range(len(captions))]
    struct = pa.array([{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(images)], STRUCT)
    table = pa.table({"image": struct, column: pa.array(captions, kind or pa.list_(pa.string()))})
    pq.write_table(table, path, row_group_size=row_group)
    return str(path)


CAPTIONS = [["a", "b "], ["c"], ["d", "e", "f"], ["a"], ["g"]]


def test_pairs_are_read_across_row_groups(tmp_path):
    pairs = open_pairs(write_pairs(tmp_path / "p.parquet", CAPTIONS))
    assert (pairs.name, len(pairs), pairs.ids.tolist()) == ("p", 5, [0, 1, 2, 3, 4])
    assert pairs.captions == (("a", "b "), ("c",), ("d", "e", "f"), ("a",), ("g",)), "as the file has them"
    assert [i.getpixel((0, 0))[0] for i in pairs.images([4, 0, 3])] == [4, 0, 3]
    assert batch_pixels(pairs, [0, 1, 2], "model", 8).shape == (3, 3, 8, 8)


def test_fingerprints_are_of_content(tmp_path):
    same = [open_pairs(write_pairs(tmp_path / f"{n}.parquet", CAPTIONS)).fingerprint for n in "xy"]
    other = open_pairs(write_pairs(tmp_path / "z.parquet", [*CAPTIONS[:4], ["h"]])).fingerprint
    assert same[0] == same[1] != other


def test_folders_and_prepared_names(tmp_path, monkeypatch):
    folder = tmp_path / "mscoco"
    folder.mkdir()
    write_pairs(folder / "val-0.parquet", [["val"]])
    write_pairs(folder / "train-0.parquet", [["train"]])
    assert open_pairs(str(folder)).captions == (("val",),)
    write_pairs(folder / "test-00001.parquet", [["t1"]])
    write_pairs(folder / "test-00000.parquet", [["t0"], ["t00"]])
    monkeypatch.setenv("RAYCLIP_DATA", str(tmp_path))
    pairs = open_pairs("mscoco")
    assert (pairs.name, pairs.captions) == ("mscoco", (("t0",), ("t00",), ("t1",)))
    assert pairs.images([2])[0].getpixel((0, 0))[0] == 0


@pytest.mark.parametrize("kind", [pa.large_list(pa.large_string()), pa.list_(pa.string(), 1)])
def test_lists_of_any_make(tmp_path, kind):
    assert open_pairs(write_pairs(tmp_path / "p.parquet", [["a"], ["b"]], kind=kind)).captions == (("a",), ("b",))


def test_captions_of_other_names_and_single_ones(tmp_path):
    assert open_pairs(write_pairs(tmp_path / "p.parquet", CAPTIONS, column="sentences")).captions == tuple(
        map(tuple, CAPTIONS)
    )
    single = open_pairs(write_pairs(tmp_path / "q.parquet", ["a", "b"], kind=pa.string()))
    assert single.captions == (("a",), ("b",)) and len(single.images([0, 1])) == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: str(p), "no such data file"),
        (lambda p: (p.write_text("no parquet"), str(p))[1], "no readable Parquet"),
        (lambda p: write_pairs(p, CAPTIONS, column="said"), "has no captions, a column 'captions'"),
        (lambda p: write_pairs(p, [1, 2], kind=pa.int64()), "has no captions, a column 'captions'"),
        (lambda p: write_pairs(p, [["a"], []]), "row 1 of .* has no captions"),
        (lambda p: write_pairs(p, [["a"], None]), "row 1 of .* has no captions"),
        (lambda p: write_pairs(p, [["a"], ["b", None]]), "row 1 of .* has an empty caption"),
        (lambda p: write_pairs(p, [[" "]]), "row 0 of .* has an empty caption"),
        (lambda p: write_pairs(p, []), "holds no rows"),
        (
            lambda p: (pq.write_table(pa.table({"captions": [["a"]], "image": [1]}), p), str(p))[1],
            "has no image column",
        ),
        (lambda p: "mscocoo", "no image-caption data 'mscocoo'"),
        (lambda p: "", "names nothing"),
        (lambda p: str(p.parent), "holds no test pairs"),
    ],
)
def test_bad_files_are_explained(tmp_path, monkeypatch, make, says):
    monkeypatch.setenv("RAYCLIP_DATA", str(tmp_path / "none"))
    with pytest.raises(UserError, match=says) as error:
        open_pairs(make(tmp_path / "p.parquet"))
    assert "\n" not in str(error.value)


def test_an_unreadable_image_names_its_row(tmp_path):
    pairs = open_pairs(write_pairs(tmp_path / "p.parquet", CAPTIONS[:3], [png("red"), b"no image", None]))
    for row in (1, 2):
        with pytest.raises(UserError, match=f"row {row} of 'p' is no readable image"):
            pairs.images([row])


def test_pairs_are_read_by_a_program_that_imports_nothing_else(tmp_path):
    """pyarrow's modules are there only once somebody has imported them."""
    path = write_pairs(tmp_path / "p.parquet", CAPTIONS)
    program = "import sys; from rayclip.data import open_pairs; open_pairs(sys.argv[1]).images([0, 4])"
    subprocess.run([sys.executable, "-c", program, path], check=True)

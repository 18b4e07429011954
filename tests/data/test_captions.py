"""Descriptions from files and addresses, matching them with classes, and the table that people edit."""

import contextlib
import csv
import http.server
import json
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayclip.data import open_data
from rayclip.data.captions import Caption, read_captions, read_table, table_for, write_captions
from rayclip.data.descriptions import match_classes, normal_name, read_descriptions
from rayclip.data.digits import CLASS_NAMES
from rayclip.models.zeroshot import clean_name
from rayclip.types import UserError


def written(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


# ---------------------------------------------------------------- reading


def test_sentences_are_tidied_and_what_is_dropped_is_counted(tmp_path):
    file = written(tmp_path / "d.json", {"cat": [" a  cat\n", "", "a cat", "A cat", "  "], "dog": []})
    found = read_descriptions(file)
    assert found.sentences == {"cat": ("a cat", "A cat"), "dog": ()}
    assert (found.empty, found.repeated) == (2, 1)
    assert len(found.sha256) == 64 and found.source == file


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("{", "is no JSON"),
        ("<!DOCTYPE html>", "take the raw file's address"),
        ("[" * 100_000, "is no JSON"),
        (["cat"], "must be one JSON object"),
        ({}, "describes no class"),
        ({"cat": "a cat"}, "class 'cat' must have a list of sentences"),
        ({"cat": ["a cat", 3]}, "class 'cat' must have a list of sentences"),
        ({" ": ["a cat"]}, "a class without a name"),
        ('{"cat": ["a"], "dog": ["b"], "cat": ["c"]}', "has class 'cat' twice"),
    ],
)
def test_another_form_is_refused_in_a_sentence(tmp_path, value, says):
    with pytest.raises(UserError, match=says):
        read_descriptions(written(tmp_path / "d.json", value))


@pytest.mark.parametrize("source", ["file:/etc/hosts", "file:///etc/hosts", "ftp://127.0.0.1/x", "data:,{}"])
def test_other_schemes_are_refused(source):
    with pytest.raises(UserError, match="neither a file nor an http"):
        read_descriptions(source)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_descriptions(str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="cannot be read"):
        read_descriptions(str(tmp_path))
    with pytest.raises(UserError, match="is larger than"):
        read_descriptions(written(tmp_path / "d.json", {"cat": ["a cat"]}), limit_bytes=10)


@contextlib.contextmanager
def serving(answer):
    """A web server whose GET is `answer(handler)`; gives its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(ConnectionError):
                answer(self)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def sends(body, code=200, **headers):
    def answer(handler):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def test_an_address_reads_as_the_file_does_and_keeps_no_secrets(tmp_path):
    file = written(tmp_path / "d.json", {"cat": ["a cat"]})
    with serving(sends((tmp_path / "d.json").read_bytes())) as address:
        found = read_descriptions(f"{address}/d.json?token=secret")
        assert found.source == f"{address}/d.json"
    local = read_descriptions(file)
    assert (found.sentences, found.sha256) == (local.sentences, local.sha256)


def test_an_address_that_fails_is_explained():
    with serving(sends(b"", 404)) as address, pytest.raises(UserError, match="answers 404 Not Found"):
        read_descriptions(f"{address}/d.json")
    with pytest.raises(UserError, match="could not be downloaded"):
        read_descriptions(f"{address}/d.json")  # nobody listens any more
    with pytest.raises(UserError, match="could not be downloaded"):
        read_descriptions("http://[::1/x")
    with serving(sends(b"x" * 3000)) as address, pytest.raises(UserError, match="is larger than"):
        read_descriptions(address, limit_bytes=1000)
    with (
        serving(sends(b"", 302, Location="file:///etc/hosts")) as address,
        pytest.raises(UserError, match=r"answers 302|could not be downloaded"),
    ):
        read_descriptions(address)


def test_a_server_that_drips_is_given_up():
    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    began = time.monotonic()
    with serving(drip) as address, pytest.raises(UserError, match="timed out"):
        read_descriptions(address, timeout_s=0.3)
    assert time.monotonic() - began < 3


# ---------------------------------------------------------------- matching


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("Tabby_Cat", "tabby cat", True),
        ("jack-o'-lantern", "Jack-o’-lantern", True),
        ("air/plane", " AIR  plane", True),
        ("cafe\u0301", "café", True),
        ("tow\u00a0truck", "tow truck", True),
        ("crème brûlée", "creme brulee", False),
        ("colt's foot", "colts foot", False),
        ("apse (indoor)", "apse (outdoor)", False),
        ("kite (bird of prey)", "kite", False),
    ],
)
def test_normal_names(one, other, equal):
    assert (normal_name(one) == normal_name(other)) is equal
    assert normal_name(normal_name(one)) == normal_name(one)


def test_names_that_prompts_make_equal_are_equal_here(shared):
    lists = json.loads((shared / "data" / "classnames.json").read_text())
    for names in lists.values():
        for name in names:
            assert normal_name(clean_name(name)) == normal_name(name)


def sentences(*keys):
    return {key: (f"about {key}",) for key in keys}


def test_matching_reports_what_is_left_and_suggests_the_nearest():
    found = match_classes(sentences("Tabby_Cat", "aeroplane", "fire truck", "zebra"), ["tabby cat", "airplane", "ufo"])
    assert found.keys == ("Tabby_Cat", None, None)
    assert found.captions == (("about Tabby_Cat",), (), ())
    assert [(i, u.name, u.nearest) for i, u in found.unmatched.items()] == [
        (1, "airplane", "aeroplane"),
        (2, "ufo", None),
    ]
    assert [(u.name, u.nearest) for u in found.unused] == [
        ("aeroplane", "airplane"),
        ("fire truck", None),
        ("zebra", None),
    ]


def test_a_word_in_common_is_near_and_letters_in_common_are_not():
    found = match_classes(sentences("common newt", "four-poster"), ["newt", "rooster"])
    assert [u.nearest for u in found.unmatched.values()] == ["common newt", None]


def test_classes_that_share_a_name_share_its_sentences():
    found = match_classes(sentences("missile", "dog"), ["missile", "dog", "missile"])
    assert found.keys == ("missile", "dog", "missile") and not found.unmatched and not found.unused


def test_keys_that_differ_in_spelling_only_are_a_conflict_that_exact_spelling_settles():
    keys = sentences("Cardigan", "cardigan", "dog")
    assert match_classes(keys, ["cardigan"]).keys == ("cardigan",)
    assert match_classes(keys, ["cardigan"]).conflicts == (("Cardigan", "cardigan"),)
    unsettled = match_classes(keys, ["CARDIGAN"])
    assert unsettled.keys == (None,)
    assert unsettled.unmatched[0].reason == "'Cardigan' and 'cardigan' differ in spelling only"
    both = match_classes(keys, ["Cardigan Welsh Corgi", "cardigan"], ["Cardigan", "cardigan"])
    assert both.keys == ("Cardigan", "cardigan")


def test_raw_spelling_helps_unless_two_classes_would_take_it():
    keys = sentences("rooster", "cock", "crane")
    found = match_classes(keys, ["cock", "hen"], ["rooster", "cock"])
    assert found.keys == ("cock", None), "a class name comes first, and what it takes is not for another"
    found = match_classes(keys, ["male chicken", "hen"], ["cock", "biddy"])
    assert found.keys == ("cock", None)
    found = match_classes(keys, ["crane bird", "construction crane"], ["crane", "crane"])
    assert found.keys == (None, None)
    assert {u.reason for u in found.unmatched.values()} == {"'crane' could be 2 classes"}


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("cupl-imagenet", "imagenet1k"),
        ("cupl-caltech101", "caltech101"),
        ("cupl-flowers102", "flowers"),
        ("cupl-oxford_pets", "pets"),
    ],
)
def test_published_descriptions_match_the_curated_names(shared, file, names):
    lists = json.loads((shared / "data" / "classnames.json").read_text())
    described = read_descriptions(str(shared / "data" / "descriptions" / f"{file}.json"))
    found = match_classes(described.sentences, lists[names])
    assert not found.unmatched and not found.unused and not found.conflicts
    assert all(found.captions)


def test_every_published_file_is_read(shared):
    files = sorted((shared / "data" / "descriptions").glob("*.json"))
    assert len(files) == 13
    assert all(read_descriptions(str(file)).sentences for file in files)


def test_ids_and_keys_of_multimodal_descriptions(shared):
    data = open_data(str(shared / "data" / "tiny_imagenet-val.parquet"), "test")
    described = read_descriptions(str(shared / "data" / "descriptions" / "saft-mllm-imagenet.json"))
    found = match_classes(described.sentences, data.class_names)
    assert not found.unmatched and len(found.unused) == 998 - 200
    assert found.conflicts == (("Cardigan", "cardigan"),)


# ---------------------------------------------------------------- the table

ROWS = [
    Caption(class_index=0, class_name="cat", rank=1, caption='a "cat", with fur; é', score=0.5, source="description"),
    Caption(class_index=0, class_name="cat", rank=2, caption="=1+1 cats", score=0.25, source="description"),
    Caption(class_index=1, class_name="dog", rank=1, caption="# a dog", score=None, source="template"),
]
MADE = {"keep": 2, "model": "tiny", "class_names": ["cat", "dog"]}


@pytest.fixture(params=["t.parquet", "t.csv"])
def table(request, tmp_path):
    path = tmp_path / request.param
    write_captions(path, ROWS, MADE)
    return path


def test_what_is_written_is_read(table):
    found = read_table(table)
    assert list(found.rows) == ROWS and found.made_from == MADE
    assert read_captions(table) == [['a "cat", with fur; é', "=1+1 cats"], ["# a dog"]]
    assert not list(table.parent.glob("*.partial"))


def test_parquet_has_plain_columns(tmp_path):
    write_captions(tmp_path / "t.parquet", ROWS, MADE)
    columns = pq.read_table(tmp_path / "t.parquet").to_pydict()
    assert list(columns) == ["class_index", "class_name", "rank", "caption", "score", "source"]
    assert columns["rank"] == [1, 2, 1] and columns["source"][2] == "template"


def edit(path, change):
    """Change the rows as a program of a person's would."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        rows = change(rows)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["class_index", "caption"], delimiter=";")
            writer.writeheader()
            writer.writerows(rows)
    else:
        rows = change(pq.read_table(path).to_pylist())
        schema = pq.read_schema(path)
        table = pa.Table.from_pylist(rows) if rows else schema.empty_table()
        pq.write_table(table.replace_schema_metadata(schema.metadata), path)


def test_rows_can_be_added_reordered_and_deleted(table):
    def change(rows):
        new = {
            "class_index": 1,
            "class_name": "Dog",
            "rank": None,
            "caption": " a new\n dog",
            "score": "",
            "source": "me",
        }
        new["score"] = "" if table.suffix == ".csv" else None
        return [new, rows[2], rows[1]]

    edit(table, change)
    assert read_captions(table, ["cat", "dog"]) == [["=1+1 cats"], ["# a dog", "a new dog"]]


def test_only_class_and_caption_have_to_stay(table):
    edit(table, lambda rows: [{"class_index": r["class_index"], "caption": r["caption"]} for r in rows])
    assert [len(own) for own in read_captions(table)] == [2, 1]
    assert {row.score for row in read_table(table).rows} == {None}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows[:2], "has no caption for 'dog'"),
        (lambda rows: [], "holds no captions"),
        (lambda rows: [{"label": 0, "caption": "a"}], "has no column 'class_index'"),
        (lambda rows: [{**rows[0], "caption": " "}], "has no caption: write one"),
        (lambda rows: [{**r, "class_index": "x"} for r in rows], "class_index 'x': .* integer"),
        (lambda rows: [{**r, "class_index": -1} for r in rows], "class_index '-1': .* greater than or equal to 0"),
        (lambda rows: [*rows, {**rows[2], "class_index": 7}], "has class 7, but there are 2 classes"),
        (lambda rows: [*rows, {**rows[2], "class_index": 0}], "gives class 0 several names: cat, dog"),
        (lambda rows: [{**r, "class_name": "cow"} for r in rows[2:]] + rows[:2], "captions of 'cow' as class 1"),
    ],
)
def test_edits_that_make_no_sense_are_named(table, change, says):
    edit(table, change)
    with pytest.raises(UserError, match=says):
        read_captions(table)


def test_the_table_must_be_of_the_same_classes(table):
    assert read_captions(table, ["Cat", "dog"])
    with pytest.raises(UserError, match="captions of 'dog' as class 1, which is 'cow'"):
        read_captions(table, ["cat", "cow"])
    with pytest.raises(UserError, match="no caption for 'cow'"):
        read_captions(table, ["cat", "dog", "cow"])


def test_a_folder_holds_a_table_for_each_data_set(tmp_path):
    for name in ("cifar10.parquet", "dtd.csv", "digits.csv"):
        write_captions(tmp_path / name, ROWS, MADE)
    folder = str(tmp_path)
    assert table_for(folder, "cifar10") == f"{folder}/cifar10.parquet" == table_for(folder, "s3://b/data/cifar10")
    assert table_for(folder, "own/dtd.parquet#holdout#validation") == f"{folder}/dtd.csv"
    assert table_for(folder, "digits#holdout") == f"{folder}/digits.csv"
    assert table_for(f"{folder}/dtd.csv", "cifar10") == f"{folder}/dtd.csv", "a table is taken as it is"
    assert table_for("digits", "cifar10") == "digits", "so is a bundled one"
    with pytest.raises(UserError, match=r"no captions of 'pcam': it needs pcam\.parquet or pcam\.csv"):
        table_for(folder, "pcam")


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(UserError, match="no such file of captions"):
        read_captions(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_text("no")
    with pytest.raises(UserError, match="no readable Parquet"):
        read_captions(tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_bytes("class_index,caption\n0,caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        read_captions(tmp_path / "t.csv")
    with pytest.raises(UserError, match=r"written as \.parquet or \.csv"):
        write_captions(tmp_path / "t.txt", ROWS, MADE)


def test_without_its_sidecar_a_csv_is_still_read(tmp_path):
    write_captions(tmp_path / "t.csv", ROWS, MADE)
    (tmp_path / "t.csv.json").unlink()
    assert [len(own) for own in read_captions(tmp_path / "t.csv")] == [2, 1]


def test_the_bundled_captions_are_whole_and_different():
    found = read_captions("digits", CLASS_NAMES)
    assert [len(own) for own in found] == [8] * 10
    assert len({text for own in found for text in own}) == 80
    for name, own in zip(CLASS_NAMES, found, strict=True):
        for words in (text.replace(",", " ").split() for text in own):
            assert {n for n in CLASS_NAMES if n in words} == {name}

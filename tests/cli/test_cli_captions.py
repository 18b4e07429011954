"""`rayclip captions`, in this process; what needs Ray is in e2e/test_captions.py."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

import tiny_generators
from calling import call
from data.test_data import write
from rayclip.data.captions import read_captions
from rayclip.data.prepare import Request, prepare
from rayclip.data.sources.folder import open_folder
from rayclip.store import Store

DESCRIPTIONS = {
    "Cat": ["a cat has fur", "a cat purrs", "cats climb", "a cat has fur"],
    "dog": ["a dog barks", "a dog has fur", ""],
    "cows": ["a cow moos", "a cow grazes"],
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory beside a folder of inputs."""
    inputs, work = tmp_path / "inputs", tmp_path / "work"
    inputs.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read once, at import
    (inputs / "d.json").write_text(json.dumps(DESCRIPTIONS))
    (inputs / "three.txt").write_text("cat\n\ndog\ncow\n")
    (inputs / "two.txt").write_text("cat\ndog\n")
    (inputs / "empty.txt").write_text("\n")
    write(inputs / "good.parquet", [0, 1] * 3)
    return inputs


FILTER = {"--classes": "{i}/two.txt", "--model": "digits", "--keep": "2", "--out": "out.parquet"}


def arguments(here, command, *positional, **changes):
    options = {"filter": FILTER, "check": {}, "show": {}, "generate": {"--out": "c.json"}}[command] | changes
    parts = [*positional, *(part for k, v in options.items() if v is not None for part in ((k, v) if v else (k,)))]
    return ["captions", command, *(part.format(i=here) for part in parts)]


@pytest.mark.parametrize("out", ["out.parquet", "out.csv"])
def test_filter_writes_a_table_that_show_prints(here, monkeypatch, capsys, out):
    code, printed, remarks = call(monkeypatch, capsys, *arguments(here, "filter", "{i}/d.json", **{"--out": out}))
    assert code == 0
    assert printed == f"captions: {out} (2 classes, 2 each)\n"
    assert "2 of 2 classes matched, with 2 to 3 captions each" in remarks
    assert "sentences dropped: 1 repeated, 1 empty" in remarks
    assert "descriptions that no class uses (1):\n  cows\n" in remarks
    assert [len(own) for own in read_captions(out, ["cat", "dog"])] == [2, 2]
    code, printed, _ = call(monkeypatch, capsys, "captions", "show", out)
    assert code == 0
    assert printed.startswith(f"from {here}/d.json, 2 per class, by digits\n0 cat\n") and "\n1 dog\n" in printed
    code, printed, _ = call(monkeypatch, capsys, "captions", "show", out, "--class", "DO")
    assert "0 cat" not in printed and "1 dog" in printed


def test_provenance_and_marks_are_in_the_file(here, monkeypatch, capsys):
    args = arguments(
        here, "filter", "{i}/d.json", **{"--classes": "{i}/three.txt", "--fill": "template", "--keep": "3"}
    )
    code, _, remarks = call(monkeypatch, capsys, *args)
    assert code == 0 and "2 classes filled up with templates" in remarks
    assert "classes without captions (1):\n  cow   (nearest: cows)\n" in remarks
    table = pq.read_table("out.parquet")
    made = json.loads(table.schema.metadata[b"rayclip_captions"])
    assert made["keep"] == 3 and made["model"] == "digits" and len(made["input_sha256"]) == 64
    assert len(made["model_fingerprint"]) == 16 and made["class_names"] == ["cat", "dog", "cow"]
    sources = [(row["class_name"], row["rank"], row["source"]) for row in table.to_pylist()]
    assert sources[3:] == [
        ("dog", 1, "description"),
        ("dog", 2, "description"),
        ("dog", 3, "template"),
        *(("cow", rank, "template") for rank in (1, 2, 3)),
    ]
    assert all(-1 <= row["score"] <= 1 for row in table.to_pylist())


def test_a_table_is_not_overwritten_unless_asked_for(here, monkeypatch, capsys):
    call(monkeypatch, capsys, *arguments(here, "filter", "{i}/d.json"))
    before = Path("out.parquet").read_bytes()
    code, _, err = call(monkeypatch, capsys, *arguments(here, "filter", "{i}/d.json", **{"--keep": "1"}))
    assert code == 2 and "--overwrite" in err and Path("out.parquet").read_bytes() == before
    code, _, _ = call(
        monkeypatch, capsys, *arguments(here, "filter", "{i}/d.json", **{"--keep": "1", "--overwrite": ""})
    )
    assert code == 0 and Path("out.parquet").read_bytes() != before


def test_check_reports_everything_and_writes_nothing(here, monkeypatch, capsys):
    code, printed, err = call(
        monkeypatch, capsys, *arguments(here, "check", "{i}/d.json", **{"--classes": "{i}/three.txt"})
    )
    assert code == 0 and err == ""
    assert printed.splitlines() == [
        "2 of 3 classes matched, with 2 to 3 captions each",
        "sentences dropped: 1 repeated, 1 empty",
        "classes without captions (1):",
        "  cow   (nearest: cows)",
        "descriptions that no class uses (1):",
        "  cows   (nearest: cow)",
    ]
    assert list(Path.cwd().iterdir()) == []


def test_raw_names_of_a_data_set_are_alternatives(here, monkeypatch, capsys, tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    for name in ("digit_0", "digit_1"):
        (root / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / "images" / name / "a.png")
    source = open_folder(None, root / "images")
    prepare(Request(name="own", class_names=("zero", "one"), splits=("test",)), source, Store(str(root)))
    (here / "raw.json").write_text(json.dumps({f"Digit {n}": ["one", "two"] for n in range(2)}))
    said = call(monkeypatch, capsys, *arguments(here, "check", "{i}/raw.json", **{"--data": str(root / "own")}))
    assert said[:2] == (0, "2 of 2 classes matched, with 2 captions each\n")


@pytest.mark.parametrize(
    ("command", "positional", "changes", "says"),
    [
        ("filter", ["{i}/d.json"], {"--keep": "3"}, "1 of 2 classes have fewer than 3 captions: 'dog' (2);"),
        ("filter", ["{i}/d.json"], {"--classes": "{i}/three.txt"}, "'cow' (0); add captions"),
        ("filter", ["{i}/d.json"], {"--keep": "99", "--fill": "template"}, "keep at most"),
        ("filter", ["{i}/d.json"], {"--keep": "0"}, "--keep"),
        ("filter", ["{i}/d.json"], {"--fill": "noise"}, "'noise' is not"),
        ("filter", ["{i}/d.json"], {"--model": "resnet"}, "unknown model"),
        ("filter", ["{i}/d.json"], {"--out": "out.txt"}, "written as .parquet or .csv"),
        ("filter", ["{i}/d.json"], {"--out": "no/out.csv"}, "there is no folder"),
        ("filter", ["{i}/none.json"], {}, "no such file"),
        ("filter", ["{i}/two.txt"], {}, "is no JSON"),
        ("filter", ["file:/etc/hosts"], {}, "neither a file nor an http(s) address"),
        ("filter", ["{i}/d.json"], {"--data": "digits"}, "either by --data NAME or by --classes FILE"),
        ("filter", ["{i}/d.json"], {"--classes": None}, "either by --data NAME or by --classes FILE"),
        ("check", ["{i}/d.json"], {"--classes": "{i}/none.txt"}, "cannot be read"),
        ("check", ["{i}/d.json"], {"--classes": "{i}/empty.txt"}, "names no class"),
        ("check", ["{i}/d.json"], {"--data": "cifar11"}, "no data set or file 'cifar11'"),
        ("show", ["none.csv"], {}, "no such file of captions"),
        ("generate", [], {"--generator": "/no/model", "--data": "digits"}, "there is no such folder"),
        ("generate", [], {"--generator": "{i}", "--data": "digits"}, "could not be loaded"),
        ("generate", [], {"--generator": "nobody/nothing", "--data": "digits"}, "could not be downloaded"),
        ("generate", [], {"--generator": "x", "--data": "digits", "--out": "c.txt"}, "are written as .json"),
        ("generate", [], {"--generator": "x", "--data": "digits", "--out": "{i}/d.json"}, "was not generated here"),
    ],
)
def test_bad_arguments_get_one_sentence_and_leave_nothing(
    here, monkeypatch, capsys, command, positional, changes, says
):
    code, out, err = call(monkeypatch, capsys, *arguments(here, command, *positional, **changes))
    assert code == 2 and says in err and out == ""
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert list(Path.cwd().iterdir()) == []


def test_generators_and_images_must_fit(here, monkeypatch, capsys):
    text = tiny_generators.text_model(here / "text")
    blip = tiny_generators.captioner(here / "blip")
    write(here / "bare.parquet", [0, 0, 2])
    (here / "q.txt").write_text("what is it?\n")
    for changes, says in [
        ({"--generator": text, "--data": "digits", "--images": "2"}, "takes text only"),
        ({"--generator": blip, "--data": "digits", "--images": "0"}, "captions images"),
        ({"--generator": blip, "--classes": "{i}/two.txt"}, "give --data"),
        ({"--generator": blip, "--data": "{i}/bare.parquet"}, "no training image of 'dog'"),
        ({"--generator": text, "--data": "digits", "--questions": "{i}/q.txt"}, "each with {}"),
    ]:
        code, out, err = call(monkeypatch, capsys, *arguments(here, "generate", **changes))
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1 and says in lines[0] and out == ""
        assert list(Path.cwd().iterdir()) == []


def test_the_bundled_captions_can_be_looked_at(monkeypatch, capsys):
    code, printed, _ = call(monkeypatch, capsys, "captions", "show", "digits", "--class", "seven")
    assert code == 0 and "a handwritten seven with a flat top" in printed and printed.count("\n") == 9


def test_help_names_the_commands(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "captions", "--help")
    assert code == 0 and all(name in out for name in ("filter", "check", "generate", "show"))

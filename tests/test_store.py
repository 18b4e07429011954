"""A store's names stay below its root, whoever wrote them; what it writes is there whole or as it was."""

import pickle
import subprocess
import sys

import pytest
from pyarrow import fs

from rayclip.store import Store
from rayclip.types import UserError

OUTSIDE = ["../secret", "a/../../secret", "/etc/passwd", "..", "a/..", "a\0b"]
USES = {
    "read": lambda store, name: store.read(name),
    "read_json": lambda store, name: store.read_json(name),
    "read_tables": lambda store, name: store.read_tables([name]),
    "write": lambda store, name: store.write(name, b"x"),
    "write_json": lambda store, name: store.write_json(name, {}),
    "delete_folder": lambda store, name: store.delete_folder(name),
    "delete": lambda store, name: store.delete(name),
    "size": lambda store, name: store.size(name),
    "open": lambda store, name: store.open(name),
    "chunks": lambda store, name: list(store.chunks(name)),
    "names": lambda store, name: store.names(name, ""),
    "path": lambda store, name: store.path(name),
    "child": lambda store, name: store.child(name),
}


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("use", USES)
def test_a_name_that_leads_out_of_the_root_is_refused(tmp_path, use, name):
    secret, root = tmp_path / "secret", tmp_path / "root"
    root.mkdir()
    secret.write_bytes(b"secret")
    for store in (Store(str(root)), Store(root.as_uri())):
        with pytest.raises(UserError):
            USES[use](store, name)
    assert secret.read_bytes() == b"secret" and {f.name for f in tmp_path.iterdir()} == {"root", "secret"}


def test_an_upload_stays_below_the_root(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x")
    with pytest.raises(UserError):
        Store(str(tmp_path / "root")).upload(file, "../elsewhere")
    assert file.is_file() and not (tmp_path / "elsewhere").exists()


def test_a_childs_name_is_no_part_of_an_address(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root").mkdir()
    root = Store((tmp_path / "root").as_uri())
    assert root.child("%2e%2e").read("secret") is None
    child = Store("s3://bucket/p?region=eu").child("x?endpoint_override=evil.example#")
    assert child.root == "s3://bucket/p/x%3Fendpoint_override%3Devil.example%23?region=eu"


def test_names_with_dots_and_folders_below_are_names(tmp_path):
    store = Store(str(tmp_path))
    for name in ("..a", "a..b/c...json", "a/b/c.d"):
        store.write(name, b"x")
        assert store.read(name) == b"x" and store.path(name) == tmp_path / name
    assert store.path("") == tmp_path and store.names("", "") == ["..a"]


def test_what_ray_writes_in_place_is_there_whole_or_as_it_was(tmp_path):
    system, base = pickle.loads(pickle.dumps(Store(str(tmp_path)).filesystem()))
    place = f"{base}/list.json"
    for content in (b"old", b"new"):
        with system.open_output_stream(place) as stream:
            stream.write(content)
        assert (tmp_path / "list.json").read_bytes() == content
    with pytest.raises(OSError, match="full"), system.open_output_stream(place) as stream:
        stream.write(b"half of")
        stream.flush()
        assert (tmp_path / "list.json").read_bytes() == b"new", "whoever is killed now has left the old one"
        raise OSError("the disk is full")
    assert (tmp_path / "list.json").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(b"a")
    system.create_dir(f"{base}/copy")
    fs.copy_files(str(tmp_path / "folder"), f"{base}/copy", destination_filesystem=system)
    assert (tmp_path / "copy" / "a").read_bytes() == b"a", "it is a local file system"


def test_what_a_killed_process_left_of_a_write_is_deleted_and_nothing_else(tmp_path):
    code = (
        "import os, sys; from rayclip.store import Store, _aside\nwith _aside(sys.argv[1]) as f: f.touch(); os._exit(9)"
    )
    for name in ("cells/a/1.parquet", "cells/b/1.parquet"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
    store = Store(str(tmp_path))
    store.write("cells/a/2.parquet", b"x")
    assert len(list(tmp_path.rglob("*.partial"))) == 2
    store.delete_unfinished("cells/a")
    store.delete_unfinished("cells/none")
    assert [f.parent.name for f in tmp_path.rglob("*.partial")] == ["b"] and store.read("cells/a/2.parquet") == b"x"

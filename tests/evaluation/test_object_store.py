"""Results on an object store: a real S3 protocol against a server on this machine."""

import pytest
from moto.server import ThreadedMotoServer

from rayclip.attacks import parse_attacks
from rayclip.data import open_data
from rayclip.evaluation import Evaluator, Protocol, Store, collect_rows, make_cells, missing_shards
from rayclip.models import load_model


@pytest.fixture
def bucket(monkeypatch, free_port):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port)
    server.start()
    yield f"s3://results/run?scheme=http&endpoint_override=127.0.0.1:{free_port}&allow_bucket_creation=true&region=us-east-1"
    server.stop()


def test_an_evaluation_resumes_on_s3(bucket, tmp_path):
    from pyarrow import fs

    system, path = fs.FileSystem.from_uri(bucket)
    system.create_dir(path)
    store, local = Store(bucket), Store(str(tmp_path))
    data = open_data("digits", "test")
    cells = make_cells(
        [("digits", load_model("digits").fingerprint())],
        [("digits", data)],
        parse_attacks("clean,bert", {"substitutes": "clip-table"}),
        Protocol(),
    )
    positions = {"digits": range(40)}
    for place in (store, local):
        for cell in cells:
            for shard in missing_shards(cell, range(20), place, 10):
                Evaluator(place).run(shard)
    rest = [s for cell in cells for s in missing_shards(cell, range(40), store, 7)]
    assert sum(len(s.positions) for s in rest) == 40, "what is there is not done again"
    for shard in rest:
        Evaluator(store).run(shard)
    for cell in cells:
        for shard in missing_shards(cell, range(40), local, 40):
            Evaluator(local).run(shard)
    there, here = (collect_rows(cells, positions, place) for place in (store, local))
    assert there == here and there[0].n == 40
    assert len(store.names("texts", ".json")) == 1

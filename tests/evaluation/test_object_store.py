"""Results on an object store: a real S3 protocol against a server on this machine."""

import numpy as np

from rayclip.attacks import parse_attacks
from rayclip.data import open_data
from rayclip.evaluation import Evaluator, Protocol, Store, collect_rows, make_cells, missing_shards
from rayclip.models import load_model


def test_an_evaluation_resumes_on_s3(s3, tmp_path):
    store, local = Store(s3), Store(str(tmp_path))
    data = open_data("digits", "test")
    cells = make_cells(
        [("digits", load_model("digits").fingerprint())],
        [("digits", data)],
        parse_attacks("clean,bert", {"substitutes": "clip-table"}),
        Protocol(),
    )
    positions = {"digits": np.arange(40)}
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

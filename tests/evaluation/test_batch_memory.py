"""The memory of an evaluation: batches count all images of a sample, and nothing is left behind by a shard."""

import gc
import itertools

import psutil
import pytest

from rayclip.attacks import parse_attacks
from rayclip.data import open_data
from rayclip.defenses import Aim, parse_defenses
from rayclip.evaluation import Evaluator, Protocol, Store, make_cells
from rayclip.evaluation.plan import Shard
from rayclip.models import Clip, load_model
from rayclip.models.scorers import parse_scorers

SHARDS = 500
EVERYTHING = {
    "attacks": "clean,pgd,apgd-ce,square,bert,sep",
    "defenses": "none,ttc:eps=32/255,step=8/255,tte",
    "aims": (Aim(), Aim(gradient="bpda", draws=2)),
}


def cells_of(attacks, defenses, aims=(Aim(),), steps=2):
    defaults = {"steps": steps, "iterations": 2, "queries": 4, "substitutes": "clip-table"}
    return make_cells(
        [("digits", load_model("digits").fingerprint())],
        [("digits", open_data("digits", "test"))],
        parse_attacks(attacks, defaults),
        Protocol(eps=32 / 255),
        defenses=parse_defenses(defenses),
        scorers=parse_scorers("template"),
        aims=aims,
    )


@pytest.mark.parametrize(
    ("defense", "aim", "each"),
    [("none", Aim(), 1), ("ttc", Aim(gradient="bpda", draws=4), 4), ("tte", Aim(), 10), ("tte+ttc", Aim(), 10)],
)
def test_no_forward_is_larger_than_the_batch(defense, aim, each, tmp_path, monkeypatch):
    """An attack's draws and a defence's views are images, too."""
    (cell,) = cells_of("pgd", defense, (aim,), steps=1)
    seen, encode = [], Clip.encode_image

    def spy(self, pixels, **more):
        seen.append(len(pixels))
        return encode(self, pixels, **more)

    monkeypatch.setattr(Clip, "encode_image", spy)
    Evaluator(Store(str(tmp_path)), batch_size=20).run(Shard(cell=cell, positions=tuple(range(30))))
    assert cell.images_at_once == each
    assert 10 < max(seen) <= 20


@pytest.mark.ci
def test_hundreds_of_shards_leave_nothing_in_memory(tmp_path):
    cells = cells_of(**EVERYTHING)
    assert len(cells) > 12
    evaluator, process, used = Evaluator(Store(str(tmp_path))), psutil.Process(), []
    for number, cell in zip(range(SHARDS), itertools.cycle(cells), strict=False):
        first = 2 * (number // len(cells))
        evaluator.run(Shard(cell=cell, positions=(first, first + 1)))
        if number % 50 == 49:
            gc.collect()
            used.append(process.memory_info().rss / 2**20)
    assert used[-1] - used[1] < 20, f"MiB after every 50 shards: {used}"

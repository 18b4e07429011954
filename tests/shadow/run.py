"""Run all attacks, methods, defences and the evaluator on the CPU and on the device that counts waits; print what
differed and who waited, as JSON. `python tests/shadow/run.py --table > tests/shadow/waits.json` writes the table that
the test compares with."""

import atexit
import contextlib
import json
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
warnings.simplefilter("ignore")

import torch  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

from attacks.test_gradient import universal  # noqa: E402
from rayclip.attacks import ATTACKS, Samples, make_attack, parse_attacks  # noqa: E402
from rayclip.attacks.bert import TextSettings  # noqa: E402
from rayclip.attacks.pairs import PairAttack, PairVictim  # noqa: E402
from rayclip.data import batch_pixels, open_data  # noqa: E402
from rayclip.defenses import parse_aims, parse_defenses  # noqa: E402
from rayclip.evaluation import Evaluator, Shard, Store  # noqa: E402
from rayclip.evaluation.cell import Protocol, make_cells  # noqa: E402
from rayclip.methods import METHODS  # noqa: E402
from rayclip.methods.base import Recipe  # noqa: E402
from rayclip.models import ZeroShot, load_model  # noqa: E402
from rayclip.models.scorers import parse_scorers  # noqa: E402
from rayclip.rng import sample_keys  # noqa: E402
from rayclip.training import TrainConfig, loop, train  # noqa: E402
from shadow.device import DEVICE, NAME  # noqa: E402

torch.set_num_threads(1)
EPS = 24 / 255
TEMPLATE = "a handwritten {}"
# Settings that make each attack short; two rows where the stop rule or the norm takes another way
SHORT: dict[str, list[dict[str, Any]]] = {
    "pgd": [{"steps": 20}, {"steps": 4, "stop": "final"}, {"steps": 1, "variant": "mi-di-si"}],
    **{name: [{"steps": 2}] for name in ("pgd-l2", "cw", "feature", "semantic")},
    **{name: [{"steps": 2, "substitutes": "clip-table"}] for name in ("co-attack", "sep")},
    "sga": [{"steps": 2, "substitutes": "clip-table"}],
    "bert": [{"substitutes": "clip-table"}],
    "charmer": [{"n": 2}],
    "transfer": [{"steps": 2, "source": "digits"}],
    "uap": [{"file": universal()}],
    "apgd-ce": [{"iterations": 5}],
    "apgd-dlr": [{"iterations": 2}],
    "apgd-t": [{"iterations": 2, "targets": 2}],
    "fab-t": [{"iterations": 3, "targets": 1}, {"iterations": 2, "targets": 1, "norm": "l2", "stop": "final"}],
    "square": [{"queries": 6}, {"queries": 6, "norm": "l2"}],
    "autoattack": [{"iterations": 1, "queries": 3}],
    "apgd-ce+apgd-t": [{"iterations": 1}],
    "autoattack-seeds": [{"iterations": 1}],
}
CELLS: dict[str, dict[str, str]] = {
    "pgd:steps=2": {"precision": "bf16"},
    "clean": {"defenses": "rn,tte,ttc:steps=1+anti-adversary:steps=1+hedge:steps=1", "aims": "ignore"},
    "fgsm": {
        "defenses": "nac:steps=1+doc:steps=1,csr:steps=1+et3:steps=1+clipure-cos:length=0.1,rtpt:count=4",
        "aims": "gate",
    },
    "pgd:steps=1": {"defenses": "ttc:steps=1", "aims": "straight"},
    "sga:steps=1": {},
}

# device -> (function to run on it, what to compare)
Case = Callable[[str], Callable[[], Any]]


class Host:
    """What `training.train` needs of its surroundings."""

    rank, world_size = 0, 1

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.losses: list[float] = []

    @contextlib.contextmanager
    def resume_from(self) -> Iterator[None]:
        yield None

    def report(self, progress: Any, save: Any) -> None:
        self.losses += [values["loss"] for _, values in progress.curve]


@lru_cache(maxsize=2)
def classifier(device: str) -> ZeroShot:
    return ZeroShot(load_model("digits").to(device), open_data("digits", "test").class_names)


def attack_case(name: str, settings: dict[str, Any], device: str) -> Callable[[], Any]:
    data, positions = open_data("digits", "test"), list(range(0, 60, 5))
    victim, attack = classifier(device), make_attack(name, **settings)
    images = (batch_pixels(data, positions, "native", 8).float() / 255).to(device)
    labels = torch.from_numpy(data.labels[positions]).to(device)
    keys, eps = sample_keys(range(len(positions)), 0, "x"), 1.0 if attack.ball == "l2" else EPS
    right = victim(images).argmax(1) == labels

    def run() -> Any:
        made = attack.run(victim, Samples(images, labels, keys, right), eps=eps, prompts=attack.prepare(victim))
        return [made.logits(victim, labels).argmax(1), made.steps_B, made.queries_B]

    if name in ("transfer", "uap"):
        run()  # loads the source or the file
    return run


def pairs_case(device: str) -> Callable[[], Any]:
    victim = PairVictim(classifier(device).clip, [["a two", "a handwritten two"], ["a small five"]])
    attack = make_attack("sga", steps=2, stop="final", substitutes="clip-table").within_on_pairs(EPS)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    bound = PairAttack(attack=attack, victim=victim, keys_I=sample_keys(range(2), 0, "x"), prompts=None, eps=EPS)
    return lambda: bound(images, 0).captions


def training_case(name: str, device: str) -> Callable[[], Any]:
    """The waits are those of the last step."""
    known = METHODS.find(name).settings()
    text = {"text": TextSettings(substitutes="clip-table")} if name == "mmcoa" else {}
    short = {"eps": 16 / 255, "steps": 2, "step": 8 / 255, "captions": "templates"}
    method = METHODS.find(name)(**{key: value for key, value in short.items() if key in known}, **text)
    recipe = Recipe(optimizer="adamw", lr=1e-3, batch_size=10, epochs=1)
    config = TrainConfig(
        model="digits", data="digits", method=method, recipe=recipe, shots=2, template=TEMPLATE, names="curated"
    )
    host, step = Host(device), loop._Run._train_step

    def counted(*args: Any) -> None:
        DEVICE.waits.clear()
        step(*args)
        nonlocal waits
        waits = DEVICE.waits.copy()

    waits = DEVICE.waits.copy()

    def run() -> list[float]:
        loop._Run._train_step = counted
        try:
            train(config, host)
        finally:
            loop._Run._train_step = step
            DEVICE.waits = waits
        return host.losses[0]  # rounding grows from step to step

    return run


def evaluation_case(attacks: str, chosen: dict[str, str], device: str) -> Callable[[], Any]:
    data = open_data("digits", "test")
    cells = make_cells(
        [("digits", load_model("digits").fingerprint())],
        [("digits", data)],
        parse_attacks(attacks, {}),
        Protocol(eps=EPS, precision=chosen.get("precision", "fp32"), template=TEMPLATE),
        parse_defenses(chosen.get("defenses", "none")),
        parse_aims(chosen.get("aims", "ignore"), 2),
        parse_scorers(chosen.get("scorers", "template")),
    )
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    evaluator = Evaluator(Store(folder), device)
    shards = [Shard(cell=cell, positions=tuple(range(12))) for cell in cells]
    for cell in cells:  # loads all
        evaluator.run(Shard(cell=cell, positions=(0,)), keep=False)
    return lambda: [evaluator.run(shard).right for shard in shards]


def cases() -> Iterator[tuple[str, Case]]:
    for name in ATTACKS:
        for settings in SHORT.get(name, [{}]):
            yield (
                f"attack {name} {json.dumps({k: v for k, v in settings.items() if k != 'file'})}",
                lambda device, name=name, settings=settings: attack_case(name, settings, device),
            )
    yield "attack on pairs: sga", pairs_case
    for name in METHODS:
        yield f"training {name}", lambda device, name=name: training_case(name, device)
    for attacks, chosen in CELLS.items():
        yield (
            f"evaluation {attacks} {json.dumps(chosen)}",
            lambda device, attacks=attacks, chosen=chosen: evaluation_case(attacks, chosen, device),
        )


def outcome(case: Case) -> dict[str, Any]:
    """Return whether both devices agree, who waited, and the error if one was raised."""
    try:
        expected = tree_map(to_list, case("cpu")())
        with DEVICE:
            run = case(NAME)
            DEVICE.waits.clear()
            found = run()
            waits = dict(sorted(DEVICE.waits.items()))
            found = tree_map(to_list, found)
    except Exception:
        return {"error": traceback.format_exc()}
    same = abs(expected - found) < 1e-4 if isinstance(found, float) else expected == found
    return {"waits": waits} if same else {"error": f"{expected} on the CPU, {found} on the device"}


def to_list(x: Any) -> Any:
    return x.tolist() if isinstance(x, torch.Tensor) else x


if __name__ == "__main__":
    outcomes = {name: outcome(case) for name, case in cases()}
    table = {name: found.get("waits", found) for name, found in outcomes.items()}
    print(json.dumps(table if "--table" in sys.argv else outcomes, indent=1))

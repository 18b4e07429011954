"""Workers that Ray's memory monitor ends, on a real Ray: work goes on with less, or says which node has too little."""

import os
import re
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
import pytest
import ray
import ray.cloudpickle
import torch

from rayclip.attacks.registry import parse_attacks
from rayclip.data import open_data
from rayclip.distributed.captioning import CaptionJob, generate_captions, open_parts
from rayclip.distributed.evaluating import calibrate, evaluate
from rayclip.distributed.resources import PoolSize
from rayclip.distributed.trials import Trial, Workers
from rayclip.distributed.tuning import run_trials
from rayclip.evaluation import Evaluator, Protocol, Store, chosen_positions, make_cells, outstanding
from rayclip.evaluation.costs import Costs
from rayclip.methods import make_method
from rayclip.methods.tecoa import TeCoA
from rayclip.models import load_model
from rayclip.progress import Display
from rayclip.training import TrainConfig
from rayclip.types import UserError

pytestmark = [pytest.mark.e2e, pytest.mark.alone, pytest.mark.timeout(600)]

ROOM_GIB, MOST_GIB = 4, 7  # that work may take beyond what the machine has in use, and that a hungry worker takes
POSITIONS = {"digits": chosen_positions(445, 96)}


def swallow(images: int) -> None:
    """In a Ray worker: take memory until Ray ends it, if the rule in the file wants it.

    The rule is the number of images that fit, or `beside`: more than one worker at a time is too many.
    """
    rule, file = read_rule(), Path(os.environ.get("HUNGRY_FILE", "-"))
    if rule.startswith(("backward", "tune")):
        return
    if rule == "beside":
        mine = file.with_name(f"{os.getpid()}.eats")
        mine.touch()
        ended = file.with_name("ended")  # there is one, and nobody to wait for
        end = time.monotonic() + (0 if ended.exists() else 5)  # two that start together may be seconds apart
        while len(pids := [int(other.stem) for other in file.parent.glob("*.eats")]) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(0.7)
        full = os.getpid() == max(pid for pid in pids if psutil.pid_exists(pid)) and len(pids) > 1
        full = full and any(psutil.pid_exists(pid) for pid in pids if pid != os.getpid())
        mine.unlink(missing_ok=not full)
        if full:
            ended.touch()
    else:
        full = bool(rule) and images > int(rule)
    if full:
        take_memory()


def take_memory() -> None:
    held = []
    while len(held) < MOST_GIB * 8:
        held.append(np.ones(1 << 24))  # 128 MiB
    time.sleep(5)


def read_rule() -> str:
    """The rule for a worker; empty in the driver, or without a hungry Ray."""
    file = Path(os.environ.get("HUNGRY_FILE", "-"))
    return file.read_text() if file.is_file() and os.getpid() != int(os.environ["HUNGRY_DRIVER"]) else ""


class FullInBackward(torch.autograd.Function):
    """The identity; in its backward CUDA's memory is full."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@dataclass(frozen=True, kw_only=True)
class Hungry(type(parse_attacks("pgd", {})[0])):
    def run(self, victim, samples, **more):
        swallow(len(samples.labels_B))
        return super().run(victim, samples, **more)


@dataclass(frozen=True, kw_only=True)
class HungryMethod(TeCoA):
    name: ClassVar[str] = "tecoa"

    def attack(self, clip, batch):
        swallow(len(batch.labels_B))
        return super().attack(clip, batch)

    def loss(self, clip, batch):
        loss, metrics = super().loss(clip, batch)
        what, _, room = read_rule().partition(" ")
        return FullInBackward.apply(loss) if what == "backward" and len(batch.labels_B) > int(room) else loss, metrics


class HungryQuestions(tuple):
    def __getitem__(self, number):
        swallow(1)
        return super().__getitem__(number)


@pytest.fixture(scope="module")
def hunger(tmp_path_factory):
    """A Ray with little memory to spare; tells its workers how much to take."""
    file = tmp_path_factory.mktemp("hunger") / "mib"
    before = dict(os.environ)
    memory = psutil.virtual_memory()
    threshold = 1 - memory.available / memory.total + ROOM_GIB * 2**30 / memory.total
    if threshold > 0.8:
        pytest.skip("too little memory to spare for a trial of what happens without")
    os.environ |= {
        "RAY_memory_usage_threshold": f"{threshold:.4f}",
        "RAY_memory_monitor_refresh_ms": "100",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "HUNGRY_FILE": str(file),
        "HUNGRY_DRIVER": str(os.getpid()),
    }
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        logging_level="ERROR",
    )

    def set_hunger(rule=""):
        file.with_name("ended").unlink(missing_ok=True)
        file.write_text(str(rule))

    yield set_hunger
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def cells():
    attack = Hungry(steps=3, step=8 / 255)
    data = open_data("digits", "test")
    return make_cells([("digits", load_model("digits").fingerprint())], [("digits", data)], [attack], Protocol(eps=0.1))


def one_sentence(said):
    assert "\n" not in said and said.count(". ") == 0 and len(said) < 330, said
    assert f"node {ray.util.get_node_ip_address()} has too little memory" in said, "it is said which"
    assert said.endswith("run again to go on from here.")
    return said


def columns(cell, store):
    table = store.read_tables(store.names(f"cells/{cell.id}", ".parquet")).sort_by("position")
    return {
        name: table[name].to_pylist() for name in ("position", "sample_id", "label", "clean_pred", "adv_pred", "steps")
    }


@pytest.mark.parametrize(("workers", "rule"), [pytest.param(1, 24, marks=pytest.mark.slow), (2, "beside")])
def test_an_evaluation_goes_on_with_smaller_batches_and_fewer_actors(hunger, cells, tmp_path, workers, rule):
    expected, store = Store(str(tmp_path / "expected")), Store(str(tmp_path / "store"))
    for shards in outstanding(cells, POSITIONS, expected, 96):
        for shard in shards:
            Evaluator(expected).run(shard)
    hunger(rule)
    work, size = outstanding(cells, POSITIONS, store, 48), PoolSize(batch_size=48, workers=workers)
    ran = evaluate(work, store, size=size, display=Display(quiet=True), total=96)
    assert ran.lost >= 1, "Ray has ended a worker"
    assert columns(cells[0], store) == columns(cells[0], expected), "each sample once, as without pressure"


@pytest.mark.slow  # as of captions below
def test_an_evaluation_that_cannot_go_on_says_which_node_had_too_little(hunger, cells, tmp_path):
    store = Store(str(tmp_path))
    hunger(0)
    size = PoolSize(batch_size=1, workers=1)
    with pytest.raises(UserError) as error:
        evaluate(outstanding(cells, POSITIONS, store, 48), store, size=size, display=Display(quiet=True), total=96)
    assert "Ray has ended its workers there to keep it alive 5 times" in one_sentence(str(error.value))
    with pytest.raises(UserError) as error:
        calibrate(
            outstanding(cells, POSITIONS, store, 48),
            cells,
            Costs(),
            store,
            size,
            seconds=60,
            display=Display(quiet=True),
        )
    one_sentence(str(error.value))
    hunger()
    evaluate(outstanding(cells, POSITIONS, store, 48), store, size=size, display=Display(quiet=True), total=96)
    assert len(columns(cells[0], store)["position"]) == 96, "the same again goes on"


def trial(out, **more):
    method = make_method("tecoa", eps=8 / 255, steps=1)
    method = HungryMethod(**{field.name: getattr(method, field.name) for field in fields(HungryMethod)})
    recipe = replace(method.small, epochs=2, batch_size=50)
    config = TrainConfig(
        model="digits",
        data="digits",
        method=method,
        shots=5,
        recipe=recipe,
        precision="fp32",  # as a run is planned
        model_fingerprint=load_model("digits").fingerprint(),
        data_fingerprint=open_data("digits", "train").fingerprint,
        **more,
    )
    return Trial(name="t", config=config, out=str(out))


def trained(config_of_trial, folder):
    from safetensors.torch import load_file

    errors = run_trials(
        [config_of_trial], workers=Workers(), storage=Store(str(folder)), log=None, display=Display(quiet=True)
    )
    assert errors == {}
    return load_file(Path(config_of_trial.out) / "open_clip_model.safetensors")


@pytest.mark.parametrize("rule", ["25", "backward 25"])
def test_training_goes_on_with_batches_in_more_parts(hunger, tmp_path, rule):
    """As a run that takes its batches in so many parts from the start. Not as one that takes them whole: sums in other
    parts are rounded otherwise, which flips signs in PGD and moves weights by up to 4e-4."""
    from torch.testing import assert_close

    hunger(rule)  # of 50
    found = trained(trial(tmp_path / "out"), tmp_path / "unfinished")
    hunger()
    for parts in (2, 4):  # Ray may end a worker twice for one cause
        expected = trained(trial(tmp_path / f"out{parts}", accumulate=parts), tmp_path / f"unfinished{parts}")
        if all(torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-6) for name, tensor in expected.items()):
            return
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


class HungryStore(Store):
    """Storage at which a trial's Tune process takes memory, as often as the file of the rule has letters."""

    def filesystem(self):
        what, _, file = read_rule().partition(" ")
        if what == "tune" and "ImplicitFunc" in " ".join(psutil.Process().cmdline()):
            left = Path(file).read_text()
            Path(file).write_text(left[1:])
            if left:
                take_memory()
        return super().filesystem()


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 99])
def test_a_training_whose_tune_process_is_ended_goes_on_or_says_which_node_had_too_little(hunger, tmp_path, times):
    left = tmp_path / "left"
    left.write_text("x" * times)
    hunger(f"tune {left}")
    storage, workers = HungryStore(str(tmp_path / "unfinished")), Workers(count=2, cpus=0.9)
    try:
        errors = run_trials(
            [trial(tmp_path / "out")], workers=workers, storage=storage, log=None, display=Display(quiet=True)
        )
    except UserError as error:
        errors = {"t": str(error)}
    assert len(left.read_text()) < times, "it was ended"
    assert (tmp_path / "out" / "open_clip_model.safetensors").exists() == (not errors) == (times == 1), errors
    if errors:
        one_sentence(errors["t"])


@pytest.mark.slow
def test_training_that_cannot_go_on_says_which_node_had_too_little(hunger, tmp_path):
    hunger(0)
    storage = Store(str(tmp_path / "unfinished"))
    errors = run_trials(
        [trial(tmp_path / "out")], workers=Workers(), storage=storage, log=None, display=Display(quiet=True)
    )
    assert errors["t"].startswith(
        f"node {ray.util.get_node_ip_address()} has too little memory: Ray has ended its workers"
    )
    times, parts = map(int, re.search(r"(\d+) times, at last with a batch in (\d+) parts;", errors["t"]).groups())
    assert times >= 4 and parts == min(2 ** (times - 1), 50), "each attempt with batches in twice as many parts"
    assert "\n" not in errors["t"] and len(errors["t"]) < 330


@pytest.fixture
def captions(tmp_path):
    """Writes captions of three classes on so many actors."""
    import tiny_generators
    from rayclip.models.generators import GeneratorSettings, generator_kind

    generator = tiny_generators.text_model(tmp_path / "text")
    job = CaptionJob(
        generator=generator,
        generator_fingerprint=generator_kind(generator).fingerprint,
        class_names=("one", "two", "three"),
        per_class=2,
        questions=HungryQuestions(("what is {}?",)),
        settings=GeneratorSettings(batch_size=2, max_new_tokens=40),
    )
    open_parts(job, tmp_path / "parts")

    def generate(workers):
        return generate_captions(job, tmp_path / "parts", None, display=Display(quiet=True), workers=workers)

    return generate


def complete(found):
    return list(found) == ["one", "two", "three"] and all(found.values())


def test_captions_say_which_node_had_too_little_and_go_on(hunger, captions):
    hunger(0)
    with pytest.raises(UserError) as error:
        captions(workers=1)
    one_sentence(str(error.value))
    hunger()
    assert complete(captions(workers=2)), "the same again goes on"


@pytest.mark.slow  # as of an evaluation above
def test_captions_go_on_with_fewer_actors(hunger, captions):
    hunger("beside")
    assert complete(captions(workers=2))

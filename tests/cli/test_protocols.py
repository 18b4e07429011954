"""`--protocol`: the field's protocols as defaults of the options."""

import pytest

from calling import call
from rayclip import api
from rayclip.api.checks import Opened, plan_all
from rayclip.attacks import parse_attacks
from rayclip.cli.request import Request
from rayclip.data import open_data
from rayclip.data.registry import DATASETS
from rayclip.data.sampling import webdataset_draw
from rayclip.data.spec import parse_spec
from rayclip.evaluation import Evaluator, Protocol, Store, collect_rows, outstanding
from rayclip.evaluation.cell import at_budgets, positions_of
from rayclip.evaluation.plan import chosen_positions
from rayclip.names import find_protocol, protocols
from rayclip.types import UserError


class Asked(BaseException):
    """What `rayclip eval` would have done."""


@pytest.fixture
def evaluation(monkeypatch, capsys, tmp_path):
    """The evaluation that a command line asks for, whatever is prepared on this machine."""

    def stop(models, evaluation, where):
        raise Asked(evaluation)

    monkeypatch.setattr(api, "evaluate_models", stop)
    monkeypatch.setattr("rayclip.cli.request.check_data", lambda specs: None)

    def ask(*words):
        with pytest.raises(Asked) as found:
            call(monkeypatch, capsys, "eval", "--model", "digits", "--out", tmp_path / "r", "--no-tracking", *words)
        return found.value.args[0]

    return ask


@pytest.mark.parametrize("name", protocols())
def test_a_protocol_sets_what_it_names_and_every_data_set_is_known(evaluation, name):
    found, settings = evaluation("--protocol", name), find_protocol(name)
    places = [parse_spec(spec).place.rpartition("/")[2] for spec in found.data]
    assert places and set(places) <= set(DATASETS) and len(set(places)) == len(places)
    assert found.subset == settings.get("subset", "even")
    budgets = {a.eps for a in at_budgets(found.attacks, found.protocol.budgets) if a.needs_eps}
    assert len(budgets) == len(settings["eps"][0].split(",")) and max(budgets) <= 4 / 255
    assert found.limit == settings.get("limit")
    assert not Request(model=["digits"], out="r", protocol=name, **settings).differences


def test_robustvlm_attacks_small_images_at_their_own_size(evaluation):
    found = evaluation("--protocol", "robustvlm")
    (attack,) = [a for a in found.attacks if a.needs_eps]
    assert [part.name for part in attack.parts()] == ["apgd-ce", "apgd-t"] and attack.iterations == 100
    native, others = found.by_resolution()
    assert {parse_spec(spec).place.rpartition("/")[2] for spec in native.data} == {"cifar10", "cifar100", "stl10"}
    assert (native.protocol.resolution, native.protocol.resize) == ("native", "plain")
    assert (others.protocol.resolution, len(others.data)) == ("clip", 11)


def test_what_is_given_counts_and_is_said(evaluation, monkeypatch, tmp_path):
    found = evaluation("--protocol", "coop", "--data", "digits", "--steps", "3")
    assert list(found.data) == ["digits"] and found.attacks[1].steps == 3
    assert found.protocol.template == "a photo of a {}." and found.protocol.eps == (4 / 255,)
    settings = find_protocol("coop") | {"data": ["digits"], "steps": 3}
    asked = Request(model=["digits"], out=str(tmp_path), protocol="coop", **settings)
    assert [line.partition(" ")[0] for line in asked.differences] == ["data", "steps"]
    assert asked.differences[1] == "steps 3 (100)"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("protocol", "cop"),
        ("resolution", "native:"),
        ("resolution", "model:x"),
        ("resolution", "native:a,b"),
        ("template", "a photo"),
    ],
)
def test_nonsense_is_one_sentence(monkeypatch, capsys, tmp_path, option, value):
    words = ["eval", "--model", "digits", "--data", "digits", "--out", tmp_path / "r", "--eps", "1/255"]
    code, _, said = call(monkeypatch, capsys, *words, f"--{option}", value)
    assert code == 2 and said.count("\n") == 1 and option in said and not (tmp_path / "r").exists()


def test_a_name_that_is_no_data_set_of_the_evaluation_cannot_stay_native(tmp_path):
    asked = Request(model=["digits"], data=["digits"], out=str(tmp_path), eps=["1/255"], resolution="native:cifar10")
    with pytest.raises(UserError, match="cifar10"):
        _ = asked.evaluation


def test_protocols_that_use_different_images_of_the_same_data_are_one_plan(tmp_path):
    """Each cell has its evaluation's images, and what two evaluations ask for has those of both."""
    asked = [
        ("even", 6, "clean,fgsm", "a {}"),
        ("robustvlm", 6, "clean,pgd:steps=1", "a {}"),
        ("even", 4, "clean", "the {}"),
    ]
    evaluations = [
        api.Evaluation(
            data=["digits"],
            attacks=parse_attacks(attacks, {}),
            protocol=Protocol(eps=32 / 255, template=template),
            limit=limit,
            subset=subset,
        )
        for subset, limit, attacks, template in asked
    ]
    cells, positions = plan_all(["digits"], evaluations, Opened(quiet=True))
    found = {(c.attack.name, c.protocol.template): positions_of(c, positions).tolist() for c in cells}
    size = len(open_data("digits", "test"))
    even, drawn = chosen_positions(size, 6).tolist(), webdataset_draw((size,), 6).tolist()
    assert found == {
        ("clean", "a {}"): sorted({*even, *drawn}),
        ("fgsm", "a {}"): even,
        ("pgd", "a {}"): drawn,
        ("clean", "the {}"): chosen_positions(size, 4).tolist(),
    }
    store = Store(str(tmp_path))
    for shards in outstanding(cells, positions, store, 50):
        for shard in shards:
            Evaluator(store).run(shard)
    rows = collect_rows(cells, positions, store)
    assert {(r.protocol["attack"], r.protocol["template"]): r.n for r in rows} == {k: len(v) for k, v in found.items()}

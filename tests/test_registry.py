"""How names find what they stand for, in the package and in packages of other people."""

import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest

from rayclip.attacks import ATTACKS, make_attack, parse_attacks
from rayclip.attacks.pgd import PGD
from rayclip.defenses import DEFENSES, parse_defenses
from rayclip.methods import METHODS
from rayclip.models.scorers import SCORERS, parse_scorers
from rayclip.names import Configurables, check_attacks
from rayclip.settings import Configurable
from rayclip.types import UserError

MODULE = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar, Literal
from rayclip.attacks.pgd import PGD

@dataclass(frozen=True, kw_only=True)
class Mine(PGD):
    "PGD with settings of every type. More."
    name: ClassVar[str] = "mine"
    often: int = 2
    share: float | None = None
    loud: bool = False
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = (1, 2)

class Named(PGD):
    name: ClassVar[str] = "another"
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install packages with one module and entry points each, as pip leaves them."""
    places = []

    def one(package: str, entry_points: str, module: str = MODULE) -> None:
        place = tmp_path / package
        about = place / f"{package}-1.0.dist-info"
        about.mkdir(parents=True)
        (place / f"{package}.py").write_text(module)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(entry_points)
        monkeypatch.syspath_prepend(str(place))
        places.append(package)

    yield one
    for package in places:
        sys.modules.pop(package, None)


def test_a_class_of_another_package_has_all_that_ours_have(install):
    install("theirs", "[rayclip.attacks]\nmine = theirs:Mine\n")
    assert list(ATTACKS)[-1] == "mine" and list(ATTACKS)[:2] == ["clean", "fgsm"] and "mine" in ATTACKS
    assert ATTACKS.about("mine") == "PGD with settings of every type. More."
    attack = make_attack("mine:often=3,share=0.5,loud=true,kind=b,sizes=3+4,eps=1/255")
    assert (attack.often, attack.share, attack.loud, attack.kind, attack.sizes) == (3, 0.5, True, "b", (3, 4))
    (attack,) = parse_attacks("mine:norm=l2,eps=2", {"steps": 7, "substitutes": "clip-table"})
    assert (attack.steps, attack.eps) == (7, 2.0)
    for text, says in {
        "mine:loud=maybe": "true, false",
        "mine:sizes=3+x": "whole number",
        "mine:oftn=3": "did you mean often",
        "mine:eps=2": "255",
        "myne": "did you mean mine",
    }.items():
        with pytest.raises(UserError, match=says):
            make_attack(text)
    check_attacks("mine:oftn=3", has_budget=True)  # settings of others are checked when they are loaded
    with pytest.raises(UserError, match="did you mean mine"):
        check_attacks("myne", has_budget=True)


@pytest.mark.parametrize(
    ("points", "name", "says"),
    [
        ("[rayclip.attacks]\npgd = theirs:Mine", "pgd", "two packages offer an attack named 'pgd', rayclip and theirs"),
        ("[rayclip.attacks]\nmine = theirs:Named", "mine", "named 'another' itself"),
        ("[rayclip.attacks]\nmine = theirs:Nothing", "mine", "cannot be loaded .*Nothing"),
        ("[rayclip.attacks]\nmine = nowhere:Mine", "mine", "cannot be loaded .*nowhere"),
        ("[rayclip.attacks]\nmine = theirs:Literal", "mine", "is no attack"),
        ("[rayclip.attacks]\nmine = dataclasses:Field", "mine", "has to be an Attack"),
    ],
)
def test_what_another_package_offers_wrongly_is_explained(install, points, name, says):
    install("theirs", points + "\n")
    with pytest.raises(UserError, match=says):
        make_attack(name)
    assert make_attack("clean").name == "clean"


def test_two_packages_cannot_offer_one_name(install):
    install("theirs", "[rayclip.attacks]\nmine = theirs:Mine\n")
    install("others", "[rayclip.attacks]\nmine = others:Mine\n")
    for ask in (make_attack, lambda name: check_attacks(name, has_budget=True), lambda _: list(ATTACKS)):
        with pytest.raises(UserError, match="two packages offer an attack named"):
            ask("mine")


def test_a_package_that_is_found_twice_on_the_path_is_one(install, monkeypatch):
    install("theirs", "[rayclip.attacks]\nmine = theirs:Mine\n")
    monkeypatch.setattr(sys, "path", [sys.path[0], *sys.path])
    assert make_attack("mine").name == "mine"


def test_a_class_can_be_registered_where_it_is_defined():
    @dataclass(frozen=True, kw_only=True)
    class Thing(Configurable):
        noun: ClassVar[str] = "thing"
        name: ClassVar[str] = "one"

        size: int = 1

    things: Configurables[Thing] = Configurables("thing", "things", Thing, option="--thing", example="one:size=2")
    assert things.register(Thing) is Thing and things.make("one:size=2") == Thing(size=2)
    with pytest.raises(UserError, match="there is a thing named 'one'"):
        things.register(Thing)
    with pytest.raises(UserError, match="there is an attack named 'pgd'"):
        ATTACKS.register(PGD)


@pytest.mark.parametrize(
    ("parse", "text", "says"),
    [
        (parse_scorers, "wca:crop=3,crops=4", "scorer 'wca' has no setting 'crop': did you mean crops"),
        (parse_scorers, "templat", "did you mean template"),
        (parse_scorers, "cupl,cupl", "names a scorer twice"),
        (parse_defenses, "ttc:epsilon=1/255", "defence 'ttc' has no setting 'epsilon'"),
        (parse_defenses, "tcc", "did you mean ttc"),
        (parse_defenses, "ttc:steps=1,steps=2", "sets steps twice"),
    ],
)
def test_the_same_errors_whatever_the_kind(parse, text, says):
    with pytest.raises(UserError, match=says):
        parse(text)


def test_the_kinds_have_their_nouns():
    for registry in (ATTACKS, DEFENSES, METHODS, SCORERS):
        assert {kind.noun for kind in registry.values()} == {registry.kind}
        assert all(registry.about(name) for name in registry)

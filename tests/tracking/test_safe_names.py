"""Names as other programs take them: two never become one."""

import itertools
import re

import pytest

from rayclip.tracking import names

NAMES = [
    "digits",
    "my-set_2.v1",
    "té st",
    "tè st",
    "te_st",
    "te st",
    "te/st",
    "te:st",
    "te[st]",
    "te{st}",
    "te st ",
    "模型",
    "数据",
    "",
    ".",
    "..",
    "a" * 300,
    "a" * 301,
    "x\udce9",
    "x\n",
    "'",
    '"',
]


@pytest.mark.parametrize("spell", [names.key_part, names.key, names.file_part, names.model_name])
def test_two_names_stay_two_and_are_the_same_in_every_run(spell):
    found = [spell(name) for name in NAMES]
    assert len(set(found)) == len(NAMES)
    assert found == [spell(name) for name in NAMES] and all(len(each) <= 250 for each in found)


def test_names_that_may_stand_stay_as_they_are():
    for name in ("clean/digits", "robust/pgd-10_eps0.5_bpda/my set", "train/loss", "method.attack.eps", "a/té"):
        assert names.key(name) == name
    assert names.file_part("digits-pgd-10_eps1.png") == "digits-pgd-10_eps1.png"
    assert names.model_name("a study of [brackets]") == "a study of [brackets]"


def test_every_name_is_taken():
    for name in NAMES:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+", names.file_part(name))
        assert re.fullmatch(r"[/\w.\- ]+", names.key(f"clean/{name}"))
        assert not set("/:'\"") & set(names.model_name(name))
    for one, two in itertools.combinations(NAMES, 2):
        assert names.key(f"clean/{one}") != names.key(f"clean/{two}")

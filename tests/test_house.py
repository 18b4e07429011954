"""The house as it was laid out: no import circle, few modules at the top, no long file, a README in every room."""

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "rayclip"
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def test_no_module_imports_itself_by_way_of_others():
    graph = grimp.build_graph("rayclip", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    del imports["rayclip"]  # offers names of api/, imported when they are asked for
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_few_modules_stand_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def test_no_file_is_longer_than_400_lines():
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > 400} == {}


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_every_room_says_what_lives_there(room):
    assert (room / "README.md").read_text().startswith("# ")

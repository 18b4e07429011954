"""Only public names of Ray, MLflow, torch, open_clip and transformers are used, but for one file with substitutes.

`e2e/test_tokens.py` tries these substitutes.
"""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import rayclip

PACKAGE = Path(rayclip.__file__).parent
FILES = sorted([*PACKAGE.rglob("*.py"), *PACKAGE.parent.glob("sweeps/**/*.py")])
LIBRARIES = ("ray", "mlflow", "torch", "open_clip", "transformers")
COMPAT = {"ray._raylet", "Config", "AuthenticationTokenLoader", "GcsClient"}  # of distributed/compat.py
OF_NAMED_TUPLES = {"_replace", "_asdict", "_fields", "_make"}


def private(name):
    parts = name.split(".")
    return any((p.startswith("_") and not p.startswith("__")) or p in ("generated", "internal") for p in parts)


def of_library(name):
    return name.split(".")[0] in LIBRARIES


def names_defined(tree):
    """Underscore names that a file gives to its own functions, classes, attributes and fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def private_names(tree, own):
    """Private names that a file uses and that are none of its own room's."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (n.name for n in names if of_library(n.name) and private(n.name))
            case ast.ImportFrom(module=str(module), names=names, level=0) if of_library(module):
                yield from (f"{module}.{n.name}" for n in names if private(f"{module}.{n.name}"))
            case ast.Attribute(value=value, attr=attr) if private(attr):
                mine = isinstance(value, ast.Name) and value.id in ("self", "cls")
                if not mine and attr not in own | OF_NAMED_TUPLES:
                    yield ast.unparse(node)
            case ast.Call(func=ast.Name(id="import_module"), args=[ast.Constant(value=str(text)), *_]):
                yield from [text] * (of_library(text) and private(text))
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=str(text)), *_]
            ):
                if private(text) and text not in own:
                    yield text


def found():
    """The private names used, by file."""
    trees = {file: ast.parse(file.read_text()) for file in FILES}
    own = defaultdict(set)
    for file, tree in trees.items():
        own[file.parent].update(names_defined(tree))
    names = {file: sorted(set(private_names(tree, own[file.parent]))) for file, tree in trees.items()}
    return {str(f.relative_to(PACKAGE)) if f.is_relative_to(PACKAGE) else f.name: n for f, n in names.items() if n}


# torchvision's data sets name their files in no other way
ELSEWHERE = {
    "data/sources/torchvision_sets.py": {
        "dataset._images",
        "dataset._labels",
        "dataset._samples",
        "dataset._image_files",
    }
}


def test_none_but_in_the_file_with_substitutes():
    used = {file: set(names) - ELSEWHERE.get(file, set()) for file, names in found().items()}
    assert {file: names for file, names in used.items() if names} == {
        "distributed/compat.py": {"ray._raylet"},
    }


def test_that_file_looks_up_no_others():
    """By text, so that each may be gone."""
    tree = ast.parse((PACKAGE / "distributed" / "compat.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    looked_up = {call.args[0].value for call in calls if call.func.id in ("_find", "import_module")}
    assert looked_up == COMPAT


@pytest.mark.parametrize(
    "code",
    [
        "from ray._private.state import state",
        "import ray._raylet",
        "from ray.core.generated import gcs_pb2",
        "from ray.train.v2._internal.execution.context import get_train_context",
        "import torch\ntorch._foreach_lerp_([], [], 0.5)",
        "from torch.nn.modules.module import _addindent",
        "import ray\nray.nodes().state._connect()",
        "getattr(config, '_commit_hash', None)",
        "import_module('mlflow.utils._spark')",
    ],
)
def test_the_search_finds(code):
    assert list(private_names(ast.parse(code), set()))

"""No file that rayclip reads may run code: loaders that could are not in the package, or are told not to."""

import ast
from pathlib import Path

import pytest

import rayclip

PACKAGE = Path(rayclip.__file__).parent
FILES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "sweeps").glob("*.py")])

MODULES = {"dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "yaml"}
CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.hub.load", "torch.jit.load", "torch.package"),
    *("pandas.read_pickle", "pd.read_pickle", "os.system", "os.popen", "shutil.unpack_archive"),
}
METHODS = {"extract", "extractall", "read_pickle", "unsafe_load"}
ONLY_WITH = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
NEVER_WITH = {"trust_remote_code": True, "allow_pickle": True, "weights_only": False, "shell": True}


def problems(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found += [f"import {n}" for n in names if n.split(".")[0] in MODULES]
            if isinstance(node, ast.ImportFrom) and names[0].split(".")[0] != "rayclip":
                # `from torch import load` would hide what is called
                found += [f"from {node.module} import {a.name}" for a in node.names if a.name in ("load", "loads")]
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        last = name.rpartition(".")[2]
        if name in CALLS or (last in METHODS and "." in name):
            found.append(name)
        if name in ONLY_WITH and given.get(ONLY_WITH[name][0]) != str(ONLY_WITH[name][1]):
            found.append(f"{name} without {ONLY_WITH[name][0]}={ONLY_WITH[name][1]}")
        found += [
            f"{name}({key}={value})"
            for key, value in given.items()
            if key in NEVER_WITH and value == str(NEVER_WITH[key])
        ]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE.parent)))
def test_no_loader_that_runs_code(path):
    assert problems(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle; pickle.loads(b'')",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "np.load(file)",
        "from torch import load",
        "import joblib",
        "eval(text)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "tarfile.open(x).extractall()",
        "subprocess.run(x, shell=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert problems(source)

"""rayclip: adversarial fine-tuning, attack and evaluation of CLIP, distributed over a cluster by Ray.

The names in `__all__` are the library, and stay; they are imported when they are asked for.
"""

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayclip.api.attacking import AttackResult, Classifier, Model, attack
    from rayclip.api.library import Rows, evaluate, load, train, wrap
    from rayclip.types import UserError

__version__ = "0.1.0"

# Part of every evaluation cell's id. Raise it with any change that can alter a verdict, so that results from before and
# after the change are never mixed.
PROTOCOL = 3

__all__ = ["AttackResult", "Classifier", "Model", "Rows", "UserError", "attack", "evaluate", "load", "train", "wrap"]

_PLACES = {
    "api.attacking": ("AttackResult", "Classifier", "Model", "attack"),
    "api.library": ("Rows", "evaluate", "load", "train", "wrap"),
    "types": ("UserError",),
}
_PLACE = {name: module for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PLACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rayclip.{_PLACE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACE})


@cache
def code_version() -> dict[str, str]:
    """Return the package's `version`, and the `commit` of the checkout if it runs from one."""
    import subprocess  # only where it is needed: every command imports this module

    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return {"version": __version__}
    commit = result.stdout.strip()
    return {"version": __version__} | ({"commit": commit} if result.returncode == 0 and commit else {})

"""rayclip: adversarial fine-tuning, attack and evaluation of CLIP, distributed over a cluster by Ray."""

from functools import cache
from pathlib import Path

__version__ = "0.1.0"

# Part of every evaluation cell's id. Raise it with any change that can alter a verdict, so that results from before and
# after the change are never mixed.
PROTOCOL = 3


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

"""Version of the code that produced a result."""

import subprocess
from functools import cache
from pathlib import Path

from rayclip import __version__


@cache
def code_version() -> dict[str, str]:
    """Return the package's `version`, and the `commit` of the checkout if it runs from one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return {"version": __version__}
    commit = result.stdout.strip()
    return {"version": __version__} | ({"commit": commit} if result.returncode == 0 and commit else {})

"""Turn names of users' files and models into names with restricted characters.

A valid name is kept as it is. A changed name gets a digest of the whole original name at its end, so that two names
never collide, and the same name is the same in every run.
"""

import hashlib
import re

_LONGEST = 120  # characters; MLflow allows keys of 250 characters, file systems names of 255 bytes
_DIGEST = 8  # hexadecimal digits


def key_part(name: str) -> str:
    """Return a name that is valid between the slashes of a metric, parameter or tag key: letters of any alphabet,
    digits, `_`, `-`, `.` and spaces."""
    return _safe(name, r"[^\w. -]")


def key(name: str, longest: int = 250) -> str:
    """Return a valid key, slashes allowed, of at most `longest` characters."""
    found = "/".join(key_part(part) for part in name.split("/"))
    return found if len(found) <= longest else _ended(found[: longest - _DIGEST - 1], name)


def file_part(name: str) -> str:
    """Return a name that is valid in file names everywhere and in web addresses: ASCII letters and digits, `_`, `-`,
    `.`."""
    return _safe(name, r"[^A-Za-z0-9_.-]")


def model_name(name: str) -> str:
    """Return a valid name for a registered model: no `/`, `:`, backslash or quotation marks."""
    return _safe(name, r"[/:'\"`\\]", "-")


def _safe(name: str, forbidden: str, instead: str = "_") -> str:
    found = re.sub(forbidden, instead, name)
    if found == name and len(name) <= _LONGEST and name.strip(" .") != "" and name == name.strip():
        return name
    return _ended(found.strip(" .")[:_LONGEST], name)


def _ended(text: str, name: str) -> str:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:_DIGEST]
    return f"{text}-{digest}".lstrip("-")

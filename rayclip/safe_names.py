"""Names of people's files and models, where only some characters may stand.

A name that may stand as it is stays as it is. What has to change gets a digest of the whole name at its end, so that
two names never become one, and the same name is the same in every run.
"""

import hashlib
import re

_LONGEST = 120  # characters; MLflow takes 250 of a key, file systems 255 bytes
_DIGEST = 8  # hexadecimal digits


def key_part(name: str) -> str:
    """What may stand between the slashes of a metric, a parameter or a tag: letters of any alphabet, digits, `_`, `-`,
    `.` and blanks."""
    return _safe(name, r"[^\w. -]")


def key(name: str, longest: int = 250) -> str:
    """A whole key that may have slashes in it, of at most `longest` characters."""
    found = "/".join(key_part(part) for part in name.split("/"))
    return found if len(found) <= longest else _ended(found[: longest - _DIGEST - 1], name)


def file_part(name: str) -> str:
    """What may stand in a file's name anywhere, in a web address too: ASCII letters and digits, `_`, `-`, `.`."""
    return _safe(name, r"[^A-Za-z0-9_.-]")


def model_name(name: str) -> str:
    """What a registered model may be called: no `/`, `:` or quotation marks."""
    return _safe(name, r"[/:'\"`\\]", "-")


def _safe(name: str, forbidden: str, instead: str = "_") -> str:
    found = re.sub(forbidden, instead, name)
    if found == name and len(name) <= _LONGEST and name.strip(" .") != "" and name == name.strip():
        return name
    return _ended(found.strip(" .")[:_LONGEST], name)


def _ended(text: str, name: str) -> str:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:_DIGEST]
    return f"{text}-{digest}".lstrip("-")

"""Read class descriptions in CuPL's format (Pratt et al. 2023) and match them to class names.

The format is one JSON object, class name -> list of sentences; SAFT's multimodal descriptions use it too.
"""

import difflib
import hashlib
import http.client
import json
import re
import time
import unicodedata
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayclip.types import UserError

_TIMEOUT_S = 30.0
_LIMIT_BYTES = 64 << 20  # ImageNet's descriptions have 1.3 MB
# Minimum difflib ratio for suggesting a name: lower for names that share a word ('newt', 'common newt'), higher for
# others, where it should find typing errors and not that 'rooster' resembles 'four-poster'.
_NEAR_SHARED, _NEAR = 0.5, 0.75

# Unifies variants of one character from keyboards and typesetters; `_`, `-`, `/` as in `models.zeroshot.clean_name`.
_SIGNS = str.maketrans({**dict.fromkeys("_-/‐‑‒–—", " "), **dict.fromkeys("’‘ʼ´`", "'")})


@dataclass(frozen=True, kw_only=True)
class Descriptions:
    """The content of a description file, before matching.

    Attributes:
        source: path, or address without its secrets.
        sentences: the file's own class names -> sentences, tidied.
        empty, repeated: number of sentences dropped for each reason.
    """

    source: str
    sha256: str
    sentences: Mapping[str, tuple[str, ...]]
    empty: int
    repeated: int


@dataclass(frozen=True, kw_only=True)
class Unmatched:
    """A name without a match. `nearest` is a suggestion; `reason` is given where a match would be ambiguous."""

    name: str
    nearest: str | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Descriptions matched to labels.

    Attributes:
        keys, captions: the file's class name and the sentences of each label; None and empty if unmatched.
        unmatched, unused: labels without a key, and keys without a label.
        conflicts: groups of keys that differ only in spelling.
    """

    keys: tuple[str | None, ...]
    captions: tuple[tuple[str, ...], ...]
    unmatched: Mapping[int, Unmatched]
    unused: tuple[Unmatched, ...]
    conflicts: tuple[tuple[str, ...], ...]


def normal_name(name: str) -> str:
    """Normalise a name for comparison: lower case; runs of `_`, `-`, `/` and blanks become one blank; one apostrophe.

    Names that `clean_name` makes equal are equal here. Brackets distinguish classes ('kite (bird of prey)') and are
    kept, as are apostrophes and accents: 'creme brulee' is suggested for 'crème brûlée' but not matched.
    """
    return " ".join(unicodedata.normalize("NFC", name).lower().translate(_SIGNS).split())


def read_descriptions(source: str, *, timeout_s: float = _TIMEOUT_S, limit_bytes: int = _LIMIT_BYTES) -> Descriptions:
    """Read and check CuPL-style JSON from a path or an http(s) address.

    Args:
        timeout_s: limit in seconds for connecting, and for the whole download.
        limit_bytes: larger files are refused.

    Raises:
        UserError: unreachable, too large, not JSON, or JSON of another form.
    """
    # An address is shown without user, password and query.
    shown = re.sub(r"://[^/]*@", "://", re.split(r"[?#]", source)[0]) if "://" in source else source
    data = _fetch(source, shown, timeout_s, limit_bytes)
    if len(data) > limit_bytes:
        raise UserError(f"{shown} is larger than {limit_bytes >> 20} MB: no file of descriptions is.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:  # Python would silently keep the last list
            raise UserError(f"{shown} has class '{twice[0]}' twice: join its sentences.")
        return dict(pairs)

    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        html = data.lstrip()[:1] == b"<"
        hint = "it looks like a web page, so take the raw file's address" if html else str(error)
        raise UserError(f"{shown} is no JSON ({hint}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{shown} must be one JSON object, class name to list of sentences.")
    empty = repeated = 0
    sentences: dict[str, tuple[str, ...]] = {}
    for name, written in value.items():
        if not name.strip():
            raise UserError(f"{shown} has a class without a name: name it or drop it.")
        if not isinstance(written, list) or not all(isinstance(s, str) for s in written):
            raise UserError(f"{shown}: class '{name}' must have a list of sentences.")
        tidy = [t for s in written if (t := " ".join(s.split()))]
        sentences[name] = tuple(dict.fromkeys(tidy))
        empty += len(written) - len(tidy)
        repeated += len(tidy) - len(sentences[name])
    if not sentences:
        raise UserError(f"{shown} describes no class.")
    sha256 = hashlib.sha256(data).hexdigest()
    return Descriptions(source=shown, sha256=sha256, sentences=sentences, empty=empty, repeated=repeated)


def _fetch(source: str, shown: str, timeout_s: float, limit_bytes: int) -> bytes:
    """Read at most `limit_bytes` + 1 bytes."""
    scheme = source.partition(":")[0].lower() if ":" in source else ""
    if scheme in ("http", "https"):
        return _download(source, shown, timeout_s, limit_bytes)
    if scheme and not Path(source).exists():
        raise UserError(f"'{shown}' is neither a file nor an http(s) address.")
    try:
        with Path(source).open("rb") as file:
            return file.read(limit_bytes + 1)
    except FileNotFoundError:
        raise UserError(f"no such file: {source}.") from None
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}.") from None


def _download(address: str, shown: str, timeout_s: float, limit_bytes: int) -> bytes:
    deadline = time.monotonic() + timeout_s
    data = bytearray()
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "rayclip"})
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            while len(data) <= limit_bytes and (part := response.read1(min(1 << 16, limit_bytes + 1 - len(data)))):
                data += part
                if time.monotonic() > deadline:
                    raise TimeoutError("timed out")
    except urllib.error.HTTPError as error:
        raise UserError(f"{shown} answers {error.code} {error.reason}: check the address.") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise UserError(f"{shown} could not be downloaded: {reason}; download it yourself and give the file.") from None
    return bytes(data)


def match_classes(
    sentences: Mapping[str, tuple[str, ...]], class_names: Sequence[str], alternatives: Sequence[str] | None = None
) -> Matching:
    """Match sentences to labels by names that are equal under `normal_name`.

    If keys differ only in spelling (ImageNet's dog 'Cardigan' and garment 'cardigan'), a label takes the key spelt
    exactly like it. Classes that share a name share its sentences. Keys left over can match `alternatives`, other names
    in label order, unless two labels claim the same key: 'crane' is a bird and a machine.
    """
    groups: dict[str, list[str]] = {}
    for key in sentences:
        groups.setdefault(normal_name(key), []).append(key)
    keys = [_pick(groups.get(normal_name(name), []), name) for name in class_names]
    reasons: dict[int, str] = {}
    if alternatives is not None:
        left = {n: [k for k in group if k not in keys] for n, group in groups.items()}
        wanted = {i: _pick(left.get(normal_name(alternatives[i]), []), alternatives[i]) for i in _missing(keys)}
        claims = Counter(wanted.values())
        for label, found in wanted.items():
            if found is not None and claims[found] == 1:
                keys[label] = found
            elif found is not None:
                reasons[label] = f"'{found}' could be {claims[found]} classes"
    unused = [key for key in sentences if key not in keys]
    missing = _missing(keys)
    for label in missing:
        rivals = [k for k in groups.get(normal_name(class_names[label]), []) if k in unused]
        if len(rivals) > 1:
            quoted = " and ".join(f"'{rival}'" for rival in rivals)
            reasons[label] = f"{quoted} differ in spelling only"
    lost = [class_names[label] for label in missing]
    nearest = zip(missing, lost, _suggest(lost, unused), strict=True)
    return Matching(
        keys=tuple(keys),
        captions=tuple(() if key is None else sentences[key] for key in keys),
        unmatched={i: Unmatched(name=name, nearest=near, reason=reasons.get(i, "")) for i, name, near in nearest},
        unused=tuple(
            Unmatched(name=name, nearest=near) for name, near in zip(unused, _suggest(unused, lost), strict=True)
        ),
        conflicts=tuple(tuple(group) for group in groups.values() if len(group) > 1),
    )


def _pick(group: Sequence[str], name: str) -> str | None:
    """Return the key of exactly this spelling, else the only key of the group, else None."""
    return name if name in group else group[0] if len(group) == 1 else None


def _missing(keys: Sequence[str | None]) -> list[int]:
    return [label for label, key in enumerate(keys) if key is None]


def _suggest(names: Sequence[str], among: Sequence[str]) -> list[str | None]:
    """Return the nearest of the others for each name; None if none is near."""
    spelling = {normal_name(other): other for other in among}

    def nearest(name: str) -> str | None:
        for other in difflib.get_close_matches(name, spelling, n=20, cutoff=_NEAR_SHARED):  # nearest first
            shared = set(name.split()) & set(other.split())
            if shared or difflib.SequenceMatcher(None, other, name).ratio() >= _NEAR:
                return spelling[other]
        return None

    return [nearest(normal_name(name)) for name in names]

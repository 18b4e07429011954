"""Results as JSON to hand in, to a leaderboard or beside a paper; `static/results.schema.json` describes the form."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rayclip import __version__
from rayclip.reports.grid import Document
from rayclip.reports.model import Model
from rayclip.reports.results import Results

SCHEMA = "rayclip-results/1"
_WHOLE = ("n", "only_this_right", "only_baseline_right")
_REAL = ("top1", "recall", "ci_low", "ci_high", "ece", "p", "theirs", "difference")


def document_json(results: Results, document: Document, board: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return a report's numbers with what is known of the models; what is empty in CSV is left out. `board`: the rows
    of a leaderboard."""
    names = results.names
    content = {
        "schema": SCHEMA,
        "rayclip": __version__,
        "models": [_describe(names[fingerprint], model) for fingerprint, model in results.models.items()],
        # Without those that are derived from others, of no attack of their own
        "numbers": [_number(line) for line in document.lines if line.get("attack")],
        **({"board": list(board)} if board else {}),
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _describe(name: str, model: Model) -> dict[str, Any]:
    known = {
        "method": model.method,
        "trained_on": model.trained_on if model.method else None,
        "trained_from": model.base if model.method else None,
        "shots": model.shots,
        "architecture": model.architecture,
        **{key: model.published.get(key) for key in ("paper", "licence")},
        "checkpoint": model.published.get("link"),
        "settings": (model.lineage or {}).get("digest"),
    }
    own = {"name": name, "spec": model.spec, "fingerprint": model.fingerprint}
    return own | {key: value for key, value in known.items() if value}


def _number(line: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in line.items() if value not in ("", None)}
    found |= {key: int(found[key]) for key in _WHOLE if key in found}
    found |= {key: float(found[key]) for key in _REAL if key in found}
    return found | ({"protocol": json.loads(found["protocol"])} if "protocol" in found else {})

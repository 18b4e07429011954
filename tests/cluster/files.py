"""The files of `cluster/` as the tests read them."""

import re
from pathlib import Path
from typing import Any

import yaml

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
KUBERNETES = sorted(f.name for f in CLUSTER.glob("*.yaml") if "apiVersion:" in f.read_text())


def read(name: str) -> str:
    return (CLUSTER / name).read_text()


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(read(name)))


def one(name: str, kind: str) -> dict[str, Any]:
    (found,) = [d for d in documents(name) if d["kind"] == kind]
    return found


def walk(value: Any, path: tuple[Any, ...] = ()):
    """Every value below, with the keys that lead to it."""
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from walk(below, (*path, key))


def pod_templates(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Every pod that a file makes, with the keys that lead to it."""
    return [
        (f"{d['kind']} {' '.join(map(str, path))}", value)
        for d in documents(name)
        for path, value in walk(d)
        if path and path[-1] in ("template", "submitterPodTemplate")
    ]


def docker_args() -> dict[str, str]:
    return dict(re.findall(r"(?m)^ARG (\w+)=(\S+)", read("Dockerfile")))

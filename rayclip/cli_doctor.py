"""`rayclip doctor`: what of this machine, its cluster and its servers works, and what to do about the rest."""

import importlib
import json as jsons
import os
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, NamedTuple

import typer

from rayclip.cli_options import Cluster, Tracking
from rayclip.types import UserError, redacted

_LIBRARIES = ("torch", "torchvision", "open_clip_torch", "transformers", "ray", "mlflow", "pyarrow")
_ROOM = 5 << 30  # bytes that a checkpoint or two and a copied data set want


class Finding(NamedTuple):
    """`wrong` is what no command can work with; `note` what some people would want to change."""

    topic: str
    state: Literal["ok", "note", "wrong"]
    says: str


def doctor(
    tracking_uri: Tracking = None,
    data_root: Annotated[
        str | None, typer.Option(help="Prepared data sets.  [default: RAYCLIP_DATA, or ~/.cache/rayclip/data]")
    ] = None,
    cluster: Cluster = False,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Check versions, GPU, Ray, MLflow, data root and disk; exit code 1 if something is wrong.

    Starts a private Ray for a moment, or with --cluster asks the running one. Changes nothing.
    """
    found = []
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": _versions,
        "GPU": _gpu,
        "Ray": lambda: _ray(cluster),
        "MLflow": lambda: _mlflow(tracking_uri),
        "data": lambda: _data(data_root),
        "disk": _disk,
    }
    for topic, check in checks.items():
        for finding in _careful(topic, check):
            found.append(finding)
            if not json:
                mark = {"ok": "✓", "note": "·", "wrong": "✗"}[finding.state]
                print(f"{mark} {finding.topic:10} {finding.says}", flush=True)
    if json:
        print(jsons.dumps([finding._asdict() for finding in found], indent=1))
    if any(finding.state == "wrong" for finding in found):
        raise typer.Exit(1)


def _careful(topic: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a check finds; an error in it is a finding too."""
    try:
        yield from check()
    except UserError as error:
        yield Finding(topic, "wrong", str(error))


def _versions() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    from rayclip import PROTOCOL, __version__

    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("rayclip", "ok", f"{__version__}, protocol {PROTOCOL}, Python {python}")
    said = []
    for name in _LIBRARIES:
        try:
            said.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            yield Finding("libraries", "wrong", f"{name} is not installed: pip install -e . brings it.")
    yield Finding("libraries", "ok", ", ".join(said))
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        yield Finding("libraries", "wrong", f"torchvision does not fit this torch ({reason}): install both together.")


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("GPU", "note", f"none here ({built}): everything runs on {os.cpu_count()} CPU cores.")
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        sum_ = torch.ones(8, 8, device=f"cuda:{number}").sum().item()  # the driver answers, and its kernels run
        state: Literal["ok", "wrong"] = "ok" if sum_ == 64 else "wrong"
        yield Finding("GPU", state, f"{about.name}, {free >> 30} of {total >> 30} GiB free")


def _ray(cluster: bool) -> Iterator[Finding]:
    from rayclip.distributed import cluster_holds, ray_cluster, surroundings

    try:
        for sentence in surroundings():
            yield Finding("Ray", "note", sentence)
        with ray_cluster(cluster=cluster):
            nodes, holds = cluster_holds()
    except UserError as error:
        yield Finding("Ray", "wrong", str(error))
        return
    which = f"the cluster at {os.environ.get('RAY_ADDRESS', 'this node')}" if cluster else "a private one starts"
    yield Finding("Ray", "ok", f"{which}: {nodes} node{'s' if nodes != 1 else ''}, {holds}")
    if cluster and os.environ.get("RAY_AUTH_MODE") != "token" and not os.environ.get("RAY_AUTH_TOKEN"):
        yield Finding("Ray", "note", "the cluster asks for no token: whoever reaches it runs code there (SECURITY.md).")


def _mlflow(uri: str | None) -> Iterator[Finding]:
    from rayclip.tracking import default_uri, look

    place = uri or default_uri()
    found = look(place)
    if found is None:
        yield Finding("MLflow", "ok", f"{redacted(place)} will be made at the first run")
    else:
        yield Finding("MLflow", "ok", f"{redacted(place)} answers, {found} experiment{'s' if found != 1 else ''}")


def _data(root: str | None) -> Iterator[Finding]:
    from rayclip.data.catalog import prepared
    from rayclip.data.opening import data_root
    from rayclip.store import Store

    store = Store(root or data_root())
    found = prepared(store)
    for name, manifest in found.items():
        if isinstance(manifest, UserError):
            yield Finding("data", "wrong", f"{name}: {manifest}")
    whole = [name for name, manifest in found.items() if not isinstance(manifest, UserError)]
    said = ", ".join(whole) or "no data set is prepared yet (rayclip data prepare NAME); digits is bundled"
    yield Finding("data", "ok" if whole else "note", f"{redacted(store.root)}: {said}")


def _disk() -> Iterator[Finding]:
    import shutil
    import tempfile
    from pathlib import Path

    from rayclip.store import cache_root

    for what, place in (("here", Path.cwd()), ("cache", cache_root()), ("temporary", Path(tempfile.gettempdir()))):
        there = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Finding("disk", "wrong", f"{what}: {place} cannot be written")
        elif free < _ROOM:
            yield Finding("disk", "note", f"{what}: {place} has {free / 2**30:.1f} GiB left")
        else:
            yield Finding("disk", "ok", f"{what}: {place} has {free >> 30} GiB left")

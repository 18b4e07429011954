"""`rayclip doctor`: check this machine, its cluster and its servers, and say how to fix problems."""

import contextlib
import importlib
import json as jsons
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import typer

from rayclip.types import UserError, redacted

_LIBRARIES = ("torch", "torchvision", "open_clip_torch", "transformers", "ray", "mlflow", "pyarrow")
_MODULES = ("torch", "torchvision", "open_clip", "transformers", "ray", "mlflow", "pyarrow", "numpy", "PIL", "rich")
_ROOM = 5 << 30  # bytes: a checkpoint or two and a copied data set


class Finding(NamedTuple):
    """A result of a check: `wrong` keeps commands from working; `note` is something that may be worth a change."""

    topic: str
    state: Literal["ok", "note", "wrong"]
    says: str


def doctor(
    tracking_uri: str | None = None, data_root: str | None = None, cluster: bool = False, json: bool = False
) -> None:
    """Check versions, GPU, Ray, MLflow, data root and disk; exit code 1 if something is wrong.

    Starts a private Ray for a moment, or with --cluster asks the running one. Changes nothing.

    Args:
        data_root: Prepared data sets. [default: RAYCLIP_DATA, or ~/.cache/rayclip/data]
        json: As JSON.
    """
    found: list[Finding] = []
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
            found.append(finding._replace(says=" ".join(finding.says.split())))
            if not json:
                mark = {"ok": "✓", "note": "·", "wrong": "✗"}[finding.state]
                print(f"{mark} {finding.topic:10} {found[-1].says}", flush=True)
    if json:
        print(jsons.dumps([finding._asdict() for finding in found], indent=1))
    if any(finding.state == "wrong" for finding in found):
        raise typer.Exit(1)


def _careful(topic: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield a check's findings; turn any error in it into a finding, so that the other checks still run."""
    try:
        yield from check()
    except UserError as error:
        yield Finding(topic, "wrong", str(error))
    except (Exception, SystemExit) as error:  # libraries may call `sys.exit`
        lines = [line.strip() for line in redacted(str(error)).splitlines() if line.strip()]
        said = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
        yield Finding(topic, "wrong", f"this check was cut off by an error ({said}){_where(error)}.")


def _where(error: BaseException) -> str:
    """Return where an error occurred, with advice if a file of the user shadows an installed module."""
    trace, files = error.__traceback__, []
    while trace is not None:
        files.append(Path(trace.tb_frame.f_code.co_filename))
        trace = trace.tb_next
    with contextlib.suppress(OSError):
        here = Path.cwd()
        for file in reversed(files):
            if here in file.absolute().parents:
                name = Path(file.absolute().relative_to(here).parts[0]).stem
                if name in {*_MODULES, *sys.stdlib_module_names}:
                    return f": {file} is imported in the place of the installed {name}, rename it"
    return f" in {files[-1].name}" if files else ""


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
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        yield Finding("libraries", "wrong", f"torchvision does not fit this torch ({reason}): install both together.")

    for path in sorted(Path.cwd().iterdir()):
        if path.stem in _MODULES and (path.suffix == ".py" or (path / "__init__.py").is_file()):
            says = f"{path} bears the name of a library, and what Python starts here may import it instead: rename it."
            yield Finding("libraries", "note", says)


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("GPU", "note", f"none here ({built}): everything runs on {os.cpu_count()} CPU cores.")
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        sum_ = torch.ones(8, 8, device=f"cuda:{number}").sum().item()  # tests that kernels run
        state: Literal["ok", "wrong"] = "ok" if sum_ == 64 else "wrong"
        yield Finding("GPU", state, f"{about.name}, {free >> 30} of {total >> 30} GiB free")


def _ray(cluster: bool) -> Iterator[Finding]:
    from rayclip.distributed.connect import describe_cluster, ray_cluster
    from rayclip.distributed.session import check_environment

    try:
        for sentence in check_environment():
            yield Finding("Ray", "note", sentence)
        with ray_cluster(cluster=cluster):
            nodes, holds = describe_cluster()
    except UserError as error:
        yield Finding("Ray", "wrong", str(error))
        return
    which = f"the cluster at {os.environ.get('RAY_ADDRESS', 'this node')}" if cluster else "a private one starts"
    yield Finding("Ray", "ok", f"{which}: {nodes} node{'s' if nodes != 1 else ''}, {holds}")
    if cluster and os.environ.get("RAY_AUTH_MODE") != "token" and not os.environ.get("RAY_AUTH_TOKEN"):
        yield Finding("Ray", "note", "the cluster asks for no token: whoever reaches it runs code there (SECURITY.md).")


def _mlflow(uri: str | None) -> Iterator[Finding]:
    from rayclip.tracking.address import default_uri
    from rayclip.tracking.experiment import count_experiments

    place = uri or default_uri()
    found = count_experiments(place, to_write=True)
    answers = f"answers, {found} experiment{'s' if found != 1 else ''}"
    yield Finding("MLflow", "ok", f"{redacted(place)} {'will be made at the first run' if found is None else answers}")


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

    from rayclip.paths import check_folder
    from rayclip.store import cache_root

    kinds: dict[str, tuple[Callable[[], Path | str], str]] = {
        "here": (Path.cwd, "change into a folder that can be written"),
        "cache": (cache_root, "set RAYCLIP_CACHE to one that can"),
        "temporary": (tempfile.gettempdir, "set TMPDIR to one that can"),
    }
    for what, (find, remedy) in kinds.items():
        place = Path()
        try:
            place = Path(find())
            check_folder(what, str(place))
            there = next(p for p in (place, *place.parents) if p.exists())
            free = shutil.disk_usage(there).free
        except (UserError, OSError, RuntimeError) as error:
            why = getattr(error.__cause__ or error, "strerror", None) or str(error)
            shown = f"{place} cannot be written" if place.is_absolute() else "there is none that can be written"
            yield Finding("disk", "wrong", f"{what}: {shown} ({why}): {remedy}.")
            continue
        left = f"{free / 2**30:.1f}" if free < _ROOM else str(free >> 30)
        yield Finding("disk", "note" if free < _ROOM else "ok", f"{what}: {place} has {left} GiB left")

"""A node's cache of remote files, named by content: each file is fetched once, for whichever data set or root."""

import hashlib
import os
import shlex
import uuid
from pathlib import Path

from filelock import FileLock

from rayclip.data.manifest import File
from rayclip.store import Store, cache_root
from rayclip.types import UserError


def local_path(store: Store, file: File) -> Path:
    """Return a local path at which a file of `store` can be memory-mapped: the file itself below a local root, else its
    copy on this node, which one process fetches while the others wait.

    Raises:
        UserError: the file is missing or differs from the manifest, or the cache's disk is full.
    """
    if store.is_local:
        path = store.path(file.file)
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise UserError(
                f"{path} is missing or has another size than its manifest says: `rayclip data verify "
                f"{shlex.quote(store.name)} --root {shlex.quote(str(path.parent.parent))}` tells more; prepare it "
                "again as before, with --force."
            )
        return path
    copy = cache_root() / file.sha256[:2] / f"{file.sha256}{Path(file.file).suffix}"
    if copy.is_file():
        return copy
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(copy.with_suffix(".lock")):
            if not copy.is_file():
                _fetch(store, file, copy)
    except OSError as error:
        raise UserError(
            f"{store.root}: {file.file} cannot be copied to {cache_root()} ({str(error).splitlines()[0]}): check the "
            "address, or set RAYCLIP_CACHE to a disk with room."
        ) from error
    return copy


def _fetch(store: Store, file: File, copy: Path) -> None:
    aside = copy.with_name(f"{copy.name}.{uuid.uuid4().hex[:8]}.partial")
    digest = hashlib.sha256()
    try:
        with aside.open("wb") as target:
            for chunk in store.chunks(file.file):
                digest.update(chunk)
                target.write(chunk)
        if digest.hexdigest() != file.sha256:
            raise UserError(
                f"{store.root}: {file.file} is not what its manifest says (other content): `rayclip data verify` "
                "tells more."
            )
        os.replace(aside, copy)
    finally:
        aside.unlink(missing_ok=True)

"""Where results and prepared data live: a folder or an object-store URI, through `pyarrow.fs`.

A file is there whole or not at all.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rayclip.types import UserError

_CHUNK = 8 << 20


class Store:
    """Files below a root. Picklable.

    Results have the layout `cells/<cell>/<shard>.parquet`, `cells/<cell>/cell.json`, `texts/`; prepared data
    `<name>/manifest.json` and its shards.
    """

    def __init__(self, root: str) -> None:
        self.root = root if "://" in root else str(Path(root).expanduser().absolute())

    @property
    def is_local(self) -> bool:
        return "://" not in self.root or self.root.startswith("file://")

    def child(self, name: str) -> "Store":
        """The folder `name` below this one; a URI keeps its options (`?endpoint_override=…`)."""
        base, mark, options = self.root.partition("?") if "://" in self.root else (self.root, "", "")
        return Store(f"{base.rstrip('/')}/{name}{mark}{options}")

    def path(self, name: str) -> Path:
        """Where a file of a local store is."""
        return Path(self._open()[1]) / name

    def _open(self) -> tuple[fs.FileSystem, str]:
        try:
            return fs.FileSystem.from_uri(self.root)
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            raise UserError(f"'{self.root}' cannot be opened: {str(error).splitlines()[0]}") from error

    def write(self, name: str, data: bytes) -> None:
        """Object stores put a file at once; on file systems it is written aside and renamed."""
        system, base = self._open()
        target = f"{base}/{name}"
        if isinstance(system, fs.LocalFileSystem):
            aside = Path(f"{target}.{uuid.uuid4().hex[:8]}.partial")
            aside.parent.mkdir(parents=True, exist_ok=True)
            try:
                aside.write_bytes(data)
                os.replace(aside, target)
            finally:
                aside.unlink(missing_ok=True)
        else:
            with system.open_output_stream(target) as stream:
                stream.write(data)

    def upload(self, local: Path, name: str) -> None:
        """Put a finished local file in its place; below a local root it is moved there."""
        system, base = self._open()
        if isinstance(system, fs.LocalFileSystem):
            os.replace(local, f"{base}/{name}")
            return
        with local.open("rb") as source, system.open_output_stream(f"{base}/{name}") as target:
            shutil.copyfileobj(source, target, _CHUNK)
        local.unlink()

    def chunks(self, name: str) -> Iterator[bytes]:
        """A file's bytes, some at a time.

        Raises:
            FileNotFoundError: there is no such file.
        """
        system, base = self._open()
        with system.open_input_stream(f"{base}/{name}") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk

    def size(self, name: str) -> int | None:
        """A file's bytes, None where there is none."""
        system, base = self._open()
        return system.get_file_info(f"{base}/{name}").size

    def delete(self, name: str) -> None:
        """Remove a file if it is there."""
        system, base = self._open()
        if system.get_file_info(f"{base}/{name}").type == fs.FileType.File:
            system.delete_file(f"{base}/{name}")

    def read(self, name: str) -> bytes | None:
        """A file's bytes, None where there is none."""
        system, base = self._open()
        if system.get_file_info(f"{base}/{name}").type != fs.FileType.File:
            return None
        with system.open_input_stream(f"{base}/{name}") as stream:
            return stream.read()

    def names(self, folder: str, ending: str) -> list[str]:
        """The files of a folder ("" is the root) with this ending, sorted."""
        system, base = self._open()
        selector = fs.FileSelector(f"{base}/{folder}", allow_not_found=True)
        found = (info.base_name for info in system.get_file_info(selector) if info.type == fs.FileType.File)
        return sorted(f"{folder}/{name}".lstrip("/") for name in found if name.endswith(ending))

    def folders(self) -> list[str]:
        """The names of the folders directly below the root, sorted."""
        system, base = self._open()
        found = system.get_file_info(fs.FileSelector(base, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def open(self, name: str) -> Any:
        """A file to be read anywhere in it. Raises `FileNotFoundError`."""
        system, base = self._open()
        return system.open_input_file(f"{base}/{name}")

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, (json.dumps(value, indent=1) + "\n").encode())

    def read_json(self, name: str) -> Any:
        data = self.read(name)
        return None if data is None else json.loads(data)

    def write_table(self, name: str, table: pa.Table | Mapping[str, Any]) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table if isinstance(table, pa.Table) else pa.table(dict(table)), sink)
        self.write(name, sink.getvalue().to_pybytes())

    def read_tables(self, names: list[str], columns: list[str] | None = None) -> pa.Table | None:
        """The rows of several files, None for no files."""
        tables = []
        for name in names:
            data = self.read(name)
            try:
                tables.append(pq.read_table(pa.BufferReader(data), columns=columns))
            except (pa.ArrowException, TypeError, ValueError, OSError) as error:
                raise UserError(f"result file {self.root}/{name} is damaged: delete it and run again.") from error
        return pa.concat_tables(tables) if tables else None

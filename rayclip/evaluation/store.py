"""Where results live: a folder or an object-store URI, through `pyarrow.fs`. A file is there whole or not at all."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rayclip.types import UserError


class Store:
    """Results below a root. Picklable; layout `cells/<cell>/<shard>.parquet`, `cells/<cell>/cell.json`, `texts/`."""

    def __init__(self, root: str) -> None:
        self.root = root if "://" in root else str(Path(root).absolute())

    def _open(self) -> tuple[fs.FileSystem, str]:
        try:
            return fs.FileSystem.from_uri(self.root)
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            raise UserError(f"results cannot be kept at '{self.root}': {str(error).splitlines()[0]}") from error

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

    def read(self, name: str) -> bytes | None:
        """A file's bytes, None where there is none."""
        system, base = self._open()
        if system.get_file_info(f"{base}/{name}").type != fs.FileType.File:
            return None
        with system.open_input_stream(f"{base}/{name}") as stream:
            return stream.read()

    def names(self, folder: str, ending: str) -> list[str]:
        """The files of a folder with this ending, sorted."""
        system, base = self._open()
        selector = fs.FileSelector(f"{base}/{folder}", allow_not_found=True)
        found = (info.base_name for info in system.get_file_info(selector) if info.type == fs.FileType.File)
        return sorted(f"{folder}/{name}" for name in found if name.endswith(ending))

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, (json.dumps(value, indent=1) + "\n").encode())

    def read_json(self, name: str) -> Any:
        data = self.read(name)
        return None if data is None else json.loads(data)

    def write_table(self, name: str, columns: Mapping[str, Any]) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(dict(columns)), sink)
        self.write(name, sink.getvalue().to_pybytes())

    def read_tables(self, names: list[str], columns: list[str] | None = None) -> pa.Table | None:
        """The rows of several files, None for no files."""
        tables = []
        for name in names:
            data = self.read(name)
            try:
                tables.append(pq.read_table(pa.BufferReader(data), columns=columns))
            except (pa.ArrowInvalid, TypeError, OSError) as error:
                raise UserError(f"result file {self.root}/{name} is damaged: delete it and run again.") from error
        return pa.concat_tables(tables) if tables else None

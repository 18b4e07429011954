"""Read and write results and prepared data in a folder or at an object-store URI, through `pyarrow.fs`.

Files are written atomically: a file is complete or does not exist.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from pyarrow import fs

from rayclip.types import UserError, has_secret

PLAN = "plan.json"  # an evaluation's plan, beside its results

_CHUNK = 8 << 20
_PARTIAL = ".partial"  # ends the names of files that are not finished
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_AGAIN = "; run again to go on from here."
_NOTE = b"rayclip"
_SUMS = b"rayclip_crc32"  # of columns of numbers, by name


def no_room(error: BaseException) -> UserError | None:
    """Return the error to raise when a file system is full or not writable; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in _NO_ROOM:
        return None
    where = f", {error.filename}" if error.filename else ""
    what = f"{error.strerror or error}{where}"
    return UserError(f"a file cannot be written or read ({what}): make room or mend the rights{_AGAIN}")


def storage_failure(error: BaseException) -> UserError | None:
    """Return the error to raise when files cannot be read or written: `no_room`'s, or what an object store says."""
    if not isinstance(error, OSError) or error.errno is not None:  # which only the operating system's errors have
        return no_room(error)
    return UserError(f"a file cannot be read or written ({str(error)[:300]}): mend that{_AGAIN}")


def cache_root() -> Path:
    """Return the cache folder: `RAYCLIP_CACHE`, or `~/.cache/rayclip/files`. On a cluster: a fast disk of each node."""
    return Path(os.environ.get("RAYCLIP_CACHE", "~/.cache/rayclip/files")).expanduser()


class Store:
    """Files below a root folder or URI. Names that lead outside the root are refused. Picklable.

    Results have the layout `cells/<cell>/<shard>.parquet`, `cells/<cell>/cell.json`, `texts/`; prepared data
    `<name>/manifest.json` and its shards.

    Raises:
        UserError: the root holds a password or a key, which would appear in logs and results.
    """

    def __init__(self, root: str) -> None:
        if "://" in root and has_secret(root):
            raise UserError(
                f"'{root}' holds a secret, and addresses are written into results and logs: take it out and set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or your store's own variables, or a role) on every node."
            )
        try:
            self.root = root if "://" in root else str(Path(root).expanduser().absolute())
        except (RuntimeError, OSError) as error:  # home folder of an unknown user; deleted working directory
            raise UserError(f"'{root}' cannot be opened ({error}): give another folder.") from error

    @property
    def is_local(self) -> bool:
        return "://" not in self.root or self.root.startswith("file://")

    @property
    def name(self) -> str:
        """The last component of the root."""
        return self.root.partition("?")[0].rstrip("/").rpartition("/")[2]

    def child(self, name: str) -> "Store":
        """Return the store of the subfolder `name`; a URI keeps its options (`?endpoint_override=…`)."""
        _check(name, self.root)
        base, mark, options = self.root.partition("?") if "://" in self.root else (self.root, "", "")
        part = quote(name) if "://" in self.root else name  # quoted, or `?` in it would start the URI's options
        return Store(f"{base.rstrip('/')}/{part}{mark}{options}")

    @property
    def parent(self) -> "Store":
        """The store of the folder that holds the root."""
        base, mark, options = self.root.partition("?") if "://" in self.root else (self.root, "", "")
        return Store(f"{base.rstrip('/').rpartition('/')[0] or '/'}{mark}{options}")

    def path(self, name: str) -> Path:
        """Return the path of a file in a local store."""
        return Path(self._at(name)[1])

    def _open(self) -> tuple[fs.FileSystem, str]:
        try:
            return fs.FileSystem.from_uri(self.root)
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            raise UserError(f"'{self.root}' cannot be opened: {str(error).splitlines()[0]}") from error

    def _at(self, name: str) -> tuple[fs.FileSystem, str]:
        """Return the file system and the path of `name` on it ("" is the root)."""
        _check(name, self.root)
        system, base = self._open()
        return system, f"{base}/{name}".rstrip("/") or "/"

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically: object stores do so themselves; on file systems it is written aside and renamed."""
        system, target = self._at(name)
        if isinstance(system, fs.LocalFileSystem):
            with _aside(target) as aside:
                aside.write_bytes(data)
        else:
            with system.open_output_stream(target) as stream:
                stream.write(data)

    def append(self, name: str, data: bytes) -> None:
        """Append to a file of a local store; on a full disk, or if killed, a part of the data may be written."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(data)

    def upload(self, local: Path, name: str) -> None:
        """Move a finished local file into the store; below a local root it is renamed."""
        system, place = self._at(name)
        if isinstance(system, fs.LocalFileSystem):
            os.replace(local, place)
            return
        self.copy_in(local, name)
        local.unlink()

    def copy_in(self, local: Path, name: str) -> None:
        """Copy a local file of any size into the store."""
        system, target = self._at(name)
        if isinstance(system, fs.LocalFileSystem):
            with _aside(target) as aside:
                shutil.copyfile(local, aside)
            return
        with local.open("rb") as source, system.open_output_stream(target) as sink:
            shutil.copyfileobj(source, sink, _CHUNK)

    def node_copy(self, names: Sequence[str]) -> Path:
        """Return a local folder with those of the named files that exist: this folder itself, or this node's copy.

        A copy is made once for the same names, sizes and modification times, and atomically; the other processes of
        the node wait for the one that makes it.
        """
        if self.is_local:
            return self.path("")
        system, _ = self._open()
        places = [self._at(name)[1] for name in names]
        found = [i for i in system.get_file_info(places) if i.type == fs.FileType.File]
        about = json.dumps([self.root, [(i.base_name, i.size, i.mtime_ns) for i in found]])
        copy = cache_root() / "folders" / hashlib.sha256(about.encode()).hexdigest()[:24]
        if not copy.is_dir():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(copy.with_suffix(".lock")):
                if not copy.is_dir():
                    aside = Path(tempfile.mkdtemp(dir=copy.parent))
                    try:
                        for info in found:
                            with (aside / info.base_name).open("wb") as target:
                                target.writelines(self.chunks(info.base_name))
                        aside.chmod(0o755)
                        os.replace(aside, copy)
                    finally:
                        shutil.rmtree(aside, ignore_errors=True)
        return copy

    def filesystem(self) -> tuple[fs.FileSystem, str]:
        """Return a file system for Ray and the root's path on it. Ray writes its lists in place; on a local disk this
        file system makes its writes atomic."""
        system, base = self._open()
        return _WholeFiles() if isinstance(system, fs.LocalFileSystem) else system, base

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield a file's bytes in chunks. Raises `FileNotFoundError`."""
        system, place = self._at(name)
        with system.open_input_stream(place) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, None if there is no such file."""
        system, place = self._at(name)
        return system.get_file_info(place).size

    def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        system, place = self._at(name)
        if system.get_file_info(place).type == fs.FileType.File:
            system.delete_file(place)

    def delete_folder(self, name: str) -> None:
        """Delete a folder and all its contents if it exists."""
        system, place = self._at(name)
        if system.get_file_info(place).type == fs.FileType.Directory:
            system.delete_dir(place)

    def delete_unfinished(self, folder: str) -> None:
        """Delete what killed processes have left of unfinished writes below a folder; nobody must be writing there."""
        system, place = self._at(folder)
        if isinstance(system, fs.LocalFileSystem):
            for left in Path(place).rglob(f"*{_PARTIAL}"):
                left.unlink(missing_ok=True)

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes, None if there is no such file."""
        system, place = self._at(name)
        if system.get_file_info(place).type != fs.FileType.File:
            return None
        with system.open_input_stream(place) as stream:
            return stream.read()

    def names(self, folder: str, ending: str) -> list[str]:
        """Return the files of a folder ("" is the root) with this ending, sorted."""
        system, place = self._at(folder)
        if isinstance(system, fs.LocalFileSystem):  # avoids a stat of each file, of which there may be many
            try:
                with os.scandir(place) as entries:
                    local = [entry.name for entry in entries if entry.name.endswith(ending) and entry.is_file()]
            except FileNotFoundError:
                return []
            return sorted(f"{folder}/{name}".lstrip("/") for name in local)
        selector = fs.FileSelector(place, allow_not_found=True)
        found = (info.base_name for info in system.get_file_info(selector) if info.type == fs.FileType.File)
        return sorted(f"{folder}/{name}".lstrip("/") for name in found if name.endswith(ending))

    def folders(self) -> list[str]:
        """Return the names of the folders directly below the root, sorted."""
        system, base = self._open()
        found = system.get_file_info(fs.FileSelector(base, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def open(self, name: str) -> Any:
        """Open a file for random access. Raises `FileNotFoundError`."""
        system, place = self._at(name)
        return system.open_input_file(place)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, (json.dumps(value, indent=1) + "\n").encode())

    def read_json(self, name: str, kind: type = object) -> Any:
        """Return a JSON file's value, None if there is no such file. Raises `UserError` if it is no JSON, holds what is
        no text, or is of another kind (`dict`, `list`)."""
        if (data := self.read(name)) is None:
            return None
        try:
            found = json.loads(data)
            json.dumps(found, ensure_ascii=False).encode("utf-8", "surrogateescape")  # as paths may be
            if isinstance(found, kind):
                return found
            raise ValueError(f"no {kind.__name__}")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.root}/{name} is damaged: delete it and run again.") from error

    def write_table(
        self, name: str, table: pa.Table | Mapping[str, Any], note: Mapping[str, Any] | None = None
    ) -> None:
        """Write a Parquet file; `note` goes into its metadata, where `read_note` finds it."""
        sink = pa.BufferOutputStream()
        table = table if isinstance(table, pa.Table) else pa.table(dict(table))
        if note is not None:
            table = table.replace_schema_metadata({**(table.schema.metadata or {}), _NOTE: json.dumps(note)})
        sums = json.dumps({name: _sum(table[name]) for name in table.column_names if _holds_numbers(table[name])})
        pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), _SUMS: sums}), sink)
        self.write(name, sink.getvalue().to_pybytes())

    def read_note(self, name: str) -> tuple[int, dict[str, Any]]:
        """Return a Parquet file's number of rows and its note, reading only the footer; without a note, {}."""
        found = self._footer(name)
        try:
            return found.num_rows, json.loads((found.metadata or {}).get(_NOTE, b"{}"))
        except ValueError as error:
            raise _damaged_result(f"{self.root}/{name}") from error

    def column_names(self, name: str) -> list[str]:
        """Return the columns of a Parquet file, reading only the footer."""
        return self._footer(name).schema.names

    def _footer(self, name: str) -> pq.FileMetaData:
        try:
            with self.open(name) as file:
                return pq.read_metadata(file)
        except (pa.ArrowException, ValueError) as error:
            raise _damaged_result(f"{self.root}/{name}") from error

    def read_tables(
        self, names: list[str], columns: Sequence[str] | Mapping[str, type] | None = None
    ) -> pa.Table | None:
        """Return the rows of several files, None for no files.

        Cheap enough for hundreds of thousands of small files: the store is opened once, and each file is read in one
        go.

        Args:
            columns: names; or names and what they hold, `int` or `float`, without gaps.

        Raises:
            UserError: a file is damaged or missing, or a column is not there or holds something else.
        """
        system, base = self._open()
        is_local = isinstance(system, fs.LocalFileSystem)
        tables: list[pa.Table] = []
        for name in names:
            _check(name, self.root)
            try:
                if is_local:
                    with open(f"{base}/{name}", "rb") as local:
                        data = local.read()
                else:
                    with system.open_input_stream(f"{base}/{name}") as stream:
                        data = stream.read()
                file = pq.ParquetFile(pa.BufferReader(data))
                table = file.read(columns=None if columns is None else list(columns), use_threads=False)
                if columns is not None and sorted(table.column_names) != sorted(columns):
                    raise ValueError("columns are missing, or there twice")
                if isinstance(columns, Mapping):
                    table = _numbers(table, columns)
                tables.append(table)
                if not tables[0].schema.equals(table.schema):
                    raise ValueError("its columns are not those of the other files")
            except (pa.ArrowException, TypeError, ValueError, OSError) as error:
                raise _damaged_result(f"{self.root}/{name}") from error
        return pa.concat_tables(tables) if tables else None


def _damaged_result(place: str) -> UserError:
    return UserError(f"result file {place} is damaged: delete it and run again.")


def _numbers(table: pa.Table, columns: Mapping[str, type]) -> pa.Table:
    """Return a table of whole (int64) and real numbers. Raises `ValueError` if it holds anything else."""
    sums = json.loads((table.schema.metadata or {}).get(_SUMS, b"{}"))
    for name, kind in columns.items():
        column = table[name]
        is_kind = pa.types.is_integer if kind is int else pa.types.is_floating
        if not is_kind(column.type) or column.null_count:
            raise ValueError(f"{name} holds no numbers, or not everywhere")
        if sums.get(name, _sum(column)) != _sum(column):
            raise ValueError(f"{name} has changed since it was written")
        if kind is int:
            table = table.set_column(table.column_names.index(name), name, column.cast(pa.int64()))
    return table


def _holds_numbers(column: pa.ChunkedArray) -> bool:
    return (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)) and not column.null_count


def _sum(column: pa.ChunkedArray) -> int:
    """Return the CRC-32 of a column's numbers. Parquet's own sums of pages leave their headers and the footer out."""
    return zlib.crc32(column.to_numpy().tobytes())


class _WholeFiles(fs.LocalFileSystem):
    """A local file system whose output streams, used as `with` blocks, write aside and rename at the end. Picklable.

    A file written in place would be left truncated or empty by a killed process or a full disk.
    """

    @contextmanager
    def open_output_stream(self, path: str, *args: Any, **options: Any) -> Iterator[pa.NativeFile]:
        with _aside(path) as aside, super().open_output_stream(str(aside), *args, **options) as stream:
            yield stream

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _WholeFiles, ()


@contextmanager
def _aside(target: str) -> Iterator[Path]:
    """Yield a temporary path to write to; it is renamed to `target` at the end of the block."""
    aside = Path(f"{target}.{uuid.uuid4().hex[:8]}{_PARTIAL}")
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _check(name: str, root: str) -> None:
    """Refuse names that lead outside the root: manifests and journals, which anybody may have written, hold them."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise UserError(f"'{name}' leads out of {root}: the file that names it is damaged or was made to do harm.")

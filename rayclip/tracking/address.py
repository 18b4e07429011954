"""Check an MLflow address quickly, without importing MLflow, which retries an unreachable database for minutes."""

import io
import os
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayclip.paths import check_folder
from rayclip.types import UserError, has_secret, redacted

_FILE = "sqlite:///"
_DATABASES = ("postgresql", "mysql", "mssql")
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_MAGIC = b"SQLite format 3\0"
_KNOCK_S = 5.0
_BUSY = 503  # for example, the database is locked
# Package of a database driver by the name of its module, where the two differ
_PACKAGES = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}


class AwayError(UserError):
    """MLflow does not answer now, but may later."""


def default_uri() -> str:
    """Return `MLFLOW_TRACKING_URI`, or else an SQLite file in the working directory. Raise a `UserError` if that is
    gone."""
    try:
        return os.environ.get("MLFLOW_TRACKING_URI") or f"{_FILE}{Path('mlflow.db').absolute()}"
    except FileNotFoundError as error:
        raise UserError("the working directory is gone: change into one that is there.") from error


def absolute(uri: str) -> str:
    """Return an address that means the same in every directory. Raise a `UserError` if it holds a password."""
    refuse_secret(uri)
    relative = uri.startswith(_FILE) and not uri.startswith(f"{_FILE}/")
    return f"{_FILE}{Path(uri.removeprefix(_FILE)).absolute()}" if relative else uri


def join_address(uri: str, experiment: str) -> str:
    """Return what names an experiment at an MLflow address; experiments of the same name there are the same."""
    return f"{absolute(uri)} {experiment}"


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite store; None for other stores."""
    return Path(uri.removeprefix(_FILE).partition("?")[0]).absolute() if uri.startswith(_FILE) else None


def is_database(uri: str) -> bool:
    """Return whether MLflow opens the address directly as a database, without an MLflow server."""
    return uri.startswith(_FILE) or uri.partition("://")[0].partition("+")[0] in _DATABASES


def refuse_secret(uri: str) -> None:
    """Raise a `UserError` for an address with a password, which would appear in logs and results."""
    if has_secret(uri):
        raise UserError(
            f"the MLflow address '{uri}' holds a secret: take it out and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD; ahead of a database that asks for a password, start an MLflow server."
        )


def check_address(uri: str, *, to_write: bool = True) -> None:
    """Raise a `UserError` for a file that is no database or (`to_write`) cannot be written, or a missing driver."""
    refuse_secret(uri)
    path = sqlite_file(uri)
    if path is not None:
        _check_file(uri, path, to_write=to_write)
    elif is_database(uri):
        _check_driver(uri)


def check_database(uri: str) -> None:
    """Connect to a database once. Raise an `AwayError` if it cannot be reached or denies access."""
    if not is_database(uri) or uri.startswith(_FILE):
        return
    from sqlalchemy import create_engine, inspect, make_url
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    url = make_url(uri)
    try:
        if url.host and not url.host.startswith("/"):  # a driver would wait longer than this
            port = url.port or _PORTS[url.get_backend_name()]
            socket.create_connection((url.host, port), timeout=_KNOCK_S).close()
        inspect(create_engine(url, poolclass=NullPool))
    except (SQLAlchemyError, OSError) as error:
        raise AwayError(
            f"the database of MLflow at '{uri}' cannot be reached: start it, or give another --tracking-uri "
            f"({reason(error)})."
        ) from error


def reason(error: BaseException) -> str:
    """Return an error's first line, at most 300 characters, without secrets."""
    text = (redacted(str(error)).strip().splitlines() or [""])[0]
    return (text if len(text) <= 300 else f"{text[:299]}…").rstrip(".") or type(error).__name__


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn all errors of MLflow about an address into one sentence: an `AwayError` if it may work later, else a
    `UserError`."""
    from mlflow import __version__
    from mlflow.exceptions import MlflowException

    try:
        yield
    except UserError:
        raise
    except Exception as error:  # databases and their drivers raise their own kinds
        status = error.get_http_status_code() if isinstance(error, MlflowException) else 0
        other = f"or give another --tracking-uri ({reason(error)})."
        if status in (401, 403):
            raise AwayError(
                f"MLflow at '{uri}' refuses us: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to a user "
                "that may write there."
            ) from error
        if is_database(uri) and "mlflow db upgrade" in str(error):  # MLflow's advice lacks the address
            raise UserError(
                f"the database of MLflow at '{uri}' is of another version of MLflow than this one ({__version__}): "
                f"take a backup and run `mlflow db upgrade {shlex.quote(uri)}`, or give another --tracking-uri."
            ) from error
        if is_database(uri) and status != _BUSY:
            raise UserError(
                f"the database of MLflow at '{uri}' cannot be used: mend it, move it away, {other}"
            ) from error
        if not isinstance(error, OSError | MlflowException) or (400 <= status < 500 and status not in (408, 429)):
            raise _misspelt(uri, error) from error
        raise AwayError(f"MLflow at '{uri}' cannot be reached: start it, {other}") from error


def _misspelt(uri: str, error: BaseException) -> UserError:
    return UserError(
        f"MLflow at '{uri}' cannot be reached as it is written: give another --tracking-uri ({reason(error)})."
    )


def _check_file(uri: str, path: Path, *, to_write: bool) -> None:
    other = "or give another --tracking-uri."
    if path.is_dir():
        raise UserError(f"the database of MLflow at '{uri}' is a folder: give a file.")
    try:
        with path.open("rb") if path.is_file() else io.BytesIO() as file:
            head = file.read(len(_MAGIC))
    except OSError as error:
        raise UserError(
            f"the database of MLflow at '{uri}' cannot be read ({error.strerror}): mend its rights, {other}"
        ) from error
    if head and head != _MAGIC:  # an empty file is an empty database
        raise UserError(f"the database of MLflow at '{uri}' is none, or damaged: move it away, {other}")
    if not to_write:
        return
    try:
        check_folder("the folder", str(path.parent))  # it holds the file, its journal and `mlruns`
    except UserError as error:
        cause = getattr(error.__cause__, "strerror", None) or "that is no folder"
        raise UserError(
            f"MLflow cannot write '{path}', where runs are logged ({cause}): work in a folder that can be written, "
            f"{other}"
        ) from error
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"MLflow cannot write '{path}', where runs are logged: mend its rights, {other}")


def _check_driver(uri: str) -> None:
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except ImportError as error:
        module = error.name or "its driver"
        package = _PACKAGES.get(module.partition(".")[0], module)
        raise UserError(
            f"MLflow reaches '{uri}' through the Python package {module}, which is not installed: "
            f"pip install {shlex.quote(package)}, or start an MLflow server and give its address."
        ) from error
    except (SQLAlchemyError, ValueError) as error:
        raise _misspelt(uri, error) from error

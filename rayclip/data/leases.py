"""Leases: what a running command works on in a folder, so that other commands there, on any host, leave that alone.

Each command has one small file of its own, which nobody else writes: who it is, the names that it holds, and a count
that a thread raises every ten seconds. Nothing is locked, so that object stores and NFS will do; two that want the same
name at once are told apart by Lamport's bakery algorithm (Communications of the ACM 17(8), 1974).

A file that has not changed during a minute of its reader's own clock is that of a dead command, and what it held is
free: clocks of different hosts are never compared. On the same machine a process that is gone is dead at once.

Leases are advisory. Results are deterministic and written atomically: a command that was stopped for longer than that
minute and goes on, or a listing that is out of date, costs work that is done twice, never a wrong number.
"""

import contextlib
import functools
import hashlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from rayclip.progress import say
from rayclip.store import Store
from rayclip.types import UserError

_FILE = ".lease-"  # begins the names of the files
_BEAT_S, _EXPIRES_S = 10.0, 60.0
_FIRST_BEAT_S = 0.5  # until a claim that nobody contested is written down as held
_LONGEST_LOOK_S = 2.0  # between two looks of one that waits
_SAY_S = 3.0  # of waiting, before it is said
_MOST = 16 << 20  # bytes of a file that is read


class Holder(BaseModel):
    """A command that is at work in a folder, as its file says."""

    model_config = ConfigDict(strict=True)
    host: str
    machine: str  # tells hosts apart, and containers on them: a process id means something on one of them only
    pid: int
    beat: int = 0
    wants: set[str] = set()  # names that it has asked for a moment ago
    holds: set[str] = set()
    waits: set[str] = set()  # names that it would take from whoever holds them

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}"

    def is_gone(self) -> bool:
        """Return whether it was a process of this machine that is no more."""
        if self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except OSError:  # somebody else's
            return False
        return False


class Leases:
    """The leases of this command in a folder; a context manager, which gives them back. Its file is there only while it
    holds or awaits something.

    Args:
        beat_s: seconds between two signs of life.
        expires_s: seconds without one, after which a lease is taken over.

    Attributes:
        given: names that were given back by `give`.
    """

    def __init__(self, store: Store, *, beat_s: float = _BEAT_S, expires_s: float = _EXPIRES_S) -> None:
        self._store, self._beat_s, self._expires_s = store, beat_s, expires_s
        self._name = f"{_FILE}{uuid.uuid4().hex[:12]}.json"
        self._me = Holder(host=platform.node(), machine=_machine(), pid=os.getpid())
        self._seen: dict[str, tuple[bytes, float]] = {}  # contents of others' files, and since when they are so
        self._lock = threading.RLock()
        self._ended: threading.Event | None = None  # of the thread
        self._asked: set[str] = set()  # of the names that are held, those that others wait for
        self.given: set[str] = set()

    def __enter__(self) -> "Leases":
        return self

    def __exit__(self, *error: object) -> None:
        self.release(set(self._me.holds))

    def claim(self, names: Iterable[str]) -> set[str]:
        """Return those of the names that nobody else holds; they are held from now on."""
        with self._lock:
            wanted, is_new, pause = set(names), self._ended is None, 0.05
            self._me.wants = asked = wanted - self._me.holds
            try:
                while self._me.wants:
                    self._write()
                    others = self.others()
                    # The smaller name goes first; one with a larger name may have looked before this one has asked
                    first = {name for key, other in others.items() if key < self._name for name in other.wants}
                    self._me.wants = self._me.wants - first.union(*(other.holds for other in others.values()))
                    if self._me.wants.isdisjoint(name for other in others.values() for name in other.wants):
                        break
                    time.sleep(pause)
                    pause = min(2 * pause, _LONGEST_LOOK_S)
                self._me.holds |= self._me.wants
            finally:
                self._me.wants = set()
                if not self._put_away() and asked and not is_new:  # of a new file the first beat does so
                    self._write()
            return wanted & self._me.holds

    def release(self, names: Iterable[str]) -> None:
        """Give names back."""
        with self._lock:
            before = len(self._me.holds)
            self._me.holds -= set(names)
            if not self._put_away() and len(self._me.holds) < before:
                with contextlib.suppress(OSError):
                    self._write()

    def give(self, names: Sequence[str]) -> set[str]:
        """Give back every second one of those of the names that another command waits for, the first included; return
        them. It costs no access to the store."""
        asked = [name for name in names if name in self._asked]
        self._asked -= (given := set(asked[::2]))
        if given:
            self.given |= given
            self.release(given)
        return given

    def wait(self, names: Iterable[str], what: str, *, every: bool = False) -> None:
        """Return as soon as one of the names is free, or every one. Say once for whom it waits, who is doing `what`."""
        awaited, told, began, pause = set(names), set[str](), time.monotonic(), 0.05
        try:
            while True:
                with self._lock:
                    others = self.others()
                    theirs = {key: awaited & (other.holds | other.wants) for key, other in others.items()}
                    busy = set[str]().union(*theirs.values())
                    if not busy or not (every or awaited <= busy):
                        return
                    if not self._me.waits:
                        self._me.waits = awaited
                        self._write()
                for key in theirs if time.monotonic() - began >= _SAY_S else ():
                    if theirs[key] and key not in told:
                        say(
                            "note",
                            f"waiting for {others[key]}, which is {what} in {self._store.root}; it is taken over "
                            f"{self._expires_s:.0f} s after the last sign of life.",
                        )
                        told.add(key)
                time.sleep(min(pause, self._expires_s / 4))
                pause = min(1.5 * pause, _LONGEST_LOOK_S)
        finally:
            with self._lock:
                self._me.waits = set()
                self._put_away()

    @contextlib.contextmanager
    def hold(self, name: str, what: str = "at work", *, patient: bool = True) -> Iterator[bool]:
        """Hold a name in the block, after waiting for it, and yield True; one that is not `patient` may get False
        instead. Within another block of the same name there is no waiting."""
        if name in self._me.holds:
            yield True
            return
        while not (is_mine := bool(self.claim([name]))) and patient:
            self.wait([name], what)
        try:
            yield is_mine
        finally:
            self.release([name])

    def others(self) -> dict[str, Holder]:
        """Return the other commands in the folder that are alive; delete the files of dead ones."""
        found, now = {}, time.monotonic()
        for name in _files(self._store):
            data = None if name == self._name else _read(self._store, name)
            if data is None:
                continue
            before, since = self._seen.get(name, (b"", now))
            self._seen[name] = data, (since if data == before else now)
            holder = _parse(data)
            if now - self._seen[name][1] > self._expires_s or (holder is not None and holder.is_gone()):
                self._store.delete(name)
            elif holder is not None:
                found[name] = holder
        return found

    def _write(self) -> None:
        self._me.beat += 1
        self._store.write(self._name, self._me.model_dump_json().encode())
        if self._ended is None:
            self._ended = threading.Event()
            threading.Thread(target=self._keep_alive, args=(self._ended,), daemon=True).start()

    def _put_away(self) -> bool:
        """Delete the file if nothing is held or awaited; return whether that is so."""
        if self._me.holds or self._me.wants or self._me.waits:
            return False
        if self._ended is not None:
            self._ended.set()
            self._ended = None
            with contextlib.suppress(OSError):
                self._store.delete(self._name)
        return True

    def _keep_alive(self, ended: threading.Event) -> None:
        pause = min(_FIRST_BEAT_S, self._beat_s)
        while not ended.wait(pause):
            pause = self._beat_s
            with self._lock, contextlib.suppress(OSError, UserError):  # the next beat tries again
                if ended.is_set():
                    return
                others = self.others().values()
                self._me.holds -= set[str]().union(*(other.holds for other in others))  # taken over meanwhile
                self._asked = self._me.holds & set[str]().union(*(other.waits for other in others))
                self._write()


def holders_in(store: Store) -> list[Holder]:
    """Return the commands that work in a folder, or did on another host and were killed there."""
    read = (_parse(_read(store, name) or b"") for name in _files(store))
    return [holder for holder in read if holder is not None and not holder.is_gone()]


def _files(store: Store) -> list[str]:
    return [name for name in store.names("", ".json") if name.startswith(_FILE)]


def _read(store: Store, name: str) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):  # put away meanwhile
        return store.read(name) if (store.size(name) or 0) < _MOST else b""
    return None


def _parse(data: bytes) -> Holder | None:
    try:
        return Holder.model_validate_json(data)
    except ValidationError:
        return None


@functools.cache
def _machine() -> str:
    """Return what tells this machine and its process ids from others: a hash of host name, boot and container."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

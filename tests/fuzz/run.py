"""Feed damaged files to the reading functions, in a process of its own with a limit on its memory.

    cd tests; python -m fuzz.run 2000 [KIND…] [--keep FOLDER]

Prints a JSON object per kind. `--keep` writes the smallest file of each fault to FOLDER, and a line for `corpus.jsonl`.
Files of the corpus come first, then drawn ones: the same in every run, others with HYPOTHESIS_PROFILE=explore.
"""

import argparse
import base64
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).with_name("corpus.jsonl")
GROWTH = 1 << 30  # bytes that reading may take
ROOM = 3 << 30  # bytes of address space beyond what the imports take, so that the machine survives a fault
SLOW_S = 20  # seconds for a file of a few kilobytes
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
SECRET = b"nobody may read this"


class FaultError(Exception):
    """What must not happen, and is no exception by itself."""


class Watch:
    """Notes what this process opens, writes and starts outside of the folders that it may write to."""

    def __init__(self, box: Path, allowed: list[Path]) -> None:
        self._allowed, self._secret, self.seen = [str(a) for a in allowed], str(box / "secret"), list[str]()
        self.on = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
            self.seen.append(f"{event}{args}")
        elif event == "open" and isinstance(args[0], str | bytes):
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            path = os.path.abspath(os.fsdecode(args[0]))
            if os.path.realpath(path) in (self._secret, "/etc/passwd") or (writes and not self._may(path)):
                self.seen.append(f"open {path}")
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "shutil.rmtree"):
            seen = [
                os.path.abspath(os.fsdecode(a))
                for a in args[: 1 + (event == "os.rename")]
                if isinstance(a, str | bytes)
            ]
            self.seen += [f"{event} {path}" for path in seen if not self._may(path)]

    def _may(self, path: str) -> bool:
        return any(path == a or path.startswith(f"{a}/") for a in ("/dev/null", *self._allowed))


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise FaultError(f"takes more than {SLOW_S} s")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SLOW_S)  # of processor time
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def memory(what: str) -> int:
    """Bytes that this process holds (`VmRSS`), or has held since `forget_peak` (`VmHWM`)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(what))


def forget_peak() -> int:
    """Begin to measure; returns the bytes held now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return memory("VmRSS")


def where(error: BaseException) -> str:
    """The innermost line of the package, and the kind of error: one fault is told from another by that."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/rayclip/" in f.filename]
    last = f"{frames[-1].filename.rpartition('/rayclip/')[2]}:{frames[-1].lineno}" if frames else "the test"
    return f"{type(error).__name__} at {last}"


class Feeder:
    """Feeds files of one kind."""

    def __init__(self, name: str, box: Path, watch: Watch) -> None:
        from fuzz.kinds import KINDS

        self.kind, self.watch, self.name = KINDS[name], watch, name
        self.folder, self.copy = box / "sound", box / "copy"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.kind.make(self.folder)
        self.sound = {form.file: (self.folder / form.file).read_bytes() for form in self.kind.forms}
        self.wanted = {form.file: self._read(form) for form in self.kind.forms}
        self.seen: set[str] = set()
        self.counts, self.faults = Counter[str](), dict[str, tuple[str, str, bytes]]()
        self.most = 0  # bytes that a file took

    def _read(self, form: Any) -> Any:
        if not form.writes:
            return form.read(self.folder)
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.folder, self.copy)
        return form.read(self.copy)

    def feed(self, form: Any, data: bytes) -> None:
        from rayclip.types import UserError

        key = hashlib.sha256(form.file.encode() + data).hexdigest()
        if key in self.seen or data == self.sound[form.file]:
            return
        self.seen.add(key)
        self.counts["cases"] += 1
        place, error = self.folder / form.file, None
        place.write_bytes(data)
        before = forget_peak()
        self.watch.on = True
        try:
            with time_limit():
                found = self._read(form)
            self.counts["read"] += 1
            if form.same(self.sound[form.file], data) and found != self.wanted[form.file]:
                raise FaultError("read wrongly")
        except UserError as refusal:
            self.counts["refused"] += 1
            said = str(refusal)
            if (
                not said.strip()
                or "\n" in said
                or len(said) > 1000
                or any(unicodedata.category(c) == "Cc" or c in BIDI for c in said)
            ):
                error = FaultError(f"no sentence: {said[:300]!r}").with_traceback(refusal.__traceback__)
        except Exception as other:
            error = other
        finally:
            self.watch.on = False
            place.write_bytes(self.sound[form.file])
        if self.watch.seen:
            error = FaultError(f"touches {self.watch.seen[0]}")
            self.watch.seen.clear()
        took = memory("VmHWM") - before
        self.most = max(self.most, took)
        if took > GROWTH:
            error = FaultError(f"takes {took >> 20} MB")
        if error is not None:
            fault = f"{form.file}: {where(error)}" + (f": {error}" if isinstance(error, FaultError) else "")
            self.counts["faults"] += 1
            known = self.faults.get(fault)
            if known is None or len(known[2]) > len(data):
                self.faults[fault] = (form.file, "".join(traceback.format_exception(error))[-1500:], data)

    def run(self, count: int) -> dict[str, Any]:
        began, cpu = time.perf_counter(), time.process_time()
        forms = {form.file: form for form in self.kind.forms}
        for kept in map(json.loads, CORPUS.read_text().splitlines() if CORPUS.exists() else ()):
            if kept["kind"] == self.name:
                self.feed(forms[kept["file"]], zlib.decompress(base64.b64decode(kept["data"])))
        most = self.counts["cases"] + count  # those of the corpus come on top
        one_of = st.sampled_from(self.kind.forms).flatmap(
            lambda form: form.damage(self.sound[form.file]).map(lambda data: (form, data))
        )
        base = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

        # More, since what is drawn twice counts once
        @settings(base, max_examples=3 * count // 2, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(drawn=one_of)
        def feed(drawn: tuple[Any, bytes]) -> None:
            if self.counts["cases"] < most:
                self.feed(*drawn)

        feed()
        return {
            "kind": self.name,
            **{key: self.counts[key] for key in ("cases", "refused", "read", "faults")},
            "most_mb": self.most >> 20,
            "whole_mb": memory("VmRSS") >> 20,
            "seconds": round(time.perf_counter() - began, 1),
            "cpu_s": round(time.process_time() - cpu, 1),
            "found": {fault: trace for fault, (_, trace, _) in self.faults.items()},
        }

    def keep(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for fault, (file, _, data) in self.faults.items():
            name = hashlib.sha256(fault.encode()).hexdigest()[:8]
            (folder / f"{self.name}-{name}").write_bytes(data)
            line = {"kind": self.name, "file": file, "why": fault, "data": packed(data)}
            with (folder / "corpus.jsonl").open("a") as lines:
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("count", type=int)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--keep", type=Path)
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from fuzz.kinds import KINDS

    with tempfile.TemporaryDirectory() as place:
        box = Path(place).resolve()
        (box / "secret").write_bytes(SECRET)
        (box / "cache").mkdir()
        (box / "tmp").mkdir()
        os.environ["RAYCLIP_CACHE"], tempfile.tempdir = str(box / "cache"), str(box / "tmp")
        watch = Watch(box, [box / name for name in ("sound", "copy", "cache", "tmp")])
        (box / "sound").mkdir()
        os.chdir(box / "sound")  # `../secret` is the secret from here
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
        for name in asked.kinds or KINDS:
            os.chdir(box)
            feeder = Feeder(name, box, watch)
            os.chdir(box / "sound")
            print(json.dumps(feeder.run(asked.count)), flush=True)
            if asked.keep is not None:
                feeder.keep(asked.keep.absolute())
        os.chdir("/")
        left = {path.name for path in box.iterdir()} - {"secret", "sound", "copy", "cache", "tmp"}
        assert not left, f"written beside the folder: {left}"


if __name__ == "__main__":
    main()

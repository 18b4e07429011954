"""Data sets of encoded images in Parquet files: decoding and checking the images."""

import contextlib
import hashlib
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rayclip.data.intake import BadImageError, check_image, decode, in_order
from rayclip.data.mapped import MappedImages
from rayclip.data.registry import DATASETS
from rayclip.data.spec import Reading
from rayclip.data.tables import TableImages
from rayclip.store import Store, cache_root
from rayclip.types import UserError


def prepare_command(name: str, paths: Sequence[Path], reading: Reading = Reading()) -> str:
    """Return the command that prepares a data set from the user's own files, setting unusable samples aside."""
    place = paths[0] if len(paths) == 1 else paths[0].parent
    command = f"rayclip data prepare {own_name(name)} --source parquet {shlex.quote(str(place.absolute()))}"
    options = {"image-column": reading.image, "label-column": reading.label, "class-names": reading.names}
    words = [f"--{option} {shlex.quote(value)}" for option, value in options.items() if value]
    words += [f"--labels-from {reading.labels_from}"] if reading.labels_from else []
    return " ".join([command, *words])


def own_name(name: str) -> str:
    """Derive a name for the user's own data set from its file name."""
    own = re.sub(r"[^\w-]+", "-", name).strip("-_") or "mine"
    if own in DATASETS or Path(own).exists():  # otherwise it would mean the published data set, or the path
        own += "-checked"
    return own


class EncodedImages:
    """Base of labelled images and image-caption pairs.

    Attributes:
        name, fingerprint, native_size: see `ImageSet`.
        encoded: the encoded images.
        paths: the user's own Parquet files; empty for a prepared data set, whose images have all been checked.
    """

    name: str
    fingerprint: str
    native_size: tuple[int, int] | None = None
    encoded: TableImages | MappedImages
    paths: tuple[Path, ...] = ()
    _reading: Reading = Reading()

    def images(self, positions: Sequence[int]) -> list[Image.Image]:
        """Return the RGB images at these positions (0..N-1), in this order."""
        return [self._decode(int(p)) for p in positions]

    def _decode(self, position: int) -> Image.Image:
        try:
            return decode(self.encoded[position])
        except BadImageError as error:
            raise UserError(f"row {position} of '{self.name}' is no readable image: {error}.") from error

    def check(self, on_progress: Callable[[int, int], None] = lambda done, total: None, *, again: bool = False) -> None:
        """See `ImageSet.check`. In files that were not prepared, every image is decoded once; the outcome is remembered
        until the files change, unless `again` is given."""
        if not self.paths:
            return
        stats = [path.stat() for path in self.paths]
        state = f"{self.fingerprint}{[(s.st_size, s.st_mtime_ns) for s in stats]}"
        memory = Store(str(cache_root() / "checked"))
        name = f"{hashlib.sha256(state.encode()).hexdigest()[:32]}.json"
        found = None if again else memory.read_json(name)
        if found is None:
            found = self._check_all(on_progress)
            with contextlib.suppress(OSError):  # if the cache cannot be written, the check is only repeated
                memory.write_json(name, found)
        if found["bad"]:
            first, reason = found["bad"][0]
            raise UserError(
                f"{len(found['bad'])} of the {len(self.encoded)} images of '{self.name}' cannot be read (row {first}: "
                f"{reason}): set them aside with `{prepare_command(self.name, self.paths, self._reading)}`."
            )
        self.native_size = tuple(found["size"]) if found["size"] else None

    def _check_all(self, on_progress: Callable[[int, int], None]) -> dict[str, Any]:
        def fetch(position: int) -> bytes | BadImageError:
            try:
                return bytes(self.encoded[position])
            except BadImageError as error:
                return error

        def size_of(image: bytes | BadImageError) -> tuple[int, int] | str:
            try:
                if isinstance(image, BadImageError):
                    raise image
                return check_image(image).size
            except BadImageError as error:
                return str(error)

        bad, sizes = [], set()
        outcomes = in_order(map(fetch, range(len(self.encoded))), size_of)
        for position, (_, outcome) in enumerate(outcomes):
            if isinstance(outcome, str):
                bad.append((position, outcome))
            else:
                sizes.add(outcome)
            on_progress(position + 1, len(self.encoded))
        return {"bad": bad, "size": sizes.pop() if len(sizes) == 1 else None}

"""Images with captions, for retrieval: Parquet with `image: struct<bytes, path>` and `captions: list<string>`."""

import bisect
import hashlib
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, UnidentifiedImageError

from rayclip.data.opening import data_root
from rayclip.data.parquet import _fingerprint, _open
from rayclip.types import UserError

_LAYOUT = "(image: struct<bytes, path>, captions: list<string>)"


class PairSet:
    """Images of one or several Parquet files, each with its captions.

    Attributes:
        name: as it appears in tables and metric names.
        captions: of each image, at least one, as the file has them.
        ids: `(N,)` int64, each image's row in its source.
        fingerprint: a hash of the content: the files' footers, as for image sets, and every caption.

    Raises:
        UserError: a file is missing, no Parquet, or without images; or an image is without captions.
    """

    name: str

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self.name = name
        self._files = [_open(path) for path in paths]
        rows = [row for file, path in zip(self._files, paths, strict=True) for row in _captions(path, file)]
        if not rows:
            raise UserError(f"{paths[0]} holds no rows.")
        self.captions: tuple[tuple[str, ...], ...] = tuple(rows)
        self.ids = np.arange(len(rows))
        self._groups = [(f, g) for f in self._files for g in range(f.num_row_groups)]
        self._starts = [0, *itertools.accumulate(f.metadata.row_group(g).num_rows for f, g in self._groups)]
        self._held: tuple[int, list[bytes | None]] | None = None  # one row group: retrieval reads in the file's order
        decisive = json.dumps([_fingerprint(paths), self.captions])
        self.fingerprint = hashlib.sha256(decisive.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, positions: Sequence[int]) -> list[Image.Image]:
        """The RGB images at these positions (0..N-1), in this order."""
        return [self._decode(p) for p in positions]

    def _decode(self, position: int) -> Image.Image:
        group = bisect.bisect_right(self._starts, position) - 1
        data = self._row_group(group)[position - self._starts[group]]
        try:
            return Image.open(io.BytesIO(data or b"")).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"row {position} of '{self.name}' is no readable image: mend or drop it.") from error

    def _row_group(self, group: int) -> list[bytes | None]:
        if self._held is None or self._held[0] != group:
            file, index = self._groups[group]
            column = file.read_row_group(index, columns=["image"])["image"]
            self._held = group, pc.struct_field(column, "bytes").to_pylist()
        return self._held[1]


def open_pairs(spec: str) -> PairSet:
    """Open images with captions.

    Args:
        spec: a `.parquet` file, taken whole; a folder with `test*.parquet`, or else `val*.parquet`; or the name of a
            data set of that kind below `data_root()`.

    Raises:
        UserError: nothing of the kind is there, or it holds no images with captions.
    """
    path = Path(spec)
    if path.is_file() or path.suffix == ".parquet":
        return PairSet([path], path.stem)
    folder = path if path.is_dir() else data_root() / spec
    if not spec.strip() or not folder.is_dir():
        raise UserError(
            f"no image-caption data '{spec}': give a .parquet file {_LAYOUT}, a folder with test*.parquet, or the name "
            f"of such a folder in {data_root()}."
        )
    for prefix in ("test", "val"):
        files = sorted(folder.glob(f"{prefix}*.parquet"))
        if files:
            return PairSet(files, folder.resolve().name)
    raise UserError(f"folder {folder} holds no test pairs: it needs test*.parquet or val*.parquet {_LAYOUT}.")


def _captions(path: Path, file: Any) -> list[tuple[str, ...]]:
    """A file's captions by image, after a look at its columns."""
    schema = file.schema_arrow
    columns = {name: schema.field(name).type for name in schema.names}
    image, captions = columns.get("image"), columns.get("captions")
    if image is None or not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise UserError(f"{path} has no column 'image' of encoded images: write it as pairs {_LAYOUT}.")
    if captions is None or not _is_list_of_text(captions):
        raise UserError(f"{path} has no column 'captions' of lists of text: retrieval needs pairs {_LAYOUT}.")
    rows = file.read(columns=["captions"])["captions"].to_pylist()
    for position, row in enumerate(rows):
        if not row:
            raise UserError(f"row {position} of {path} has no captions: drop the image or caption it.")
        if any(caption is None or not caption.strip() for caption in row):
            raise UserError(f"row {position} of {path} has an empty caption: drop or write it.")
    return [tuple(row) for row in rows]


def _is_list_of_text(kind: Any) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and (pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type))

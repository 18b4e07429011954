"""Does reading from prepared Parquet keep decoders busy? Prints rates; not a test, since rates depend on the machine.

    python tests/benchmarks/reading.py [--images 4000]

Two processes decode the same images to RGB, once from bytes in memory (Pillow alone), once from a prepared data set in
the order of a shuffled epoch, in batches of 128, as DataLoader workers do.
"""

import argparse
import io
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from rayclip.data import open_data
from rayclip.data.prepare import Request, prepare
from rayclip.data.sources.folder import open_folder
from rayclip.store import Store

PROCESSES, BATCH = 2, 128
KINDS = {"32 px PNG": ((32, 32), "png"), "96 px PNG": ((96, 96), "png"), "500×375 px JPEG": ((500, 375), "jpeg")}


def make_images(folder: Path, count: int, size: tuple[int, int], form: str) -> list[bytes]:
    """Pictures with the detail of photographs: smooth shapes with a little noise."""
    generator, files = np.random.default_rng(0), []
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(int)
        noisy = np.clip(pixels + generator.integers(-12, 13, pixels.shape), 0, 255).astype(np.uint8)
        path = folder / f"class {i % 2}" / f"{i:06d}.{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=90)
        files.append(path)
    return [path.read_bytes() for path in sorted(files)]


def from_memory(images: list[bytes], positions: np.ndarray) -> None:
    for batch in np.array_split(positions, max(1, len(positions) // BATCH)):
        [Image.open(io.BytesIO(images[p])).convert("RGB") for p in batch]


def from_parquet(place: str, positions: np.ndarray) -> None:
    data = open_data(place, "test")
    for batch in np.array_split(positions, max(1, len(positions) // BATCH)):
        data.images(batch.tolist())


def rate(work: object, *args: object, count: int) -> float:
    """Images per second of all processes together; the best of five rounds, to leave out what else the machine did."""
    best = 0.0
    for round_ in range(5):
        order = np.random.default_rng(round_).permutation(count)
        context = multiprocessing.get_context("fork")
        began = time.perf_counter()
        workers = [context.Process(target=work, args=(*args, order[r::PROCESSES])) for r in range(PROCESSES)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert all(worker.exitcode == 0 for worker in workers)
        best = max(best, count / (time.perf_counter() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    count = parser.parse_args().images
    Image.init()
    print(f"{'images':<18}{'Pillow alone':>13}{'Parquet':>13}")
    for name, (size, form) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            images = make_images(Path(folder) / "files", count, size, form)
            source = open_folder(None, Path(folder) / "files")
            request = Request(name="bench", class_names=source.class_names, splits=("test",))
            prepare(request, source, Store(folder))
            place = str(Path(folder) / "bench")
            raw = rate(from_memory, images, count=count)
            ours = rate(from_parquet, place, count=count)
        print(f"{name:<18}{raw:>10.0f} /s {ours:>9.0f} /s {ours / raw:>6.0%}")


if __name__ == "__main__":
    main()

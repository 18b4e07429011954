"""Does fine-tuning make image-text alignment itself more robust?  MMCoA's table VI: retrieval under Co-Attack.

    python sweeps/mmcoa_retrieval.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/mmcoa_retrieval.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --pairs PAIRS.parquet
    ray job submit --working-dir . -- python sweeps/mmcoa_retrieval.py --scale paper

Cost: `digits` 4 minutes of processor time. `paper` has not been run by us: the full-shot rows of
`mmcoa_shots.py` (which `--models` shares), and Co-Attack on COCO's 5,000 images and 25,000 captions. At `digits` the
pairs are one image of each class with five captions: a smoke test.

Numbers to expect at the scale `paper` (MMCoA, table VI, COCO 5k under Co-Attack, recall in percent at 1 / 5 / 10):

                 image to text (TR)      text to image (IR)
    untouched     3.94 / 10.34 / 15.42    1.73 /  5.23 /  7.99
    TeCoA        10.94 / 26.14 / 35.76    7.40 / 18.46 / 26.33
    MMCoA        13.22 / 29.94 / 39.12    7.39 / 18.98 / 26.55
"""

import dataclasses
import io
import tempfile
from typing import Annotated

import typer

from rayclip.cli.sweep import Run, start, sweep
from rayclip.types import UserError

CAPTIONS = ("a photo of a {}", "a handwritten {}", "the digit {}", "a scan of the digit {}", "someone wrote a {}")


@sweep("mmcoa-retrieval", methods="tecoa,mmcoa", every={"shots": "full"}, omit=["test"])
def main(
    run: Run,
    pairs: Annotated[
        str | None, typer.Option(help="Images with captions.  [default: digits' own, or mscoco_captions at paper]")
    ] = None,
    test_eps: Annotated[str | None, typer.Option(help="Co-Attack's budget.  [default: twice the training's]")] = None,
) -> None:
    """Fine-tune with each method, and evaluate image-to-text and text-to-image retrieval under Co-Attack."""
    from rayclip import api
    from rayclip.attacks import parse_attacks
    from rayclip.data import open_pairs
    from rayclip.units import parse_budget

    if pairs is None and run.model != "digits" and not run.is_paper:
        raise UserError("--pairs is missing: give a .parquet file of images with captions, or a prepared data set.")
    eps = parse_budget(test_eps, "test-eps") if test_eps else 2 * run.setting.eps
    bundled, steps = pairs is None and not run.is_paper, 10
    # The paper's settings for retrieval
    settings = {"steps": steps, "step": 1.25 * eps / steps, "stop": "final", "substitutes": run.substitutes}
    attacks = parse_attacks("clean,co-attack", settings)
    if not bundled:
        open_pairs(pairs or "mscoco_captions")
    found = run.go(run.trials(), run.evaluations("clean"))
    if not found.rows:  # of --plan
        return
    with tempfile.TemporaryDirectory(prefix="rayclip-") as place:
        rows = api.evaluate_retrieval(
            list(found.labels),
            write_digits(f"{place}/digits-pairs.parquet") if bundled else pairs or "mscoco_captions",
            run.where(),
            limit=run.options.limit,
            resolution=run.resolution("digits") if bundled else "model",
            attacks=attacks,
            eps=eps,
            seed=run.options.seed,
        )
    api.show_retrieval([dataclasses.replace(row, model=found.labels[row.model]) for row in rows])


def write_digits(path: str) -> str:
    """Write a Parquet file with the first test image of each digit and its captions; return the path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rayclip.data.digits import Digits

    digits = Digits("test")
    first = [digits.labels.tolist().index(label) for label in range(len(digits.class_names))]
    images = []
    for picture in digits.images(first):
        encoded = io.BytesIO()
        picture.save(encoded, "PNG")
        images.append({"bytes": encoded.getvalue(), "path": None})
    captions = [[caption.format(name) for caption in CAPTIONS] for name in digits.class_names]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(images, kind), "captions": captions}), path)
    return path


if __name__ == "__main__":
    start(main)

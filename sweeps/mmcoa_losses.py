"""Does MMCoA need both its image loss and its text loss?  MMCoA's table IV.

    python sweeps/mmcoa_losses.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/mmcoa_losses.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --test TEST.parquet
    ray job submit --working-dir . -- python sweeps/mmcoa_losses.py --scale paper

Cost: `digits` 4 minutes of processor time. `paper` has not been run by us: three times MMCoA's runs of table I
(`mmcoa_in_distribution.py`); with `--models` of that sweep two times.

Numbers to expect at the scale `paper` (MMCoA, table IV, top-1 in percent, image / text / multimodal / clean):

                        CIFAR10                        CIFAR100
    image loss only     76.69 / 86.75 / 69.98 / 93.42  47.28 / 47.96 / 33.94 / 70.23
    text loss only      28.85 / 96.74 / 28.49 / 96.70   9.90 / 83.03 / 10.62 / 83.74
    both                84.55 / 96.16 / 84.52 / 96.17  59.50 / 75.38 / 55.13 / 81.51
                        TinyImageNet                   ImageNet
    image loss only     22.11 / 16.34 /  8.72 / 49.98  32.64 / 13.42 /  9.93 / 53.47
    text loss only       0.92 / 63.14 /  1.72 / 72.31   3.14 / 50.75 /  8.01 / 51.54
    both                53.97 / 54.13 / 39.19 / 76.11  46.58 / 41.34 / 30.02 / 67.79
"""

from rayclip.cli.scales import IN_DISTRIBUTION
from rayclip.cli.sweep import Run, start, sweep


@sweep("mmcoa-losses", paper=IN_DISTRIBUTION, omit=["shots", "methods"])
def main(run: Run) -> None:
    """Fine-tune with MMCoA's image loss, its text loss and both, and attack the results on the same data set."""
    variants = {
        "mmcoa image loss only": run.method("mmcoa", lambda_txt=0.0),
        "mmcoa text loss only": run.method("mmcoa", lambda_img=0.0),
        "mmcoa": run.method("mmcoa"),
    }
    for data, test, part in run.pairs():
        trials = [
            run.trial(label, method, data=data, part=part, in_distribution=True) for label, method in variants.items()
        ]
        run.go(trials, run.evaluations("clean,pgd,bert,sep", tests=[test]), part=part)


if __name__ == "__main__":
    start(main)

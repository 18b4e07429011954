"""How robust are models on the data set that they were trained on?  MMCoA's table I.

    python sweeps/mmcoa_in_distribution.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/mmcoa_in_distribution.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --test T.parquet
    ray job submit --working-dir . -- python sweeps/mmcoa_in_distribution.py --scale paper

Cost: `digits` 4 minutes of processor time. `paper` has not been run by us; the paper reports 40 minutes an
epoch on two A6000 for CIFAR and 2.25 hours on four for ImageNet, 30 epochs each.

Numbers to expect at the scale `paper` (MMCoA, table I, top-1 in percent, image / text / multimodal / clean):

                  CIFAR10                        CIFAR100
    untouched      9.32 / 79.74 / 11.65 / 88.56   4.59 / 37.24 /  2.42 / 62.28
    FT-standard   63.93 / 96.21 / 64.39 / 97.01   6.53 / 62.28 /  7.74 / 85.21
    TeCoA         85.06 / 92.04 / 79.53 / 95.88  60.71 / 56.96 / 44.34 / 80.01
    MMCoA         84.55 / 96.16 / 84.52 / 96.17  59.50 / 75.38 / 55.13 / 81.51
                  TinyImageNet                   ImageNet
    untouched      1.93 / 19.67 /  2.18 / 59.46   0.79 / 13.65 /  1.80 / 59.16
    FT-standard    4.55 / 29.96 /  4.10 / 78.96   3.88 / 17.61 /  3.47 / 64.57
    TeCoA         49.01 / 25.09 / 19.80 / 66.25  41.47 / 15.84 / 11.96 / 63.29
    MMCoA         53.97 / 54.13 / 39.19 / 76.11  46.58 / 41.34 / 30.02 / 67.79
"""

from rayclip.cli.scales import IN_DISTRIBUTION
from rayclip.cli.sweep import Run, start, sweep


@sweep("mmcoa-in-distribution", paper=IN_DISTRIBUTION, omit=["shots"])
def main(run: Run) -> None:
    """Fine-tune with each method on a data set, and attack the results on the same data set."""
    for data, test, part in run.pairs():
        run.go(run.own_trials(data, part), run.evaluations("clean,pgd,bert,sep", tests=[test]), part=part)


if __name__ == "__main__":
    start(main)

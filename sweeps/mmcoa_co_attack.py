"""Do models trained against separate image and text attacks withstand a joint one?  MMCoA's table V.

    python sweeps/mmcoa_co_attack.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/mmcoa_co_attack.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --test TEST.parquet
    ray job submit --working-dir . -- python sweeps/mmcoa_co_attack.py --scale paper

Cost: `digits` 6 minutes of processor time, 3 on two cores. `paper` has not been run by us; training costs what it
does in `mmcoa_in_distribution.py` and `mmcoa_shots.py`, whose checkpoints `--models` shares.

Numbers to expect at the scale `paper` (MMCoA, table V, top-1 in percent under Co-Attack):

                  trained on the data set itself         on ImageNet: 1, 5, 50 shots, average of 15 data sets
                  CIFAR10 / CIFAR100 / TinyImageNet      1-shot / 5-shot / 50-shot
    untouched     39.72 /  9.17 /  0.46                  13.47
    FT-standard   58.48 / 12.49 /  1.00                  13.99 / 15.36 / 17.70
    TeCoA         85.58 / 48.13 / 17.94                  13.53 / 15.16 / 15.42
    MMCoA         87.96 / 60.40 / 22.88                  14.57 / 20.74 / 22.66
"""

from rayclip.cli.sweep import Run, start, sweep

OWN = ("cifar10", "cifar100", "tiny_imagenet")


@sweep("mmcoa-co-attack", paper={"shots": "1,5,50"})
def main(run: Run) -> None:
    """Fine-tune with each method, and attack image and text jointly."""
    attacks = "clean,co-attack"
    for data in OWN if run.is_paper else ():
        run.go(run.own_trials(data, data), run.evaluations(attacks, tests=[data]), part=data)
    run.go(run.trials(), run.evaluations(attacks))


if __name__ == "__main__":
    start(main)

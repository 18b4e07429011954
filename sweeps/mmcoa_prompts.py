"""Is a learned prompt around a frozen model enough?  MMCoA's table VII: AdvPT and VP against fine-tuning.

    python sweeps/mmcoa_prompts.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/mmcoa_prompts.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --test TEST.parquet
    ray job submit --working-dir . -- python sweeps/mmcoa_prompts.py --scale paper

Cost: `digits` 5 minutes of processor time. `paper` has not been run by us: on CIFAR10 and CIFAR100
the four methods; TeCoA's and MMCoA's runs are those of `mmcoa_in_distribution.py`, which `--models` shares.

Numbers to expect at the scale `paper` (MMCoA, table VII, top-1 in percent, image / text / multimodal):

             CIFAR10                 CIFAR100
    AdvPT    66.70 /   -   /   -     44.20 /   -   /   -
    VP       74.52 / 81.26 / 66.79   45.35 / 38.22 / 28.37
    TeCoA    85.06 / 92.04 / 79.53   60.71 / 56.96 / 44.34
    MMCoA    84.55 / 96.16 / 84.52   59.50 / 75.38 / 55.13
"""

from rayclip.cli.sweep import Run, start, sweep


@sweep(
    "mmcoa-prompts", methods="advpt,vp,tecoa,mmcoa", paper={"data": ("cifar10", "cifar100"), "test": ()}, omit=["shots"]
)
def main(run: Run) -> None:
    """Learn a prompt or fine-tune, and attack the results on the same data set."""
    for data, test, part in run.pairs():
        run.go(run.own_trials(data, part), run.evaluations("clean,pgd,bert,sep", tests=[test]), part=part)


if __name__ == "__main__":
    start(main)

"""How many images per class does each method need?  MMCoA's tables II and III.

    python sweeps/mmcoa_shots.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/mmcoa_shots.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --test TEST.parquet
    ray job submit --working-dir . -- python sweeps/mmcoa_shots.py --scale paper

Cost: `digits` 1.5 minutes on two CPU cores. `paper` has not been run by us; by operation count about 30 A100-hours
to train (bf16; nearly all of it the full-shot rows) and up to 200 to attack 13 models on 15 data sets (PGD-100, fp32).

Numbers to expect at the scale `paper` (MMCoA, averages over 15 data sets, top-1 in percent):

                          multimodal (table II)   clean (table III)
    untouched CLIP                 4.64                63.05
    FT-standard   1 / 5 / 50 / full   4.72 / 4.84 / 6.89 / 7.23        65.26 / 64.67 / 59.02 / 54.18
    TeCoA         1 / 5 / 50 / full   4.59 / 6.43 / 15.00 / 19.96      62.67 / 54.84 / 51.67 / 54.34
    MMCoA         1 / 5 / 50 / full   4.87 / 9.84 / 18.46 / 22.00      62.75 / 58.29 / 53.76 / 54.62

After an interruption the same command continues the sweep; a finished sweep prints its table again.
"""

from rayclip.cli.sweep import Run, start, sweep


@sweep("mmcoa-shots")
def main(run: Run) -> None:
    """Fine-tune with each method on 1, 5, ... and all images per class, and attack every result."""
    run.go(run.trials(), run.evaluations("clean,pgd,bert,sep"))


if __name__ == "__main__":
    start(main)

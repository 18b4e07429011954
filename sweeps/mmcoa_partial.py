"""Is it enough to fine-tune the image encoder?  MMCoA's figure 5.

    python sweeps/mmcoa_partial.py                     # bundled digits: minutes on two cores, no downloads
    python sweeps/mmcoa_partial.py --scale pocket --model local-dir:PATH --data TRAIN.parquet --test TEST.parquet
    ray job submit --working-dir . -- python sweeps/mmcoa_partial.py --scale paper

Cost: `digits` at most 5 minutes on two CPU cores. `paper` has not been run by us: twice the rows of those methods in
`mmcoa_shots.py`, whose full fine-tuning `--models` shares.

To expect at the scale `paper`: the figure prints no numbers. The paper reads from it that the more parameters are
trained, the higher is the accuracy under the multimodal attack.
"""

from rayclip.cli_sweep import Run, start, sweep


@sweep("mmcoa-partial", methods="tecoa,mmcoa", every={"shots": "5,full"})
def main(run: Run) -> None:
    """Fine-tune the image encoder alone and the whole model, and attack the results."""
    parts = {"image": "image", "all": "whole"}
    trials = [
        run.trial(f"{label} {part}", run.method(name, trains=trains), shots=shots)
        for label, name, shots in run.grid()
        for trains, part in parts.items()
    ]
    run.go(trials, [run.evaluation("clean,pgd,bert,sep")])


if __name__ == "__main__":
    start(main)

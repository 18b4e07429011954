"""`rayclip eval`: attack models and print their clean and robust accuracy."""

from rayclip.cli import plan
from rayclip.cli.command import Positive
from rayclip.cli.options import hand_out
from rayclip.cli.request import Request


def evaluate(asked: Request, workers: Positive | None = None) -> None:
    """Attack models and print a table of their clean and robust accuracy.

    \b
    Examples:
      rayclip eval --model digits --data digits --eps 32/255 --out results
      rayclip eval --model local-dir:OUT --data cifar10,food101 --attacks clean,pgd:steps=100,autoattack --eps 1/255 \\
        --out s3://BUCKET/results --cluster
      rayclip eval --model ViT-B-32:openai --data TEST.parquet --defense none,ttc --scorer template,ensemble \\
        --eps 4/255 --out results

    Args:
        workers: Evaluation actors, at most; a cluster's autoscaler is asked for their nodes.
            [default: a GPU, else a core, each, of all that the cluster has or may have]
    """
    from rayclip import progress
    from rayclip.cli import answers

    answer = answers.find(asked.words, asked.files, asked.out)
    if answer is not None:
        for level, sentence in answer.said:
            progress.say(level, sentence)
    else:
        from rayclip import api

        evaluation, where = asked.evaluation, asked.where(workers)
        with progress.listening() as said:
            rows = api.evaluate_models(asked.models, evaluation, where)
        answer = answers.Answer(rows, said)
        answers.keep(asked.words, asked.files, asked.out, answer)

    def show() -> None:
        show_rows(answer.rows)
        print(f"results: {asked.out}")
        plan.say_spent(asked.out)

    from rayclip.reports.rows import rows_json, show_rows

    hand_out(asked.json, rows_json(answer.rows), show)

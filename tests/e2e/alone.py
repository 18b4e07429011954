"""What one process finds by itself, without Ray."""

from rayclip.api.checks import Opened, plan_cells
from rayclip.api.request import Evaluation
from rayclip.attacks import parse_attacks
from rayclip.evaluation import Evaluator, Protocol, Store, outstanding


def evaluate_alone(out, model, data, attacks, *, limit=None, **settings):
    """Write what `rayclip eval --eps 32/255 --out OUT` writes, with other shards.

    Args:
        settings: of all attacks, such as `steps`.
    """
    wanted = Evaluation(
        data=[str(data)], attacks=parse_attacks(attacks, settings), protocol=Protocol(eps=32 / 255), limit=limit
    )
    cells, positions = plan_cells([model], wanted, Opened(quiet=True))
    store = Store(str(out))
    evaluator = Evaluator(store)
    for shards in outstanding(cells, positions, store, 100):
        for shard in shards:
            evaluator.run(shard)

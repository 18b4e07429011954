"""Find and release the Ray resources that lost Train runs have reserved.

Ray keeps the placement group of a dead actor until the whole job ends (README, notes). Nothing public tells whose a
group is: the workers of each trial ask for a slightly different amount of CPU, by which its groups are recognised among
those of this job.
"""

import functools
import itertools

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

_UNIT = 1e-4  # Ray's smallest difference of a resource
_MOST = 0.1  # maximum part of `cpus` by which an amount differs
_PER_NODE = 32  # workers of a trial on one node, for which amounts are checked


@functools.cache
def distinct_cpus(cpus: float, workers: int) -> tuple[float, ...]:
    """Return amounts of CPU of a worker, all slightly below `cpus`, one for each trial at work.

    Elastic training divides a node's by one worker's, in floats and rounding down: only amounts that divide exactly are
    returned.
    """
    amounts = (round(cpus - number * _UNIT, 4) for number in range(1, int(_MOST * cpus / _UNIT)))

    def is_exact(amount: float) -> bool:
        sums = itertools.accumulate(itertools.repeat(amount, min(workers, _PER_NODE)))
        return all(total // amount == count for count, total in enumerate(sums, 1))

    return tuple(filter(is_exact, amounts))


def release(cpus: float) -> None:
    """Remove the placement groups of this job whose bundles have this amount of CPU (one of `distinct_cpus`)."""
    job = ray.get_runtime_context().get_job_id()  # which ends the ids of its placement groups
    for group, record in placement_group_table().items():
        amounts = {round(bundle.get("CPU", 0.0), 4) for bundle in record["bundles"].values()}
        if group.endswith(job) and record["state"] != "REMOVED" and amounts == {cpus}:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))

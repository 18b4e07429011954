"""What the processes of a trial leave for each other, and what lost ones have left reserved in Ray."""

import contextlib
from dataclasses import dataclass
from typing import Literal

import ray
from ray._private.state import state
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup, remove_placement_group

from rayclip.store import Store

_Kind = Literal["failure", "pressure", "reservation", "starved", "stop"]


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What the processes of a trial tell each other, beside its unfinished run.

    Attributes:
        storage: which driver and workers share.
        run: name of the trial's Train run.
    """

    storage: Store
    run: str

    def read(self, kind: _Kind) -> str | None:
        """`failure`: what trying again does not mend; `pressure`: how often Ray's memory monitor has ended a worker,
        and the node of the last; `reservation`: resources of the Train run; `starved`: memory has ended Train itself;
        `stop`: a request."""
        note = self.storage.read(f"{self.run}.{kind}")
        return None if note is None else note.decode()

    def write(self, kind: _Kind, text: str) -> None:
        self.storage.write(f"{self.run}.{kind}", text.encode())

    def clear(self, kind: _Kind) -> None:
        self.storage.delete(f"{self.run}.{kind}")

    def write_node(self, rank: int, address: str) -> None:
        """Where a rank is: nobody can ask it once it has been ended."""
        self.storage.write(f"{self.run}.node-{rank}", address.encode())

    def node_of(self, rank: int) -> str | None:
        note = self.storage.read(f"{self.run}.node-{rank}")
        return None if note is None else note.decode()


def release(notes: Notes) -> None:
    """Give back what a trial's Train run has reserved, if its driver was killed and could not.

    Ray keeps an actor's placement groups until the whole job ends, and Train's own cleaner needs the dashboard, which a
    private Ray has not: without this, a driver that is started again waits for its own resources for ever, and where a
    node has gone for good, Ray looks for room for the lost part alone and places nothing else. What Train has asked
    Ray's coordinator for would be kept for it for three minutes more.
    """
    note = notes.read("reservation")
    if note is not None:
        group, _, requester = note.partition(" ")
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))
        with contextlib.suppress(ValueError):  # there is none
            coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
            coordinator.cancel_request.remote(requester)
        notes.clear("reservation")
    for orphan in _orphans():
        remove_placement_group(orphan)


def _orphans() -> list[PlacementGroup]:
    """What actors of this job have reserved that are dead: a controller may be lost before a worker could note it.

    The group's own flag is not enough: a controller whose node has just died may still ask for one, and that is
    registered with a creator who is dead already.
    """
    job, no_actor = ray.get_runtime_context().get_job_id(), b"\xff" * 16  # Tune's own are no actor's
    accessor, found = state._connect_and_get_accessor(), []
    for record in accessor.get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(record)
        ours = group.creator_job_id.hex() == job and group.creator_actor_id != no_actor and not group.is_detached
        if not ours or group.state == group.REMOVED:  # a long sweep has removed many
            continue
        creator = accessor.get_actor_info(ray.ActorID(group.creator_actor_id))
        if creator is None or gcs_pb2.ActorTableData.FromString(creator).state == gcs_pb2.ActorTableData.DEAD:
            found.append(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return found

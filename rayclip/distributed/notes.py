"""Pass notes between the processes of a trial, and release the Ray resources that lost processes had reserved."""

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
    """Notes that the processes of a trial write for each other, stored beside its unfinished run.

    Attributes:
        storage: storage that driver and workers share.
        run: name of the trial's Train run.
    """

    storage: Store
    run: str

    def read(self, kind: _Kind) -> str | None:
        """Return a note; None if there is none.

        Args:
            kind: `failure`: an error that another attempt would not fix; `pressure`: how often Ray's memory monitor has
                killed a worker, and the node of the last one; `reservation`: resources of the Train run; `starved`: one
                of Train's own processes ran out of memory; `stop`: a request to stop.
        """
        note = self.storage.read(f"{self.run}.{kind}")
        return None if note is None else note.decode()

    def write(self, kind: _Kind, text: str) -> None:
        self.storage.write(f"{self.run}.{kind}", text.encode())

    def clear(self, kind: _Kind) -> None:
        self.storage.delete(f"{self.run}.{kind}")

    def write_node(self, rank: int, address: str) -> None:
        """Record the node of a rank, which cannot be asked once it has been killed."""
        self.storage.write(f"{self.run}.node-{rank}", address.encode())

    def node_of(self, rank: int) -> str | None:
        note = self.storage.read(f"{self.run}.node-{rank}")
        return None if note is None else note.decode()


def release(notes: Notes) -> None:
    """Release the resources that a trial's Train run has reserved, if its driver was killed before it could.

    Ray keeps an actor's placement groups until the whole job ends, and Train's own cleaner needs the dashboard, which a
    private Ray does not have. Without this, a restarted driver would wait for its own resources for ever; and if a node
    is gone for good, Ray would look for room for the lost part alone and place nothing else. Train's request to Ray's
    autoscaling coordinator would be kept for three more minutes.
    """
    note = notes.read("reservation")
    if note is not None:
        group, _, requester = note.partition(" ")
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))
        with contextlib.suppress(ValueError):  # there is no coordinator
            coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
            coordinator.cancel_request.remote(requester)
        notes.clear("reservation")
    for orphan in _orphans():
        remove_placement_group(orphan)


def _orphans() -> list[PlacementGroup]:
    """Return the placement groups of this job's dead actors: a controller may be lost before a worker notes its group.

    The group's own flag is not enough: a controller whose node has just died may still request a group, which is then
    registered with a creator that is already dead.
    """
    job, no_actor = ray.get_runtime_context().get_job_id(), b"\xff" * 16  # Tune's own groups belong to no actor
    accessor, found = state._connect_and_get_accessor(), []
    for record in accessor.get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(record)
        ours = group.creator_job_id.hex() == job and group.creator_actor_id != no_actor and not group.is_detached
        if not ours or group.state == group.REMOVED:  # skip removed ones: a long sweep has many
            continue
        creator = accessor.get_actor_info(ray.ActorID(group.creator_actor_id))
        if creator is None or gcs_pb2.ActorTableData.FromString(creator).state == gcs_pb2.ActorTableData.DEAD:
            found.append(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return found

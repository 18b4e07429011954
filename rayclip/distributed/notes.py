"""Pass notes between the processes of a trial, through the storage that they share."""

from dataclasses import dataclass
from typing import Literal

from rayclip.store import Store

_Kind = Literal["failure", "pressure", "starved", "stop"]


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
                killed a worker, and the node of the last one; `starved`: one of Train's own processes ran out of
                memory; `stop`: a request to stop.
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

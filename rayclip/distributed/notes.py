"""Pass notes between the processes of a trial, through the storage that they share."""

from dataclasses import dataclass

from rayclip.store import Store


@dataclass(frozen=True, kw_only=True)
class Notes:
    """Notes that the processes of a trial write for each other, stored beside its unfinished run.

    Kinds are `failure`: an error that another attempt would not fix; `pressure`: how often Ray's memory monitor has
    killed a worker, and the node of the last one; `node-RANK`: the address of a rank's node, which cannot be asked once
    it has been killed; `starved`: one of Train's own processes ran out of memory; `stop`: a request to stop.

    Attributes:
        storage: storage that driver and workers share.
        run: name of the trial's Train run.
    """

    storage: Store
    run: str

    def read(self, kind: str) -> str | None:
        """Return a note; None if there is none."""
        note = self.storage.read(f"{self.run}.{kind}")
        return None if note is None else note.decode()

    def write(self, kind: str, text: str) -> None:
        self.storage.write(f"{self.run}.{kind}", text.encode())

    def clear(self, kind: str) -> None:
        self.storage.delete(f"{self.run}.{kind}")

"""Say when a run waits for its images to be decoded."""

from rayclip.progress import say

_LOOKS_AT_S = 60.0  # of work, before anything is said: what starts up waits, too
_MUCH = 0.2  # share of the time


class DataWait:
    """The share of their time that workers wait for images; a warning, once, if it is much.

    Args:
        what: waits where there is no GPU.
    """

    def __init__(self, what: str) -> None:
        self._what, self._waiting, self._seconds, self._is_told = what, 0.0, 0.0, False

    def add(self, waiting: float, seconds: float, *, on_gpu: bool) -> None:
        """Add some seconds of a worker, in `waiting` of which it had no images."""
        self._waiting, self._seconds = self._waiting + waiting, self._seconds + seconds
        share = self._waiting / max(self._seconds, 1e-9)
        if self._is_told or self._seconds < _LOOKS_AT_S or share < _MUCH:
            return
        self._is_told = True
        who = "the GPU" if on_gpu else self._what
        say("warning", f"{who} waits {100 * share:.0f} % of the time for images to be decoded: raise --data-workers.")

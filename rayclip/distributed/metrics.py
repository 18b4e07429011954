"""Where trials log their metrics: what `run_trials` asks of whoever keeps them."""

from collections.abc import Sequence
from typing import Protocol


class MetricLog(Protocol):
    """Takes the metrics of runs. Picklable, since rank 0 of each trial gets it."""

    def metrics(self, run: str, values: Sequence[tuple[str, float, int]]) -> None:
        """Log (name, value, step) triples to a run."""

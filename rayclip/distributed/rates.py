"""Measure how fast a cluster's workers train."""

import os
from collections.abc import Sequence

import ray
import torch
from ray.exceptions import RayError

from rayclip.distributed.faults import explain
from rayclip.distributed.pool import use_device
from rayclip.distributed.trials import Workers
from rayclip.evaluation.costs import Hardware, peak_memory
from rayclip.progress import Display
from rayclip.training import TrainConfig
from rayclip.training.rate import measure_rate


def measure_rates(
    configs: Sequence[TrainConfig], workers: Workers, threads: int, display: Display
) -> tuple[list[float], Hardware | None, float]:
    """Return the images per second of each configuration on one of the workers, with so many threads if it has no GPU,
    that worker's hardware, and the most bytes of memory that it held."""
    measure = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus, max_retries=0)(_measure)
    rates, hardware, memory = [], None, 0.0
    for number, config in enumerate(configs):
        display.update("measuring trainings", number, len(configs), config.method.name)
        try:
            rate, hardware, held = ray.get(measure.remote(config, threads))
        except RayError as error:
            raise explain(error) from error
        rates.append(rate)
        memory = max(memory, held)
    return rates, hardware, memory


def _measure(config: TrainConfig, threads: int) -> tuple[float, Hardware, float]:
    device = torch.device(use_device(min(threads, os.cpu_count() or 1)))
    return measure_rate(config, device), Hardware.here(device), peak_memory()

"""Measure how fast a cluster's workers train."""

from collections.abc import Sequence

import ray
import torch
from ray.exceptions import RayError

from rayclip.distributed.faults import explain
from rayclip.distributed.pool import use_device
from rayclip.distributed.trials import Workers
from rayclip.evaluation.costs import Hardware
from rayclip.progress import Display
from rayclip.training import TrainConfig
from rayclip.training.rate import measure_rate


def measure_rates(
    configs: Sequence[TrainConfig], workers: Workers, display: Display
) -> tuple[list[float], Hardware | None]:
    """Return the images per second of each configuration on one of the workers, and that worker's hardware."""
    measure = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus, max_retries=0)(_measure)
    rates, hardware = [], None
    for number, config in enumerate(configs):
        display.update("measuring trainings", number, len(configs), config.method.name)
        try:
            rate, hardware = ray.get(measure.remote(config, workers.cpus))
        except RayError as error:
            raise explain(error) from error
        rates.append(rate)
    return rates, hardware


def _measure(config: TrainConfig, cpus: float) -> tuple[float, Hardware]:
    device = torch.device(use_device(cpus))
    return measure_rate(config, device), Hardware.here(device)

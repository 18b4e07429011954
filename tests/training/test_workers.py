"""Two workers give the loss curve of one, whatever the options."""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rayclip.models.prompts import Prompted
from rayclip.training import train
from training.test_loop import LocalHost, config

OPTIONS = {
    "mmcoa in parts": ("mmcoa", {"accumulate": 2}),
    "advpt": ("advpt", {"ema": 0.5}),
    "everything": ("tecoa", {"accumulate": 3, "ema": 0.9, "eps_warmup": 1.5}),
}


def settings(option):
    name, changes = OPTIONS[option]
    base = config(name, **changes)
    return replace(
        base,
        method=replace(base.method, trains={"mmcoa": "all", "tecoa": "last-2", "advpt": "prompt"}[name]),
        recipe=replace(base.recipe, optimizer="sgd", lr=1e-3),
    )


def watched(clip):
    return (clip.learned if isinstance(clip, Prompted) else clip.model.visual.proj).detach()


def worker(rank, folder, port, queue):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results = {}
    for number, option in enumerate(OPTIONS):
        host = LocalHost(folder / str(number))
        host.rank, host.world_size = rank, 2
        clip = train(settings(option), host)
        results[option] = host.curve, watched(clip).numpy()
    if rank == 0:
        queue.put(results)
    dist.barrier()
    dist.destroy_process_group()


def test_two_workers_give_one_workers_curve(tmp_path, free_port):
    """Every option on the same two processes: starting them is what takes the time."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=worker, args=(rank, tmp_path, free_port, queue)) for rank in range(2)]
    for p in processes:
        p.start()
    results = queue.get(timeout=300)
    for p in processes:
        p.join(60)
        assert p.exitcode == 0
    for option, (curve, weights) in results.items():
        alone = LocalHost(tmp_path / "one" / option)
        clip = train(settings(option), alone)
        assert set(curve) == set(alone.curve) == set(range(1, 7)), option
        for step, row in alone.curve.items():
            assert curve[step] == pytest.approx(row, rel=1e-3), option
        assert torch.allclose(torch.from_numpy(weights), watched(clip), atol=1e-5), option

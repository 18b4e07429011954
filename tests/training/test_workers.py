"""Two workers give the loss curve of one, whatever the options, and whatever the model's normalisation."""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from conftest import tiny_clip
from processes import on_two_processes
from rayclip.models import load_model
from rayclip.models.checkpoint import read_lineage, save_checkpoint
from rayclip.models.prompts import Prompted
from rayclip.training import train
from training.test_loop import LocalHost, config

RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}
OPTIONS = {
    "batch norm": ("tecoa", {"accumulate": 1}),
    "batch norm in parts": ("tecoa", {"accumulate": 2}),
    "mmcoa in parts": ("mmcoa", {"accumulate": 2}),
    "advpt": ("advpt", {"ema": 0.5}),
    "everything": ("tecoa", {"accumulate": 3, "ema": 0.9, "eps_warmup": 1.5}),
}


def save_resnet(folder):
    """A small ModifiedResNet whose BatchNorms have statistics, as a trained one has."""
    clip = tiny_clip(vision_cfg=RESNET)
    generator = torch.Generator().manual_seed(0)
    for name, buffer in clip.model.visual.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    save_checkpoint(clip, folder / "resnet", {})


def settings(option, folder):
    name, changes = OPTIONS[option]
    base = config(name, **changes)
    if option.startswith("batch norm"):
        base = replace(base, model=f"local-dir:{folder / 'resnet'}")
        base = replace(base, method=replace(base.method, trains="image"))
        return replace(base, recipe=replace(base.recipe, optimizer="sgd", lr=1e-2))
    return replace(
        base,
        method=replace(base.method, trains={"mmcoa": "all", "tecoa": "last-2", "advpt": "prompt"}[name]),
        recipe=replace(base.recipe, optimizer="sgd", lr=1e-3),
    )


def watched(clip):
    if isinstance(clip, Prompted):
        return clip.learned.detach()
    visual = clip.model.visual
    return visual.proj.detach() if hasattr(visual, "proj") else flat(visual.state_dict())


def flat(state):
    """Weights and statistics."""
    return torch.cat([x.detach().float().flatten() for x in state.values()])


def worker(rank, folder, port, queue):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results = {}
    for number, option in enumerate(OPTIONS):
        host = LocalHost(folder / str(number))
        host.rank, host.world_size = rank, 2
        clip = train(settings(option, folder), host)
        results[option] = host.curve, watched(clip).numpy()
    if rank == 0:
        queue.put(results)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.ci
def test_two_workers_give_one_workers_curve(tmp_path, free_port):
    """Every option on the same two processes: starting them is what takes the time."""
    save_resnet(tmp_path)
    for option, (curve, weights) in on_two_processes(worker, tmp_path, free_port).items():
        alone = LocalHost(tmp_path / "one" / option)
        clip = train(settings(option, tmp_path), alone)
        assert set(curve) == set(alone.curve) == set(range(1, 7)), option
        for step, row in alone.curve.items():
            assert curve[step] == pytest.approx(row, rel=1e-3), option
        assert torch.allclose(torch.from_numpy(weights), watched(clip), atol=1e-5), option


def test_batch_norm_keeps_its_statistics_and_says_so(tmp_path):
    """In parts or whole, the step is the same, since no sample's loss depends on the others."""
    save_resnet(tmp_path)
    before = load_model(f"local-dir:{tmp_path / 'resnet'}").model.visual.state_dict()
    hosts, after = [], []
    for option in ("batch norm", "batch norm in parts"):
        hosts.append(LocalHost(tmp_path / option))
        clip = train(replace(settings(option, tmp_path), save_every_epochs=3), hosts[-1])
        assert not any(module.training for module in clip.modules())
        after.append(clip.model.visual.state_dict())
    statistics = [name for name in before if "running" in name or "num_batches" in name]
    learned = [name for name in before if name.startswith("layer1.0.bn1.")]
    assert statistics and all(torch.equal(before[n], after[0][n]) for n in statistics)
    assert any(not torch.equal(before[n], after[0][n]) for n in learned), "scale and shift are trained"
    assert torch.allclose(flat(after[0]), flat(after[1]), atol=1e-5)
    for step, row in hosts[0].curve.items():
        assert hosts[1].curve[step] == pytest.approx(row, rel=1e-3)
    assert read_lineage(hosts[0].checkpoints[-1])["batch_norm"] == "statistics of the base model, frozen"

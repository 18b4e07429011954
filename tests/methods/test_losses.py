"""The losses agree with their formulas, entry by entry, in float64; several workers give one worker's gradient."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from open_clip.loss import SigLipLoss
from torch.nn.parallel import DistributedDataParallel

import naive
from conftest import tiny_clip
from processes import on_two_processes
from rayclip.methods import METHODS, Batch, ClassTexts, Original, make_method
from rayclip.methods.losses import class_cross_entropy, contrastive
from rayclip.methods.parallel import local_count
from rayclip.models import TEMPLATE, class_prompts
from rayclip.models.clip import frozen
from rayclip.rng import sample_keys
from rayclip.training.loop import choose_trainable
from rayclip.training.step import LossOf, attack_and_backward
from rayclip.types import UserError

CLASSES = ("cat", "dog", "truck", "lemon")


ON_IMAGES = [name for name, kind in METHODS.items() if kind.uses_attack() and not kind.prepares]


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def vectors(n=9, d=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("targets", ["diagonal", "class"])
def test_contrastive_agrees_with_the_plain_loop(targets):
    images, texts = vectors()
    labels = torch.tensor([0, 1, 1, 2, 0, 3, 1, 2, 4])
    ours = contrastive(unit(images), unit(texts), labels, torch.tensor(14.0), 9, targets).mean().item()
    assert ours == pytest.approx(naive.contrastive(images, texts, labels.tolist(), 14.0, targets).item(), abs=1e-9)


@pytest.mark.parametrize("labels", [list(range(9)), [0, 1, 1, 2, 0, 3, 1, 2, 4]], ids=["own text", "class"])
def test_a_siglip_is_trained_by_its_own_loss(labels):
    """open_clip's loss with each image's own text as its one positive; else the plain sum over all pairs."""
    images, texts = (unit(x) for x in vectors())
    scale, bias = torch.tensor(117.0), torch.tensor(-12.9)
    ours = contrastive(images, texts, torch.tensor(labels), scale, 9, "class", bias).mean().item()
    logits = scale * images @ texts.T + bias
    pairs = [(i, j, 1 if labels[i] == labels[j] else -1) for i in range(9) for j in range(9)]
    plain = sum(torch.log1p((-sign * logits[i, j]).exp()).item() for i, j, sign in pairs) / 9
    assert ours == pytest.approx(plain, abs=1e-9)
    published = SigLipLoss()(images, texts, scale, bias).item()
    diagonal = contrastive(images, texts, torch.tensor(labels), scale, 9, "diagonal", bias).mean().item()
    assert diagonal == pytest.approx(published, abs=1e-9) and (ours == pytest.approx(published)) == (labels[2] == 2)


def test_the_two_target_conventions_agree_when_no_class_occurs_twice():
    images, texts = vectors()
    values = [
        contrastive(unit(images), unit(texts), torch.arange(9), torch.tensor(14.0), 9, t) for t in ("diagonal", "class")
    ]
    assert torch.allclose(*values, atol=1e-12)


def test_class_cross_entropy_agrees_with_the_plain_loop():
    images, texts = vectors()
    labels = torch.arange(9) % 5
    ours = class_cross_entropy(unit(images), unit(texts[:5]), labels, torch.tensor(14.0))
    for i in range(9):
        plain = naive.cross_entropy(naive.scores(images[i], texts[:5], 14.0), int(labels[i]))
        assert ours[i].item() == pytest.approx(plain, abs=1e-9)


def example(clip, n=8, chosen=None):
    """A batch; the original is another model than `clip`, so that all that depends on it can be seen."""
    pixels = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(clip.mean.dtype)
    labels = torch.arange(n) % len(CLASSES)
    prompts = class_prompts(CLASSES) if chosen is None else chosen.prompts(CLASSES, TEMPLATE)
    base = tiny_clip(seed=1, dtype=clip.mean.dtype).requires_grad_(False)
    return Batch(
        pixels_BCHW=pixels,
        labels_B=labels,
        keys_B=sample_keys(range(n), 0),
        texts=ClassTexts(clip, prompts, trainable=True),
        total=n,
        original=Original(clip=base, texts=ClassTexts(base, prompts, trainable=False)),
        auxiliary=auxiliary(clip, chosen),
    )


def auxiliary(clip, chosen):
    return None if chosen is None else chosen.auxiliary(clip, 0).to(clip.mean.dtype)


def method(name, **settings):
    if name == "saft":
        settings = {"captions": "templates", "sets": 3, **settings}
    if name.startswith("apt"):
        settings = {"context": 5, **settings}  # a longer one would leave no room for the class
    return make_method(
        name, eps=8 / 255, steps=3, step=4 / 255, defaults={"substitutes": "clip-table", "k": 4}, **settings
    )


def attacked(clip, chosen, batch):
    with frozen(clip):
        return chosen.attack(clip, batch)


def same_value_and_gradient(clip, chosen, loss, expected):
    """To 1e-9, in every parameter that the method trains."""
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    trained = clip.parameters_of(chosen.trains)
    ours, theirs = (torch.autograd.grad(value, trained) for value in (loss, expected))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(ours, theirs, strict=True))
    assert any(g.abs().max() > 1e-3 for g in ours)


@pytest.mark.parametrize("targets", ["diagonal", "class"])
@pytest.mark.parametrize(("img", "txt"), [(0.5, 0.5), (0.0, 1.0), (0.3, 0.0)])
def test_mmcoa_is_the_weighted_sum_of_its_two_losses(targets, img, txt):
    clip = tiny_clip(dtype=torch.float64)
    chosen = method("mmcoa", lambda_img=img, lambda_txt=txt, targets=targets)
    batch = attacked(clip, chosen, example(clip))
    loss, metrics = chosen.loss(clip, batch)
    labels = batch.labels_B.tolist()

    def part(pixels, prompts):
        images = clip.encode_image(pixels, normalize=False)
        texts = clip.encode_text(clip.tokenize(prompts), normalize=False)
        return naive.contrastive(images, texts, labels, clip.scale, targets)

    expected = 0.0
    if img:
        image = part(batch.adversarial_BCHW, [batch.texts.prompts[c] for c in labels])
        assert metrics["loss_image"].item() == pytest.approx(image.item(), abs=1e-9)
        expected += img * image
    if txt:
        text = part(batch.pixels_BCHW, [batch.adversarial_prompts[c] for c in labels])
        assert metrics["loss_text"].item() == pytest.approx(text.item(), abs=1e-9)
        expected += txt * text
    same_value_and_gradient(clip, chosen, loss, expected)
    assert (batch.adversarial_BCHW is None) == (img == 0) and (batch.adversarial_prompts is None) == (txt == 0)


@pytest.mark.parametrize("targets", ["diagonal", "class"])
def test_mmcoas_attack_raises_its_image_loss(targets):
    """Step by step, the whole batch at once: each image is in the loss of all others."""
    clip = tiny_clip(dtype=torch.float64)
    chosen, batch = method("mmcoa", lambda_txt=0.0, targets=targets), example(clip)
    labels = batch.labels_B.tolist()
    texts = clip.encode_text(clip.tokenize([batch.texts.prompts[c] for c in labels]), normalize=False).detach()

    def loss(pixels):
        return naive.contrastive(clip.encode_image(pixels, normalize=False), texts, labels, clip.scale, targets)

    expected = naive.ascend_together(
        loss, batch.pixels_BCHW, keys=batch.keys_B.tolist(), eps=chosen.eps, step=chosen.step, steps=chosen.steps
    )
    assert torch.allclose(attacked(clip, chosen, batch).adversarial_BCHW, expected, atol=1e-9)


@pytest.mark.parametrize("trains", ["all", "image", "last-1"])
@pytest.mark.parametrize("name", ["tecoa", "ft-standard"])
def test_class_losses_average_over_the_batch(name, trains):
    clip = tiny_clip(dtype=torch.float64)
    chosen = method(name, trains=trains)
    batch = attacked(clip, chosen, example(clip))
    pixels = batch.adversarial_BCHW if name == "tecoa" else batch.pixels_BCHW
    texts = [naive.unit(t) for t in clip.encode_text(clip.tokenize(batch.texts.prompts), normalize=False)]
    expected = 0.0
    for image, y in zip(clip.encode_image(pixels, normalize=False), batch.labels_B.tolist(), strict=True):
        scores = [clip.scale * (naive.unit(image) * t).sum() for t in texts]
        expected = expected + (torch.stack(scores).exp().sum().log() - scores[y]) / len(pixels)
    same_value_and_gradient(clip, chosen, chosen.loss(clip, batch)[0], expected)


@pytest.mark.parametrize("name", ON_IMAGES)
def test_training_attacks_stay_in_the_ball_and_raise_the_loss(name):
    clip = tiny_clip()
    chosen = method(name)
    batch = example(clip, chosen=chosen)
    made = attacked(clip, chosen, batch)
    assert (made.adversarial_BCHW - batch.pixels_BCHW).abs().max() <= 8 / 255 + 1e-6
    assert made.adversarial_BCHW.min() >= 0 and made.adversarial_BCHW.max() <= 1
    losses = [
        chosen.loss(clip, replace(made, adversarial_BCHW=images))[1]
        for images in (batch.pixels_BCHW, made.adversarial_BCHW)
    ]
    key = "loss_image" if name == "mmcoa" else "loss"
    assert losses[1][key] > losses[0][key]


def test_the_training_attacks_norm_and_start_are_settings():
    clip = tiny_clip()
    chosen, batch = method("tecoa"), example(clip)
    delta = attacked(clip, replace(chosen, norm="l2", eps=0.2, step=0.1), batch).adversarial_BCHW - batch.pixels_BCHW
    norms = delta.flatten(1).norm(dim=1)
    assert norms.max() <= 0.2 + 1e-6 and norms.min() > 0.05 and (delta.abs().amax((1, 2, 3)) > 8 / 255).all()
    one = replace(chosen, steps=1, start="zero", step=1 / 255)
    delta = attacked(clip, one, batch).adversarial_BCHW - batch.pixels_BCHW
    inside = (batch.pixels_BCHW > 1 / 255) & (batch.pixels_BCHW < 254 / 255)
    assert torch.allclose(delta[inside].abs() * 255, torch.ones(int(inside.sum())), atol=1e-3)
    again = replace(batch, keys_B=batch.keys_B + 1)
    for start, same in (("zero", True), ("random", False)):
        made = [attacked(clip, replace(chosen, start=start), b).adversarial_BCHW for b in (batch, again)]
        assert torch.equal(*made) == same


def test_an_attack_leaves_mode_and_gradients_as_they_were():
    clip = tiny_clip().train()
    clip.model.visual.proj.requires_grad_(False)
    before = [p.requires_grad for p in clip.parameters()]
    attacked(clip, method("mmcoa"), example(clip))
    assert clip.training and [p.requires_grad for p in clip.parameters()] == before
    assert all(p.grad is None for p in clip.parameters())


def test_a_loss_of_nothing_is_refused():
    with pytest.raises(UserError):
        make_method("mmcoa", lambda_img=0.0, lambda_txt=0.0)


def test_an_unknown_method_is_explained():
    with pytest.raises(UserError, match=", ".join(METHODS)):
        make_method("tecoo")


def one_step(name, targets, parts=1, **model):
    """The loss of one step on this rank's share of the batch, averaged over ranks, and all trained gradients."""
    chosen = method(name, **({"targets": targets} if name == "mmcoa" else {}))
    if chosen.trains != "prompt" and name not in ("fare", "sim-clip", "lore", "leaf"):
        chosen = replace(chosen, trains="all")
    clip = chosen.wrap_model(tiny_clip(dtype=torch.float64, **model), seed=0).train()
    trained = choose_trainable(clip, chosen)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    whole = example(clip, 7, chosen)
    if chosen.prepares:
        with frozen(clip):
            whole = replace(whole, prepared_BD=chosen.prepare(clip, whole))
    batch = replace(
        whole,
        pixels_BCHW=whole.pixels_BCHW[rank::size],
        labels_B=whole.labels_B[rank::size],
        keys_B=whole.keys_B[rank::size],
        prepared_BD=None if whole.prepared_BD is None else whole.prepared_BD[rank::size],
    )
    assert len(batch.labels_B) == local_count(7, rank, size)
    module = LossOf(clip, chosen, auxiliary(clip, chosen))
    if size > 1:
        module = DistributedDataParallel(module)
    widest = []
    clip.model.visual.ln_pre.register_forward_pre_hook(lambda module, tokens: widest.append(len(tokens[0])))
    metrics = attack_and_backward(module, clip, chosen, batch, parts)
    part = -(-len(batch.labels_B) // parts)
    assert chosen.prepares or chosen.trains == "text" or max(widest) == part, (
        "the image encoder's memory is that of a part"
    )
    if size > 1:
        dist.all_reduce(metrics["loss"])
    return torch.cat([metrics["loss"].view(1) / size, *(p.grad.flatten() for p in trained)])


CASES = [
    ("mmcoa", "diagonal", 1),
    *(("mmcoa", "class", parts) for parts in (1, 2)),
    ("tecoa", None, 3),
    *((n, None, 1) for n in METHODS if n != "mmcoa"),
    ("apt:prompting=perturbed,context_step=30", None, 2),
]


SIGLIP = {"init_logit_bias": -5.0}


def worker(rank, meeting, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=meeting)
    results = {case: one_step(*case).numpy() for case in CASES}
    results["siglip"] = one_step("mmcoa", "class", 2, **SIGLIP).numpy()
    if rank == 0:
        queue.put(results)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", [*METHODS, "apt:prompting=perturbed,context_step=30"])
def test_a_batch_in_parts_gives_the_whole_batchs_gradient(name):
    whole = one_step(name, "class")
    assert all(torch.allclose(one_step(name, "class", parts), whole, atol=1e-9) for parts in (3, 7))


def test_parts_are_nearly_equal_and_no_more_than_samples():
    batch = example(tiny_clip(), 5)
    assert [len(part.labels_B) for part in batch.split(2)] == [3, 2]
    assert [len(part.labels_B) for part in batch.split(9)] == [1] * 5
    assert torch.cat([part.keys_B for part in batch.split(3)]).equal(batch.keys_B)
    assert all(part.total == 5 for part in batch.split(2))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Each case on two processes: starting them is what takes the time."""
    return on_two_processes(worker, f"file://{tmp_path_factory.mktemp('ranks') / 'store'}")


@pytest.mark.ci
@pytest.mark.parametrize("case", CASES)
def test_two_unequal_workers_give_one_workers_loss_and_gradient(case, together):
    """Seven samples on two ranks: contrastive negatives come from both, and the mean is over all seven."""
    assert torch.allclose(torch.from_numpy(together[case]), one_step(*case), atol=1e-9)


def test_two_unequal_workers_give_one_workers_sigmoid_loss(together):
    found = one_step("mmcoa", "class", 2, **SIGLIP)
    assert torch.allclose(torch.from_numpy(together["siglip"]), found, atol=1e-9)
    assert len(found) == len(one_step("mmcoa", "class")) + 1, "the bias is trained"


def test_under_autocast_logits_stay_in_fp32():
    generator = torch.Generator().manual_seed(0)
    images, texts = (unit(torch.randn(6, 16, generator=generator)) for _ in range(2))
    labels, scale = torch.arange(6), torch.tensor(100.0)

    def losses():
        return contrastive(images, texts, labels, scale, 6), class_cross_entropy(images, texts, labels, scale)

    with torch.autocast("cpu", torch.bfloat16):
        found = losses()
    assert all(torch.equal(a, b) for a, b in zip(found, losses(), strict=True))

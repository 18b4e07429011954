"""The defences of 2025 and 2026 against their formulas, written out image by image in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import naive
from conftest import tiny_clip
from defenses.test_defenses import N, images, keys, start, stepped, victim  # noqa: F401
from rayclip import rng
from rayclip.defenses import DEFENSES, Defended
from rayclip.defenses.augmix import OPERATIONS, operate, random_views
from rayclip.models import ZeroShot

E, S = 4 / 255, 1.5 / 255


def weighted(d, beta):
    weights = [math.exp(beta * n) for n in range(len(d))]
    return sum(w * one for w, one in zip(weights, d, strict=True)) / sum(weights)


def gradient_away(encode, clean, pixels):
    at = pixels.clone().requires_grad_()
    (encode(at[None])[0] - clean).pow(2).sum().backward()
    return at.grad


def inside(x, d):
    return torch.clamp(torch.clamp(d, -E, E), -x, 1 - x)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_nac_takes_the_gradient_ahead(victim, images, keys, momentum):  # noqa: F811
    encode = lambda p: victim.clip.encode_image(p, normalize=False)  # noqa: E731
    found = DEFENSES["nac"](tau=9.0, steps=3, step=S, momentum=momentum).purify(victim, images, keys)
    for i, x in enumerate(images):
        clean = encode(x[None])[0].detach()
        d, v = [start(x, int(keys[i]), E)], torch.zeros_like(x)
        for _ in range(3):
            v = momentum * v + S * gradient_away(encode, clean, x + d[-1] + momentum * v).sign()
            d.append(inside(x, d[-1] + v))
        assert (found[i] - x - weighted(d, 2.0)).abs().max() < 1e-12
    ttc = DEFENSES["ttc"](tau=9.0, steps=3, step=S).purify(victim, images, keys)
    assert torch.equal(found, ttc) == (momentum == 0)


def test_doc_is_the_papers(victim, images, keys):  # noqa: F811
    """A gate of slope 30 about the median sensitivity, so that shares lie between the ends."""
    encode = lambda p: victim.clip.encode_image(p, normalize=False)  # noqa: E731
    chosen = {"tau": 0.01, "gamma": 100.0, "noises": 2, "orthogonal": 0.7, "momentum": 0.6, "steps": 3}
    found, shares = DEFENSES["doc"](**chosen).purify(victim, images, keys), []
    for i, x in enumerate(images):
        key, clean = int(keys[i]), encode(x[None])[0].detach()
        d, m = [start(x, key, E)], torch.zeros_like(x)
        for n in range(3):
            g = gradient_away(encode, clean, x + d[-1])
            g = g / g.pow(2).sum().sqrt()
            own = int(rng.subkeys(keys[i : i + 1], f"step {n}"))
            u1, u2 = (naive.uniforms(own, tuple(x.shape), s) for s in (0, 1))
            r = (-2 * (1 - u1).log()).sqrt() * (2 * math.pi * u2).cos()
            r = r - (r * g).sum() * g
            m = 0.6 * m + 0.4 * (g + 0.7 * r / r.pow(2).sum().sqrt())
            d.append(inside(x, d[-1] + 3 / 255 * m.sign()))
        cosines = []
        for k in range(2):
            noise = torch.where(naive.uniforms(key, tuple(x.shape), 16 + k) < 0.5, -E, E)
            y = encode((x + noise)[None])[0].detach()
            cosines.append(float((y * clean).sum() / (y.pow(2).sum() * clean.pow(2).sum()).sqrt()))
        share = 1 / (1 + math.exp(-100 * (0.01 - (1 - sum(cosines) / 2))))
        shares.append(share)
        wanted = share * (x + weighted(d, 2.0)).clamp(0, 1) + (1 - share) * (x + d[0]).clamp(0, 1)
        assert (found[i] - wanted).abs().max() < 1e-12
    assert min(shares) < 0.9 and max(shares) > 0.1, "the gate is neither open nor shut"


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("threshold", [-1.0, 0.98, 2.0])
def test_csr_is_the_papers(victim, images, keys, threshold, keep):  # noqa: F811
    radius = 0.15
    y, x_ = np.meshgrid(np.arange(8) - 4, np.arange(8) - 4, indexing="ij")
    mask = np.exp(-(y**2 + x_**2) / (2 * (radius * 8) ** 2))
    settings = {"threshold": threshold, "keep": keep, "radius": radius, "steps": 4, "step": 3 / 255}
    found, purified = DEFENSES["csr"](**settings).purify(victim, images, keys), 0
    for i, x in enumerate(images):
        spectrum = np.fft.fftshift(np.fft.fft2(x.numpy()), axes=(-2, -1)) * mask
        low = torch.from_numpy(np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(-2, -1))).real).clamp(0, 1)
        unit = lambda p: F.normalize(victim.clip.encode_image(p, normalize=False), dim=1)[0]  # noqa: E731
        f, f_low = unit(x[None]).detach(), unit(low[None]).detach()
        if (f * f_low).sum() >= threshold:
            assert torch.equal(found[i], x)
            continue
        purified += 1
        score = lambda p: (unit(p) * f_low).sum() - (unit(p) * f).sum()  # noqa: B023, E731
        d = [torch.zeros_like(x)]
        for _ in range(4):
            d.append(stepped(x, d[-1], score, 3 / 255, E))
        best = max(d, key=lambda one: float(score((x + one)[None]).detach())) if keep == "best" else d[-1]
        assert (found[i] - (x + best).clamp(0, 1)).abs().max() < 1e-12
    assert purified == {-1.0: 0, 2.0: N}.get(threshold, purified)


def test_clipure_turns_embeddings_toward_the_texts_without_a_class(victim, images, keys):  # noqa: F811
    import open_clip

    texts = [make("") for make in open_clip.OPENAI_IMAGENET_TEMPLATES]
    anchor = torch.stack([victim.clip.embed_texts([t])[0] for t in texts]).mean(0)
    for steps, step in ((1, 30.0), (3, 0.2)):
        with torch.no_grad():
            found = Defended(victim, (DEFENSES["clipure-cos"](steps=steps, length=step),), keys).embed(images)
        for i, x in enumerate(images):
            u = victim.clip.encode_image(x[None])[0].detach()
            for _ in range(steps):
                u.requires_grad_()
                (g,) = torch.autograd.grad(F.cosine_similarity(u, anchor, dim=0), u)
                u = u.detach() + step * g / g.pow(2).sum().sqrt()
                u = u / u.pow(2).sum().sqrt()
            assert (found[i] - u).abs().max() < 1e-9
    with torch.no_grad():
        raw = Defended(victim, (DEFENSES["clipure-cos"](steps=3, length=0.2),), keys).embed(images, normalize=False)
        lengths = victim.embed(images, normalize=False).norm(dim=1, keepdim=True)
        assert torch.allclose(raw, lengths * found, rtol=0, atol=1e-9), "un-normalised embeddings keep their length"
        near = F.normalize(F.normalize(anchor, dim=0) + 4 * victim.embed(images), dim=1)[:, None]
        near = torch.where(near @ anchor[:, None] < 0.05, F.normalize(near + anchor, dim=-1), near)
        published = DEFENSES["clipure-cos"]().embeddings(victim, near, keys)
        assert torch.allclose(published, near, rtol=0, atol=1e-6), "ten steps of 30 turn there and back"


def entropy(logits):
    p = naive.softmax(logits)
    return -sum(q * math.log(q) for q in p)


@pytest.mark.parametrize("steps", [1, 3])
def test_rtpt_tunes_each_images_context(images, keys, steps):  # noqa: F811
    """Against AdamW on a context put into the model's own text encoder by a hook, image by image."""
    victim = ZeroShot(tiny_clip(dtype=torch.float64), ("cat", "dog", "garbage_truck"))  # noqa: F811
    victim.clip.model.requires_grad_(False)
    defense = DEFENSES["rtpt"](count=7, selected=0.45, steps=steps, lr=0.05, neighbours=3, context="a photo of a")
    with torch.no_grad():
        defended = Defended(victim, (defense,), keys)
        found = defended(images)
        views = defense.views(victim, images, rng.subkeys(rng.subkeys(keys, "judge"), "rtpt 0 0"))
    tower, scale = victim.clip.model, float(victim.clip.scale)
    tokens = victim.clip.token_rows(["a photo of a cat.", "a photo of a dog.", "a photo of a garbage truck."])
    for i in range(N):
        context = tower.token_embedding.weight[tokens[0, 1:5]].clone().requires_grad_()

        def hook(module, inputs, words, context=context):
            return torch.cat([words[:, :1], context.expand(3, -1, -1), words[:, 5:]], 1)

        f = torch.stack([victim.clip.encode_image(v[None])[0] for v in views[i]]).detach()
        optimizer, chosen = torch.optim.AdamW([context], lr=0.05), None
        handle = tower.token_embedding.register_forward_hook(hook)
        for _ in range(steps):
            logits = scale * f @ tower.encode_text(tokens, normalize=True).T
            chosen = chosen or sorted(range(7), key=lambda v, z=logits: entropy(z[v].detach()))[:3]
            p = logits[chosen].softmax(1)
            loss = -(p * p.log()).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        tuned = scale * f @ tower.encode_text(tokens, normalize=True).detach().T
        handle.remove()
        near = [sorted((float(f[v] @ f[w]) for w in range(7) if w != v), reverse=True)[:3] for v in range(7)]
        weights = naive.softmax(torch.tensor([sum(own) / 3 / 0.01 for own in near], dtype=torch.float64))
        wanted = sum(w * z for w, z in zip(weights, tuned, strict=True))
        assert torch.allclose(found[i], wanted, rtol=0, atol=1e-7)


def as_pil(pixels):
    return Image.fromarray((pixels * 255).round().permute(1, 2, 0).to(torch.uint8).numpy())


PIL_OPERATIONS = {
    "autocontrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "posterize": lambda image, level, sign: ImageOps.posterize(image, 4 - int(0.4 * level)),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - int(25.6 * level)),
    "rotate": lambda image, level, sign: image.rotate(sign * int(3 * level), resample=Image.BILINEAR),
    "shear-x": lambda image, level, sign: affine(image, 1, sign * 0.03 * level, 0, 0, 1, 0),
    "shear-y": lambda image, level, sign: affine(image, 1, 0, 0, sign * 0.03 * level, 1, 0),
    "translate-x": lambda image, level, sign: affine(image, 1, 0, sign * level / 30 * 32, 0, 1, 0),
    "translate-y": lambda image, level, sign: affine(image, 1, 0, 0, 0, 1, sign * level / 30 * 32),
}


def affine(image, *matrix):
    return image.transform(image.size, Image.AFFINE, matrix, resample=Image.BILINEAR)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_augmix_are_pils(name):
    """Up to one grey level inside the image; what comes from beyond its border is black."""
    noise = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    smooth = F.interpolate(noise, size=(32, 32), mode="bicubic").clamp(0, 1).mul(255).round() / 255
    for level, sign in ((0.34, 1), (0.99, -1), (0.7, 1)):
        index, ones = torch.full((2,), float(OPERATIONS.index(name))), torch.ones(2, dtype=torch.float64)
        found = operate(smooth, index, level * ones, sign * ones).clamp(0, 1)
        for image, one in zip(smooth, found, strict=True):
            wanted = np.asarray(PIL_OPERATIONS[name](as_pil(image), level, sign)) / 255
            gap = (one.permute(1, 2, 0) - torch.from_numpy(wanted))[3:-3, 3:-3].abs().max()
            assert gap < 2.1 / 255, (name, level, float(gap))
        assert (found - smooth).abs().max() > 1e-3


def test_crops_and_mixtures_are_within_what_they_may_be():
    """A crop of an image of coordinates says where it lies."""
    line = (torch.arange(32.0, dtype=torch.float64) + 0.5) / 32
    where = torch.stack([line.expand(32, 32), line[:, None].expand(32, 32), torch.ones(32, 32)])
    keys_ = rng.sample_keys(range(4), 0, "views")
    crops = random_views(where.expand(4, -1, -1, -1), keys_, 50, "crops").flatten(0, 1)
    wide = (crops[:, 0, 16, -2] - crops[:, 0, 16, 1]) / 29 * 32
    high = (crops[:, 1, -2, 16] - crops[:, 1, 1, 16]) / 29 * 32
    area, ratio = wide.abs() * high, wide.abs() / high
    assert 0.075 < area.min() < 0.2 and 0.8 < area.max() <= 1.001
    assert ratio.min() > 0.74 and ratio.max() < 1.34
    assert 0.35 < (wide < 0).double().mean() < 0.65, "half of them are mirrored"
    mixed = random_views(where.expand(4, -1, -1, -1), keys_, 50, "augmix").flatten(0, 1)
    assert mixed.min() >= 0 and mixed.max() <= 1
    assert 0.01 < (mixed - crops).abs().mean() < 0.3
    assert not torch.equal(mixed[0], mixed[50]), "each image draws its own"

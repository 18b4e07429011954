"""Each scorer against its formula, written out image by image and text by text in float64."""

import json
import math

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import naive
from conftest import tiny_clip
from rayclip.models import ZeroShot, class_prompts
from rayclip.models.scorers import SCORERS, parse_scorers, random_crops, templates_of
from rayclip.rng import sample_keys
from rayclip.types import UserError

CLASSES = ("Cat", "grand_piano", "truck")
TEXTS = (("a furry pet", "whiskers and a tail"), ("black keys and white keys",), ("a lorry", "six wheels", "a cabin"))
N = 4


@pytest.fixture(scope="module")
def clip():
    return tiny_clip(dtype=torch.float64)


@pytest.fixture(scope="module")
def images():
    return torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def unit(v):
    return v / v.pow(2).sum().sqrt()


def embed_text(clip, text):
    with torch.no_grad():
        return unit(clip.encode_text(clip.tokenize([text]), normalize=False)[0])


def embed_image(clip, x):
    with torch.no_grad():
        return unit(clip.encode_image(x[None], normalize=False)[0])


def bind(scorer, clip, keys=None, attacked=False):
    keys = sample_keys(range(N), 0, "scores") if keys is None else keys
    return scorer.bind(scorer.classifier(clip, CLASSES, "a {}"), keys, attacked=attacked)


def mean_direction(clip, texts):
    return unit(torch.stack([embed_text(clip, t) for t in texts]).mean(0))


def test_one_template(clip, images):
    found = bind(SCORERS["template"](), clip)(images)
    wanted = ZeroShot(clip, CLASSES, "a {}")(images)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind, count", [("openai", 80), ("simple", 7)])
def test_an_ensemble_is_the_normalised_mean_of_its_templates(clip, images, kind, count):
    makers = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}[kind]
    assert len(makers) == count
    found = bind(SCORERS["ensemble"](templates=kind), clip)(images)
    for c, name in enumerate(("cat", "grand piano", "truck")):
        direction = mean_direction(clip, [make(name) for make in makers])
        for i in range(N):
            assert float(found[i, c]) == pytest.approx(
                float(clip.scale * embed_image(clip, images[i]) @ direction), abs=1e-9
            )


@pytest.mark.parametrize(
    ("kind", "dataset", "count", "one"),
    [
        ("clip", "oxford_pets", 1, "a photo of a {}, a type of pet."),
        ("clip", "eurosat", 3, "a centered satellite photo of the {}."),
        ("clip", "ucf101", 48, "a demonstration of the person practicing {}."),
        ("clip", "imagenet_r", 80, "the embroidered {}."),
        ("coop", "dtd", 1, "{} texture."),
        ("coop", "my-own", 1, "a photo of a {}."),
    ],
)
def test_a_data_sets_own_templates_keep_the_spelling_of_its_classes(kind, dataset, count, one):
    (scorer,) = parse_scorers(f"ensemble:templates={kind}")
    scorer = scorer.for_dataset(dataset)
    (first, second) = scorer.prompts(("shih-tzu", "A/B_c"), "never {}")
    assert len(first) == len(second) == len(set(first)) == count
    assert one.format("shih-tzu") in first and one.format("A/B c") in second
    assert scorer.label == f"ensemble:templates={kind}" and scorer.describe().startswith(f"ensemble (templates {kind} ")


def test_clips_templates_are_those_that_were_handed_over(shared):
    from rayclip.data.registry import DATASETS

    theirs = json.loads((shared / "data" / "templates.json").read_text())
    renamed = {"oxford_pets": "pets", "flowers102": "flowers", "stanford_cars": "cars", "digits": "mnist"}
    for name in DATASETS:
        own = list(templates_of("clip", name))
        if name != "ucf101":
            wanted = theirs.get(renamed.get(name, name), theirs["imagenet1k"])
            assert own == [text.replace("{c}", "{}") for text in wanted], name


def test_cupl_is_the_normalised_mean_of_a_classs_descriptions(clip, images):
    found = bind(SCORERS["cupl"]().with_texts(TEXTS), clip)(images)
    for c, texts in enumerate(TEXTS):
        direction = mean_direction(clip, texts)
        for i in range(N):
            assert float(found[i, c]) == pytest.approx(
                float(clip.scale * embed_image(clip, images[i]) @ direction), abs=1e-9
            )


def softmax(values):
    top = max(values)
    return [math.exp(v - top) / sum(math.exp(u - top) for u in values) for v in values]


def test_wca_weighs_crops_and_descriptions(clip, images):
    scorer = SCORERS["wca"](crops=5, alpha=0.4).with_texts(TEXTS)
    keys = sample_keys(range(N), 0, "scores")
    found = bind(scorer, clip, keys)(images)
    from rayclip import rng

    for i in range(N):
        crops = random_crops(images[i : i + 1], rng.subkeys(keys[i : i + 1], "judge"), 5, 0.4, 8)[0]
        whole = embed_image(clip, images[i])
        embedded = [embed_image(clip, crop) for crop in crops]
        w = softmax([math.exp(4) * float(f @ whole) for f in embedded])
        for c, texts in enumerate(TEXTS):
            template = embed_text(clip, class_prompts(CLASSES, "a {}")[c])
            described = [embed_text(clip, t) for t in texts]
            v = softmax([math.exp(2.02) * float(t @ template) for t in described])
            total = sum(
                a * b * float(f @ t)
                for a, f in zip(w, embedded, strict=True)
                for b, t in zip(v, described, strict=True)
            )
            assert float(found[i, c]) == pytest.approx(float(clip.scale) * total, abs=1e-8)


def test_crops_are_the_places_and_sizes_that_were_drawn():
    """A picture whose pixels are their own coordinates shows where a crop was taken."""
    height, width, size = 20, 30, 20
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    picture = torch.stack([rows / height, columns / width, torch.zeros_like(rows)])[None].double()
    key = sample_keys([7], "crops")
    crops = random_crops(picture, key, 50, 0.5, size)[0]
    for crop, (a, b, c) in zip(crops, naive.uniforms(int(key[0]), (50, 3)).tolist(), strict=True):
        side = (0.5 + 0.4 * a) * height
        left, top = b * (width - side), c * (height - side)
        for pixel in (5, 9, 14):  # away from the picture's border, where a ramp has its end
            there = (pixel + 0.5) * side / size  # in pixels; the cubic kernel bends a ramp by some hundredths
            assert float(crop[0, pixel, 9]) * height == pytest.approx(top + there, abs=0.05)
            assert float(crop[1, 9, pixel]) * width == pytest.approx(left + there, abs=0.05)
    assert crops.min() >= 0 and crops.max() <= 1


def test_large_images_are_brought_to_the_models_size_first():
    picture = torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    small = torch.nn.functional.interpolate(picture, size=(20, 30), mode="bicubic", antialias=True)
    key = sample_keys([7], "crops")
    assert torch.equal(random_crops(picture, key, 5, 0.5, 20), random_crops(small, key, 5, 0.5, 20))


def test_a_crop_is_a_crop_and_a_resize():
    """Against Pillow, on a crop that lies on whole pixels."""
    pixels = (np.random.default_rng(0).random((16, 16, 3)) * 255).astype(np.uint8)
    picture = torch.from_numpy(pixels).permute(2, 0, 1)[None].double() / 255
    smooth = torch.nn.functional.avg_pool2d(picture, 5, stride=1, padding=2)  # bicubic kernels differ on noise
    key = sample_keys([1], "crop")
    crop = random_crops(smooth, key, 1, 0.9, 16)[0, 0]
    (_, b, c), side = naive.uniforms(int(key[0]), (1, 3))[0].tolist(), 0.9 * 16
    box = (b * (16 - side), c * (16 - side), b * (16 - side) + side, c * (16 - side) + side)
    shown = Image.fromarray((smooth[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    wanted = torch.from_numpy(np.array(shown.resize((16, 16), Image.BICUBIC, box=box))).permute(2, 0, 1) / 255
    assert (crop - wanted).abs()[:, 2:-2, 2:-2].max() < 0.02


def test_the_judges_crops_stay_and_the_attackers_do_not(clip, images):
    scorer = SCORERS["wca"](crops=3).with_texts(TEXTS)
    judge, target = bind(scorer, clip), bind(scorer, clip, attacked=True)
    with torch.no_grad():
        assert torch.equal(judge(images), judge(images))
        rows = torch.tensor([2, 0])
        assert torch.allclose(judge(images[rows], rows), judge(images)[rows], atol=1e-9)
        first, second = target(images), target(images)
    assert not torch.allclose(first, second) and not torch.allclose(first, judge(images))
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(target(x).sum(), x)
    assert gradient.abs().amax((1, 2, 3)).min() > 0


def test_scorers_as_they_are_written():
    found = parse_scorers(
        "template,ensemble:templates=simple,cupl:captions=a.csv,wca:captions=a.csv,crops=30,alpha=0.6"
    )
    assert [s.label for s in found] == [
        "template",
        "ensemble:templates=simple",
        "cupl:captions=a.csv",
        "wca:captions=a.csv,crops=30,alpha=0.6",
    ]
    assert [s.cost for s in found] == [1, 1, 1, 31] and found[0].describe() == "template"


def test_captions_are_named_by_what_they_say():
    one, other = (SCORERS["cupl"](captions="f.csv").with_texts(t) for t in (TEXTS, TEXTS[::-1]))
    renamed = SCORERS["cupl"](captions="g.csv").with_texts(TEXTS)
    assert one.describe() == renamed.describe() != other.describe()


@pytest.mark.parametrize(
    "text, said",
    [
        ("magic", "unknown scorer 'magic'"),
        ("wca:crops=0", "at least 1"),
        ("wca:alpha=1.5", "share of the image's side"),
        ("ensemble:templates=all", "use one of openai, simple, clip, coop"),
        ("template,template", "twice"),
        ("cupl:colour=red", "no setting 'colour'"),
    ],
)
def test_wrong_scorers_are_one_sentence(text, said):
    with pytest.raises(UserError, match=said):
        parse_scorers(text)

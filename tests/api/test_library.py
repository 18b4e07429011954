"""The library that `import rayclip` offers: what it takes and refuses, and that it leaves the caller's things alone."""

import dataclasses
import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

import rayclip
from conftest import TINY, tiny_clip
from rayclip.api import evaluating, library
from rayclip.cli import evaluate as cli_evaluate
from rayclip.cli import request, train
from rayclip.data import batch_pixels, open_data
from rayclip.models.zeroshot import ZeroShot

PUBLIC = ["AttackResult", "Classifier", "Model", "Rows", "UserError", "attack", "evaluate", "load", "train", "wrap"]
EPS = "16/255"
NAMES = ["cat", "dog", "cow", "hen"]
PREPROCESS = (TINY["preprocess_cfg"]["mean"], TINY["preprocess_cfg"]["std"], 8)
TOKENIZER = open_clip.SimpleTokenizer(context_length=16)


def model() -> rayclip.Model:
    return rayclip.Model(tiny_clip())


def pixels(count: int = 6, **options) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(**options)


@pytest.fixture
def classifier() -> rayclip.Classifier:
    return model().zero_shot(NAMES, "a photo of a {}.")


@pytest.fixture
def labels(classifier) -> torch.Tensor:
    """The classes that the images have before an attack."""
    return classifier(pixels()).argmax(1)


def test_public_names_are_frozen():
    assert rayclip.__all__ == PUBLIC and set(PUBLIC) <= set(dir(rayclip))
    for name in PUBLIC:
        assert getattr(rayclip, name).__doc__


def test_importing_it_is_cheap():
    code = "import time; t = time.process_time(); import rayclip, sys; print(time.process_time() - t, *sys.modules)"
    took, *modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert float(took) < 0.2 and not {"torch", "open_clip", "ray", "mlflow"} & set(modules)


@pytest.mark.ci
@pytest.mark.parametrize("script", sorted(Path(__file__).parent.glob("scripts/*.py")), ids=lambda path: path.stem)
def test_script(script):
    runpy.run_path(str(script))


def test_defaults_are_those_of_the_command_line():
    def defaults(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items()}

    ours, theirs = defaults(library.evaluate) | library._DEFAULTS, defaults(request.Request)
    shared = ours.keys() & theirs.keys() - {"cluster", "out", "eps", "data"}
    assert {"attacks", "defense", "aim", "steps", "resolution", "precision"} <= shared
    for name in shared:
        (default,) = theirs[name] if isinstance(theirs[name], tuple) else [theirs[name]]
        assert ours[name] == default, name
    ours, theirs = defaults(library.train), defaults(train.train)
    shared = ours.keys() & theirs.keys() - {"method", "model", "data", "out", "shots"}
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    assert defaults(cli_evaluate.evaluate)["local"] is False  # the command line's default is Ray


# ---- what comes back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_result_is_judged_in_the_callers_dtype_and_within_the_budget(dtype):
    data = open_data("digits", "test")
    images = (batch_pixels(data, range(8), "native", 8) / 255).to(dtype)
    classifier = rayclip.load("digits").zero_shot(data.class_names)
    found = rayclip.attack(classifier, images, data.labels[:8], "pgd:steps=5", eps="32/255")
    assert found.images.dtype == dtype and found.images.device == images.device
    assert found.images.shape == images.shape and found.logits.shape == (8, 10) and len(found) == 8
    assert torch.allclose(classifier(found.images), found.logits, atol=1e-4)
    assert torch.equal(found.success, found.logits.argmax(1) != found.labels) and found.success.sum() > 4
    delta = (found.images.double() - images.double()).abs().max()
    assert 31 / 255 < delta <= 32 / 255 + max(torch.finfo(dtype).eps, 1e-7)  # the model is fp32
    assert not any(x.requires_grad for x in vars(found).values() if isinstance(x, torch.Tensor))
    assert found.attack.steps == 5 and found.class_names == data.class_names


def test_images_that_are_wrong_already_are_left_alone_to_the_bit(classifier, labels):
    wrong = labels.clone()
    wrong[:3] = (wrong[:3] + 1) % 4
    found = rayclip.attack(classifier, pixels(dtype=torch.float64), wrong, eps=EPS)
    assert torch.equal(found.images[:3], pixels(dtype=torch.float64)[:3]) and found.success[:3].all()
    assert found.steps[:3].eq(0).all()


def test_pictures_tensors_and_loaders_are_the_same(classifier):
    pictures = [Image.effect_noise((8, 8), 90).convert("RGB") for _ in range(5)]
    bare = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]) / 255
    labels = classifier(bare).argmax(1)
    wanted = rayclip.attack(classifier, bare, labels, "pgd:steps=3", eps=EPS)
    for given in (
        (pictures, labels.tolist()),
        (list(bare), labels.numpy()),
        ([(pictures[:2], labels[:2]), (pictures[2:], labels[2:])],),
    ):
        images, *rest = given
        images = iter(images) if not rest else images
        found = rayclip.attack(classifier, images, *rest, attack="pgd:steps=3", eps=EPS)
        assert torch.allclose(found.images, wanted.images, atol=1e-6) and torch.equal(found.labels, labels)
    one = rayclip.attack(classifier, pictures[0], int(labels[0]), "pgd:steps=3", eps=EPS, batch_size=1)
    assert torch.allclose(one.images, wanted.images[:1], atol=1e-6)
    single = rayclip.attack(classifier, bare[0], labels[0], "pgd:steps=3", eps=EPS)
    assert torch.equal(single.images, one.images)


# ---- what is refused

TRAIN = {"method": "tecoa", "data": "digits", "out": "o"}
BAD = {
    "the budget 8": lambda c, x, y: rayclip.attack(c, x, y, "pgd", eps=8),
    "write 8/255": lambda c, x, y: rayclip.attack(c, x, y, "pgd", eps="8"),
    "budget": lambda c, x, y: rayclip.attack(c, x, y, "pgd"),
    "divide bytes": lambda c, x, y: rayclip.attack(c, 255 * x, y, eps=EPS),
    "leave normalisation": lambda c, x, y: rayclip.attack(c, (x - 0.5) / 0.25, y, eps=EPS),
    "divide": lambda c, x, y: rayclip.attack(c, (255 * x).byte(), y, eps=EPS),
    "channels first": lambda c, x, y: rayclip.attack(c, x.permute(0, 2, 3, 1), y, eps=EPS),
    r"\(6, 1, 8, 8\)": lambda c, x, y: rayclip.attack(c, x[:, :1], y, eps=EPS),
    "native": lambda c, x, y: rayclip.attack(c, x[..., :6], y, eps=EPS, resolution="model"),
    "differ in size": lambda c, x, y: rayclip.attack(c, [x[0], x[1, :, :4]], [0, 1], eps=EPS),
    "label 4": lambda c, x, y: rayclip.attack(c, x, y * 0 + 4, eps=EPS),
    "label -1": lambda c, x, y: rayclip.attack(c, x, y * 0 - 1, eps=EPS),
    "6 images and 2 labels": lambda c, x, y: rayclip.attack(c, x, y[:2], eps=EPS),
    "whole numbers": lambda c, x, y: rayclip.attack(c, x, torch.eye(6), eps=EPS),
    "labels are missing": lambda c, x, y: rayclip.attack(c, x, eps=EPS),
    "ndarray": lambda c, x, y: rayclip.attack(c, x.numpy(), y, eps=EPS),
    "is empty": lambda c, x, y: rayclip.attack(c, iter([]), eps=EPS),
    "on meta": lambda c, x, y: rayclip.attack(c, x.to("meta"), y, eps=EPS),
    "unknown attack": lambda c, x, y: rayclip.attack(c, x, y, "pdg", eps=EPS),
    "2 attacks": lambda c, x, y: rayclip.attack(c, x, y, "pgd,cw", eps=EPS),
    "defence": lambda c, x, y: rayclip.attack(c, x, y, eps=EPS, aim="bpda"),
    "zero_shot": lambda c, x, y: rayclip.attack(c.model, x, y, eps=EPS),
    "two classes": lambda c, x, y: c.model.zero_shot(["cat"]),
    "template": lambda c, x, y: c.model.zero_shot(NAMES, "a cat"),
    "unknown defence": lambda c, x, y: c.behind("tcc"),
    "unknown model": lambda c, x, y: rayclip.load("nowhere"),
    "text encoder": lambda c, x, y: rayclip.attack(lambda p: p.flatten(1)[:, :4], x, y, "bert"),
    "does not take images": lambda c, x, y: rayclip.attack(nn.Sequential(nn.Flatten(), nn.Linear(5, 4)), x, y, eps=EPS),
    "no prediction": lambda c, x, y: rayclip.attack(lambda p: 0 * p.flatten(1)[:, :4], x, y, eps=EPS),
    r"\(B, K\)": lambda c, x, y: rayclip.attack(lambda p: p, x, y, eps=EPS),
    "leave cluster away": lambda c, x, y: rayclip.evaluate(c.model, "digits", eps=EPS, cluster=True),
    "no setting 'epoch'": lambda c, x, y: rayclip.train(**TRAIN, model="digits", epoch=1),
    "memory": lambda c, x, y: rayclip.train(**TRAIN, model=wrapped()),
    "no CLIP": lambda c, x, y: rayclip.wrap(nn.Linear(2, 2), PREPROCESS, TOKENIZER),
    "mean, std": lambda c, x, y: rayclip.wrap(c.model.clip.model, None, TOKENIZER),
    "belong to it": lambda c, x, y: rayclip.wrap(c.model.clip.model, (*PREPROCESS[:2], 12), TOKENIZER),
    "tokenizer": lambda c, x, y: rayclip.wrap(c.model.clip.model, PREPROCESS, None),
}


@pytest.mark.parametrize("says", BAD)
def test_what_cannot_be_meant_is_said_in_one_sentence(classifier, labels, tmp_path, monkeypatch, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(rayclip.UserError, match=says) as error:
        BAD[says](classifier, pixels(), labels)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


# ---- what stays as it was


class Odd(nn.Module):
    """A CNN with all that an attack could disturb: BatchNorm and dropout in mixed modes, a frozen weight, a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8 * 36, 4)
        self.head.weight.requires_grad_(False)
        self.features[1].eval()
        self.calls = 0
        self.features[0].register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))
        self.fails = False

    def forward(self, x):
        if self.fails and torch.is_grad_enabled():
            raise KeyError("a bug of the caller's")
        return self.head(self.features(x).flatten(1))


def state(module: nn.Module) -> list:
    tensors = [*module.state_dict().values()]
    modes = [m.training for m in module.modules()] + [p.requires_grad for p in module.parameters()]
    hooks = [len(m._forward_hooks) for m in module.modules()]
    return [modes, hooks, [p.grad is None for p in module.parameters()], [x.clone() for x in tensors]]


def same(one: list, other: list) -> bool:
    return one[:3] == other[:3] and all(map(torch.equal, one[3], other[3]))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_callers_changes(mode, fails):
    module = Odd()
    module.fails = fails
    before, random = state(module), torch.random.get_rng_state()
    with mode():
        images, grad = pixels(), torch.is_grad_enabled()
        try:
            found = rayclip.attack(module, images, torch.arange(6) % 4, "pgd:steps=3", eps=EPS)
            assert not fails and found.steps.max() <= 3
        except KeyError:
            assert fails
        assert torch.is_grad_enabled() == grad and torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert same(state(module), before) and torch.equal(torch.random.get_rng_state(), random)
    assert module.calls > 0 and torch.equal(images, pixels())


def test_a_clip_in_training_is_attacked_in_eval_mode_and_stays_in_training():
    own = tiny_clip()
    own.train().requires_grad_(True)
    own.model.visual.eval()
    own.model.visual.conv1.requires_grad_(False)
    before, random = state(own), torch.random.get_rng_state()
    tf32 = torch.backends.cudnn.allow_tf32
    classifier = rayclip.Model(own).zero_shot(NAMES)
    x = pixels().requires_grad_()
    classifier(x).sum().backward()
    assert x.grad.abs().sum() > 0
    for attack in ("pgd", "square:queries=5", "sga:substitutes=clip-table,steps=2"):
        rayclip.attack(classifier.behind("ttc"), pixels(), [0] * 6, attack, eps=EPS, aim="bpda")
    rayclip.evaluate(rayclip.Model(own), "digits", attacks="clean", limit=4, quiet=True)
    assert same(state(own), before) and torch.equal(torch.random.get_rng_state(), random)
    assert torch.backends.cudnn.allow_tf32 == tf32


# ---- models of the caller's own


def wrapped(**options) -> rayclip.Model:
    return rayclip.wrap(tiny_clip().model, PREPROCESS, TOKENIZER, **options)


def test_a_wrapped_open_clip_model_is_the_model():
    stock, own = tiny_clip(), wrapped(name="mine")
    assert own.spec == "wrapped:mine" and own.clip.image_size == 8
    assert torch.allclose(own.clip.encode_image(pixels()), stock.encode_image(pixels()), atol=1e-6)
    texts = ["a photo of a cat", "words " * 40, ""]
    assert torch.allclose(own.clip.embed_texts(texts), stock.embed_texts(texts), atol=1e-6)
    assert own.clip.cut_texts(texts) == stock.cut_texts(texts) == texts[1:2] and own.clip.room == 16
    labels = own.zero_shot(NAMES)(pixels()).argmax(1)
    ours, theirs = (
        rayclip.attack(m.zero_shot(NAMES), pixels(), labels, "sep:substitutes=clip-table,steps=3", eps="4/255")
        for m in (own, rayclip.Model(stock))
    )
    assert torch.equal(ours.success, theirs.success) and torch.allclose(ours.logits, theirs.logits, atol=1e-3)


@pytest.mark.parametrize("how", ["patched method", "other class", "code alone"])
def test_what_was_changed_is_honoured(how):
    own = tiny_clip().model
    block = own.visual.transformer.resblocks[0]
    if how == "patched method":
        own.encode_image = lambda x, **options: type(own).encode_image(own, x.flip(3), **options)
    elif how == "other class":
        block.attn.__class__ = type("Own", (nn.MultiheadAttention,), {"forward": lambda s, q, *r, **o: (2 * q, None)})
    else:
        block.mlp.gelu.forward = torch.tanh
    model = rayclip.wrap(own, PREPROCESS, TOKENIZER)
    with torch.no_grad():
        normalised = (pixels() - model.clip.mean) / model.clip.std
        wanted = own.encode_image(normalised, normalize=True)
    assert torch.allclose(model.clip.encode_image(pixels()), wanted, atol=1e-6)
    assert not torch.allclose(wanted, tiny_clip().encode_image(pixels()), atol=1e-3)
    classifier = model.zero_shot(NAMES)
    found = rayclip.attack(classifier, pixels(), [0] * 6, eps=EPS)
    text = model.clip.embed_texts(classifier.victim.prompts)
    with torch.no_grad():
        image = own.encode_image((found.images - model.clip.mean) / model.clip.std, normalize=True)
    assert torch.allclose(found.logits, model.clip.scale * image @ text.T, atol=1e-3)
    # Results of the unchanged model are not taken for its own
    assert model.clip.fingerprint() != wrapped().clip.fingerprint()


def test_transformers_models_and_their_tokenizers():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "max_position_embeddings": 16, "vocab_size": 60, "eos_token_id": 59}
    hf = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=16)
    ).half()
    words = {word: i for i, word in enumerate(["[pad]", "[unk]", *"this is a photo of cat dog cow hen".split()])}
    plain = Tokenizer(models.WordLevel(words | {"<end>": 59}, unk_token="[unk]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 59)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[pad]", eos_token="<end>")
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    model = rayclip.wrap(hf, processor, tokenizer)
    inputs = {**tokenizer(["a photo of a cat", "dog"], padding=True, return_tensors="pt")}
    inputs["pixel_values"] = ((pixels() - model.clip.mean) / model.clip.std).half()
    with torch.no_grad():
        wanted = hf.eval()(**inputs)
    assert torch.allclose(model.clip.embed_texts(["a photo of a cat", "dog"]), wanted.text_embeds.float(), atol=2e-3)
    assert torch.allclose(model.clip.encode_image(pixels()), wanted.image_embeds.float(), atol=2e-3)
    found = rayclip.attack(model.zero_shot(NAMES), pixels(), [0] * 6, "pgd", eps=EPS)
    assert found.images.dtype == torch.float32 and hf.dtype == torch.float16


def test_a_compose_says_mean_std_and_size():
    from rayclip.models.wrapped import read_preprocessing

    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    for trains in (False, True):
        assert read_preprocessing(open_clip.image_transform(8, trains, mean, std)) == (mean, std, 8)


# ---- evaluation in this process


def test_a_model_in_memory_is_evaluated_as_it_is(tmp_path):
    loaded = rayclip.load("digits")
    options = {"attacks": "clean,fgsm", "eps": ["8/255", 16 / 255], "limit": 32, "quiet": True, "out": str(tmp_path)}
    rows = rayclip.evaluate([loaded], "digits", **options)
    assert [row.attack for row in rows][:3] == ["clean", "fgsm_eps8", "fgsm_eps16"] and rows[0].top1 > 90
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/*.parquet")}
    again = rayclip.evaluate("digits", "digits", **options)  # the same model by name: nothing is computed again
    assert again == rows and all(path.stat().st_mtime_ns == time for path, time in files.items())
    with torch.no_grad():
        loaded.clip.model.visual.proj.neg_()
    turned = rayclip.evaluate(loaded, "digits", **options)
    assert turned[0].top1 < 50
    frame = turned.to_pandas()
    assert len(frame) == len(turned) and frame["protocol.attack"][1] == "fgsm" and frame["top1"][0] == turned[0].top1


def test_a_protocol_sets_what_is_not_given(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluating, "evaluate_models", lambda models, evaluation, *_: asked.append(evaluation) or [])
    rayclip.evaluate("digits", protocol="robustvlm")
    rayclip.evaluate("digits", "digits", protocol="robustvlm", limit=9, eps="1/255", resolution="native")
    whole, mine = asked
    assert len(whole.data) == 14 and whole.limit == 1000 and whole.protocol.eps == (2 / 255, 4 / 255)
    assert (mine.data, mine.limit, mine.protocol.eps) == (["digits"], 9, (1 / 255,))
    assert [a.label for a in mine.attacks] == [a.label for a in whole.attacks] and not mine.native
    with pytest.raises(rayclip.UserError, match="robustvlm"):
        rayclip.evaluate("digits", protocol="robustvml")
    with pytest.raises(rayclip.UserError, match="data"):
        rayclip.evaluate("digits")


def test_an_interrupted_evaluation_goes_on(tmp_path, monkeypatch):
    from rayclip.evaluation.shard import Evaluator

    real, runs = Evaluator.run, []

    def run(self, shard, *rest, **options):
        runs.append(shard)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return real(self, shard, *rest, **options)

    monkeypatch.setattr(Evaluator, "run", run)
    options = {"attacks": "clean,fgsm", "eps": EPS, "limit": 40, "shard_size": 10, "quiet": True, "out": str(tmp_path)}
    with pytest.raises(KeyboardInterrupt):
        rayclip.evaluate("digits", "digits", **options)
    assert len(list(tmp_path.glob("cells/*/*.parquet"))) == 2
    rows = rayclip.evaluate("digits", "digits", **options)
    assert len(runs) == 3 + 6 and rows[0].n == rows[1].n == 40


def test_functions_are_classifiers_for_every_attack_on_images():
    """`FunctionClassifier` hides nothing that attacks ask a zero-shot classifier for."""
    clip = tiny_clip()
    victim = ZeroShot(clip, NAMES)
    x, labels = pixels(), victim(pixels()).argmax(1)
    for attack in ("fgsm", "cw:steps=3", "apgd-t:iterations=5", "fab-t:iterations=3", "square:queries=10"):
        by_function = rayclip.attack(victim, x, labels, attack, eps="4/255")
        by_name = rayclip.attack(rayclip.Model(clip).zero_shot(NAMES), x, labels, attack, eps="4/255")
        assert torch.allclose(by_function.images, by_name.images, atol=1e-6), attack
        assert dataclasses.replace(by_function.attack) == by_name.attack

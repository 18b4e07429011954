"""A model with parts of its own is asked through its own passes; a stock one keeps the short ones.

Every kind of change is one that the rebuilt passes would not see, or would see elsewhere.
"""

import copy
import functools
import types

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from conftest import TINY, NormInputs, text_rows, tiny_clip
from rayclip.models import Clip, fast_copy
from rayclip.models.attention import encode_with_patches
from rayclip.models.image import class_token_tower
from rayclip.models.prompts import WithContext
from rayclip.models.text import causal_tower
from rayclip.types import UserError

PIXELS = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TEXTS = ["a cat", "This is a photo of a dog", "", "a cat", "This is a photo of a " + "house " * 30]


class Hot(nn.MultiheadAttention):
    """Attention of another temperature."""

    def forward(self, query, *args, **kwargs):
        return super().forward(3 * query, *args, **kwargs)


class Adapter(nn.Module):
    """A bottleneck that mixes tokens, around something."""

    def __init__(self, inner, width):
        super().__init__()
        self.inner, self.mix = inner, nn.Linear(width, width)
        nn.init.normal_(self.mix.weight, std=0.3)

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        return out + self.mix(out.mean(1, keepdim=True))


class Positive(nn.Module):
    def forward(self, weight):
        return weight.abs()


def double(_, __, out):
    return out * torch.linspace(0.5, 2, out.shape[-1], dtype=out.dtype)


def own_class(module, kind):
    module.__class__ = kind


def by_forward_hook(inner, _):
    inner.resblocks[0].register_forward_hook(double)


def by_last_block_hook(inner, _):
    inner.resblocks[-1].ln_2.register_forward_hook(lambda _, __, out: out - out.mean(1, keepdim=True))


def by_pre_hook(inner, _):
    inner.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2 - inputs[0].roll(1, 1), *inputs[1:]))


def by_attention_class(inner, _):
    own_class(inner.resblocks[0].attn, Hot)


def by_block_forward(inner, _):
    block = inner.resblocks[0]
    forward = block.forward
    block.forward = lambda x, **rest: forward(x, **rest).sin()


def by_block_method(inner, _):
    def attention(self, q_x, k_x=None, v_x=None, attn_mask=None):
        return q_x.flip(-1)

    inner.resblocks[0].attention = types.MethodType(attention, inner.resblocks[0])


def by_adapter(inner, _):
    inner.resblocks[1] = Adapter(inner.resblocks[1], 32).to(torch.float64)


def by_adapter_in_the_mlp(inner, _):
    inner.resblocks[1].mlp.add_module("adapter", nn.Softmax(1))


def by_low_rank_weights(inner, _):
    parametrizations.orthogonal(inner.resblocks[0].attn, "in_proj_weight")


def by_parametrized_projection(inner, _):
    parametrize.register_parametrization(inner.resblocks[0].mlp.c_fc, "weight", Positive())


def by_weight_norm_of_old(inner, _):
    nn.utils.spectral_norm(inner.resblocks[0].mlp.c_fc)  # a pre-hook that makes the weight anew


def by_the_class(inner, monkeypatch):
    plain = ResidualAttentionBlock.forward

    @functools.wraps(plain)
    def forward(self, *args, **kwargs):
        return plain(self, *args, **kwargs).tanh()

    monkeypatch.setattr(ResidualAttentionBlock, "forward", forward)


def by_a_hook_on_all(inner, monkeypatch):
    kinds = [inner.resblocks[0]]
    handle = nn.modules.module.register_module_forward_hook(lambda m, _, out: out.cos() if m in kinds else None)
    monkeypatch.callback(handle.remove)


EVERYWHERE = [
    *(by_forward_hook, by_last_block_hook, by_pre_hook, by_attention_class, by_block_forward, by_block_method),
    *(by_adapter, by_adapter_in_the_mlp, by_low_rank_weights, by_parametrized_projection, by_weight_norm_of_old),
    *(by_the_class, by_a_hook_on_all),
]


def image_tower_hook(model):
    model.visual.register_forward_hook(double)


def image_conv_class(model):
    class Overlapping(nn.Conv2d):
        def forward(self, x):
            return super().forward(x.roll(1, -1) * 2)

    own_class(model.visual.conv1, Overlapping)


def image_overlapping_patches(model):
    conv = nn.Conv2d(3, 32, 6, stride=4, padding=1, bias=False)  # ViTs with early or overlapping convolutions
    nn.init.normal_(conv.weight)
    model.visual.conv1 = conv.double()


def image_conv_norm(model):
    parametrizations.weight_norm(model.visual.conv1)
    model.visual.conv1.register_forward_hook(lambda _, __, out: 10 * out.relu())


def image_tower_forward(model):
    forward = model.visual.forward
    model.visual.forward = lambda x: forward(x) + x.mean((1, 2, 3))[:, None]


def image_tower_class(model):
    class Averaging(VisionTransformer):
        def forward(self, x):
            return self.transformer(self._embeds(x)).mean(1) @ self.proj

    own_class(model.visual, Averaging)


def image_encode(model):
    def encode_image(self, image, normalize=False):
        features = self.visual(image).abs()
        return F.normalize(features, dim=-1) if normalize else features

    model.encode_image = types.MethodType(encode_image, model)


def image_encode_class(model):
    class Mine(type(model)):
        def encode_image(self, image, normalize=False):
            return F.normalize(super().encode_image(image).abs(), dim=-1)

    own_class(model, Mine)


IMAGE = [
    *(image_tower_hook, image_conv_class, image_overlapping_patches, image_conv_norm, image_tower_forward),
    *(image_tower_class, image_encode, image_encode_class),
]


def text_embedding_hook(model):
    parts(model).token_embedding.register_forward_hook(lambda _, __, out: out - out.mean(1, keepdim=True))


def text_norm_hook(model):
    parts(model).ln_final.register_forward_hook(lambda _, __, out: out - out.mean(1, keepdim=True))


def text_embedding_class(model):
    class Soft(nn.Embedding):
        def forward(self, tokens):
            return super().forward(tokens).cumsum(1) / 4

    own_class(parts(model).token_embedding, Soft)


def text_encode(model):
    def encode_text(self, text, normalize=False):
        features = type(self).encode_text(self, text).abs() + text.float().mean(1, keepdim=True) / 1e5
        return F.normalize(features, dim=-1) if normalize else features

    model.encode_text = types.MethodType(encode_text, model)


TEXT = [text_embedding_hook, text_norm_hook, text_embedding_class, text_encode]


def parts(model):
    return getattr(model, "text", model)


@functools.cache
def tokenizer():
    return open_clip.SimpleTokenizer(context_length=16)


def stock(kind=CLIP):
    torch.manual_seed(0)
    config = TINY["model_cfg"]
    model = kind(16, config["vision_cfg"], config["text_cfg"])
    for name, p in model.named_parameters():
        if "token_embedding" in name or "positional" in name:
            p.data.mul_(20)
    return Clip(model, TINY, tokenizer(), "mine").double().eval()


class Undo:
    """pytest's monkeypatch, and things to do at the end."""

    def __init__(self, monkeypatch, request):
        self.setattr, self.callback = monkeypatch.setattr, request.addfinalizer


@pytest.fixture
def undo(monkeypatch, request):
    return Undo(monkeypatch, request)


def own_image(clip, pixels):
    return clip.model.encode_image((pixels - clip.mean) / clip.std, normalize=True)


def own_text(clip, texts):
    return clip.model.encode_text(clip._tokenizer(texts), normalize=True)


def cosine(a, b):
    return F.cosine_similarity(a, b).min().item()


def check_image(clip, plain):
    """The wrapper's embeddings and gradient are the changed model's own, and those differ from the stock model's."""
    pixels = [PIXELS.clone().requires_grad_() for _ in range(2)]
    ours, own = clip.encode_image(pixels[0]), own_image(clip, pixels[1])
    assert cosine(own, plain) < 0.9995, "the change does something"
    assert cosine(ours, own) > 0.99999
    weights = torch.randn(own.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slopes = [torch.autograd.grad((e * weights).sum(), x)[0] for e, x in zip((ours, own), pixels, strict=True)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=1e-12)
    assert slopes[0].abs().max() > 0


def check_text(clip, plain):
    own = own_text(clip, TEXTS)
    assert cosine(own, plain) < 0.9995, "the change does something"
    assert cosine(clip.embed_texts(TEXTS), own) > 0.99999
    assert cosine(clip.embed_texts(TEXTS, chunk=2), own) > 0.99999
    assert cosine(clip.encode_text(clip.tokenize(TEXTS)), own) > 0.99999
    named = [(n, p) for n, p in clip.named_parameters() if p.requires_grad]
    loss = [(e * torch.linspace(-1, 1, 16, dtype=torch.float64)).sum() for e in (clip.embed_texts(TEXTS), own)]
    ours, theirs = (torch.autograd.grad(x, [p for _, p in named], allow_unused=True) for x in loss)
    for (name, _), a, b in zip(named, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("change", [*EVERYWHERE, *IMAGE], ids=lambda f: f.__name__)
def test_a_changed_image_tower_gives_its_own_embeddings_and_gradients(change, undo):
    clip = stock()
    plain = clip.encode_image(PIXELS).detach()
    assert class_token_tower(clip.model) is clip.model.visual
    if change in IMAGE:
        change(clip.model)
    else:
        change(clip.model.visual.transformer, undo)
    assert class_token_tower(clip.model) is None
    check_image(clip, plain)


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("change", [*EVERYWHERE, *TEXT], ids=lambda f: f.__name__)
def test_a_changed_text_tower_gives_its_own_embeddings_and_gradients(change, kind, undo):
    clip = stock(kind)
    plain = clip.embed_texts(TEXTS).detach()
    assert causal_tower(clip.model) is parts(clip.model)
    if change in TEXT:
        change(clip.model)
    else:
        change(parts(clip.model).transformer, undo)
    assert causal_tower(clip.model) is None
    check_text(clip, plain)


def test_a_gradient_that_is_changed_on_its_way_back():
    """As transfer attacks on ViTs do, which leave out or scale what comes through a block."""
    clip = stock()
    clip.model.visual.transformer.resblocks[0].register_full_backward_hook(lambda _, given, __: (given[0] * 3,))
    pixels = [PIXELS.clone().requires_grad_() for _ in range(2)]
    found = [f(x) for f, x in zip((clip.encode_image, lambda x: own_image(clip, x)), pixels, strict=True)]
    ours, own = (torch.autograd.grad(e[:, 0].sum(), x)[0] for e, x in zip(found, pixels, strict=True))
    plain = PIXELS.clone().requires_grad_()
    (unchanged,) = torch.autograd.grad(stock().encode_image(plain)[:, 0].sum(), plain)
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours, 3 * unchanged, rtol=0, atol=1e-12)


def test_one_changed_tower_leaves_the_other_its_short_pass():
    clip = stock()
    clip.model.visual.register_forward_hook(double)
    assert class_token_tower(clip.model) is None and causal_tower(clip.model) is clip.model
    other = stock()
    other.model.transformer.register_forward_hook(lambda *_: None)
    assert class_token_tower(other.model) is other.model.visual and causal_tower(other.model) is None


def test_a_removed_hook_gives_the_short_passes_back():
    clip = tiny_clip()
    block = clip.model.visual.transformer.resblocks[-1]
    handle = block.register_forward_hook(lambda *_: None)
    with torch.no_grad(), NormInputs(block.ln_2) as looked:
        clip.encode_image(PIXELS.float())
        handle.remove()
        clip.encode_image(PIXELS.float())
    assert looked.seen == [(3, 5), (3, 1)]


def test_rows_that_were_cut_for_the_short_pass_are_filled_up_for_the_own_one():
    """A training run keeps its prompts' rows; a hook may come later."""
    clip = stock()
    rows = clip.tokenize(TEXTS[:2])
    with torch.no_grad(), text_rows(clip) as seen:
        before = clip.encode_text(rows)
        clip.model.transformer.register_forward_hook(lambda *_: None)
        after = clip.encode_text(rows)
    assert seen == [(2, 9), (2, 16)]
    assert (before - after).abs().max() < 1e-12


@pytest.mark.parametrize("settings", [{"patch_dropout": 0.5}, {"ls_init_value": 0.1}, {"no_ln_pre": True}, {}], ids=str)
@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_what_open_clip_builds_itself_is_stock(settings, kind, quick_gelu):
    config = TINY["model_cfg"]
    for cast in (None, torch.float16):
        image = {**config["vision_cfg"], **settings}
        model = kind(16, image, config["text_cfg"], quick_gelu=quick_gelu, cast_dtype=cast)
        assert class_token_tower(model) is model.visual and causal_tower(model) is parts(model)
        assert class_token_tower(copy.deepcopy(model)) is not None


def test_settings_that_the_short_passes_do_not_know():
    changes = [
        lambda m: m.set_grad_checkpointing(),
        lambda m: setattr(m.visual.transformer.resblocks[0].attn, "dropout", 0.1),
        lambda m: setattr(m.visual, "output_tokens", True),
        lambda m: setattr(m.visual.conv1, "padding", (1, 1)),
    ]
    for change in changes:
        model = stock().model
        change(model)
        assert class_token_tower(model) is None


def test_a_padding_mask_is_not_passed_over():
    """'!' is CLIP's token 0, which such a tower takes for padding."""
    clip = stock(CustomTextCLIP)
    small = {"context_length": 16, "width": 32, "heads": 2, "layers": 2, "output_dim": 16}
    clip.model.text = TextTransformer(**small, use_pad_mask=True, eos_id=49407).double().eval()
    texts = ["wow! a cat", "a dog"]
    assert (clip.embed_texts(texts) - own_text(clip, texts)).abs().max() < 1e-12


@pytest.mark.parametrize("change", [image_tower_hook, image_tower_forward, image_conv_class, image_encode])
def test_patches_of_a_changed_tower_come_from_its_own_pass(change):
    """Text-guided attention looks at what the changed tower computes."""
    clip = stock()
    change(clip.model)
    seen = []
    handle = clip.model.visual.transformer.register_forward_hook(lambda _, __, out: seen.append(out))
    image, patches = encode_with_patches(clip, PIXELS)
    handle.remove()
    tower = clip.model.visual
    assert len(seen) == 1 and torch.allclose(image, own_image(clip, PIXELS), atol=1e-12)
    expected = F.normalize(tower.ln_post(seen[0][:, 1:]) @ tower.proj, dim=-1)
    assert torch.allclose(patches, expected, atol=1e-12)


def test_a_tower_that_goes_past_its_transformer_has_no_patches():
    clip = stock()
    clip.model.visual.forward = lambda x: x.flatten(1)[:, :16]
    with pytest.raises(UserError, match="transformer"):
        encode_with_patches(clip, PIXELS)


def test_a_context_stands_before_the_words_of_a_changed_tower_too():
    plain, changed = stock(), stock()
    changed.model.transformer.resblocks[0].register_forward_hook(lambda *_: None)  # full length, the same function
    found = []
    for base in (plain, changed):
        clip = WithContext.begin(base, 4, seed=0)
        with torch.no_grad():
            clip.learned.mul_(100)
        embedded = clip.embed_texts(["cat", "sea lion"])
        found.append((embedded, *torch.autograd.grad(embedded[:, 3].sum(), clip.learned)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    double_block = stock()
    double_block.model.transformer.resblocks[0].register_forward_hook(double)
    changed_text = WithContext.begin(double_block, 4, seed=0).embed_texts(["cat"])
    assert cosine(changed_text, WithContext.begin(plain, 4, seed=0).embed_texts(["cat"])) < 0.999


@pytest.mark.parametrize("hooked", [False, True])
def test_a_context_is_learned_alike_in_chunks(hooked):
    """The second forward of a chunk, in the backward pass, has the context in its place as well."""
    base = stock()
    if hooked:
        base.model.transformer.register_forward_hook(lambda *_: None)
    clip = WithContext.begin(base, 4, seed=0)
    rows = clip.tokenize(["cat", "sea lion", "dog", "a house"])

    def gradient():
        loss = (clip.encode_text(rows) * torch.linspace(-1, 1, 16, dtype=torch.float64)).sum()
        return torch.autograd.grad(loss, clip.learned)[0]

    whole = gradient()
    with clip.in_chunks(2):
        parts_ = gradient()
    torch.testing.assert_close(parts_, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("change", [image_tower_hook, image_conv_class, image_tower_class], ids=lambda f: f.__name__)
def test_a_fast_copy_keeps_the_models_own_parts(change, precision):
    clip = tiny_clip()
    plain = clip.encode_image(PIXELS.float()).detach()
    change(clip.model)
    fast = fast_copy(clip, precision)
    with torch.no_grad():
        own, found = own_image(clip, PIXELS.float()), fast.encode_image(PIXELS.float())
    assert cosine(own, plain) < 0.999
    assert cosine(found, own) > {"fp32": 0.99999, "bf16": 0.999, "fp16": 0.9999}[precision]


def test_parts_that_a_reduced_copy_cannot_have_are_refused():
    """A patch that holds on to the fp32 tower's weights cannot take tokens of bf16."""
    clip = tiny_clip()
    by_block_forward(clip.model.visual.transformer, None)
    with pytest.raises(UserError, match=r"tiny.*fp32"):
        fast_copy(clip, "bf16")
    with torch.no_grad():
        assert cosine(fast_copy(clip).encode_image(PIXELS.float()), own_image(clip, PIXELS.float())) > 0.99999

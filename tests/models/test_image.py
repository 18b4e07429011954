"""A ViT whose last block works for the class token alone gives what open_clip's whole forward gives."""

import open_clip
import pytest
import torch
from open_clip.model import CLIP

from conftest import TINY, NormInputs, tiny_clip
from rayclip.models import Clip
from rayclip.models.image import class_token_tower

PIXELS = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PLAIN = TINY["model_cfg"]["vision_cfg"]


def with_image(**changes):
    config = {**TINY, "model_cfg": {**TINY["model_cfg"], "vision_cfg": {**PLAIN, **changes}}}
    torch.manual_seed(0)
    model = CLIP(16, config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"])
    return Clip(model, config, open_clip.SimpleTokenizer(context_length=16), "tiny").double().eval()


@pytest.mark.parametrize(
    "changes",
    [{}, {"ls_init_value": 0.3}, {"final_ln_after_pool": True}, {"layers": 1}, {"image_size": 9}, {"no_ln_pre": True}],
    ids=str,
)
def test_the_same_embeddings_and_gradients_as_the_whole_forward(changes):
    clip = with_image(**changes)
    assert class_token_tower(clip.model) is not None
    weights = torch.randn(3, 16, dtype=torch.float64)

    def embedded_and_gradients(encode, normalize):
        clip.zero_grad()
        pixels = PIXELS.clone().requires_grad_()
        embedded = encode(pixels, normalize)
        (embedded * weights).sum().backward()
        found = {name: p.grad.clone() for name, p in clip.named_parameters() if p.grad is not None}
        return embedded.detach(), {"pixels": pixels.grad, **found}

    for normalize in (True, False):
        whole, expected = embedded_and_gradients(
            lambda x, n: clip.model.encode_image(clip.tower_input(x), normalize=n), normalize
        )
        ours, found = embedded_and_gradients(lambda x, n: clip.encode_image(x, normalize=n), normalize)
        assert (ours - whole).abs().max() < 1e-12 * max(1, whole.abs().max())
        assert found.keys() == expected.keys() and "visual.conv1.weight" in {n.removeprefix("model.") for n in found}
        largest = max(g.abs().max() for g in expected.values())
        assert max((found[name] - expected[name]).abs().max() for name in found) < 1e-12 * max(1, largest)


def test_the_last_mlp_sees_one_token():
    clip = tiny_clip()
    first, last = clip.model.visual.transformer.resblocks
    with torch.no_grad(), NormInputs(first.ln_2) as whole, NormInputs(last.ln_2) as one:
        clip.encode_image(PIXELS.float())
    assert (whole.seen, one.seen) == ([(3, 5)], [(3, 1)])


@pytest.mark.parametrize("changes", [{"pool_type": "avg"}, {"attentional_pool": True}, {"qk_norm": True}], ids=str)
def test_other_towers_go_the_whole_way(changes):
    clip = with_image(**changes)
    assert class_token_tower(clip.model) is None
    with torch.no_grad():
        assert torch.equal(clip.encode_image(PIXELS), clip.model.encode_image(clip.tower_input(PIXELS), normalize=True))

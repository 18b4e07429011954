"""Every family of models that open_clip offers is loaded, attacked, trained, saved and loaded again."""

import json
from dataclasses import replace

import huggingface_hub
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    M2M100Config,
    MT5Config,
    RobertaConfig,
    XLMRobertaConfig,
)

from rayclip.attacks import PGD, Samples
from rayclip.attacks.bert import TextSettings
from rayclip.methods import Batch, ClassTexts, make_method
from rayclip.models import ZeroShot, class_prompts, load_model
from rayclip.models.checkpoint import save_checkpoint
from rayclip.rng import sample_keys
from rayclip.training.loop import LossOf, attack_and_backward, choose_trainable
from rayclip.types import UserError

CLASSES, LABELS = ("cat", "dog", "lemon"), torch.tensor([0, 2])
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] this is a photo of cat dog lemon truck violin tree house red big".split()
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
SMALL = {"vocab_size": len(WORDS), "max_position_embeddings": 100, "pad_token_id": 0}
OTHER = {"hf_tokenizer_name": "lab/words", "vocab_size": len(WORDS)}  # a vocabulary of its own
SIGLIP = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}, **OTHER}
DECODER = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, "attn_pooler_heads": 2}


def timm(name, size, pool="avg", **changes):
    return {"timm_model_name": name, "image_size": size, "timm_pool": pool, "timm_proj": None, **changes}


def hf(kind):
    return {"hf_model_name": f"lab/{kind}", "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler", **OTHER}


OWN_TEXT = {"custom_text": True}
FAMILIES = {
    "ResNet": ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, TEXT, {"quick_gelu": True}),
    "CLIPA": (VIT | {"pool_type": "avg", "final_ln_after_pool": True}, TEXT | {"pool_type": "last"}, {}),
    "SigLIP": (
        timm("test_vit3", 160, "map", timm_proj="none"),
        TEXT | SIGLIP,
        OWN_TEXT | {"embed_dim": 96, "init_logit_bias": -10},
    ),
    "CoCa": (
        VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        TEXT | {"embed_cls": True, "output_tokens": True, "context_length": 15},
        OWN_TEXT | {"multimodal_cfg": DECODER},
    ),
    "EVA": (timm("eva02_tiny_patch14_224", 224, "token"), TEXT, OWN_TEXT),
    "ConvNeXt": (timm("test_convnext", 64, "", timm_proj="linear", timm_drop=0.1, timm_drop_path=0.1), TEXT, {}),
    "MobileCLIP": (timm("fastvit_t8", 64), TEXT | {"no_causal_mask": True}, OWN_TEXT),
    "RoBERTa": (VIT, hf("roberta"), {}),
    "XLM-RoBERTa": (VIT, hf("xlm-roberta"), {}),
    "mT5": (VIT, hf("mt5"), {}),
    "NLLB": (VIT, hf("m2m_100") | {"hf_pooler_type": "cls_pooler"}, {"init_logit_bias": -10}),
}
TEXT_TOWERS = [
    *(
        kind(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **SMALL)
        for kind in (RobertaConfig, XLMRobertaConfig)
    ),
    MT5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **SMALL),
    M2M100Config(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, decoder_layers=1, **SMALL
    ),
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub's cache with the configurations of text towers, without a network, and a masked language model."""
    cache = tmp_path_factory.mktemp("hub")
    for config in TEXT_TOWERS:
        folder = cache / f"models--lab--{config.model_type}"
        config.save_pretrained(folder / "snapshots" / ("0" * 40))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
    (cache / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(cache / "vocab.txt")).save_pretrained(cache / "lm")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(**sizes, **SMALL, initializer_range=0.5)).save_pretrained(cache / "lm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(cache), raising=False)  # of version 4
        yield cache


def member(folder, hub, vision, text, rest):
    """A random model of open_clip's, as a folder in its layout."""
    folder.mkdir()
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, **rest}
    pixels = {"mean": [0.5] * 3, "std": [0.25] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pixels}))
    if "hf_tokenizer_name" in text:
        BertTokenizer(str(hub / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    if hasattr(model, "text_decoder"):
        torch.nn.init.normal_(model.text_decoder.text_projection)  # which open_clip leaves as memory happens to be
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}", model.eval()


def text_settings(clip, words):
    """The attack on texts: by the model's own table if it has CLIP's vocabulary, else by a masked language model."""
    if not words:
        return TextSettings(substitutes="clip-table", k=4)
    with pytest.raises(UserError, match="masked language model"):
        TextSettings(substitutes="clip-table").source(clip)
    return TextSettings(substitutes=str(words), k=4, threshold=-100.0)


LONG = ("EVA", "MobileCLIP")  # seconds of a core


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.ci) if f in LONG else f for f in FAMILIES])
def test_a_member_of_each_family(family, tmp_path, hub):
    spec, plain = member(tmp_path / "model", hub, *FAMILIES[family])
    clip = load_model(spec)
    size = clip.image_size
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    prompts = class_prompts(CLASSES)
    with torch.no_grad():
        images, texts = (clip.encode_image(pixels), clip.embed_texts(prompts))
        assert (images - plain.encode_image((pixels - 0.5) / 0.25, normalize=True)).abs().max() < 1e-5
        rows = open_clip.get_tokenizer(spec)(prompts)
        assert (texts - plain.encode_text(rows, normalize=True)).abs().max() < 1e-5
    assert (texts[0] - texts[1]).abs().max() > 1e-4, "its texts differ"

    victim = ZeroShot(clip, CLASSES)
    labels = victim(pixels).argmax(1)
    keys = sample_keys(range(2), 0, "t")
    attack = PGD(steps=1, step=0.05, stop="final")
    found = attack.run(victim, Samples(pixels, labels, keys, labels >= 0), eps=0.05, prompts=attack.prepare(victim))
    loss = torch.nn.functional.cross_entropy
    with torch.no_grad():
        assert loss(victim(found.images_BCHW), labels) > loss(victim(pixels), labels)

    text = text_settings(clip, hub / "lm" if "hf_tokenizer_name" in FAMILIES[family][1] else None)
    assert any(change.changes for change in text.attack(clip, prompts))

    for method in (make_method("tecoa", steps=1), make_method("mmcoa", steps=1, text=text)):
        method = replace(method, trains="all")
        method.check(clip)
        trained = choose_trainable(clip, method)
        batch = Batch(
            pixels_BCHW=pixels, labels_B=LABELS, keys_B=keys, texts=ClassTexts(clip, prompts, trainable=True), total=2
        )
        metrics = attack_and_backward(LossOf(clip, method), clip, method, batch)
        assert all(metric.isfinite() for metric in metrics.values())
        unused = [n for n, p in clip.named_parameters() if p.requires_grad and p.grad is None]
        assert not unused, "workers wait for the gradients of all that is trained"
        torch.optim.SGD(trained, lr=0.01).step()
    with torch.no_grad():
        assert (clip.encode_image(pixels) - images).abs().max() > 1e-6
        assert (clip.embed_texts(prompts) - texts).abs().max() > 1e-6

    save_checkpoint(clip, tmp_path / "saved", {})
    again = load_model(f"local-dir:{tmp_path / 'saved'}")
    assert again.fingerprint() == clip.fingerprint()
    with torch.no_grad():
        assert torch.equal(again.encode_image(pixels), clip.encode_image(pixels))
        assert torch.equal(again.embed_texts(prompts), clip.embed_texts(prompts))


def test_a_folder_without_its_tokenizer_takes_the_published_one(tmp_path, hub):
    spec, plain = member(tmp_path / "model", hub, *FAMILIES["SigLIP"])
    words = hub / "models--lab--words"
    (words / "snapshots" / ("0" * 40)).mkdir(parents=True)
    for file in (tmp_path / "model").iterdir():
        if not file.name.startswith("open_clip"):
            file.rename(words / "snapshots" / ("0" * 40) / file.name)
    BertConfig().save_pretrained(words / "snapshots" / ("0" * 40))  # without it, a name needs the network
    with pytest.raises(UserError, match="HF_HOME"):
        load_model(spec)
    (words / "refs").mkdir()
    (words / "refs" / "main").write_text("0" * 40)
    clip = load_model(spec)
    rows = clip.tokenize(["a photo of a dog"])
    assert rows[0, :7].tolist() == [WORDS.index(word) for word in "[CLS] a photo of a dog [SEP]".split()]
    assert torch.equal(clip.encode_text(rows), plain.encode_text(rows, normalize=True))

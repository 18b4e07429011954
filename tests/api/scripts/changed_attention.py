"""A CLIP with a changed attention: it is attacked as it is, not as open_clip has it."""

import copy

import open_clip
import torch
from torch import nn

import rayclip
from rayclip.data import batch_pixels, open_data
from rayclip.models import load_model


class SharpAttention(nn.MultiheadAttention):
    """Attends twice as sharply as the weights say."""

    def forward(self, query, key, value, **options):
        return super().forward(1.2 * query, key, value, **options)


stock = load_model("digits").model  # any open_clip model: open_clip.create_model_and_transforms(...)
preprocess = open_clip.image_transform(8, is_train=False)
tokenizer = open_clip.SimpleTokenizer(context_length=stock.context_length)
mine = copy.deepcopy(stock)
for block in mine.visual.transformer.resblocks:
    block.attn.__class__ = SharpAttention

data = open_data("digits", "test")
images, labels = batch_pixels(data, range(32), "native", 8).float() / 255, torch.as_tensor(data.labels[:32])
results = {}
for name, module in {"stock": stock, "mine": mine}.items():
    module.requires_grad_(True).train()
    classifier = rayclip.wrap(module, preprocess, tokenizer, name).zero_shot(data.class_names)
    found = rayclip.attack(classifier, images, labels, "pgd:steps=5,start=zero,stop=final", eps="16/255")
    results[name] = found

    # The module's own forward says the same of the images that were found
    assert module.training and all(p.requires_grad for p in module.parameters())
    with torch.no_grad():
        module.eval()
        x = torch.stack([preprocess.transforms[-1](image) for image in found.images])
        prompts = [f"This is a photo of a {name}" for name in data.class_names]
        image, text = module.encode_image(x, normalize=True), module.encode_text(tokenizer(prompts), normalize=True)
        assert torch.allclose(module.logit_scale.exp() * image @ text.T, found.logits, atol=1e-3)

assert not torch.equal(results["stock"].images, results["mine"].images)
rows = rayclip.evaluate(
    [rayclip.wrap(stock, preprocess, tokenizer, "stock"), rayclip.wrap(mine, preprocess, tokenizer, "mine")],
    "digits",
    attacks="clean,pgd:steps=2",
    eps="16/255",
    limit=32,
    quiet=True,
)
accuracies = rows.to_pandas().pivot(index="model", columns="attack", values="top1")
assert list(accuracies.index) == ["wrapped:mine", "wrapped:stock"]
assert accuracies.loc["wrapped:stock", "clean"] > 90

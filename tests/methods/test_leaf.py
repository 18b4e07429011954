"""LEAF: its search, sample by sample; its loss; and that it does what it is for."""

import re
from dataclasses import replace

import pytest
import torch

import naive
from conftest import tiny_clip
from methods.test_guided import text
from methods.test_losses import CLASSES, attacked, example, same_value_and_gradient
from rayclip.attacks import make_attack
from rayclip.attacks.charmer import CHARACTERS
from rayclip.data import batch_pixels, open_data
from rayclip.methods import make_method
from rayclip.models import ZeroShot, load_model
from rayclip.training.loop import train
from training.test_loop import LocalHost, config


@pytest.mark.parametrize(
    "settings",
    [{"rho": 3}, {"rho": 52}, {"rho": 4, "k": 2, "captions": "templates", "sets": 3}, {"rho": 6, "constrain": True}],
    ids=str,
)
def test_the_search_is_that_of_the_paper(settings):
    """Sample by sample, text by text: whatever the batch, each image draws places and characters with its own key."""
    clip = tiny_clip(dtype=torch.float64)
    chosen = make_method("leaf", **settings)
    batch = example(clip, 4, chosen)
    known = {w.removesuffix("</w>") for w in clip.vocabulary if re.fullmatch("[a-z]{2,}</w>", w)}

    def allowed(before, after):
        words = [len(known.intersection(re.findall("[a-z]+", t.lower()))) for t in (before, after)]
        return not chosen.constrain or words[1] < words[0]

    def draw(key, count, stream):
        values = naive.uniforms(key, (count,), stream).tolist()
        return sorted(range(count), key=values.__getitem__)[: chosen.rho]

    made = attacked(clip, chosen, batch).adversarial_texts
    assert not set(made) & set(batch.texts.prompts) or chosen.rho < 5
    for label, key, found in zip(batch.labels_B.tolist(), batch.keys_B.tolist(), made, strict=True):
        several = chosen.texts_per_class
        number = int(several * naive.uniforms(key, (1,), 2 * chosen.k))
        prompt = batch.texts.prompts[number * len(CLASSES) + label]
        anchor, current = text(batch.original.clip, prompt).detach(), prompt
        for turn in range(chosen.k):
            places = draw(key, 2 * len(current) + 1, 2 * turn)
            characters = [CHARACTERS[i] for i in draw(key, len(CHARACTERS), 2 * turn + 1)]
            current = naive.leaf_step(
                lambda s, a=anchor: float((text(clip, s).detach() - a).pow(2).sum()),
                current,
                places,
                characters,
                allowed,
            )
        assert found == current and naive.edit_distance(prompt, found) <= chosen.k
    assert made == [s for part in batch.split(3) for s in attacked(clip, chosen, part).adversarial_texts]
    assert made != attacked(clip, chosen, replace(batch, keys_B=batch.keys_B + 1)).adversarial_texts


def test_the_loss_is_the_mean_squared_distance_from_the_original():
    clip = tiny_clip(dtype=torch.float64)
    chosen = make_method("leaf", rho=5)
    batch = attacked(clip, chosen, example(clip, 6))
    loss, metrics = chosen.loss(clip, batch)
    expected = 0.0
    for label, made in zip(batch.labels_B.tolist(), batch.adversarial_texts, strict=True):
        expected = (
            expected + (text(clip, made) - text(batch.original.clip, batch.texts.prompts[label])).pow(2).sum() / 6
        )
    same_value_and_gradient(clip, chosen, loss, expected)
    assert metrics["loss"].item() == loss.item()
    parts = {part: {id(p) for p in clip.parameters_of(part)} for part in ("all", "image", "text")}
    assert parts["all"] - parts["image"] - parts["text"] == {id(clip.model.logit_scale)}
    assert not parts["image"] & parts["text"] and len(parts["text"]) > 10


@pytest.mark.ci
def test_prompts_hold_when_their_characters_change(tmp_path):
    """On the digits, of which the untouched model tells none by such prompts; what it says of the clean ones stays."""
    data = open_data("digits", "test")
    images = batch_pixels(data, range(len(data)), "native", 8).float() / 255

    def accuracies(clip):
        victim = ZeroShot(clip, data.class_names)
        with torch.no_grad():
            features = victim.embed(images)
            texts = [victim.text_KD, victim.embed_prompts(make_attack("charmer").prepare(victim))]
            said = [victim.logits(features, text_KD).argmax(1).numpy() for text_KD in texts]
        return [100 * (labels == data.labels).mean() for labels in said]

    settings = config("leaf", shots=None)
    chosen = replace(settings.method, rho=10)
    trained = train(replace(settings, method=chosen, recipe=replace(chosen.small, epochs=6)), LocalHost(tmp_path))
    before, after = accuracies(load_model("digits")), accuracies(trained)
    assert before[1] < 10 and after[1] > before[1] + 30 and after[0] > before[0] - 1

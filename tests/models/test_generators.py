"""Real `transformers` models with random weights: what they write is nonsense, how it is asked for and kept is not."""

import pytest
import torch
from PIL import Image

import tiny_generators
from rayclip.models.generators import (
    IMAGE_QUESTIONS,
    QUESTIONS,
    Ask,
    GeneratorSettings,
    TransformersGenerator,
    caption_classes,
    first_sentence,
    generator_kind,
)
from rayclip.types import UserError

SETTINGS = GeneratorSettings(batch_size=8, max_new_tokens=24)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("generators")
    return {
        "chat": tiny_generators.text_model(base / "chat"),
        "plain": tiny_generators.text_model(base / "plain", chat=False),
        "llava": tiny_generators.chat_vision_model(base / "llava"),
        "blip": tiny_generators.captioner(base / "blip"),
    }


@pytest.mark.parametrize(
    ("model", "sees", "chats"),
    [("chat", False, True), ("plain", False, False), ("llava", True, True), ("blip", True, False)],
)
def test_every_kind_writes_single_finished_sentences_again_and_again_the_same(folders, model, sees, chats):
    kind = generator_kind(folders[model])
    assert (kind.sees, kind.chats) == (sees, chats)
    pictures = [[Image.new("RGB", (20 + i, 15), c) for i in range(2)] for c in ("red", "blue")] if sees else []
    questions = IMAGE_QUESTIONS if sees else QUESTIONS

    generator = TransformersGenerator(folders[model], settings=SETTINGS)

    def write(seed, generator=generator):
        return caption_classes(generator, ["dog", "Cat_bird"], 5, questions=questions, images=pictures, seed=seed)

    first = write(0)
    assert all(len(own) == len(set(own)) == 5 for own in first)
    sentences = [s for own in first for s in own]
    assert all("\n" not in s and "assistant" not in s.split()[:1] and "<" not in s for s in sentences)
    assert all(". " not in s for s in sentences), "one sentence each"
    if model == "blip":
        assert all(s.startswith("a photo of") for s in sentences)
    assert write(1) != first
    assert write(0, TransformersGenerator(folders[model], settings=SETTINGS)) == first


def test_prompts_follow_the_template_of_the_model(folders):
    ask = Ask(name="dog", question="what is a dog", image=Image.new("RGB", (4, 4)))
    text = Ask(name="dog", question="what is a dog")
    prompts = {name: TransformersGenerator(folders[name], settings=SETTINGS)._prompt for name in folders}
    assert prompts["chat"](text) == "user what is a dog assistant"
    assert prompts["plain"](text) == "Question: what is a dog\nAnswer:"
    assert prompts["llava"](ask) == "user <image> what is a dog assistant"
    assert prompts["blip"](ask) == "a photo of dog"


def test_images_reach_the_model(folders):
    generator = TransformersGenerator(folders["llava"], settings=SETTINGS)

    def write(image):
        return generator.generate([Ask(name="dog", question="a photo of", image=image)] * 8, seed=3)

    noise = Image.fromarray(torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy())
    assert write(noise) == write(noise)
    assert write(noise) != write(Image.new("RGB", (16, 16), "white"))


def test_a_batch_is_padded_without_changing_what_is_likely(folders):
    """Next-word logits of a short prompt are the same alone and beside a longer one."""
    generator = TransformersGenerator(folders["chat"], settings=SETTINGS)
    short, long = "user a dog assistant", "user the long red bird has a tail assistant"

    def logits(prompts):
        inputs = generator._front(text=prompts, padding=True, return_tensors="pt", add_special_tokens=False)
        inputs.pop("token_type_ids", None)
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return generator._model(**inputs, position_ids=positions).logits[:, -1]

    with torch.no_grad():
        torch.testing.assert_close(logits([short, long])[0], logits([short])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("A cat has fur. It purrs.", "A cat has fur."),
        ("  A cat\n", "A cat"),
        ("1. **A cat** has fur.\n2. It purrs.", "A cat has fur."),
        ("- a St. Bernard is a large dog. It drools.", "a St. Bernard is a large dog."),
        ('"A cat has fur."', "A cat has fur."),
        ("<think>Hmm. What is it?</think>\n\nA cat has fur!", "A cat has fur!"),
        ("<think>Never ends", None),
        ("A plane 3.5 metres long (roughly). It flies.", "A plane 3.5 metres long (roughly)."),
        ("Cat.", None),
        ("", None),
    ],
)
def test_first_sentence(answer, sentence):
    assert first_sentence(answer) == sentence


def test_an_answer_that_was_cut_off_counts_only_up_to_its_first_full_stop():
    assert first_sentence("A cat has fur. It pu", finished=False) == "A cat has fur."
    assert first_sentence("A cat has fu", finished=False) is None


def test_questions_take_turns_and_then_the_images(folders):
    seen = []

    class Noting(TransformersGenerator):
        def generate(self, asks, seed):
            seen.extend(asks)
            return super().generate(asks, seed)

    pictures = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    generator = Noting(folders["llava"], settings=SETTINGS)
    caption_classes(generator, ["dog"], 4, questions=["one {}", "two {} {}"], images=[pictures])
    asked = [(ask.question, pictures.index(ask.image)) for ask in seen[:4]]
    assert asked == [("one dog", 0), ("two dog dog", 0), ("one dog", 1), ("two dog dog", 1)]


def test_what_is_no_generator_is_explained(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="folder"):
        generator_kind(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="loaded"):
        generator_kind(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(UserError, match="resnet"):
        generator_kind(str(tmp_path))

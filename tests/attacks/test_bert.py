import itertools
import math
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

import naive
from conftest import text_rows, tiny_clip
from rayclip.attacks import Samples, make_attack
from rayclip.attacks.bert import TextSettings, bert_attack, divergence
from rayclip.attacks.substitutes import MaskedLM, ReferenceMaskedLM, TokenTable
from rayclip.attacks.words import REFERENCE, STOP_WORDS, split_words
from rayclip.models import ZeroShot
from rayclip.rng import sample_keys
from rayclip.types import UserError

PROMPTS = [
    f"This is a photo of a {c}" for c in ("cat", "golden retriever", "truck", "african violet", "wombatlike thing")
]
CAPTIONS = [
    "A dog and a golden retriever, by the tree.",
    "The wombatlike thing (a picture of a stone) sees catlike doging lemons",
    "Window, door, table, chair, house: a car is the river's cloud in an image of a painting of a tree and of a truck; "
    "this is a violet on paper, and a house of stone, a lemon and the door of the car",
    "of the and.",
    "photo",
]
SPACED = [
    "a dog and a golden retriever , by the tree .",
    "the wombatlike thing ( a picture of a stone ) sees catlike doging lemons",
    "window , door , table , chair , house : a car is the river's cloud in an image of a painting of a tree and of a "
    "truck ; this is a violet on paper , and a house of stone , a lemon and the door of the car",
    "of the and .",
    "photo",
]
VOCABULARY = """[PAD] [UNK] [CLS] [SEP] [MASK] this is a photo of the cat dog golden retriever truck african violet
##let wombat ##like thing picture image painting lemon car house tree river stone cloud paper table chair window door
##s ##ed ##ing .""".split()


def embedder(clip):
    return lambda text: clip.embed_texts([text])[0].detach()


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory) -> str:
    """A folder with a random masked language model of BERT's architecture and a real tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("changes", [1, 2])
def test_token_table_attack_agrees_with_the_plain_loop(changes):
    clip = tiny_clip(dtype=torch.float64)
    ours = bert_attack(clip, PROMPTS, TokenTable(clip, k=6), changes=changes)
    table = clip.token_table.detach().float()

    def pieces(word):
        tokens = clip.tokenize([word])[0].tolist()
        return tokens[1 : tokens.index(49407)]

    def substitutes(words, i):
        return naive.nearest_words(table, clip.vocabulary, pieces, words[i], 6, STOP_WORDS)

    for prompt, change in zip(PROMPTS, ours, strict=True):
        assert change.prompt == naive.bert_attack(embedder(clip), prompt, substitutes, STOP_WORDS, changes)
        assert len(change.changes) == changes


def plain_substitutes(folder, *, k=8, threshold=0.0, combinations=24, max_length=30):
    """The masked language model's substitutes, sentence by sentence and combination by combination."""
    tokenizer, model = BertTokenizer.from_pretrained(folder), BertForMaskedLM.from_pretrained(folder).eval()

    def substitutes(words, i):
        parts = [tokenizer.tokenize(w) for w in words]
        if sum(map(len, parts[: i + 1])) > max_length - 2:
            return []
        row = ["[CLS]", *list(itertools.chain(*parts))[: max_length - 2], "[SEP]"]
        logits = model(torch.tensor([tokenizer.convert_tokens_to_ids(row)])).logits[0].detach()
        first = sum(len(p) for p in parts[:i]) + 1
        found = []
        if len(parts[i]) == 1:
            for token in logits[first].argsort(descending=True)[:k].tolist():
                if threshold and logits[first, token] < threshold:
                    break
                found.append(VOCABULARY[token])
        else:
            tops = [logits[first + j].argsort(descending=True)[:4].tolist() for j in range(len(parts[i]))]
            ranked = []
            for order, combination in enumerate(itertools.islice(itertools.product(*tops), combinations)):
                out = model(torch.tensor([combination])).logits[0].detach()
                losses = [naive.cross_entropy(out[j].tolist(), t) for j, t in enumerate(combination)]
                text = tokenizer.convert_tokens_to_string([VOCABULARY[t] for t in combination])
                ranked.append((math.exp(sum(losses) / len(losses)), order, text))
            found = [text for _, _, text in sorted(ranked)]
        return [
            f for f in dict.fromkeys(found) if f.replace(" ", "").isalpha() and f != words[i] and f not in STOP_WORDS
        ]

    return substitutes


def published_substitutes(folder, *, k=8, threshold=0.0, combinations=24, max_length=30):
    """The same as MMCoA's code has it: no [SEP], a position early, nothing dropped but pieces and stop words."""
    tokenizer, model = BertTokenizer.from_pretrained(folder), BertForMaskedLM.from_pretrained(folder).eval()

    def substitutes(words, i):
        parts = [tokenizer.tokenize(w) for w in words]
        start = sum(map(len, parts[:i]))
        if start > max_length - 2:
            return []
        row = ["[CLS]", *itertools.chain(*parts)][:max_length]
        logits = model(torch.tensor([tokenizer.convert_tokens_to_ids(row)])).logits[0].detach()
        tops = [row.argsort(descending=True)[:k].tolist() for row in logits[start : start + len(parts[i])]]
        found = []
        if len(tops) == 1:
            for token in tops[0]:
                if threshold and logits[start, token] < threshold:
                    break
                found.append(VOCABULARY[token])
        elif tops:
            every = itertools.product(*(top[:4] for top in tops[:12]))
            for combination in itertools.islice(every, combinations):  # their order does not matter: the best is taken
                found.append(" ".join(VOCABULARY[t] for t in combination).replace(" ##", "").strip())
        return [f for f in found if f != words[i] and "##" not in f and f not in REFERENCE.stop_words]

    return substitutes


def reader(folder, max_length=30):
    """What MMCoA's code lets CLIP read: pieces, put together again."""
    tokenizer = BertTokenizer.from_pretrained(folder)

    def read(text):
        told = " ".join(tokenizer.tokenize(text)[: max_length - 1]).replace(" ##", "")
        for mark in ".?!,":
            told = told.replace(f" {mark}", mark)
        for special in ("[PAD]", "[CLS]", "[SEP]"):
            told = told.replace(special, "")
        return told.strip()

    return read


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_masked_lm_attack_agrees_with_the_plain_loop(masked_lm, threshold):
    clip = tiny_clip(dtype=torch.float64)
    source = MaskedLM(masked_lm, clip.device, k=8, threshold=threshold)
    substitutes = plain_substitutes(masked_lm, threshold=threshold)
    for prompt, change in zip(PROMPTS, bert_attack(clip, PROMPTS, source), strict=True):
        assert change.prompt == naive.bert_attack(embedder(clip), prompt, substitutes, STOP_WORDS)


PUBLISHED = [
    *PROMPTS,
    *CAPTIONS,
    "This  is a Car .",
    " this [PAD] car",
    "The car, the Car: THE CAR",
    "",
    "trucks doging",
]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"changes": 3},
        {"k": 2},
        {"threshold": 0.3},
        {"threshold": 4.0},
        {"combinations": 3},
        {"combinations": 64, "changes": 2},
        {"max_length": 5},
        {"max_length": 9, "changes": 2},
    ],
    ids=str,
)
def test_the_reference_agrees_with_the_plain_loop_of_the_public_code(masked_lm, settings):
    clip = tiny_clip(dtype=torch.float64)
    known = {"substitutes": masked_lm, "offset": "reference", "threshold": 0.0, "k": 8}
    found = TextSettings(**(known | settings)).attack(clip, PUBLISHED)
    settings = dict(settings)
    changes = settings.pop("changes", 1)
    substitutes = published_substitutes(masked_lm, **settings)
    read = reader(masked_lm, settings.get("max_length", 30))
    for text, change in zip(PUBLISHED, found, strict=True):
        plain = naive.published_bert_attack(embedder(clip), read, text, substitutes, REFERENCE.stop_words, changes)
        assert change.prompt == plain, text


def test_each_thing_that_the_reference_does_shows(masked_lm):
    """Case-sensitive stop words, blanks, special tokens as substitutes; the text is left as it was else."""
    clip = tiny_clip(dtype=torch.float64)
    attack = TextSettings(substitutes=masked_lm, offset="reference", threshold=0.0, k=20)
    changes = attack.attack(clip, ["This of a", "this of a", "The  CAR,", "of , - !"])
    assert [c[:2] for c in changes[0].changes] == [(0, "This")], "no stop word"
    assert changes[1].prompt == "this of a" and not changes[1].changes
    assert "  " in changes[2].prompt and ("The " in changes[2].prompt or "CAR," in changes[2].prompt)
    assert changes[3].prompt == "of , - !"
    source = ReferenceMaskedLM(masked_lm, clip.device, k=40, threshold=0.0)
    options = {o for row in source.candidates([["photo", "doging"]]) for word in row for o in word}
    assert {"[PAD]", "[MASK]"} & options and not any("##" in o for o in options)
    assert source.as_read(["A  Dóg, doging"]) == ["a dog [UNK] doging"]


@pytest.mark.parametrize("name", ["bert", "sep", "co-attack", "sga"])
def test_every_attack_on_texts_takes_the_reference(masked_lm, name):
    victim = ZeroShot(tiny_clip(dtype=torch.float64), [p.removeprefix("This is a photo of a ") for p in PROMPTS])
    labels = torch.arange(len(PROMPTS))
    images = torch.rand(len(PROMPTS), 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attack = make_attack(name, substitutes=masked_lm, offset="reference", threshold=0.0, k=8)
    prompts = attack.prepare(victim)
    result = attack.run(victim, Samples(images, labels, sample_keys(range(5))), eps=0.0, prompts=prompts)
    texts = prompts or [own[0] for own in result.own_texts]
    substitutes, read = published_substitutes(masked_lm), reader(masked_lm)
    for label, text in enumerate(texts):
        guide = None if name != "sga" else victim.embed(images[[label]])[0].detach()
        assert text == naive.published_bert_attack(
            embedder(victim.clip), read, victim.prompts[label], substitutes, REFERENCE.stop_words, 1, guide
        )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"changes": 3},
        {"k": 2},
        {"threshold": 4.0},
        {"combinations": 3},
        {"combinations": 64, "changes": 2},
        {"max_length": 6},
    ],
    ids=str,
)
def test_captions_agree_with_the_plain_loop_setting_by_setting(masked_lm, settings):
    clip = tiny_clip(dtype=torch.float64)
    found = TextSettings(substitutes=masked_lm, **({"threshold": 0.0, "k": 8} | settings)).attack(clip, CAPTIONS)
    settings = dict(settings)
    changes = settings.pop("changes", 1)
    substitutes = plain_substitutes(masked_lm, **settings)
    for caption, change in zip(SPACED, found, strict=True):
        assert change.prompt == naive.bert_attack(embedder(clip), caption, substitutes, STOP_WORDS, changes)
    assert any(len(change.changes) == changes for change in found)


def test_every_setting_of_the_masked_lm_can_matter(masked_lm):
    clip = tiny_clip()

    def attack(**settings):
        settings = {"threshold": 0.0, "k": 8, "changes": 2} | settings
        return [c.prompt for c in TextSettings(substitutes=masked_lm, **settings).attack(clip, CAPTIONS)]

    base = attack()
    for other in ({"k": 2}, {"changes": 1}, {"threshold": 4.0}, {"combinations": 1}, {"max_length": 6}):
        assert attack(**other) != base, other
    assert attack(max_length=1) == SPACED, "there is no room for a word"


def test_words_and_punctuation():
    """Punctuation is no part of a word and is never replaced; CLIP reads the same tokens."""
    assert split_words("Two dogs' ball, in St. Ives -- it's well-worn!") == (
        "two dogs ' ball , in st . ives -- it's well-worn !".split()
    )
    clip = tiny_clip()
    assert torch.equal(clip.tokenize([" ".join(split_words(c)) for c in CAPTIONS]), clip.tokenize(CAPTIONS))
    source = TokenTable(clip, 5)
    (change,) = bert_attack(clip, ["... , ! cat , -"], source, changes=5)
    assert [c[:2] for c in change.changes] == [(3, "cat")]
    assert bert_attack(clip, [], source) == []


def test_candidates_are_no_stop_words_pieces_or_the_word_itself(masked_lm):
    clip = tiny_clip()
    sentences = [p.lower().split() for p in PROMPTS]
    for source in (TokenTable(clip, 10), MaskedLM(masked_lm, clip.device, k=20, threshold=0.0)):
        for sentence, found in zip(sentences, source.candidates(sentences), strict=True):
            for word, options in zip(sentence, found, strict=True):
                assert (word not in STOP_WORDS) or not options
                assert all(o != word and o not in STOP_WORDS and "#" not in o for o in options)


def test_all_prompts_share_their_forwards():
    """200 prompts cost a handful of text forwards, not one per word, and less than their own length in rows: a prompt,
    two maskings and ten substitutes share what they begin with."""
    clip = tiny_clip()
    with text_rows(clip) as seen:
        bert_attack(clip, [f"This is a photo of a {w}" for w, _ in clip.whole_words[:200]], TokenTable(clip, 10))
    assert len(seen) <= 6 and sum(rows for rows, _ in seen) < 200 * 4


def test_captions_share_the_language_models_forwards(masked_lm, monkeypatch):
    """300 captions with words of several pieces cost a forward a 64 captions, and a few for all combinations."""
    clip, rows = tiny_clip(), []
    source = MaskedLM(masked_lm, clip.device, k=8, threshold=0.0)
    forward = BertForMaskedLM.forward
    monkeypatch.setattr(
        BertForMaskedLM, "forward", lambda self, **kw: (rows.append(len(kw["input_ids"])), forward(self, **kw))[1]
    )
    source.candidates([split_words(f"a wombatlike thing {c}") for c in CAPTIONS * 60])
    assert len(rows) <= 12


def test_divergence_is_kl_of_the_softmaxes():
    a, b = torch.randn(2, 7, dtype=torch.float64)
    assert divergence(a, b).item() == pytest.approx(naive.kl(a, b), abs=1e-12)


def test_a_missing_language_model_is_explained(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="substitutes=clip-table"):
        TextSettings(substitutes="/no/such/folder").source(tiny_clip())


def test_berts_own_vocabulary(shared: Path, tmp_path):
    """With the real 30,522 word pieces: substitutes are whole words of it."""
    words = (shared / "data/bert-base-uncased-vocab.txt").read_text().split("\n")
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    clip = tiny_clip()
    source = MaskedLM(str(tmp_path), clip.device, k=10, threshold=0.0)
    for change in bert_attack(clip, PROMPTS, source):
        assert len(change.changes) == 1
        assert set(change.changes[0][2].split()) <= set(words) or " " not in change.changes[0][2]

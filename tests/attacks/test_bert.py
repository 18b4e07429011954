import itertools
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

import naive
from conftest import tiny_clip
from rayclip.attacks.bert import TextSettings, bert_attack, divergence
from rayclip.attacks.substitutes import STOP_WORDS, MaskedLM, TokenTable
from rayclip.types import UserError

PROMPTS = [
    f"This is a photo of a {c}" for c in ("cat", "golden retriever", "truck", "african violet", "wombatlike thing")
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


@pytest.mark.parametrize("offset", ["correct", "reference"])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_masked_lm_attack_agrees_with_the_plain_loop(masked_lm, offset, threshold):
    clip = tiny_clip(dtype=torch.float64)
    source = MaskedLM(masked_lm, clip.device, k=8, threshold=threshold, offset=offset)
    ours = bert_attack(clip, PROMPTS, source)
    tokenizer, model = BertTokenizer.from_pretrained(masked_lm), BertForMaskedLM.from_pretrained(masked_lm).eval()

    def substitutes(words, i):
        parts = [tokenizer.tokenize(w) for w in words]
        row = ["[CLS]", *itertools.chain(*parts), "[SEP]"]
        logits = model(torch.tensor([tokenizer.convert_tokens_to_ids(row)])).logits[0].detach()
        first = sum(len(p) for p in parts[:i]) + (1 if offset == "correct" else 0)
        found = []
        if len(parts[i]) == 1:
            for token in logits[first].argsort(descending=True)[:8].tolist():
                if threshold and logits[first, token] < threshold:
                    break
                found.append(VOCABULARY[token])
        else:
            tops = [logits[first + j].argsort(descending=True)[:4].tolist() for j in range(len(parts[i]))]
            ranked = []
            for order, combination in enumerate(itertools.islice(itertools.product(*tops), 24)):
                out = model(torch.tensor([combination])).logits[0].detach()
                loss = sum(naive.cross_entropy(out[j].tolist(), t) for j, t in enumerate(combination)) / len(
                    combination
                )
                ranked.append((loss, order, tokenizer.convert_tokens_to_string([VOCABULARY[t] for t in combination])))
            found = [text for _, _, text in sorted(ranked)]
        return [
            f for f in dict.fromkeys(found) if f.replace(" ", "").isalpha() and f != words[i] and f not in STOP_WORDS
        ]

    for prompt, change in zip(PROMPTS, ours, strict=True):
        assert change.prompt == naive.bert_attack(embedder(clip), prompt, substitutes, STOP_WORDS)


def test_the_two_offsets_differ(masked_lm):
    clip = tiny_clip()
    sentences = [p.lower().split() for p in PROMPTS]
    by_offset = [
        MaskedLM(masked_lm, clip.device, k=8, threshold=0.0, offset=o).candidates(sentences)
        for o in ("correct", "reference")
    ]
    assert by_offset[0] != by_offset[1]


def test_candidates_are_no_stop_words_pieces_or_the_word_itself(masked_lm):
    clip = tiny_clip()
    sentences = [p.lower().split() for p in PROMPTS]
    for source in (TokenTable(clip, 10), MaskedLM(masked_lm, clip.device, k=20, threshold=0.0, offset="correct")):
        for sentence, found in zip(sentences, source.candidates(sentences), strict=True):
            for word, options in zip(sentence, found, strict=True):
                assert (word not in STOP_WORDS) or not options
                assert all(o != word and o not in STOP_WORDS and "#" not in o for o in options)


def test_all_prompts_share_their_forwards():
    """200 prompts cost a handful of text forwards, not one per word."""
    clip = tiny_clip()
    calls = []
    encode = clip.encode_text
    clip.encode_text = lambda tokens, **kw: (calls.append(len(tokens)), encode(tokens, **kw))[1]
    bert_attack(clip, [f"This is a photo of a {w}" for w, _ in clip.whole_words[:200]], TokenTable(clip, 10))
    assert len(calls) <= 6 and sum(calls) > 200 * 15


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
    source = MaskedLM(str(tmp_path), clip.device, k=10, threshold=0.0, offset="correct")
    for change in bert_attack(clip, PROMPTS, source):
        assert len(change.changes) == 1
        assert set(change.changes[0][2].split()) <= set(words) or " " not in change.changes[0][2]

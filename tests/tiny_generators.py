"""Language and image-text models with random weights, written as folders that `transformers` loads."""

from pathlib import Path

import torch

WORDS = [
    *("<unk>", "<pad>", "<s>", "</s>", "<image>", "user", "assistant", "a", "an", "the", "photo", "of", "is", "has"),
    *("dog", "cat", "bird", "long", "short", "round", "red", "blue", "black", "fur", "tail", "wings", "and", "with"),
    *("small", "large", "thin", "line", "curve", "ink.", "paper.", "eyes.", "legs.", "feathers.", "stripes.", "ears."),
]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endif %}"
    "{% endfor %} assistant"
)


def tokenizer(*, chat: bool, framed: bool = False):
    """Words with blanks between; `framed` in start and end, as BERT's tokenizer does and BLIP expects."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if framed:
        fast.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    made.chat_template = CHAT if chat else None
    return made


def _llama():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=1,
    )


def text_model(folder: Path, *, chat: bool = True) -> str:
    """A Llama of one layer. Returns the folder's name."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(_llama()).save_pretrained(folder)
    tokenizer(chat=chat).save_pretrained(folder)
    return str(folder)


def chat_vision_model(folder: Path) -> str:
    """A LLaVA with a vision tower of two layers for images of 16×16 pixels."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=_llama(), image_token_index=WORDS.index("<image>"), image_seq_length=4
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(20)  # for the image to matter to what is written
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer(chat=True),
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return str(folder)


def captioner(folder: Path) -> str:
    """A BLIP, which has no chat template and continues a caption."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 1}
    config = BlipConfig(
        text_config={**layers, **tokens, "vocab_size": len(WORDS), "encoder_hidden_size": 16},
        vision_config={**layers, "image_size": 16, "patch_size": 8},
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    front = tokenizer(chat=False, framed=True)
    BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), front).save_pretrained(folder)
    return str(folder)

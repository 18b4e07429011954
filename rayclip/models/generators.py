"""Models that write captions of classes, for data sets that have none.

A generator answers questions in the manner of CuPL (Pratt et al. 2023): several questions per class, sampled answers,
one sentence each. With an image-text model every question comes with one example image of the class.
"""

import hashlib
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image

from rayclip.models.loading import silence
from rayclip.models.zeroshot import clean_name
from rayclip.types import UserError

QUESTIONS = (
    'Describe in one sentence what a photo of "{}" shows.',
    'In one sentence: by which shapes, colours and surfaces can "{}" be recognised in a picture?',
    'Explain to somebody who has never seen "{}", in one sentence, how it looks.',
    'Which visible parts and details set "{}" apart from things that look alike? Answer in one sentence.',
    'Write a one-sentence caption for a typical picture of "{}".',
)
IMAGE_QUESTIONS = (
    'This picture shows "{}". Describe in one sentence how "{}" looks in it.',
    'This is an example of "{}". In one sentence: by which shapes, colours and surfaces can it be recognised?',
    'The picture is of "{}". Which visible details set it apart from things that look alike? Answer in one sentence.',
)

_ROUNDS = 4  # of questions; later rounds replace repeated and unfinished answers


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One question about a class, with an image of it or None."""

    name: str
    question: str
    image: Image.Image | None = None


@dataclass(frozen=True, kw_only=True)
class GeneratorSettings:
    """Sampling settings of a generator.

    Attributes:
        batch_size: questions answered at a time.
        temperature: 0.99 is CuPL's.
        max_new_tokens: an answer whose first sentence is longer is dropped.
    """

    batch_size: int = 64
    temperature: float = 0.99
    max_new_tokens: int = 64


@dataclass(frozen=True, kw_only=True)
class GeneratorKind:
    """A model's capabilities, known from its configuration alone.

    Attributes:
        sees: takes images.
        chats: has a chat template; other models continue a text.
        fingerprint: changes with the model's files.
    """

    sees: bool
    chats: bool
    fingerprint: str


class CaptionGenerator(ABC):
    """A model that answers questions with sentences. The same questions with the same seed get the same answers."""

    @abstractmethod
    def generate(self, asks: Sequence[Ask], seed: int) -> list[str | None]:
        """Return one sentence for each question, None if the answer contains no complete one."""


def caption_classes(
    generator: CaptionGenerator,
    class_names: Sequence[str],
    per_class: int,
    *,
    questions: Sequence[str],
    images: Sequence[Sequence[Image.Image]] = (),
    seed: int = 0,
) -> list[list[str]]:
    """Return up to `per_class` distinct sentences for each class, asking again a few times for missing ones.

    Args:
        questions: with `{}` for the class; each class is asked them in turn.
        images: examples of each class; the next one is used after all questions were asked; none for text models.
    """
    found: list[dict[str, None]] = [{} for _ in class_names]
    asked = [0] * len(class_names)
    for turn in range(_ROUNDS):
        owners, asks = [], []
        for k, name in enumerate(class_names):
            for _ in range(per_class - len(found[k])):
                question = questions[asked[k] % len(questions)].replace("{}", clean_name(name))
                image = images[k][asked[k] // len(questions) % len(images[k])] if images else None
                asks.append(Ask(name=clean_name(name), question=question, image=image))
                owners.append(k)
                asked[k] += 1
        if not asks:
            break
        for k, sentence in zip(owners, generator.generate(asks, _seed(seed, turn)), strict=True):
            if sentence is not None:
                found[k].setdefault(sentence)
    return [list(own) for own in found]


def _seed(*numbers: int) -> int:
    """Return a different seed for each tuple of numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


def first_sentence(text: str, *, finished: bool = True) -> str | None:
    """Return the first sentence of an answer without a model's decoration, or None.

    Removes thoughts, list marks, markup and quotes. A full stop after at most two letters ("St. Bernard") ends no
    sentence.

    Args:
        finished: whether the model ended by itself; if not, an answer without an end of sentence is truncated and
            useless.
    """
    text = re.sub(r"<think>.*?(</think>|$)", " ", text, flags=re.DOTALL)
    lines = (re.sub(r"^(?:[-*•#>]+|\(?\d{1,2}[.)])\s+", "", line.strip()) for line in text.splitlines())
    line = next((clean for line in lines if (clean := " ".join(line.replace("*", "").split()).strip("\"'“”`"))), "")
    end = re.search(r"""(?:\w{3}|[^\w\s.])[.!?]+(?=["'”]?(?:\s|$))""", line)
    sentence = line[: end.end()] if end else line if finished else ""
    return sentence if len(sentence.split()) > 1 else None


def generator_kind(model: str) -> GeneratorKind:
    """Return a model's capabilities from its small files.

    Args:
        model: a folder or hub id of a `transformers` text-generation or image-text model.

    Raises:
        UserError: no such model, or one that does not generate text.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    config = _load(model, "AutoConfig")
    sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if not sees and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"generator '{model}' is a {config.model_type}, which writes no captions: give a text-generation or "
            "image-text model of transformers."
        )
    front = _load(model, "AutoProcessor" if sees else "AutoTokenizer")
    digest = hashlib.sha256(config.to_json_string().encode())
    digest.update(str(_commit(model)).encode())
    for file in sorted(Path(model).iterdir()) if Path(model).is_dir() else ():
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return GeneratorKind(
        sees=sees, chats=bool(getattr(front, "chat_template", None)), fingerprint=digest.hexdigest()[:16]
    )


def _commit(model: str) -> str | None:
    """Return the commit of a hub model's files in the local cache, which are kept below `snapshots/<commit>`."""
    found = None if Path(model).exists() else try_to_load_from_cache(model, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


class TransformersGenerator(CaptionGenerator):
    """Any text-generation or image-text model of `transformers`, by folder or hub id.

    Chat models get the question in their chat template. Text models without one continue "Question: … Answer:", and
    image-text models without one (BLIP, GIT) continue "a photo of NAME", as they were trained to.

    Raises:
        UserError: the model cannot be loaded.
    """

    def __init__(
        self, model: str, device: torch.device | str = "cpu", settings: GeneratorSettings | None = None
    ) -> None:
        self.kind = generator_kind(model)
        self._settings, self._device = settings or GeneratorSettings(), torch.device(device)
        self._front = _load(model, "AutoProcessor" if self.kind.sees else "AutoTokenizer")
        self._tokenizer = getattr(self._front, "tokenizer", self._front)
        self._tokenizer.padding_side = "left"  # generation continues at the right end
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token
        if self._tokenizer.pad_token is None:
            raise UserError(f"generator '{model}' has a tokenizer without padding or end-of-text token: add one to it.")
        loader = "AutoModelForImageTextToText" if self.kind.sees else "AutoModelForCausalLM"
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        self._model = _load(model, loader).to(device=self._device, dtype=dtype).eval()
        if self._model.generation_config.pad_token_id is None:
            self._model.generation_config.pad_token_id = self._tokenizer.pad_token_id
        ends = self._model.generation_config.eos_token_id
        self._ends = {*self._tokenizer.all_special_ids, *(ends if isinstance(ends, list) else [ends])}

    def generate(self, asks: Sequence[Ask], seed: int) -> list[str | None]:
        torch.manual_seed(seed)
        prompts = [self._prompt(ask) for ask in asks]
        answers: list[str | None] = []
        for members in self._batches(prompts):
            answers += self._answer([prompts[i] for i in members], [asks[i].image for i in members])
        return answers

    def _batches(self, prompts: Sequence[str]) -> list[range]:
        """Return ranges of consecutive positions. Image captioners need prompts of equal length: BLIP's start token is
        position 0."""
        size, batches, start = self._settings.batch_size, [], 0
        for i in range(1, len(prompts) + 1):
            other = i < len(prompts) and not self.kind.chats and self.kind.sees and prompts[i] != prompts[start]
            if i == len(prompts) or i - start == size or other:
                batches.append(range(start, i))
                start = i
        return batches

    def _prompt(self, ask: Ask) -> str:
        if not self.kind.chats:
            return f"a photo of {ask.name}" if self.kind.sees else f"Question: {ask.question}\nAnswer:"
        content: Any = ask.question
        if self.kind.sees:
            content = [{"type": "image"}] * (ask.image is not None) + [{"type": "text", "text": ask.question}]
        template = self._front.chat_template
        # Models that would think first have templates with this switch.
        switches = {"enable_thinking": False} if "enable_thinking" in str(template) else {}
        return self._front.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, **switches
        )

    @torch.no_grad()
    def _answer(self, prompts: list[str], images: list[Image.Image | None]) -> list[str | None]:
        options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        if self.kind.chats:
            options["add_special_tokens"] = False  # the template contains them already
        if images[0] is not None:
            options["images"] = [[image] for image in images] if self.kind.chats else images
        inputs = self._front(text=prompts, **options).to(self._device)
        for name, value in inputs.items():
            if torch.is_floating_point(value):  # pixels, whatever the model calls them
                inputs[name] = value.to(self._model.dtype)
        if "token_type_ids" not in inspect.signature(self._model.forward).parameters:
            inputs.pop("token_type_ids", None)  # some tokenizers write them for every model
        with silence():
            written = self._model.generate(
                **inputs,
                do_sample=True,
                temperature=self._settings.temperature,
                max_new_tokens=self._settings.max_new_tokens,
            )
        captioner = self.kind.sees and not self.kind.chats
        fresh = written if captioner else written[:, inputs["input_ids"].shape[1] :]  # a caption includes its prompt
        texts = self._tokenizer.batch_decode(fresh, skip_special_tokens=True)
        ended = [int(row[-1]) in self._ends for row in written]
        return [first_sentence(text, finished=end) for text, end in zip(texts, ended, strict=True)]


def _load(model: str, auto: str) -> Any:
    """Return `transformers.<auto>.from_pretrained(model)`, quietly and without running code that comes with a model."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    local = Path(model).exists()
    if not local and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise UserError(f"generator '{model}': there is no such folder.")
    try:
        with silence():
            return getattr(transformers, auto).from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if not local:
            raise UserError(
                f"generator '{model}' could not be downloaded: check its name, the network and HF_HOME, or give a "
                "folder that holds it."
            ) from error
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"generator '{model}' could not be loaded: {reason}") from error

"""The zoo: published robust CLIPs by name, `zoo:NAME`, a line of `zoo.csv` each. Imports neither torch nor open_clip.

Columns of `zoo.csv`; what is not known is empty:

- `name`; `layout`: `open_clip` (a folder with a configuration and weights), `image-tower` (the state dict of an image
  tower, put into `base`) or `transformers` (a folder with a `CLIPModel`).
- `source`: `hf-hub:ORG/NAME`, or a link that does not last and is therefore only shown; `mirrors`: further ones,
  separated by blanks, tried in turn; `file`: the weights' name there; `revision`: commit of the repository; `sha256`:
  of the file of weights.
- `architecture` (open_clip's name), `image_size` (pixels), `activation` (`quickgelu` or `gelu`), `normalization`
  (`openai` or `imagenet`), `tokenizer` (one of transformers'): what a row states overrules the published configuration.
- `base`: the model that it was fine-tuned from; `method`, `trained_on`, `trained_against`: how it was trained.
- `clean`, `robust_1`, `robust_2`, `robust_4`: published accuracies in percent, of `numbers`; `robust_E` within E/255.
- `licence`, `paper`, `page` (where people find it), `note`.
"""

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from rayclip.settings import suggest
from rayclip.store import cache_root
from rayclip.types import UserError
from rayclip.units import parse_budget

PREFIX = "zoo:"
_HUB = "hf-hub:"
WEIGHTS = {
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "transformers": ("model.safetensors", "pytorch_model.bin"),
}
_TEXTS = ("*.json", "*.txt")  # configurations and tokenizers
CLIPS_OWN = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # mean and std
_NORMALIZATIONS = {
    "openai": CLIPS_OWN,
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}
_NOT_OPEN_CLIPS = ("vocab_path",)  # settings of a fork's text tower, which open_clip refuses; of its tokenizer only


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A line of `zoo.csv`."""

    name: str
    layout: Literal["open_clip", "image-tower", "transformers"]
    source: str
    file: str = ""
    architecture: str
    image_size: int
    activation: Literal["quickgelu", "gelu", ""] = ""
    normalization: Literal["openai", "imagenet", ""] = ""
    tokenizer: str = ""
    base: str = ""
    method: str
    trained_on: str = ""
    trained_against: str = ""
    clean: float | None = None
    robust_1: float | None = None
    robust_2: float | None = None
    robust_4: float | None = None
    numbers: str = ""
    licence: str = ""
    paper: str = ""
    page: str = ""
    revision: str = ""
    sha256: str = ""
    mirrors: str = ""
    note: str = ""

    @property
    def spec(self) -> str:
        return PREFIX + self.name

    @property
    def own_folder(self) -> Path:
        """Folder of a copy that the user put there, which is preferred to a download."""
        return cache_root() / "zoo" / self.name

    @property
    def link(self) -> str:
        """Address of the checkpoint."""
        repository = self.source.removeprefix(_HUB)
        return f"https://huggingface.co/{repository}" if self.source.startswith(_HUB) else self.source

    @property
    def is_on_hub(self) -> bool:
        return any(place.startswith(_HUB) for place in (self.source, *self.mirrors.split()))

    def lineage(self) -> dict[str, Any]:
        """Return its origin in the form of a checkpoint's lineage (`rayclip.json`)."""
        norm_eps = self.trained_against.split()
        eps = {"eps": parse_budget(norm_eps[1])} if norm_eps[:1] == ["linf"] else {}
        config = {"model": self.base or self.spec, "data": self.trained_on, "method": {"name": self.method, **eps}}
        return {"zoo": {**asdict(self), "link": self.link}, "config": config}

    def adapt(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the published configuration of open_clip with what the row states.

        Raises:
            UserError: it is of another image size.
        """
        model, text = dict(config["model_cfg"]), dict(config["model_cfg"].get("text_cfg") or {})
        size = (model.get("vision_cfg") or {}).get("image_size", self.image_size)
        if size not in (self.image_size, [self.image_size] * 2):
            raise UserError(
                f"{self.spec} is published with images of {size} pixels, and the zoo knows it with {self.image_size}: "
                "the repository has changed; name the model as what it is now, by hf-hub: or local-dir:."
            )
        text = {key: value for key, value in text.items() if key not in _NOT_OPEN_CLIPS}
        if self.tokenizer and not text.get("hf_tokenizer_name"):
            text |= {"hf_tokenizer_name": self.tokenizer, "tokenizer_kwargs": {"strip_sep_token": True}}
        if self.activation:
            model["quick_gelu"] = self.activation == "quickgelu"
        preprocess = dict(config.get("preprocess_cfg") or {})
        if self.normalization:
            preprocess["mean"], preprocess["std"] = _NORMALIZATIONS[self.normalization]
        return {**config, "model_cfg": {**model, "text_cfg": text}, "preprocess_cfg": preprocess}

    def fetch(self) -> Path:
        """Return its folder, or its file of weights if it is an image tower: the user's own copy, or downloaded into
        the hub's cache (`HF_HOME`).

        Raises:
            UserError: it cannot be downloaded; with where to get it, and how to import it.
        """
        if self.own_folder.is_dir():
            return self.own_folder
        reason = ""
        for place in (self.source, *self.mirrors.split()):
            if place.startswith(_HUB):
                try:
                    return self._download(place.removeprefix(_HUB))
                except (OSError, ValueError, RuntimeError) as error:
                    reason = reason or f" ({str(error).strip().splitlines()[0][:120]})" if str(error).strip() else ""
        raise UserError(self.how_to_get(reason))

    def how_to_get(self, reason: str = "") -> str:
        """Return where to get it by hand and how to import it, as one sentence."""
        what = "be downloaded now" if self.is_on_hub else "be downloaded, since its link does not last"
        begin = f"{self.spec} cannot {what}{reason}: get {self.file or 'its files'} from {self.link} or {self.page}, "
        if self.layout == "image-tower":
            command = f"rayclip import {self.file} --base {self.base} --out {self.own_folder}"
            return f"{begin}and run {command}; {self.spec} is then that."
        return f"{begin}and copy them to {self.own_folder}; {self.spec} is then that."

    def _download(self, repository: str) -> Path:
        from huggingface_hub import hf_hub_download, snapshot_download

        revision = self.revision or None
        if self.layout == "image-tower":
            return Path(hf_hub_download(repository, self.file, revision=revision))
        wanted = [*_TEXTS, *([self.file] if self.file else WEIGHTS[self.layout])]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))


@cache
def zoo() -> Mapping[str, PublishedModel]:
    """Return the published models by name."""
    text = (resources.files("rayclip.models") / "zoo.csv").read_text("utf-8")
    return {row["name"]: _read_row(row) for row in csv.DictReader(text.splitlines())}


def find_published(name: str) -> PublishedModel:
    """Return the published model of this name, `zoo:` before it or not.

    Raises:
        UserError: there is none.
    """
    found = zoo().get(name.removeprefix(PREFIX))
    if found is None:
        near = suggest(name.removeprefix(PREFIX), zoo())
        raise UserError(f"the zoo has no model '{name}': {near}rayclip models list names them.")
    return found


def check_available(spec: str) -> None:
    """Raise a `UserError` for a name that the zoo does not have, or a model that the user must fetch by hand first."""
    model = find_published(spec)
    if not (model.is_on_hub or model.own_folder.is_dir()):
        raise UserError(model.how_to_get())


def zoo_json() -> str:
    """Return all rows as a JSON list."""
    return json.dumps([{**asdict(model), "link": model.link} for model in zoo().values()], indent=1) + "\n"


def _read_row(row: Mapping[str, str]) -> PublishedModel:
    kinds = {field.name: field.type for field in fields(PublishedModel)}
    numbers: dict[str, Any] = {k: float(v) if v else None for k, v in row.items() if kinds.get(k) == float | None}
    return PublishedModel(**{**row, **numbers, "image_size": int(row["image_size"])})

"""Models as result files know them, and their names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from rayclip.units import format_budget

_PLACES = ("local-dir", "prompted", "hf-hub", "hf", "zoo", "mix")  # specifications that name no architecture


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as the results know it: specification, label, and the lineage of a checkpoint (`rayclip.json`)."""

    fingerprint: str
    spec: str
    label: str
    lineage: Mapping[str, Any] | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """Training configuration; empty for a model that we did not train."""
        return (self.lineage or {}).get("config") or {}

    @property
    def method(self) -> str | None:
        return (self.config.get("method") or {}).get("name")

    @property
    def base(self) -> str:
        """Specification of the model that it was fine-tuned from; its own if nobody did."""
        return str(self.config.get("model") or self.spec)

    @property
    def train_eps(self) -> str | None:
        """Budget of the training attack as a fraction; None if there was none or it is not known."""
        eps = (self.config.get("method") or {}).get("eps")
        return format_budget(eps) if eps else None

    @property
    def published(self) -> Mapping[str, Any]:
        """Row of the zoo that the model is, empty for others: architecture, paper, link, licence."""
        return (self.lineage or {}).get("zoo") or {}

    @property
    def architecture(self) -> str:
        """open_clip's name of the architecture, empty if the specifications do not say it."""
        name, colon, _ = self.base.partition(":")
        named = name if colon and name not in _PLACES else ""
        return str(self.published.get("architecture") or named.removesuffix("-quickgelu").removesuffix("-gelu"))

    @property
    def is_mix(self) -> bool:
        """Return whether its weights lie between those of two others (`mix:START+END@a`)."""
        return self.spec.startswith("mix:")

    @property
    def shots(self) -> int | None:
        """Training images per class; None for all of them, or without training."""
        return self.config.get("shots")

    @property
    def trained_on(self) -> str | None:
        """Name of the training data."""
        return ((self.lineage or {}).get("data") or {}).get("name") or self.config.get("data")


def short_names(models: Sequence[Model]) -> dict[str, str]:
    """Return a unique display name per model fingerprint: the label, or the specification with a folder's name only.

    Labels that several models have are followed by their training data; specifications are whole if that is not enough.
    """

    def with_data(model: Model) -> str:
        return f"{model.label} ({model.trained_on})" if model.label != model.spec and model.trained_on else model.spec

    wanted = {m.fingerprint: m.label if m.label != m.spec else model_name(m.spec) for m in models}
    for again in (with_data, lambda m: m.spec, lambda m: f"{m.spec} ({m.fingerprint[:6]})"):
        names = list(wanted.values())
        alike = {f for f, name in wanted.items() if names.count(name) > 1}
        wanted |= {m.fingerprint: again(m) for m in models if m.fingerprint in alike}
    return wanted


def model_name(spec: str) -> str:
    """Return the folder name of a checkpoint's specification; other specifications unchanged."""
    kind, colon, path = spec.partition(":")
    return PurePosixPath(path).name if colon and kind in ("local-dir", "prompted") else spec

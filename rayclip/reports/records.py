"""Check the records of results: what reports take from them has the types that they count on."""

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from rayclip.store import Store
from rayclip.types import UserError


def _budget(text: str) -> str:
    numerator, _, denominator = text.partition("/")
    try:
        Fraction(numerator) / Fraction(denominator or 1)
    except ZeroDivisionError as error:
        raise ValueError("no budget") from error
    return text


_Text = Annotated[str, Field(max_length=10_000)]
_Name = Annotated[str, Field(max_length=1000)]
_Budget = Annotated[str, Field(max_length=40), AfterValidator(_budget)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Protocol(_Record):
    attack: _Name
    eps: _Budget = "0"
    norm: _Name = "linf"
    resolution: _Name = "native"
    resize: _Name = "antialias"
    precision: _Name = "fp32"
    template: _Text = ""
    aim: _Name = "ignore"
    draws: PositiveInt = 1
    judgements: PositiveInt = 1


class _Judged(_Record):
    model: _Name
    model_fingerprint: _Name
    dataset: _Name
    data_fingerprint: _Name
    protocol: _Protocol
    attack_label: _Name | None = None
    cut_texts: NonNegativeInt = 0
    cut_for_substitutes: NonNegativeInt = 0


class CellRecord(_Judged):
    """`cells/CELL/cell.json`; see `evaluation.Cell.record`."""

    class_names: list[_Text]
    data: _Name | None = None
    defense_label: _Name | None = None
    scorer_label: _Name | None = None
    code: dict[str, str] = {}


class _Recall(_Record):
    direction: Literal["tr", "ir"]
    k: PositiveInt
    right: NonNegativeInt
    n: PositiveInt

    @model_validator(mode="after")
    def _adds_up(self) -> "_Recall":
        if self.right > self.n:
            raise ValueError("more are right than there are")
        return self


class _PairsProtocol(_Protocol):
    images: NonNegativeInt
    captions: NonNegativeInt
    ties: _Name
    text: _Name
    resolution: _Name
    precision: _Name


class PairsRecord(_Judged):
    """`retrieval/TASK.json`; see `evaluation.retrieval.Task.record`."""

    attack_label: _Name
    protocol: _PairsProtocol
    recalls: Annotated[list[_Recall], Field(min_length=1)]


class _Method(_Record):
    name: _Name | None = None
    eps: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class _Config(_Record):
    model: _Name | None = None
    data: _Name | None = None
    shots: int | None = None
    method: _Method | None = None


class _Data(_Record):
    name: _Name | None = None


class _Lineage(_Record):
    config: _Config | None = None
    data: _Data | None = None
    zoo: dict[str, Any] | None = None
    digest: _Name | None = None


class ModelRecord(_Record):
    """`lineage/MODEL.json`; see `models.checkpoint.model_record`."""

    label: _Name | None = None
    lineage: _Lineage | None = None


def check(value: Any, kind: type[BaseModel], store: Store, name: str) -> None:
    """Raise a `UserError` that names the first entry of a record that is missing or not what it should be."""
    try:
        kind.model_validate(value)
    except RecursionError:
        what = "too deep"
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        entry = ".".join(map(str, first["loc"])) or "record"
        what = f"no {entry}" if first["type"] == "missing" else f"{entry} is wrong"
    else:
        return
    raise UserError(f"{store.root}/{name} is damaged ({what}): delete it and run again.")

"""An evaluation.yaml as frozen, typed objects. `checks` says whether one can be carried out."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from actors.settings import CHECKOUT, Name, Resources, Settings, Weight, locate_model


class Average(Settings):
    """A model that writes in the base's place: whole model directories averaged. A text means that one directory."""

    average: dict[str, float] = Field(min_length=1)
    """Weights by directory; they sum to 1."""


Model = Annotated[
    Average, BeforeValidator(lambda model: {"average": {model: 1.0}} if isinstance(model, str) else model)
]


class Row(Settings):
    """One way of writing."""

    num_samples: int | None = Field(default=None, ge=1)
    """Answers to each prompt, in place of the plan's own."""

    weights: dict[str, Weight] | None = None
    """Weights by guide, beside the base."""

    model: str | None = None
    """One of `models`, in the base's place and alone."""

    best_of: int | None = Field(default=None, ge=2)
    """Of every so many answers of another row the best is kept."""

    source: str | None = Field(default=None, alias="from")
    """That other row."""

    reward: str | None = None
    """Which answer is the best."""

    @model_validator(mode="after")
    def _check_kind(self) -> "Row":
        if self.best_of is None:
            if self.source is not None or self.reward is not None:
                raise ValueError("from and reward belong to best_of; give best_of too, or leave them out")
            if self.model is not None and self.weights is not None:
                raise ValueError("a model of models writes alone; give model or weights, not both")
        elif self.source is None or self.reward is None:
            raise ValueError("best_of needs from, the row that it picks from, and reward, what it picks by")
        elif not (self.model is None and self.weights is None and self.num_samples is None):
            raise ValueError("best_of picks from another row; leave model, weights and num_samples to that row")
        return self


class AlignmentTable(Settings):
    """What each way of writing gains and costs."""

    reward: str
    against: str
    """The row that every other is compared with, answer by answer."""

    rows: list[str] = Field(min_length=1)


class RecoveryTable(Settings):
    """How much of the way from one row to another the rows go."""

    reward: str
    source: str = Field(alias="from")
    target: str = Field(alias="to")
    rows: list[str] = Field(min_length=1)


class Tables(Settings):
    """The report's tables; one that is absent is left out."""

    alignment: AlignmentTable | None = None
    recovery: RecoveryTable | None = None


class Front(Settings):
    """Two rewards against each other."""

    x: str
    y: str
    curves: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(min_length=1)
    """Rows by curve, in the order in which the line joins them."""

    compare: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    """Two curves: is each point of the first on or above the second?"""


class Plan(Settings):
    """The whole of an evaluation.yaml. Relative paths start at the checkout."""

    base: str
    prompts: str
    """JSONL with `messages` or `prompt`, and perhaps an `id`."""

    num_samples: int = Field(default=4, ge=1)
    max_tokens: int = Field(ge=1)
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    num_measured: int = Field(default=1, ge=1)
    """Answers to each prompt whose log-probability and KL are measured, which costs as much as writing them."""

    concurrency: int = Field(default=32, ge=1, le=4096)
    """Answers that are written at a time."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_context: int = Field(ge=2)
    resources: Resources = Resources(cpus=0.1)
    """Of each model that is served."""

    rewards: dict[str, str] = Field(min_length=1)
    """module:function by name (`actors.training.rewards.load_reward`)."""

    guides: dict[Name, str] = Field(default_factory=dict)
    models: dict[str, Model] = Field(default_factory=dict)
    rows: dict[str, Row] = Field(min_length=1)
    tables: Tables = Tables()
    fronts: dict[str, Front] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _default_table(self) -> "Plan":
        """A plan that names no table has one of all its rows, against the first."""
        if self.tables.alignment is None and self.tables.recovery is None and not self.fronts:
            rows = list(self.rows)
            alignment = AlignmentTable(reward=next(iter(self.rewards)), against=rows[0], rows=rows)
            object.__setattr__(self, "tables", Tables(alignment=alignment))
        return self

    def num_samples_of(self, row: str) -> int:
        """Return how many answers to each prompt a row keeps."""
        settings = self.rows[row]
        if settings.best_of is not None and settings.source is not None:
            return self.num_samples_of(settings.source) // settings.best_of
        return settings.num_samples or self.num_samples

    def written_by(self, row: str) -> str:
        """Return the row whose answers a row takes: itself, unless it picks from another."""
        return self.rows[row].source or row

    def guides_of(self, row: str) -> list[str]:
        """Return the guides that run beside the base in a row."""
        return [guide for guide, weight in (self.rows[row].weights or {}).items() if weight]

    def parts_of(self, row: str) -> Mapping[Path, float]:
        """Return the directories that are averaged into the model that writes a row, most often just one."""
        model = self.rows[self.written_by(row)].model
        parts = {self.base: 1.0} if model is None else self.models[model].average
        return {Path(locate_model(directory)): weight for directory, weight in parts.items()}

    def guide_path(self, guide: str) -> Path:
        """Return where a guide lies."""
        return Path(locate_model(self.guides[guide]))

    @property
    def base_path(self) -> Path:
        """Where the base lies."""
        return Path(locate_model(self.base))

    @property
    def prompts_path(self) -> Path:
        """Where the prompts lie."""
        return CHECKOUT / Path(self.prompts).expanduser()

    @property
    def digest(self) -> str:
        """64 bits in hex of the plan and its prompts."""
        settings = json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True).encode()
        return hashlib.sha256(settings + self.prompts_path.read_bytes()).hexdigest()[:16]


def slug(row: str) -> str:
    """Return a row's name as that of a file."""
    return re.sub(r"[^a-z0-9.]+", "-", row.lower()).strip("-.")

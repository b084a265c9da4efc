"""What every section has in common: frozen, complete, and an unknown key is an error."""

from __future__ import annotations

from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
)

Fraction = Field(ge=0.0, le=1.0)
SLUG = r"^[a-z0-9][a-z0-9_-]{0,62}$"


class ConfigError(ValueError):
    """The experiment's file or an override is wrong; the message names file and key."""


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Workers(Section):
    """How many processes do a stage's work, and what each of them takes from the cluster."""

    count: PositiveInt
    num_cpus: float = Field(gt=0)
    """CPUs a worker reserves; may be a fraction."""
    num_gpus: float = Field(default=0, ge=0)


def as_dict(section: Section) -> dict[str, Any]:
    """A section as plain JSON values."""
    return section.model_dump(mode="json")


def explain(error: ValidationError, source: str) -> str:
    """What is wrong with `source`, a line for each key."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        message = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
        lines.append(f"{source}: {key}: {message}")
    return "\n".join(lines)

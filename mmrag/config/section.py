"""What every section has in common: frozen, complete, and an unknown key is an error.

Every key is identity, which what is made depends on, or operation, which says how it is made. A
key is identity unless its type is marked: who forgets the mark is refused once too often, and
never handed what was made from something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)
from pydantic.fields import FieldInfo

Fraction = Field(ge=0.0, le=1.0)
SLUG = r"^[a-z0-9][a-z0-9_-]{0,62}$"


class Role(StrEnum):
    """What becomes of an output, finished or half made, when a key is changed."""

    IDENTITY = "identity"
    """Another output: both are refused."""
    OPERATION = "operation"
    """The same output: a finished one is found, a half-made one goes on."""
    LAYOUT = "layout"
    """The same output once it is finished; what is half made is cut by it, and is refused."""
    CORRECTION = "correction"
    """Another output, which a half-made one may still become: a finished one is refused."""


Value = TypeVar("Value")
Operation = Annotated[Value, Role.OPERATION]
Layout = Annotated[Value, Role.LAYOUT]
Correction = Annotated[Value, Role.CORRECTION]


Synthesizer = Literal["espeak", "kokoro"]
Voices = Annotated[dict[Synthesizer, PositiveFloat], Field(min_length=1)]
"""Synthesizer -> its share of what is said."""
Copies = dict[Synthesizer, PositiveInt]
"""Synthesizer -> how often something stands in a corpus."""


class ConfigError(ValueError):
    """The experiment's file or an override is wrong; the message names file and key."""


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Workers(Section):
    """How many processes do a stage's work, and what each of them takes from the cluster."""

    count: Operation[PositiveInt]
    num_cpus: Operation[float] = Field(gt=0)
    """CPUs a worker reserves; may be a fraction."""
    num_gpus: Operation[float] = Field(default=0, ge=0)


def as_dict(section: Section) -> dict[str, Any]:
    """A section as plain JSON values."""
    return section.model_dump(mode="json")


def roles(section: type[Section]) -> dict[str, Role]:
    """The role of each key of a section, and of the sections in it by dotted name."""
    found: dict[str, Role] = {}
    for name, about in section.model_fields.items():
        inner, marked = _section(about.annotation), _marked(about)
        if inner is None or marked:
            found[name] = marked or Role.IDENTITY
        else:
            found |= {f"{name}.{key}": role for key, role in roles(inner).items()}
    return found


def _defaults(section: type[Section]) -> dict[str, Any]:
    """What the keys of a section are where nothing is said of them, of those that may be left out;
    of the sections in it by dotted name."""
    found: dict[str, Any] = {}
    for name, about in section.model_fields.items():
        inner = _section(about.annotation)
        if inner is not None and not _marked(about):
            found |= {f"{name}.{key}": value for key, value in _defaults(inner).items()}
        elif not about.is_required() and isinstance(about.default, bool | int | float | str):
            found[name] = about.default
    return found


def identity(section: Section) -> dict[str, Any]:
    """The keys of a section that what is made depends on, as plain JSON values."""
    return _chosen(section, {Role.IDENTITY, Role.CORRECTION})


def operation(section: Section) -> dict[str, Any]:
    """The keys of a section that only say how it is made, as plain JSON values."""
    return _chosen(section, {Role.OPERATION, Role.LAYOUT})


@dataclass(frozen=True)
class Recipe:
    """What an output is made by: the keys that it depends on, and those that only say how."""

    identity: dict[str, Any]
    operation: dict[str, Any] = field(default_factory=dict)
    layout: frozenset[str] = frozenset()
    """Dotted names in `operation` that a half-made output is cut by."""
    corrections: frozenset[str] = frozenset()
    """Dotted names in `identity` that may still change while the output is half made."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Dotted names in `identity` -> what they are where nothing is said of them: an output that was
    made before there was such a key was made by that."""

    @classmethod
    def of(cls, config: Recipe | Mapping[str, Any]) -> Recipe:
        """A mapping is a recipe of identity alone."""
        return config if isinstance(config, Recipe) else cls(dict(config))

    @property
    def settings(self) -> dict[str, Any]:
        """Identity and operation together, each section whole again."""
        return _merged(self.identity, self.operation)


def recipe(*parts: Section | Mapping[str, Any]) -> Recipe:
    """The recipe of an output that `parts` say all about.

    A section stands for its keys; a mapping's values are plain, or sections under that name.
    """
    made = Recipe({}, {})
    layout, corrections, defaults = set(), set(), {}
    for prefix, part in _named(parts):
        if not isinstance(part, Section):
            made.identity[prefix] = part
            continue
        _into(made.identity, prefix).update(identity(part))
        _into(made.operation, prefix).update(operation(part))
        defaults |= {
            f"{prefix}.{name}" if prefix else name: value
            for name, value in _defaults(type(part)).items()
        }
        for name, role in roles(type(part)).items():
            dotted = f"{prefix}.{name}" if prefix else name
            if role == Role.LAYOUT:
                layout.add(dotted)
            elif role == Role.CORRECTION:
                corrections.add(dotted)
    return Recipe(
        made.identity, made.operation, frozenset(layout), frozenset(corrections), defaults
    )


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(one)
    for name, value in other.items():
        inner = merged.get(name)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        merged[name] = _merged(inner, value) if both else value
    return merged


def _named(parts: tuple[Section | Mapping[str, Any], ...]) -> Iterator[tuple[str, Any]]:
    for part in parts:
        yield from [("", part)] if isinstance(part, Section) else part.items()


def _into(values: dict[str, Any], name: str) -> dict[str, Any]:
    return values.setdefault(name, {}) if name else values


def _section(annotation: Any) -> type[Section] | None:
    """The section that a key holds, or may hold; None for a plain value or a list."""
    if get_origin(annotation) in (Union, UnionType):
        inner = [each for each in map(_section, get_args(annotation)) if each is not None]
        return inner[0] if inner else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _chosen(section: Section, wanted: set[Role]) -> dict[str, Any]:
    """The values whose role is wanted, nested as the section is."""
    chosen, plain = {}, as_dict(section)
    for name, about in type(section).model_fields.items():
        value, marked = getattr(section, name), _marked(about)
        if isinstance(value, Section) and marked is None:
            if inner := _chosen(value, wanted):
                chosen[name] = inner
        elif (marked or Role.IDENTITY) in wanted:
            chosen[name] = plain[name]
    return chosen


def _marked(about: FieldInfo) -> Role | None:
    return next((mark for mark in about.metadata if isinstance(mark, Role)), None)


def explain(error: Exception, source: str) -> str:
    """What is wrong with `source`: for a model that does not hold, a line for each key."""
    if not isinstance(error, ValidationError):
        return f"{source}: {error}"
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        message = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
        lines.append(f"{source}: {key}: {message}")
    return "\n".join(lines)

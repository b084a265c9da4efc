"""What an output was made by before, and what of it is not so now.

Knows records and recipes alone, and nothing of where they lie.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mmrag.config.section import Recipe


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as JSON gives it back, so that a tuple equals the list it was written as."""
    return json.loads(json.dumps(dict(config)))


def differing(
    before: Mapping[str, Any],
    recipe: Recipe,
    inputs: Mapping[str, str],
    *,
    draft: bool = False,
    laid_out: bool = False,
) -> list[str]:
    """What was recorded before and is not so now, a sentence for each key and each input.

    A key that is operation now may have been recorded as any other, and does not differ; one that
    there was not yet was as its default. Of a `draft`, corrections do not differ, and the layout
    does if what is held was `laid_out` by it.
    """
    recorded = dict(_flat(before["config"]))
    now, operation = dict(_flat(plain(recipe.identity))), dict(_flat(plain(recipe.operation)))
    passed = recipe.corrections if draft else frozenset()
    recorded = {name: recipe.defaults.get(name) for name in now} | recorded
    names = ({*recorded, *now} - operation.keys()) - passed
    if draft and laid_out:
        recorded |= dict(_flat(before.get("operation", {})))
        now |= operation
        names |= recipe.layout & recorded.keys()
    found = [
        f"{name} was {recorded.get(name)!r} and is now {now.get(name)!r}"
        for name in sorted(names)
        if _given(recorded.get(name)) != _given(now.get(name))
    ]
    used = before["inputs"]
    found += [
        f"input {name} was {used.get(name)} and is now {inputs.get(name)}"
        for name in sorted({*used, *inputs})
        if used.get(name) != inputs.get(name)
    ]
    return found


def _given(value: Any) -> Any:
    """A key that was not known yet is as one of which nothing is said."""
    return None if value in ([], {}) else value


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted name; what is empty stays as it is."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

"""A storage in memory, whose answers can be made to fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mmrag import storage
from mmrag.storage import Url


def empty(name: str) -> Url:
    """A bucket in memory; whatever any of them held is gone."""
    bucket = Url(f"memory://{name}")
    store = storage._filesystem(bucket)
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    return bucket


def failing(
    bucket: Url, patch: pytest.MonkeyPatch, error: Exception, fails: Callable[[int], bool]
) -> None:
    """Reading raises `error`, at those of its calls, numbered from 0, that `fails` names."""
    store = storage._filesystem(bucket)
    whole, asked = type(store).cat_file, []

    def cat_file(*arguments: object, **named: object) -> bytes:
        asked.append(arguments)
        if fails(len(asked) - 1):
            raise error
        return whole(store, *arguments, **named)

    patch.setattr(store, "cat_file", cat_file)

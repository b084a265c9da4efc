"""Datastores that the service begins with: copied from where the jobs left them."""

from __future__ import annotations

import re

from mmrag import artifact
from mmrag.durable import make_directory
from mmrag.storage import Location, Url, located
from serve.access.tenants import MARK
from serve.settings import Settings


def fetch_datastores(settings: Settings) -> list[str]:
    """Copy the datastores below `datastores_from` to `datastores`; the names of those it had not.

    One that is there already stays as it is: it may have been changed since. Raises ArtifactError
    for one that is damaged, StorageError.
    """
    if settings.datastores_from is None:
        return []
    root = located(settings.datastores_from)
    new = [name for name in _names(root) if not (settings.datastores / name).exists()]
    for name in new:
        make_directory((settings.datastores / name).parent)
        artifact.adopt(root / name, settings.datastores / name, "datastore")
    return new


def _names(root: Location) -> list[str]:
    """What stages made in a directory, or at a URL; a tenant's own lie one deeper."""
    if isinstance(root, Url):
        described = (name.rpartition("/") for name in root.listing()[0])
        found = [name for name, _, file in described if file == artifact.FILE]
        return [one for one in found if "/" not in one or re.fullmatch(f"{MARK}[^/]+/[^/]+", one)]
    own = root.glob(f"{MARK}*/[!.]*/{artifact.FILE}")
    found = [*root.glob(f"[!.]*/{artifact.FILE}"), *own]
    return sorted(str(one.parent.relative_to(root)) for one in found)

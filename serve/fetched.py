"""Datastores that the service begins with: copied from where the jobs left them."""

from __future__ import annotations

from mmrag import artifact
from mmrag.storage import Location, Url, located
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
        artifact.adopt(root / name, settings.datastores / name, "datastore")
    return new


def _names(root: Location) -> list[str]:
    """What stages made in a directory, or at a URL."""
    if isinstance(root, Url):
        described = (name.rpartition("/") for name in root.listing()[0])
        return [name for name, _, file in described if file == artifact.FILE and "/" not in name]
    return sorted(one.parent.name for one in root.glob(f"[!.]*/{artifact.FILE}"))

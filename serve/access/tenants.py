"""Tenants: who shares the service without knowing of the others, and where each one's datastores
lie.

The datastores of the default tenant lie where they always did, `<datastores>/names`; those of
another, acme, in `<datastores>/@acme/names`: no datastore's name begins with `@`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from mmrag.config import SLUG
from serve.messages import UnknownDatastore
from serve.settings import TenantQuotas

DEFAULT = "default"
"""The tenant of every key that is given without one, and of everybody where there are no keys."""
MARK = "@"


@dataclass(frozen=True)
class Tenant:
    """Who a key belongs to."""

    name: str = DEFAULT
    quotas: TenantQuotas = field(default_factory=TenantQuotas)

    def datastore(self, name: str) -> str:
        """How the pipeline and the retriever call its datastore of this name.

        Raises UnknownDatastore for what is no name: nothing that a caller sends may lead to another
        tenant's.
        """
        if not re.fullmatch(SLUG, name):
            raise UnknownDatastore(f"no datastore {name!r}")
        return name if self.name == DEFAULT else f"{self.name}/{name}"


def own_name(datastore: str) -> str:
    """What its tenant calls a datastore."""
    return datastore.rpartition("/")[2]


def tenant_of(datastore: str) -> str:
    """Whose a datastore is, by how the retriever calls it."""
    return datastore.rpartition("/")[0] or DEFAULT


def directory_of(root: Path, tenant: str) -> Path:
    """Where the datastores of a tenant lie, below that of all of them."""
    return root if tenant == DEFAULT else root / f"{MARK}{tenant}"


def tenant_at(root: Path, directory: Path) -> str:
    """Whose the datastore in a directory is."""
    return DEFAULT if directory.parent == root else directory.parent.name.removeprefix(MARK)


def place_of(root: Path, datastore: str) -> Path:
    """Where a datastore lies or would lie; UnknownDatastore for what is no name of one."""
    tenant, name = tenant_of(datastore), own_name(datastore)
    if not re.fullmatch(SLUG, name) or not re.fullmatch(SLUG, tenant):
        raise UnknownDatastore(f"no datastore {name!r}")
    return directory_of(root, tenant) / name

"""Where API keys come from: the environment, and a file of lines or of tenants.

tenants:
  acme:
    keys:
      - {sha256: "9f86d0…", role: transcribe, name: kiosk}
      - {key: "a-long-random-word", role: admin}
    quotas: {requests: 4, audio_seconds: 600}
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from mmrag.config import SLUG, ConfigError, Section
from serve.access.roles import Role
from serve.access.tenants import Tenant
from serve.settings import KEYS, KEYS_FILE, TenantQuotas

EXPIRING = "ek_"
"""How keys begin that the service made itself and that expire."""
TENANTS = (".yaml", ".yml", ".json")
"""Endings of files that hold tenants; other files hold a key a line."""
ID_LETTERS = 12


@dataclass(frozen=True)
class Known:
    """A key that lets in: its SHA-256, never the key."""

    digest: bytes
    tenant: Tenant
    role: Role = "admin"
    name: str | None = None

    @property
    def id(self) -> str:
        """What the key is called where others read it: its name, or some letters that tell nothing
        of it."""
        return self.name or self.fingerprint[:ID_LETTERS]

    @property
    def fingerprint(self) -> str:
        """Another for each key, whatever its name; tells nothing of it."""
        return hashlib.sha256(b"mmrag key " + self.digest).hexdigest()


class _Key(Section):
    key: str | None = Field(default=None, min_length=1)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    role: Role = "transcribe"
    name: str | None = Field(default=None, pattern=SLUG)

    def model_post_init(self, _: Any) -> None:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give either key or sha256")
        if self.key is not None:
            _require_usable(self.key)

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.sha256) if self.sha256 else digest(self.key or "")


class _Tenant(Section):
    keys: tuple[_Key, ...] = Field(min_length=1)
    quotas: TenantQuotas = TenantQuotas()


class _Tenants(Section):
    tenants: dict[Annotated[str, Field(pattern=SLUG)], _Tenant] = Field(min_length=1)


def digest(key: str) -> bytes:
    """The SHA-256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def from_environment(quotas: TenantQuotas) -> list[Known]:
    """The keys of MMRAG_API_KEYS, all of the default tenant; `quotas` are a tenant's own unless the
    file says otherwise. Raises ConfigError."""
    keys = os.environ.get(KEYS, "").replace(",", "\n").splitlines()
    return _plain([key.strip() for key in keys if key.strip()], quotas, KEYS)


def from_file(path: Path, quotas: TenantQuotas) -> list[Known]:
    """The keys of a file. Raises ConfigError, which names the line, for a wrong one, and for one
    without keys: that must not let everybody in."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{KEYS_FILE}: {error}") from None
    if path.suffix in TENANTS:
        return _of_tenants(text, f"{KEYS_FILE}: {path}", quotas)
    if not text.split():
        raise ConfigError(f"{KEYS_FILE}: no keys in {path}")
    return _plain(text.split(), quotas, f"{KEYS_FILE}: {path}")


def _plain(keys: list[str], quotas: TenantQuotas, source: str) -> list[Known]:
    try:
        for key in keys:
            _require_usable(key)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    tenant = Tenant(quotas=quotas)
    return [Known(digest(key), tenant) for key in keys]


def _require_usable(key: str) -> None:
    if key.startswith(EXPIRING):
        raise ValueError("a key begins with ek_, as those do that the service makes itself")


def _of_tenants(text: str, source: str, quotas: TenantQuotas) -> list[Known]:
    try:
        tree = yaml.compose(text, yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or "no YAML"
        raise ConfigError(f"{source}, line {mark.line + 1 if mark else 1}: {reason}") from None
    for line, reason in _repeated(tree):
        raise ConfigError(f"{source}, line {line}: {reason}")
    try:
        read = _Tenants.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        unknown = problem["type"] == "extra_forbidden"
        reason = "unknown key" if unknown else problem["msg"]
        line = _line(tree, problem["loc"])
        raise ConfigError(f"{source}, line {line}: {where}: {reason}") from None
    return _distinct(read, tree, source, quotas)


def _distinct(read: _Tenants, tree: yaml.Node, source: str, quotas: TenantQuotas) -> list[Known]:
    """The keys, each of one tenant alone, and its name of one key of the tenant."""
    found: list[Known] = []
    met: set[object] = set()
    for name, tenant in read.tenants.items():
        own = quotas.model_copy(update=tenant.quotas.model_dump(exclude_unset=True))
        for number, key in enumerate(tenant.keys):
            line = _line(tree, ("tenants", name, "keys", number))
            if key.digest in met:
                raise ConfigError(f"{source}, line {line}: this key stands there twice")
            if key.name and (name, key.name) in met:
                raise ConfigError(f"{source}, line {line}: two keys are named {key.name}")
            met |= {key.digest, (name, key.name)}
            found.append(Known(key.digest, Tenant(name, own), key.role, key.name))
    return found


def _repeated(node: yaml.Node | None) -> Iterator[tuple[int, str]]:
    """Names that stand twice in one mapping, which YAML passes over, with their lines."""
    if isinstance(node, yaml.MappingNode):
        met = set()
        for key, value in node.value:
            if key.value in met:
                yield key.start_mark.line + 1, f"{key.value} stands there twice"
            met.add(key.value)
            yield from _repeated(value)
    elif isinstance(node, yaml.SequenceNode):
        for one in node.value:
            yield from _repeated(one)


def _line(node: yaml.Node | None, place: tuple[int | str, ...]) -> int:
    """The line of what stands at a place, or of the nearest thing around it."""
    line = 1
    for step in place:
        below: Mapping[Any, yaml.Node] = {}
        if isinstance(node, yaml.MappingNode):
            below = {key.value: value for key, value in node.value}
            line = next((k.start_mark.line + 1 for k, _ in node.value if k.value == step), line)
        elif isinstance(node, yaml.SequenceNode):
            below = dict(enumerate(node.value))
        if step not in below:
            break
        node = below[step]
        if isinstance(step, int):
            line = node.start_mark.line + 1
    return line

"""Who a caller is, by the key that comes with a request; keys that expire, made for browsers.

Keys are compared by their SHA-256, all of them, in constant time. A file of keys is read again when
it has changed. What a key that expires says of itself is signed, so that every replica of the
ingress, and a service that was started again, knows it; the secret lies beside the datastores, not
in the keys: a file that holds only their SHA-256 would else let its readers sign.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrag.config import ConfigError
from serve.access import keyfile
from serve.access.keyfile import EXPIRING, Known, digest
from serve.access.roles import Role, allows
from serve.access.tenants import Tenant
from serve.errors import ApiError
from serve.settings import KEYS_FILE, TenantQuotas

OPEN = "open"
"""What stands for a key where none is asked for."""
SHORTEST_SECONDS, LONGEST_SECONDS = 10, 7200
"""How long a key that expires may last, as OpenAI's."""
SESSION_BYTES = 6000
"""The most that a key says of the session that it is for: it travels in a header."""
CHECK_SECONDS = 1.0
"""How often the file of keys is looked at, at most."""
SIGNING = ".signing"
"""The file below the datastores with the secret that keys which expire are signed with."""
log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Caller:
    """Who sends a request."""

    tenant: Tenant = field(default_factory=Tenant)
    key: str = OPEN
    """A short public id of the key, never the key."""
    session: dict[str, Any] | None = None
    """What a key that expires was made for."""
    role: Role = "admin"
    expires: int | None = None
    """When the key expires, unix seconds; None for one that does not."""

    def require(self, needed: Role) -> None:
        """Raises ApiError (403), which names the role, where the key's own does not suffice."""
        if not allows(self.role, needed):
            message = f"this needs a key of the role {needed}, and this one's is {self.role}"
            raise ApiError(403, message, "insufficient_role")


class Keys:
    """The keys as they are now.

    Raises ConfigError if they cannot be read at the start; later, the old ones go on counting.
    """

    def __init__(self, quotas: TenantQuotas, datastores: Path) -> None:
        """`quotas` are those of a tenant for which the file says nothing else; the secret that
        signs lies in `datastores`."""
        self._quotas = quotas
        self._signing_file = datastores / SIGNING
        self._signing: bytes | None = None
        named = os.environ.get(KEYS_FILE)
        self._file = Path(named) if named else None
        self._fixed = keyfile.from_environment(quotas)
        self._state = self._stat()
        self._known = self._read()
        self._checked = time.monotonic()

    @property
    def tenants(self) -> int:
        """How many tenants there are."""
        return len({one.tenant.name for one in self._current()}) or 1

    def caller(self, given: str | None) -> Caller | None:
        """Whose key this is; None for nobody's. Without keys, everybody is the default tenant's
        admin, but for who comes with a key that expires: that one counts."""
        known = self._current()
        if given is not None and given.startswith(EXPIRING):
            return self._expiring(given, known)
        if not known:
            return Caller(Tenant(quotas=self._quotas))
        own = digest(given or "")
        found = [one for one in known if hmac.compare_digest(own, one.digest)]
        if not found or given is None:
            return None
        return Caller(found[0].tenant, found[0].id, role=found[0].role)

    def issue(
        self, caller: Caller, seconds: float, session: dict[str, Any] | None
    ) -> tuple[str, int]:
        """A key of the caller's tenant for one who may only transcribe, and when it expires (unix
        seconds). It ends with the caller's own key, if that is taken away before.

        Raises ApiError where it would last too long or hold too much (400), or is asked for with
        such a key (403).
        """
        if caller.expires is not None:
            raise ApiError(403, "a key that expires makes no others", "insufficient_role")
        if not SHORTEST_SECONDS <= seconds <= LONGEST_SECONDS:
            message = f"a key expires after {SHORTEST_SECONDS} to {LONGEST_SECONDS} seconds"
            raise ApiError(400, message, "invalid_value", "expires_after.seconds")
        if len(json.dumps(session)) > SESSION_BYTES:
            message = f"session: more than {SESSION_BYTES} characters: send them in session.update"
            raise ApiError(400, message, "invalid_value", "session")
        expires = int(time.time() + seconds)
        whose = caller.tenant.name, caller.key
        known = [one for one in self._current() if (one.tenant.name, one.id) == whose]
        made_by = known[0].fingerprint if known else OPEN
        told = {"t": caller.tenant.name, "k": made_by, "e": expires, "s": session}
        payload = _letters(json.dumps(told, separators=(",", ":")).encode())
        signature = _letters(self._signature(payload, self._secret(make=True)))
        return f"{EXPIRING}{payload}.{signature}", expires

    def _expiring(self, given: str, known: list[Known]) -> Caller | None:
        payload, _, signature = given.removeprefix(EXPIRING).partition(".")
        secret = self._secret(make=False)
        if secret is None:
            return None
        own = _letters(self._signature(payload, secret))
        if not hmac.compare_digest(own.encode(), signature.encode("utf-8", "replace")):
            return None
        told = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        if told["e"] < time.time():
            return None
        if not known and told["k"] == OPEN:
            tenant, key = Tenant(quotas=self._quotas), OPEN
        else:
            made_by = [
                one for one in known if (one.fingerprint, one.tenant.name) == (told["k"], told["t"])
            ]
            if not made_by:
                return None
            tenant, key = made_by[0].tenant, made_by[0].id
        return Caller(tenant, key, told["s"], "transcribe", told["e"])

    def _signature(self, payload: str, secret: bytes) -> bytes:
        return hmac.new(secret, payload.encode("utf-8", "replace"), hashlib.sha256).digest()

    def _secret(self, make: bool) -> bytes | None:
        """What keys are signed with: the same for every replica; made when it is first needed."""
        if self._signing is None and make and not self._signing_file.exists():
            _write_once(self._signing_file, secrets.token_bytes(32))
        if self._signing is None and self._signing_file.exists():
            self._signing = self._signing_file.read_bytes()
        return self._signing

    def _current(self) -> list[Known]:
        """The keys, read again if their file has changed."""
        now = time.monotonic()
        if self._file is None or now - self._checked < CHECK_SECONDS:
            return self._known
        self._checked = now
        state = self._stat()
        if state != self._state:
            self._state = state
            try:
                self._known = self._read()
                log.warning("the API keys have changed: there are %d", len(self._known))
            except ConfigError as error:
                log.error("the API keys stay as they were: %s", error)
        return self._known

    def _read(self) -> list[Known]:
        more = keyfile.from_file(self._file, self._quotas) if self._file else []
        return [*self._fixed, *more]

    def _stat(self) -> tuple[int, ...] | None:
        with suppress(OSError):
            found = self._file and self._file.stat()
            return found and (found.st_ino, found.st_mtime_ns, found.st_size)
        return None


def _letters(data: bytes) -> str:
    """Bytes as letters that may stand in any header."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _write_once(path: Path, content: bytes) -> None:
    """Make a file that its owner alone reads, whole, unless somebody else was quicker."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)
        os.fsync(stream.fileno())
    with suppress(FileExistsError):
        os.link(aside, path)
    aside.unlink()

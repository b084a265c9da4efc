"""What a key may do: its role, and the role that each route of the API asks for."""

from __future__ import annotations

import re
from typing import Literal, get_args

Role = Literal["transcribe", "write", "admin"]
"""Each may do what those before it may."""
ROLES: tuple[Role, ...] = get_args(Role)

_ONE = r"/v1/datastores/[^/]+"
RULES: tuple[tuple[str, str, Role], ...] = (
    ("GET", r"/v1/usage", "admin"),
    ("GET", r"/v1/.*", "transcribe"),
    ("POST", r"/v1/audio/[a-z]+", "transcribe"),
    ("POST", r"/v1/realtime/.+", "transcribe"),
    ("POST", rf"{_ONE}/(search|preview)", "transcribe"),
    ("POST", rf"{_ONE}/upkeep/(overview|statistics|verify|list_snapshots)", "transcribe"),
    ("POST", rf"{_ONE}/upkeep/(index|create_snapshot)", "write"),
    ("POST|DELETE", rf"{_ONE}/entries", "write"),
)
"""Method, path, and the role needed; the first that fits counts."""


def allows(role: Role, needed: Role) -> bool:
    """Whether a key of this role may do what asks for another."""
    return ROLES.index(role) >= ROLES.index(needed)


def needed(method: str, path: str) -> Role:
    """The role that a request asks for: `admin` for whatever no rule speaks of."""
    method = {"HEAD": "GET", "OPTIONS": "GET"}.get(method, method)
    for methods, pattern, role in RULES:
        if re.fullmatch(methods, method) and re.fullmatch(pattern, path):
            return role
    return "admin"

"""Keys, whose they are and what they may do; keys that expire."""

import hashlib
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrag.config import ConfigError
from serve.access import keys as keys_module
from serve.access.keys import SIGNING, Keys
from serve.access.roles import needed
from serve.errors import ApiError
from serve.settings import TenantQuotas

FILE = """
tenants:
  acme:
    keys:
      - {key: acme-admin, role: admin, name: boss}
      - {sha256: "HASH", role: write}
      - {key: acme-kiosk}
    quotas: {requests: 4}
  globex:
    keys: [{key: globex-admin, role: admin}]
""".replace("HASH", hashlib.sha256(b"acme-writer").hexdigest())


@pytest.fixture
def keys(monkeypatch, tmp_path):
    """`keys(*them, file=)`: the keys of an environment."""
    for name in ("MMRAG_API_KEYS", "MMRAG_API_KEYS_FILE"):
        monkeypatch.delenv(name, raising=False)

    def make(*them, file=None, name="keys.yaml"):
        if them:
            monkeypatch.setenv("MMRAG_API_KEYS", ",".join(them))
        if file is not None:
            (tmp_path / name).write_bytes(file if isinstance(file, bytes) else file.encode())
            monkeypatch.setenv("MMRAG_API_KEYS_FILE", str(tmp_path / name))
        return Keys(TenantQuotas(requests=9, datastores=7), tmp_path / "datastores")

    return make


def test_without_keys_everybody_is_the_default_tenants_admin(keys):
    for given_key in (None, "", "anything"):
        caller = keys().caller(given_key)
        assert (caller.tenant.name, caller.role, caller.key) == ("default", "admin", "open")


def test_keys_of_the_environment_and_of_a_file_of_lines_are_the_default_tenants(keys):
    known = keys("one", " two", "", file="\nthree\n\n four \n", name="keys")
    for key in ("one", "two", "three", "four"):
        caller = known.caller(key)
        assert (caller.tenant.name, caller.role) == ("default", "admin")
    for key in (None, "", "One", "one two", "five", "é", "\udcff"):
        assert known.caller(key) is None


@pytest.mark.parametrize("content", [None, "", "\n \n", b"\xff"])
def test_a_file_without_keys_lets_nobody_in(keys, tmp_path, monkeypatch, content):
    """Whoever names a file wants to be asked for keys."""
    monkeypatch.setenv("MMRAG_API_KEYS_FILE", str(tmp_path / "keys"))
    with pytest.raises(ConfigError, match="MMRAG_API_KEYS_FILE"):
        keys(file=content, name="keys")


def test_a_file_of_tenants_says_whose_a_key_is_and_what_it_may_do(keys):
    known = keys(file=FILE)
    found = {key: known.caller(key) for key in ("acme-admin", "acme-writer", "acme-kiosk")}
    assert {key: one.role for key, one in found.items()} == {
        "acme-admin": "admin",
        "acme-writer": "write",
        "acme-kiosk": "transcribe",
    }
    assert {one.tenant.name for one in found.values()} == {"acme"}
    assert found["acme-admin"].key == "boss" and len({one.key for one in found.values()}) == 3
    assert found["acme-admin"].tenant.quotas == TenantQuotas(requests=4, datastores=7)
    assert known.caller("globex-admin").tenant.quotas == TenantQuotas(requests=9, datastores=7)
    assert known.tenants == 2


def test_a_key_is_never_shown(keys):
    known = keys(file=FILE)
    shown = repr(vars(known)) + repr(known.caller("acme-kiosk"))
    assert "acme-kiosk" not in shown and "acme-admin" not in shown
    assert hashlib.sha256(b"acme-kiosk").hexdigest()[:8] not in known.caller("acme-kiosk").key


@pytest.mark.parametrize(
    ("wrong", "line", "why"),
    [
        (FILE.replace("role: write", "role: writer"), 6, "'transcribe', 'write' or 'admin'"),
        (FILE.replace("requests: 4", "requests: 0"), 8, "greater than 0"),
        (FILE.replace("requests: 4", "request: 4"), 8, "unknown key"),
        (FILE.replace("globex:", "Glo bex:"), 9, "match pattern"),
        (FILE.replace("globex:", "acme:"), 9, "acme stands there twice"),
        (FILE.replace("globex-admin", "acme-kiosk"), 10, "this key stands there twice"),
        (FILE.replace("key: acme-kiosk", "key: x, name: boss"), 7, "two keys are named boss"),
        (FILE.replace("key: acme-kiosk", "role: write"), 7, "either key or sha256"),
        (FILE.replace("key: acme-kiosk", "key: ek_mine"), 7, "begins with ek_"),
        (FILE.replace("key: acme-kiosk", "key: 12345"), 7, "valid string"),
        (FILE.replace("[{key: globex-admin, role: admin}]", "[]"), 10, "at least 1"),
        (FILE + "  - what", 11, "expected"),
        ("tenants: {", 1, "expected"),
        ("", 1, "valid dictionary"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(keys, wrong, line, why):
    with pytest.raises(ConfigError) as refused:
        keys(file=wrong)
    message = str(refused.value)
    assert f"keys.yaml, line {line}: " in message and why in message
    assert "acme-admin" not in message and "acme-kiosk" not in message


def test_a_changed_file_counts_without_a_restart_and_a_wrong_one_does_not(
    keys, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(keys_module, "CHECK_SECONDS", 0.0)
    known = keys(file=FILE)
    file = tmp_path / "keys.yaml"
    file.write_text(FILE.replace("acme-kiosk", "acme-tablet"))
    assert known.caller("acme-kiosk") is None and known.caller("acme-tablet") is not None
    for wrong in ("tenants: {}", "", "tenants: ["):
        file.write_text(wrong)
        assert known.caller("acme-tablet").tenant.name == "acme"
        assert "the API keys stay as they were" in caplog.text
        caplog.clear()
    file.unlink()
    assert known.caller("acme-tablet") is not None
    file.write_text(FILE)
    assert known.caller("acme-kiosk") is not None and known.caller("acme-tablet") is None


def test_the_file_is_looked_at_once_a_second_at_most(keys, tmp_path, monkeypatch):
    known = keys(file=FILE)
    looked = []
    monkeypatch.setattr(known, "_stat", lambda: looked.append(True))
    for _ in range(100):
        known.caller("acme-kiosk")
    assert looked == []
    monkeypatch.setattr(known, "_checked", time.monotonic() - 2)
    for _ in range(100):
        known.caller("acme-kiosk")
    assert len(looked) == 1


def test_every_key_is_compared_whichever_is_given(keys, monkeypatch):
    known, compared = keys(file=FILE), []
    real = keys_module.hmac.compare_digest

    def count(one, other):
        compared.append(True)
        return real(one, other)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", count)
    for key in ("acme-admin", "globex-admin", "nobody"):
        compared.clear()
        known.caller(key)
        assert len(compared) == 4


def test_a_key_that_expires_may_transcribe_until_then_on_every_replica(keys, monkeypatch):
    known = keys(file=FILE)
    session = {"type": "transcription", "datastore": "names"}
    before = time.time()
    secret, expires = known.issue(known.caller("acme-admin"), 60, session)
    assert secret.startswith("ek_") and before + 59 <= expires <= time.time() + 60
    for replica in (known, keys(file=FILE)):
        caller = replica.caller(secret)
        assert (caller.tenant.name, caller.role, caller.key) == ("acme", "transcribe", "boss")
        assert caller.session == session and caller.expires == expires
    monkeypatch.setattr(keys_module.time, "time", lambda: expires + 1)
    assert known.caller(secret) is None


def test_a_key_that_expires_ends_with_the_one_that_made_it(keys, tmp_path, monkeypatch):
    monkeypatch.setattr(keys_module, "CHECK_SECONDS", 0.0)
    known = keys(file=FILE)
    secret, _ = known.issue(known.caller("acme-admin"), 60, None)
    other, _ = known.issue(known.caller("acme-kiosk"), 60, None)
    # Another key under the same name is another key.
    (tmp_path / "keys.yaml").write_text(FILE.replace("acme-admin", "acme-new"))
    assert known.caller(secret) is None and known.caller(other) is not None


def test_without_keys_one_that_expires_still_says_what_its_session_is(keys):
    known = keys()
    secret, _ = known.issue(known.caller(None), 60, {"a": 1})
    assert known.caller(secret).session == {"a": 1} and known.caller(secret).role == "transcribe"
    assert known.caller("ek_made.up") is None
    assert keys("now-there-is-one").caller(secret) is None


@pytest.mark.parametrize("seconds", [0, 9, 7201, -1, float("nan"), float("inf")])
def test_a_key_that_expires_lasts_neither_a_moment_nor_for_ever(keys, seconds):
    known = keys()
    with pytest.raises(ApiError, match="10 to 7200") as refused:
        known.issue(known.caller(None), seconds, None)
    assert refused.value.status == 400


def test_a_key_that_expires_holds_little_and_makes_no_other(keys):
    known = keys()
    with pytest.raises(ApiError, match=r"session\.update"):
        known.issue(known.caller(None), 60, {"keywords": ["a" * 6000]})
    secret, _ = known.issue(known.caller(None), 60, {"keywords": ["é" * 600]})
    assert len(secret) < 9000 and secret.isascii()
    with pytest.raises(ApiError) as refused:
        known.issue(known.caller(secret), 60, None)
    assert refused.value.status == 403


def test_the_secret_that_signs_is_made_once_and_is_its_owners_alone(keys, tmp_path):
    assert not (tmp_path / "datastores").exists(), "nothing is written before it is needed"
    known = keys()
    known.issue(known.caller(None), 60, None)
    path = tmp_path / "datastores" / SIGNING
    assert os.stat(path).st_mode & 0o777 == 0o600 and len(path.read_bytes()) == 32
    kept = path.read_bytes()
    keys().issue(known.caller(None), 60, None)
    assert path.read_bytes() == kept and os.listdir(path.parent) == [SIGNING]


@given(st.text(max_size=40), st.integers(0, 10_000), st.characters())
def test_nothing_that_was_changed_is_a_key(tmp_path_factory, text, where, letter):
    root = tmp_path_factory.getbasetemp() / "signed"
    known = Keys(TenantQuotas(), root)
    secret, _ = known.issue(known.caller(None), 60, {"a": 1})
    where %= len(secret)
    changed = secret[:where] + letter + secret[where + 1 :]
    if changed != secret and changed.startswith("ek_"):
        assert known.caller(changed) is None
    assert known.caller(f"ek_{text}") is None


@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        ("GET", "/v1/models", "transcribe"),
        ("GET", "/v1/datastores", "transcribe"),
        ("GET", "/v1/realtime", "transcribe"),
        ("GET", "/v1/usage", "admin"),
        ("HEAD", "/v1/usage", "admin"),
        ("POST", "/v1/audio/transcriptions", "transcribe"),
        ("POST", "/v1/audio/translations", "transcribe"),
        ("POST", "/v1/realtime/client_secrets", "transcribe"),
        ("POST", "/v1/datastores", "admin"),
        ("DELETE", "/v1/datastores/names", "admin"),
        ("POST", "/v1/datastores/names/entries", "write"),
        ("DELETE", "/v1/datastores/names/entries", "write"),
        ("POST", "/v1/datastores/names/search", "transcribe"),
        ("POST", "/v1/datastores/names/preview", "transcribe"),
        ("POST", "/v1/datastores/names/upkeep/verify", "transcribe"),
        ("POST", "/v1/datastores/names/upkeep/index", "write"),
        ("POST", "/v1/datastores/names/upkeep/compact", "admin"),
        ("POST", "/v1/datastores/names/upkeep/drop_snapshot", "admin"),
        ("POST", "/v1/whatever", "admin"),
        ("PATCH", "/v1/datastores/names/entries", "admin"),
        ("POST", "/v1/datastores/a/b/entries", "admin"),
    ],
)
def test_what_is_asked_for_says_the_role_that_it_needs(method, path, role):
    assert needed(method, path) == role

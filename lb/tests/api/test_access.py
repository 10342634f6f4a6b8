"""Tokens, the audit log and the limit on failures: what is kept, and what is not."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lb.api import access as access_module
from lb.api.access import Access, Entry, Failures, Role
from lb.cli.main import cli
from lb.client.connect import HostConnector
from lb.errors import AlreadyExists, InvalidInput, NotFound, StoreError

ENTRY = Entry(1700000000.5, "uid 0 (root)", "unix", "PUT", "/v1/config", "10.0.0.1:80/tcp: removed", "200")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "default" / "access.db"


def test_a_token_is_known_by_its_secret_alone(path: Path) -> None:
    with Access.open(path) as access:
        secret = access.create("deploy", Role.WRITE)
        other = access.create("metrics", Role.READ)
        found = access.authenticate(secret)
        assert found
        assert (found.name, found.role) == ("deploy", Role.WRITE)
        assert access.authenticate(other) != found
        for wrong in ("", "xlb_", secret[:-1], secret + "0", secret.upper(), "deploy", hashed(secret), "xlb_\ud800"):
            assert access.authenticate(wrong) is None


def test_a_secret_has_256_random_bits_and_a_prefix_to_search_for(path: Path) -> None:
    with Access.open(path) as access:
        secrets = [access.create(f"t{n}", Role.READ) for n in range(3)]
    assert len(set(secrets)) == 3
    for secret in secrets:
        assert secret.startswith("xlb_")
        assert len(bytes.fromhex(secret.removeprefix("xlb_"))) == 32


def hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def test_no_file_has_the_secret_and_only_its_owner_may_read_what_has_the_hash(path: Path) -> None:
    with Access.open(path) as access:
        secret = access.create("deploy", Role.WRITE)
        files = list(path.parent.iterdir())
        assert any(hashed(secret).encode() in file.read_bytes() for file in files)
        for file in files:
            assert secret.removeprefix("xlb_").encode() not in file.read_bytes()
            assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_what_another_process_creates_or_revokes_is_known_at_once(path: Path) -> None:
    with Access.open(path) as daemon, Access.open(path) as command:
        assert daemon.tokens() == []
        secret = command.create("deploy", Role.WRITE)
        assert daemon.authenticate(secret)
        command.record(ENTRY)
        command.revoke("deploy")
        assert daemon.authenticate(secret) is None


def test_names_are_names_and_each_is_there_once(path: Path) -> None:
    with Access.open(path) as access:
        access.create("deploy", Role.READ)
        with pytest.raises(AlreadyExists, match="token deploy: already exists"):
            access.create("deploy", Role.WRITE)
        with pytest.raises(NotFound, match="token nobody: not found"):
            access.revoke("nobody")
        for name in ("", "-x", "a b", "a\nb", "x" * 64, "é"):
            with pytest.raises(InvalidInput, match="invalid name"):
                access.create(name, Role.READ)


def test_the_last_entries_are_read_the_oldest_first(path: Path) -> None:
    entries = [Entry(float(n), "who", "from", "PUT", f"/{n}", "", "200") for n in range(5)]
    with Access.open(path) as access:
        for entry in entries:
            access.record(entry)
        assert access.entries(3) == entries[2:]
        assert access.entries(10) == entries


def test_the_log_does_not_grow_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_module, "ENTRIES_KEPT", 3)
    with Access.open(path) as access:
        for n in range(7):
            access.record(Entry(float(n), "who", "from", "PUT", f"/{n}", "", "200"))
        assert [entry.path for entry in access.entries(10)] == ["/4", "/5", "/6"]


def test_what_a_client_has_sent_does_not_reach_the_terminal(path: Path) -> None:
    with Access.open(path) as access:
        access.record(Entry(0.0, "who", "from", "PUT", "/\x1b[2J\n\ud800", "\x07", "ok"))
        (entry,) = access.entries(1)
    assert (entry.path, entry.change) == ("/\\x1b[2J\\n\\ud800", "\\x07")


def test_a_file_of_a_newer_version_is_left_alone(path: Path) -> None:
    Access.open(path).close()
    with sqlite3.connect(path) as newer:
        newer.execute("PRAGMA user_version = 9")
    newer.close()
    with pytest.raises(StoreError, match="created by a newer xdp-lb"):
        Access.open(path)


def test_a_file_that_is_something_else_is_one_line(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("not a database" * 100)
    with pytest.raises(StoreError, match="file is not a database"):
        Access.open(path)


def test_ten_failures_a_minute_are_looked_at_and_no_more() -> None:
    failures = Failures(rate=10, period_s=60)
    for n in range(10):
        assert failures.wait_s("192.0.2.1", float(n)) == 0
        failures.record("192.0.2.1", float(n))
    assert failures.wait_s("192.0.2.1", 10.0) == 50
    assert failures.wait_s("192.0.2.2", 10.0) == 0
    assert failures.wait_s("192.0.2.1", 60.0) == 0  # the first is forgotten
    failures.record("192.0.2.1", 60.0)
    assert failures.wait_s("192.0.2.1", 60.5) == 0.5


@pytest.mark.parametrize(
    ("failed", "asks", "is_one"),
    [
        ("2001:db8::1", "2001:db8::ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
    ],
)
def test_addresses_of_one_network_are_one(failed: str, asks: str, is_one: bool) -> None:
    failures = Failures(rate=1)
    failures.record(failed, 0.0)
    assert bool(failures.wait_s(asks, 0.0)) is is_one


def test_an_attacker_with_many_addresses_takes_up_little() -> None:
    failures = Failures(rate=1, remembered=3)
    for n in range(10):
        failures.record(f"192.0.2.{n}", 0.0)
    assert [n for n in range(10) if failures.wait_s(f"192.0.2.{n}", 0.0)] == [7, 8, 9]


# The commands


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDP_LB_STATE_DIR", str(tmp_path))
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, words, obj=HostConnector())


def lines(*words: str) -> list[str]:
    result = run(*words)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout.splitlines()


def test_a_token_is_shown_once_and_listed_without_its_secret(here: Path) -> None:
    assert lines("token", "list") == ["no tokens: create one with xdp-lb token create"]
    (secret,) = lines("token", "create", "deploy", "--role", "write")
    created = json.loads("\n".join(lines("token", "create", "metrics", "--json")))
    assert (created["name"], created["role"]) == ("metrics", "read")
    heading, first, second = lines("token", "list")
    assert heading.split() == ["TOKEN", "ROLE", "CREATED"]
    assert [first.split()[:2], second.split()[:2]] == [["deploy", "write"], ["metrics", "read"]]
    assert [t["name"] for t in json.loads("\n".join(lines("token", "list", "--json")))] == ["deploy", "metrics"]
    for words in (("token", "list", "--json"), ("audit",), ("audit", "--json")):
        assert secret not in run(*words).output


def test_a_token_is_revoked_by_name(here: Path) -> None:
    lines("token", "create", "deploy")
    assert lines("token", "revoke", "deploy") == ["token deploy: revoked"]
    assert lines("token", "list") == ["no tokens: create one with xdp-lb token create"]
    failed = run("token", "revoke", "deploy")
    assert (failed.exit_code, failed.stderr) == (1, "xdp-lb: token deploy: not found: see xdp-lb token list\n")


def test_the_audit_log_says_who_has_made_and_revoked_tokens(here: Path) -> None:
    assert lines("audit") == ["no entries: changes made through xdp-lb serve are recorded"]
    lines("token", "create", "deploy", "--role", "write")
    lines("token", "revoke", "deploy")
    heading, created, revoked = lines("audit")
    assert heading.split() == ["TIME", "WHO", "FROM", "REQUEST", "CHANGE", "OUTCOME"]
    assert "token create deploy" in created
    assert "role write" in created
    assert "token revoke deploy" in revoked
    (last,) = json.loads("\n".join(lines("audit", "-n", "1", "--json")))
    assert (last["method"], last["path"], last["outcome"]) == ("token revoke", "deploy", "done")

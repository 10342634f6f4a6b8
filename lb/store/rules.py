"""Filter rules in the store's tables.

Enters: an open connection, in a transaction. Leaves: rows. A set's prefixes are stored packed with its rule, so that a
rule works after a boot even if the file has changed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping

from lb.model.rules import Action, At, Deadline, Rate, Rule, Rules, SetSource

PackedSet = tuple[bytes, bytes]
"""The keys of the IPv4 and IPv6 tries."""

SCHEMA = """
CREATE TABLE rule (
    position INTEGER PRIMARY KEY,
    slot INTEGER NOT NULL UNIQUE,
    interface TEXT NOT NULL,
    hook TEXT NOT NULL,
    action TEXT NOT NULL,
    rate TEXT,
    expression TEXT NOT NULL,
    instructions BLOB NOT NULL,
    set_path TEXT,
    set_side TEXT,
    set_prefixes INTEGER,
    boot_id TEXT,
    boot_ns INTEGER,
    unix_ns INTEGER
);
CREATE TABLE rule_set (slot INTEGER PRIMARY KEY, ipv4 BLOB NOT NULL, ipv6 BLOB NOT NULL);
"""

_COLUMNS = "slot, interface, hook, action, rate, expression, instructions, set_path, set_side, set_prefixes"
_DEADLINE = "boot_id, boot_ns, unix_ns"


def read_rules(connection: sqlite3.Connection) -> Rules:
    rows = connection.execute(f"SELECT {_COLUMNS}, {_DEADLINE} FROM rule ORDER BY position")
    return Rules(tuple(_rule(*row) for row in rows))


def _rule(
    slot: int,
    interface: str,
    hook: str,
    action: str,
    rate: str | None,
    expression: str,
    instructions: bytes,
    set_path: str | None,
    set_side: str,
    set_prefixes: int,
    boot_id: str | None,
    boot_ns: int,
    unix_ns: int,
) -> Rule:
    return Rule(
        slot,
        interface,
        At(hook),
        Action(action),
        expression,
        instructions,
        Rate.parse(rate) if rate is not None else None,
        SetSource(set_path, set_side, set_prefixes) if set_path is not None else None,
        Deadline(boot_id, boot_ns, unix_ns) if boot_id is not None else None,
    )


def write_rules(connection: sqlite3.Connection, rules: Rules, sets: Mapping[int, PackedSet]) -> None:
    """`sets`: slot -> the prefixes of those that are new or have changed."""
    connection.execute("DELETE FROM rule")
    connection.executemany(
        f"INSERT INTO rule (position, {_COLUMNS}, {_DEADLINE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [(position, *_row(rule)) for position, rule in enumerate(rules.all)],
    )
    connection.executemany(
        "INSERT OR REPLACE INTO rule_set VALUES (?, ?, ?)", [(slot, *packed) for slot, packed in sets.items()]
    )
    connection.execute("DELETE FROM rule_set WHERE slot NOT IN (SELECT slot FROM rule WHERE set_path IS NOT NULL)")


def _row(rule: Rule) -> Iterator[object]:
    source, deadline = rule.set, rule.deadline
    yield from (rule.slot, rule.interface, rule.at.value, rule.action.value, str(rule.rate) if rule.rate else None)
    yield from (rule.expression, rule.instructions)
    yield from (source.path, source.side, source.prefixes) if source else (None, None, None)
    yield from (deadline.boot_id, deadline.boot_ns, deadline.unix_ns) if deadline else (None, None, None)


def read_set(connection: sqlite3.Connection, slot: int) -> PackedSet:
    row = connection.execute("SELECT ipv4, ipv6 FROM rule_set WHERE slot = ?", (slot,)).fetchone()
    if row is None:
        raise sqlite3.DatabaseError(f"prefixes of rule {slot} missing")
    return row[0], row[1]

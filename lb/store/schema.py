"""The tables of the store, and the steps from each version of them to the next."""

from __future__ import annotations

import time

from lb.store.rules import SCHEMA as RULE_SCHEMA

SCHEMA_VERSION = 4
FIRST_WITH_RULES = 3
SCHEMA = """
CREATE TABLE generation (value INTEGER NOT NULL);
CREATE TABLE service (
    vip TEXT PRIMARY KEY,
    mode TEXT NOT NULL,
    ring_size INTEGER NOT NULL,
    flow_timeout_s INTEGER NOT NULL,
    options TEXT NOT NULL DEFAULT '{}'
) WITHOUT ROWID;
CREATE TABLE backend (
    vip TEXT NOT NULL,
    address TEXT NOT NULL,
    port INTEGER NOT NULL,
    weight INTEGER NOT NULL,
    draining INTEGER NOT NULL,
    server_ids TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (vip, address, port)
) WITHOUT ROWID;
CREATE TABLE interface (
    position INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    xdp_mode TEXT NOT NULL,
    replies_only INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE own_address (address TEXT PRIMARY KEY, interface TEXT NOT NULL) WITHOUT ROWID;
"""
# From each version to the next. A new option needs no column, but a version: an older xdp-lb must not leave it out.
MIGRATIONS = {
    1: """
ALTER TABLE service ADD COLUMN options TEXT NOT NULL DEFAULT '{}';
ALTER TABLE backend ADD COLUMN server_ids TEXT NOT NULL DEFAULT '';
""",
    2: RULE_SCHEMA,
    3: "ALTER TABLE interface ADD COLUMN replies_only INTEGER NOT NULL DEFAULT 0;",
}


def create_script() -> str:
    return f"{SCHEMA} {RULE_SCHEMA} INSERT INTO generation VALUES ({int(time.time())});"

"""What was saved last is there, whatever became of the process; what cannot be read is named."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import NoReturn

import pytest

from lb import paths
from lb.errors import Busy, StoreError
from lb.model.options import Options, parse_network
from lb.model.rules import Action, At, Deadline, Rate, Rule, Rules, SetSource
from lb.model.state import Backend, Interface, Mode, OwnAddress, Service, State, XdpMode
from lb.model.vip import Vip
from lb.paths import Paths
from lb.store.lock import writer_lock
from lb.store.rules import SCHEMA as RULE_SCHEMA
from lb.store.store import Store

STATE = State(
    services=(
        Service(
            Vip.parse("10.0.0.1:80/tcp"),
            Mode.NAT,
            (
                Backend(ip_address("10.0.0.11"), 80),
                Backend(ip_address("10.0.0.12"), 8080, weight=3, draining=True),
            ),
            ring_size=251,
            flow_timeout_s=60,
        ),
        Service(Vip.parse("[2001:db8::1]:53/udp"), Mode.DR),
    ),
    interfaces=(Interface("eth1", XdpMode.GENERIC), Interface("eth0")),
    own_addresses=(OwnAddress("eth1", ip_address("10.0.0.1")),),
)
OTHER = replace(STATE, services=STATE.services[1:], interfaces=())

# Every option, member sets, wide VIPs and server IDs.
RICH = State(
    services=(
        Service(
            Vip.parse("10.0.0.1:443/tcp"),
            Mode.GUE,
            (Backend.parse("10.0.0.11"), Backend.parse("2001:db8::11")),
            options=Options(
                affinity_s=300,
                sources=(parse_network("10.0.0.0/8"), parse_network("192.0.2.7")),
                syn_limit=1000,
                syn_limit_of_source=10,
                mss=1400,
                echo=True,
                tunnel_sources=(parse_network("198.18.0.0/16"), parse_network("2001:db8:1::/64")),
                gue_port=6081,
                outer_checksum=True,
                second_chance=True,
                vip_address=False,
            ),
        ),
        Service(
            Vip.parse("10.0.0.1:443/tcp@eu"),
            Mode.IPIP,
            (Backend.parse("10.0.0.12"),),
            options=Options(sources=(parse_network("10.7.0.0/16"),)),
        ),
        Service(
            Vip.parse("[2001:db8:2::/64]:8000-8999/udp"),
            Mode.DR,
            (
                replace(Backend.parse("2001:db8::11"), server_ids=("0:0a", "1:0b0c")),
                replace(Backend.parse("2001:db8::12"), server_ids=("0:0b",)),
            ),
        ),
    ),
    interfaces=(Interface("eth0"), Interface("eth1", replies_only=True)),
)

# As the release before options wrote it.
STORE_1 = """
CREATE TABLE generation (value INTEGER NOT NULL);
CREATE TABLE service (
    vip TEXT PRIMARY KEY,
    mode TEXT NOT NULL,
    ring_size INTEGER NOT NULL,
    flow_timeout_s INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE backend (
    vip TEXT NOT NULL,
    address TEXT NOT NULL,
    port INTEGER NOT NULL,
    weight INTEGER NOT NULL,
    draining INTEGER NOT NULL,
    PRIMARY KEY (vip, address, port)
) WITHOUT ROWID;
CREATE TABLE interface (
    position INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    xdp_mode TEXT NOT NULL
);
CREATE TABLE own_address (address TEXT PRIMARY KEY, interface TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO generation VALUES (1700000042);
INSERT INTO service VALUES ('10.0.0.1:80/tcp', 'nat', 251, 60), ('[2001:db8::1]:53/udp', 'dr', 16381, 3600);
INSERT INTO backend VALUES ('10.0.0.1:80/tcp', '10.0.0.11', 80, 1, 0), ('10.0.0.1:80/tcp', '10.0.0.12', 8080, 3, 1);
INSERT INTO interface VALUES (0, 'eth1', 'generic'), (1, 'eth0', 'auto');
INSERT INTO own_address VALUES ('10.0.0.1', 'eth1');
PRAGMA user_version = 1;
"""

# As the release before filter rules wrote it.
STORE_2 = f"""{STORE_1}
ALTER TABLE service ADD COLUMN options TEXT NOT NULL DEFAULT '{{}}';
ALTER TABLE backend ADD COLUMN server_ids TEXT NOT NULL DEFAULT '';
PRAGMA user_version = 2;
"""

# As the release before homes of VIP addresses wrote it.
STORE_3 = f"""{STORE_2}
{RULE_SCHEMA}
PRAGMA user_version = 3;
"""

# Every column of a rule, set and empty.
RULES = Rules(
    (
        Rule(
            slot=7,
            interface="eth0",
            at=At.TC_IN,
            action=Action.LIMIT,
            expression="udp port 53",
            instructions=bytes(range(16)),
            rate=Rate(1500, "min"),
            set=SetSource("/etc/bad.txt", "dst", 2),
            deadline=Deadline("boot", 5, 6),
        ),
        Rule(0, "eth1", At.XDP, Action.DROP, "", b"\x06"),
        Rule(1, "eth0", At.TC_OUT, Action.PASS, "arp", b"\x06"),
    )
)
PREFIXES = (bytes(8), bytes(20))


def write_store(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with sqlite3.connect(path) as connection:
        connection.executescript(script)
    connection.close()


def query(path: Path, statement: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(path) as connection:
        rows = connection.execute(statement).fetchall()
    connection.close()
    return rows


def save(path: Path, state: State) -> int:
    with Store.open(path, write=True) as store:
        store.load()
        with store.saving(state):
            pass
        return store.generation


def load(path: Path) -> State:
    with Store.open(path, write=False) as store:
        return store.load()


def many_services(services: int, backends: int) -> State:
    members = tuple(Backend(ip_address(f"10.1.0.{n}"), 80) for n in range(1, backends + 1))
    vips = (f"10.0.{n // 250}.{n % 250 + 1}:80" for n in range(services))
    return State(tuple(Service(Vip.parse(vip), Mode.NAT, members) for vip in vips))


def in_child(act: Callable[[], None]) -> int:
    """The signal that ended a child which did `act`, 0 if it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lib" / "blue" / "state.db"


def test_what_was_saved_is_loaded(path: Path) -> None:
    save(path, STATE)
    assert load(path) == STATE


def test_every_option_is_saved_and_loaded(path: Path) -> None:
    save(path, RICH)
    assert load(path) == RICH


def test_an_option_that_changes_is_saved(path: Path) -> None:
    save(path, RICH)
    plain = replace(RICH.services[0], options=Options())
    nameless = replace(RICH.services[2], backends=tuple(replace(b, server_ids=()) for b in RICH.services[2].backends))
    changed = RICH.replacing_service(plain).replacing_service(nameless)
    save(path, changed)
    assert load(path) == changed


def test_each_change_replaces_what_was_there(path: Path) -> None:
    heavier = STATE.services[0].changing_backend(Backend.parse("10.0.0.11"), lambda b: replace(b, weight=9))
    without = heavier.without_backend(Backend.parse("10.0.0.12:8080"))
    states = [
        STATE,
        STATE.replacing_service(heavier),
        STATE.replacing_service(without),
        replace(STATE, own_addresses=(), interfaces=STATE.interfaces[1:]),
        OTHER,
        State(),
        STATE,
    ]
    with Store.open(path, write=True) as store:
        store.load()
        for state in states:
            with store.saving(state):
                pass
            assert load(path) == state


def test_the_generation_grows_with_each_change_and_only_then(path: Path) -> None:
    first = save(path, STATE)
    assert save(path, STATE) == first
    assert save(path, OTHER) == first + 1


def test_a_store_made_anew_does_not_repeat_a_generation(path: Path) -> None:
    before = int(time.time())
    assert save(path, STATE) > before


def test_an_error_in_the_body_leaves_the_old_state(path: Path) -> None:
    generation = save(path, STATE)
    with Store.open(path, write=True) as store:
        store.load()
        with pytest.raises(RuntimeError), store.saving(OTHER):
            raise RuntimeError
        assert (store.state, store.generation) == (STATE, generation)
        assert load(path) == STATE
        with store.saving(OTHER):
            pass
    assert load(path) == OTHER


@pytest.mark.parametrize("write", [False, True])
def test_a_process_killed_in_the_body_leaves_the_old_state(path: Path, write: bool) -> None:
    def change() -> None:
        with Store.open(path, write=True) as store:
            store.load()
            with store.saving(OTHER):
                die()

    save(path, STATE)
    assert in_child(change) == signal.SIGKILL
    with Store.open(path, write=write) as store:
        assert store.load() == STATE


def test_a_reader_sees_the_old_state_while_a_change_is_under_way(path: Path) -> None:
    save(path, STATE)
    with Store.open(path, write=True) as store:
        store.load()
        with store.saving(OTHER):
            assert load(path) == STATE
    assert load(path) == OTHER


def test_reading_a_missing_store_creates_nothing(path: Path) -> None:
    with Store.open(path, write=False) as store:
        assert (store.load(), store.generation) == (State(), 0)
    assert not path.parent.exists()


def test_a_store_opened_for_reading_cannot_be_changed(path: Path) -> None:
    save(path, STATE)
    with Store.open(path, write=False) as store:
        store.load()
        with pytest.raises(StoreError, match="not writable"), store.saving(OTHER):
            pass
    assert load(path) == STATE


def test_only_its_owner_can_read_it(path: Path) -> None:
    save(path, STATE)
    modes = [p.stat().st_mode & 0o777 for p in (path.parent.parent, path.parent, path)]
    assert modes == [0o700, 0o700, 0o600]


def test_a_newer_schema_is_refused_with_both_numbers(path: Path) -> None:
    save(path, STATE)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    for write in (False, True):
        with pytest.raises(StoreError) as caught:
            Store.open(path, write=write)
        assert str(caught.value) == (
            f"store {path}: created by a newer xdp-lb (schema 7, supported: 4): upgrade xdp-lb"
        )


of_each_release_before = pytest.mark.parametrize("script", [STORE_1, STORE_2, STORE_3], ids=["1", "2", "3"])


@of_each_release_before
def test_a_store_of_a_release_before_is_read_as_it_is(path: Path, script: str) -> None:
    write_store(path, script)
    version = query(path, "PRAGMA user_version")
    with Store.open(path, write=False) as store:
        assert (store.load(), store.generation) == (STATE, 1700000042)
    assert query(path, "PRAGMA user_version") == version


@of_each_release_before
def test_a_store_of_a_release_before_is_brought_up_to_date_by_the_first_writer(path: Path, script: str) -> None:
    write_store(path, script)
    with Store.open(path, write=True) as store:
        assert (store.load(), store.generation) == (STATE, 1700000042)
        assert query(path, "PRAGMA user_version") == [(4,)]
        with store.saving(RICH):
            pass
    assert load(path) == RICH


def test_a_migrated_store_has_the_tables_of_a_new_one(path: Path, tmp_path: Path) -> None:
    write_store(path, STORE_1)
    save(path, STATE)
    save(tmp_path / "new" / "state.db", STATE)
    columns = "SELECT m.name, i.name, i.type, i.pk FROM sqlite_master m, pragma_table_info(m.name) i ORDER BY 1, i.cid"
    assert query(path, columns) == query(tmp_path / "new" / "state.db", columns)


def test_a_reader_that_opened_the_old_schema_reads_the_new_one(path: Path) -> None:
    write_store(path, STORE_1)
    with Store.open(path, write=False) as reader:
        assert reader.load() == STATE
        save(path, RICH)
        assert reader.load() == RICH


def test_a_migration_that_fails_leaves_the_old_store(path: Path) -> None:
    """The second of its steps finds the column there already."""
    write_store(path, STORE_1 + "ALTER TABLE backend ADD COLUMN server_ids TEXT;")
    with pytest.raises(StoreError, match="duplicate column name: server_ids"):
        Store.open(path, write=True)
    assert query(path, "PRAGMA user_version") == [(1,)]
    assert "options" not in [column[1] for column in query(path, "PRAGMA table_info(service)")]
    assert load(path) == STATE


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ("{", "Expecting"),
        ("[]", "no attribute"),
        ('{"mss": 5}', "mss 5: out of range"),
        ('{"sources": ["10.0.0.1/8"]}', "has host bits set"),
        ('{"shoe_size": 47}', "option shoe_size: unknown"),
        ('{"tunnel_sources": ["198.18.0.0/16"]}', "needs mode ipip or gue"),
    ],
)
def test_options_that_make_no_sense_are_named(path: Path, options: str, fault: str) -> None:
    save(path, STATE)
    write_store(path, f"UPDATE service SET options = '{options}' WHERE mode = 'nat'")
    with pytest.raises(StoreError, match=rf"holds an invalid value .*{fault}.*damaged"):
        load(path)


def test_a_file_that_is_no_store_is_named_with_the_way_out(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a database " * 100)
    for write in (False, True):
        with pytest.raises(StoreError) as caught:
            Store.open(path, write=write)
        assert str(caught.value) == f"store {path}: not an xdp-lb store: move the file away"


def test_a_damaged_store_is_named_with_the_way_out(path: Path) -> None:
    save(path, many_services(20, 20))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    with pytest.raises(StoreError, match=r"state\.db: damaged: move the file away"):
        load(path)


def test_a_value_that_makes_no_sense_is_named(path: Path) -> None:
    save(path, STATE)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE backend SET weight = 70000 WHERE port = 80")
    connection.close()
    with pytest.raises(StoreError, match=r"holds an invalid value .*weight 70000.*damaged"):
        load(path)


def test_a_full_disk_leaves_the_old_state(path: Path) -> None:
    save(path, STATE)
    with Store.open(path, write=True) as store:
        store.load()
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        with (
            pytest.raises(StoreError, match="the disk is full: free some space"),
            store.saving(many_services(50, 50)),
        ):
            pass
    assert load(path) == STATE


def test_a_path_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for act in (
        lambda path: Store.open(path, write=True),
        lambda path: Store.open(path, write=False),
        lambda path: writer_lock(path, "blue").__enter__(),
    ):
        with pytest.raises(StoreError, match=r"file.*: move it away, or set XDP_LB_STATE_DIR"):
            act(tmp_path / "file" / "blue" / "state.db")


def test_one_backend_of_a_hundred_thousand_is_changed_by_few_rows(path: Path) -> None:
    state = many_services(1000, 100)
    save(path, state)
    service = state.services[500]
    lighter = service.changing_backend(service.backends[50], lambda b: replace(b, weight=0))
    changed = state.replacing_service(lighter)
    with Store.open(path, write=True) as store:
        store.load()
        before = store._connection.total_changes
        with store.saving(changed):
            pass
        assert store._connection.total_changes - before <= 5
    assert load(path) == changed


def test_a_second_writer_is_told_who_the_first_one_is(tmp_path: Path) -> None:
    lock = tmp_path / "blue" / "lock"
    with (
        writer_lock(lock, "blue"),
        pytest.raises(Busy) as caught,
        writer_lock(lock, "blue", wait_s=0),
    ):
        pass
    line = str(caught.value)
    assert line.startswith(f"another xdp-lb (pid {os.getpid()}, ")
    assert line.endswith(") is changing network namespace blue: try again when it has ended")


def test_the_lock_is_free_when_its_holder_has_ended(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with writer_lock(lock, "blue"):
        pass
    with writer_lock(lock, "blue", wait_s=0):
        pass


def test_the_lock_is_free_when_its_holder_was_killed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"

    def hold() -> None:
        with writer_lock(lock, "blue"):
            die()

    assert in_child(hold) == signal.SIGKILL
    with writer_lock(lock, "blue", wait_s=0):
        pass


def test_a_second_writer_waits_for_the_first(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    locked, release = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with writer_lock(lock, "blue"):
            os.write(locked[1], b".")
            os.read(release[0], 1)
            os._exit(0)
    os.read(locked[0], 1)
    os.write(release[1], b".")
    with writer_lock(lock, "blue"):
        pass
    os.waitpid(child, 0)
    for end in (*locked, *release):
        os.close(end)


def test_each_network_namespace_has_its_own_folder() -> None:
    here = Paths(Path("/state"), Path("/run"), "blue")
    assert here.store == Path("/state/blue/state.db")
    assert here.lock == Path("/state/blue/lock")


def test_the_environment_moves_the_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDP_LB_STATE_DIR", "/srv/state")
    monkeypatch.setenv("XDP_LB_RUN_DIR", "")
    here = Paths.here()
    assert (here.state_dir, here.run_dir) == (Path("/srv/state"), Path("/run/xdp-lb"))


def test_a_namespace_is_called_by_the_name_that_ip_netns_gave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = os.stat("/proc/self/ns/net")
    monkeypatch.setattr(paths, "NAMED_NAMESPACES", tmp_path)
    monkeypatch.setattr(paths, "ROOT_NAMESPACE", tmp_path / "none")
    assert paths.current_netns() == f"net-{own.st_ino}"
    (tmp_path / "blue").symlink_to("/proc/self/ns/net")
    assert paths.current_netns() == "blue"
    monkeypatch.setattr(paths, "ROOT_NAMESPACE", paths.OWN_NAMESPACE)
    assert paths.current_netns() == "default"


# Filter rules


def save_rules(path: Path, rules: Rules, sets: dict[int, tuple[bytes, bytes]]) -> None:
    with Store.open(path, write=True) as store, store.saving_rules(rules, sets):
        pass


def test_rules_are_read_as_they_were_saved(path: Path) -> None:
    save_rules(path, RULES, {7: PREFIXES})
    with Store.open(path, write=False) as store:
        assert store.rules() == RULES
        assert store.rule_set(7) == PREFIXES


def test_set_stays_until_its_rule_goes(path: Path) -> None:
    save_rules(path, RULES, {7: PREFIXES})
    save_rules(path, RULES.moved(RULES.all[0], 2), {})
    with Store.open(path, write=True) as store:
        assert store.rule_set(7) == PREFIXES
        with store.saving_rules(RULES.without(RULES.all[:1]), {}):
            pass
        with pytest.raises(StoreError, match="prefixes of rule 7 missing"):
            store.rule_set(7)


def test_rules_and_services_leave_each_other_alone(path: Path) -> None:
    generation = save(path, STATE)
    save_rules(path, RULES, {7: PREFIXES})
    with Store.open(path, write=True) as store:
        assert (store.load(), store.generation) == (STATE, generation)
        with store.saving(OTHER):
            pass
        assert store.rules() == RULES


def test_an_error_in_the_body_leaves_the_old_rules(path: Path) -> None:
    save_rules(path, RULES, {7: PREFIXES})
    with Store.open(path, write=True) as store:
        with pytest.raises(ZeroDivisionError), store.saving_rules(Rules(), {}):
            raise ZeroDivisionError
        assert (store.rules(), store.rule_set(7)) == (RULES, PREFIXES)


def test_a_store_from_before_rules_has_none_and_takes_some(path: Path) -> None:
    write_store(path, STORE_2)
    with Store.open(path, write=False) as store:
        assert (store.load(), store.rules()) == (STATE, Rules())
    save_rules(path, RULES, {7: PREFIXES})
    with Store.open(path, write=False) as store:
        assert (store.load(), store.rules()) == (STATE, RULES)


def test_a_rule_that_makes_no_sense_is_named(path: Path) -> None:
    save_rules(path, RULES, {7: PREFIXES})
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE rule SET hook = 'nowhere' WHERE slot = 1")
    connection.close()
    with Store.open(path, write=False) as store, pytest.raises(StoreError, match="'nowhere' is not a valid At"):
        store.rules()

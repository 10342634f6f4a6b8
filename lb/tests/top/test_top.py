"""`xdp-lb top`: rates from one Status to the next, lines for every size of terminal, and the session on one."""

from __future__ import annotations

import fcntl
import os
import pickle
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lb.cli.main import cli
from lb.errors import DataplaneError
from lb.model.conditions import Condition
from lb.model.forwarding import UNKNOWN, Attachment, Counters, OpenConnections
from lb.model.report import BackendStatus, InterfaceStatus, ServiceStatus, Status
from lb.model.state import Backend, Interface, Mode, Service
from lb.model.vip import Vip
from lb.top import session as top_session
from lb.top.rates import Meter, Order, Rates, View
from lb.top.view import Display, figure, last_offset, plain, rows, screen, shortened, sparkline

WEB, DNS = Vip.parse("10.0.0.1:80/tcp"), Vip.parse("10.0.0.1:53/udp")
FIRST, SECOND = (Backend.parse(f"10.0.0.1{n}:80") for n in (1, 2))
RESOLVER = Backend.parse("10.0.0.19:53")
ETH0 = InterfaceStatus(Interface("eth0"), Attachment("eth0", "native", 37))

Counts = dict[Backend, Counters]


OPEN = {FIRST: OpenConnections(37), RESOLVER: OpenConnections(12, estimated=True)}


def service(vip: Vip, counts: Counts, mode: Mode = Mode.NAT, moving: int = 0) -> ServiceStatus:
    backends = tuple(BackendStatus(b, True, counters, open=OPEN.get(b, UNKNOWN)) for b, counters in counts.items())
    return ServiceStatus(Service(vip, mode, tuple(counts)), moving, backends)


def status(*services: ServiceStatus, **drops: int) -> Status:
    return Status("default", True, (ETH0,), services, drops, {})


def web(**counts: Counters) -> Status:
    names = {"first": FIRST, "second": SECOND}
    return status(service(WEB, {names[name]: counters for name, counters in counts.items()}))


def measured(*statuses: Status, interval_s: float = 2.0) -> View:
    """The View of the last one."""
    meter = Meter()
    return [meter.take(each, 100 + n * interval_s) for n, each in enumerate(statuses)][-1]


def backend_rates(view: View) -> dict[str, Rates]:
    return {backend.name: backend.rates for each in view.services for backend in each.backends}


# Rates


def test_rates_are_what_was_counted_meanwhile_by_the_second() -> None:
    view = measured(web(first=Counters(100, 1000, 50, 700, 3, 1)), web(first=Counters(160, 2000, 90, 1200, 9, 5)))
    rates = Rates(connections=3, packets=30, bits=4000, reply_packets=20, reply_bits=2000, repeated_syns=2)
    assert backend_rates(view) == {"10.0.0.11:80": rates}
    assert (view.services[0].rates, view.total, view.measured) == (rates, rates, True)


def test_nothing_is_measured_by_the_first_status_alone() -> None:
    view = measured(web(first=Counters(100, 1000, 50, 700, 3)))
    assert (view.measured, view.total, view.services[0].history) == (False, Rates(), ())


def test_service_has_the_rates_of_its_backends_together() -> None:
    view = measured(web(first=Counters(), second=Counters(10)), web(first=Counters(4), second=Counters(20)))
    assert (view.services[0].rates.packets, view.total.packets) == (7, 7)


@pytest.mark.parametrize("fallen", range(6))
def test_counters_of_which_one_has_fallen_have_begun_anew_together(fallen: int) -> None:
    after = [20, 300, 40, 500, 6, 8]
    before = [count + 1 if n == fallen else count - 1 for n, count in enumerate(after)]
    view = measured(web(first=Counters(*before)), web(first=Counters(*after)))
    assert backend_rates(view)["10.0.0.11:80"] == Rates(3, 10, 1200, 20, 2000, 4)


def test_backend_that_is_new_counts_from_zero_and_one_that_left_is_forgotten() -> None:
    meter = Meter()
    meter.take(web(first=Counters(500)), 0)
    assert backend_rates(meter.take(web(second=Counters(20)), 2)) == {"10.0.0.12:80": Rates(packets=10)}
    assert backend_rates(meter.take(web(first=Counters(6)), 4)) == {"10.0.0.11:80": Rates(packets=3)}


@pytest.mark.parametrize(("before", "after", "rate"), [(10, 30, 10), (30, 10, 5), (10, 10, 0)])
def test_rate_of_a_reason_is_never_negative(before: int, after: int, rate: float) -> None:
    view = measured(status(drop_no_backend=before), status(drop_no_backend=after))
    assert [(each.name, each.rate, each.packets) for each in view.reasons] == [("drop_no_backend", rate, after)]
    assert (view.rate_of("drop_"), view.rate_of("pass_")) == (rate, 0)


def test_history_is_of_the_service_and_ends_with_it() -> None:
    meter = Meter()
    views = [meter.take(web(first=Counters(packets)), n) for n, packets in enumerate((0, 5, 25))]
    assert views[-1].services[0].history == (5, 20)
    meter.take(status(), 3)
    assert meter.take(web(first=Counters(30)), 4).services[0].history == (30,)


def test_states_are_those_of_status() -> None:
    backends = (
        BackendStatus(FIRST, False, Counters()),
        BackendStatus(SECOND, True, Counters(), Condition(down=True)),
    )
    view = measured(status(ServiceStatus(Service(WEB, Mode.NAT, (FIRST, SECOND)), 0, backends)))
    assert [backend.state for backend in view.services[0].backends] == ["unresolved", "down"]


BUSY = (
    status(service(WEB, {FIRST: Counters(), SECOND: Counters()}), service(DNS, {RESOLVER: Counters()})),
    status(
        service(WEB, {FIRST: Counters(20, 200, 20, 0, 8), SECOND: Counters(30, 100, 30, 0, 4)}),
        service(DNS, {RESOLVER: Counters(60, 10_000, 0, 0, 0)}),
    ),
)


@pytest.mark.parametrize(
    ("order", "names"),
    [
        (Order.PACKETS, [WEB, SECOND, FIRST, DNS, RESOLVER]),
        (Order.BITS, [DNS, RESOLVER, WEB, FIRST, SECOND]),
        (Order.CONNECTIONS, [WEB, FIRST, SECOND, DNS, RESOLVER]),
        (Order.NAME, [WEB, FIRST, SECOND, DNS, RESOLVER]),
    ],
)
def test_busiest_come_first_in_every_order_but_that_of_names(order: Order, names: list[object]) -> None:
    found = [backend.name if backend else each.name for each, backend in rows(measured(*BUSY), order)]
    assert found == [str(name) for name in names]


def test_orders_follow_each_other_in_a_circle() -> None:
    assert [order.next for order in Order] == [*list(Order)[1:], Order.PACKETS]


# Lines


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0, "0"), (0.049, "0"), (0.05, "0.1"), (9.94, "9.9"), (9.95, "10"), (9999, "9999"), (12_345, "12.3k")],
)
def test_figures_of_rates(rate: float, text: str) -> None:
    assert figure(rate) == text


def test_figures_have_at_most_five_characters() -> None:
    rates = [digits * 10.0**power for power in range(-3, 19) for digits in (0.9949, 0.9951, 1, 9.995)]
    assert max(len(figure(rate)) for rate in rates) == 5


def test_sparkline_shows_the_latest_values_up_to_the_highest_of_them() -> None:
    assert sparkline((9, 0, 7, 14), 3) == "▁▅█"
    assert sparkline((0, 0), 8) == "▁▁"
    assert sparkline((1,), 0) == ""


def test_names_are_shortened_in_the_middle() -> None:
    assert shortened("[2001:db8::11]:8443", 12) == "[2001..:8443"
    assert shortened("10.0.0.11:80", 12) == "10.0.0.11:80"


TWO = (
    status(
        service(WEB, {FIRST: Counters(), replace(SECOND, draining=True): Counters()}, moving=125),
        service(DNS, {RESOLVER: Counters()}, Mode.DR),
        drop_no_backend=5,
    ),
    status(
        service(
            WEB,
            {FIRST: Counters(2468, 300_000, 2460, 600_000, 90), replace(SECOND, draining=True): Counters(7, 700, 6)},
            moving=125,
        ),
        service(DNS, {RESOLVER: Counters(1, 60, 0, 0, 0)}, Mode.DR),
        drop_no_backend=25,
    ),
)


def test_block_of_lines_for_a_file() -> None:
    assert plain(measured(*TWO), Display(clock="12:00:00", interval_s=2)) == [
        "xdp-lb top  12:00:00  by packets  eth0 native  every 2 s",
        "45 conn/s  1238 pkt/s  1.20M bit/s  10 dropped/s  1233 replies/s  2.40M bit/s  0 passed/s",
        "",
        "VIP, BACKEND    STATE         OPEN CONN/S PKT/S BIT/S REPLY/S BIT/S",
        "10.0.0.1:80/tcp nat ~125         -     45  1238 1.20M    1233 2.40M",
        "  10.0.0.11:80  active          37     45  1234 1.20M    1230 2.40M",
        "  10.0.0.12:80  draining         -      0   3.5  2800     3.0     0",
        "10.0.0.1:53/udp dr             ~12      0   0.5   240",
        "  10.0.0.19:53  active         ~12      0   0.5   240",
        "",
        "REASON          PKT/S PACKETS",
        "drop_no_backend    10      25",
    ]


RETRIED = (
    status(service(WEB, {FIRST: Counters(10, 600, 0, 0, 5, 1), SECOND: Counters(10, 600, 8, 700, 5)})),
    status(service(WEB, {FIRST: Counters(70, 4200, 0, 0, 25, 41), SECOND: Counters(70, 4200, 68, 4900, 25)})),
)


def test_retries_are_shown_once_there_have_been_any() -> None:
    assert plain(measured(*RETRIED), Display())[3:7] == [
        "VIP, BACKEND    STATE         OPEN CONN/S RETRY/S PKT/S BIT/S REPLY/S BIT/S",
        "10.0.0.1:80/tcp nat              -     20      20    60 28.8k      30 16.8k",
        "  10.0.0.12:80  active           -     10       0    30 14.4k      30 16.8k",
        "  10.0.0.11:80  active          37     10      20    30 14.4k       0     0",
    ]
    quiet = measured(RETRIED[1], RETRIED[1])
    assert "RETRY/S" in plain(quiet, Display())[3], "columns come and go as rates do"


def test_retries_are_left_out_first_where_there_is_no_room() -> None:
    assert "RETRY/S" not in texts(measured(*RETRIED), Display(60, 24))[3]


def texts(view: View, display: Display) -> list[str]:
    return [line.plain.rstrip() for line in screen(view, display)]


def test_screen_has_totals_services_reasons_and_keys() -> None:
    lines = texts(measured(*TWO), Display(80, 24, clock="12:00:00"))
    assert lines[0] == "xdp-lb top  12:00:00  by packets  eth0 native  every 1 s"
    assert lines[4] == "10.0.0.1:80/tcp nat ~125         -     45  1238 1.20M    1233 2.40M █"
    assert lines[-4:] == [
        "",
        "REASON          PKT/S PACKETS",
        "drop_no_backend    10      25",
        "q quit  s sort  space pause  arrows, PgUp, PgDn scroll",
    ]
    assert len(lines) == 24


def test_columns_are_left_out_before_names_are_shortened() -> None:
    view = measured(*TWO)
    headings = {width: texts(view, Display(width, 24))[3].split()[2:] for width in (80, 60, 50, 40, 30)}
    assert headings == {
        80: ["STATE", "OPEN", "CONN/S", "PKT/S", "BIT/S", "REPLY/S", "BIT/S"],
        60: ["STATE", "OPEN", "CONN/S", "PKT/S", "BIT/S"],
        50: ["STATE", "CONN/S", "PKT/S", "BIT/S"],
        40: ["STATE", "PKT/S", "BIT/S"],
        30: ["PKT/S", "BIT/S"],
    }
    assert texts(view, Display(25, 24))[4] == "10.0...80/tcp  1238 1.20M"


MANY = tuple(
    status(*(service(Vip.parse(f"10.0.1.{n}:80"), {FIRST: Counters(n * scale)}) for n in range(1, 21)))
    for scale in (0, 1000)
)


@pytest.mark.parametrize("height", [1, 2, 5, 6, 15, 16, 24, 50, 200])
@pytest.mark.parametrize("width", [1, 10, 20, 39, 80, 200])
@pytest.mark.parametrize("statuses", [TWO, MANY, TWO[:1], (status(),), (Status("lb1", False, (), (), {}, {}),)])
def test_screen_fits_every_terminal(statuses: tuple[Status, ...], width: int, height: int) -> None:
    lines = screen(measured(*statuses), Display(width, height, clock="12:00:00", paused=True, notice="n" * 300))
    assert len(lines) <= height
    assert max(line.cell_len for line in lines) <= width


def test_scrolling_shows_every_row_and_ends_with_the_last() -> None:
    view, height = measured(*MANY), 15
    last = last_offset(view, height)
    seen = [line for offset in range(0, last + 1) for line in texts(view, Display(80, height, offset=offset))[4:-1]]
    assert {line.split()[0] for line in seen} == {"10.0.0.11:80", *(f"10.0.1.{n}:80/tcp" for n in range(1, 21))}
    bottom = texts(view, Display(80, height, offset=last))
    assert (bottom[-3].split()[0], bottom[-1].split("  ")[0]) == ("10.0.1.1:80/tcp", "31-40 of 40")


def test_low_screen_leaves_the_reasons_to_the_totals() -> None:
    lines = texts(measured(*TWO), Display(80, 12))
    assert "10 dropped/s" in lines[1]
    assert not any("drop_no_backend" in line for line in lines)


def test_reasons_that_have_no_room_are_counted() -> None:
    drops = {f"drop_{n}": n for n in range(1, 12)}
    lines = texts(measured(status(**drops), status(**drops)), Display(80, 24))
    block = lines[lines.index("REASON  PKT/S PACKETS") :]
    assert [line.split()[0] for line in block[1:5]] == ["drop_11", "drop_10", "drop_9", "drop_8"]
    assert block[5] == "and 7 more"


def test_terminal_that_knows_ascii_only_gets_nothing_else() -> None:
    assert "".join(texts(measured(*TWO), Display(80, 24, ascii_only=True))).isascii()


def test_colours_warn_of_what_is_wrong() -> None:
    styles = {
        line.plain[span.start : span.end].strip(): str(span.style)
        for line in screen(measured(*TWO), Display(80, 24))
        for span in line.spans
    }
    assert (styles["draining"], styles["10 dropped/s"]) == ("yellow", "red")


# The command


class Readings:
    """An opener that gives `statuses` one after the other, and then the last one again; an error is raised."""

    def __init__(self, *statuses: Status | Exception) -> None:
        self._statuses = list(statuses)

    @contextmanager
    def open(self, *, write: bool) -> Iterator[Readings]:
        assert not write
        yield self

    def status(self) -> Status:
        current = self._statuses.pop(0) if len(self._statuses) > 1 else self._statuses[0]
        if isinstance(current, Exception):
            raise current
        return current


def run(*words: str, readings: Readings) -> Result:
    return CliRunner().invoke(cli, ["top", *words], obj=readings)


def test_what_is_no_terminal_gets_blocks_of_lines() -> None:
    result = run("-d", "0.1", "-n", "2", readings=Readings(*TWO))
    assert (result.exit_code, result.stderr) == (0, "")
    first, second = result.stdout.split("\n\nxdp-lb top")
    assert first.startswith("xdp-lb top  ")
    assert [block.count("10.0.0.1:80/tcp") for block in (first, second)] == [1, 1]
    assert re.search(r"drop_no_backend +[0-9.]+ +25\n$", second)


def test_once_is_one_block() -> None:
    assert run("-d", "0.1", "--once", readings=Readings(*TWO)).stdout.count("xdp-lb top") == 1


def test_error_in_the_first_reading_ends_the_command() -> None:
    result = run(readings=Readings(DataplaneError("nothing to read")))
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "xdp-lb: nothing to read\n")


@pytest.mark.parametrize("words", [("-d", "0"), ("-d", "nan"), ("-d", "inf"), ("-d", "x"), ("-n", "0")])
def test_numbers_that_make_no_sense_are_refused(words: tuple[str, ...]) -> None:
    assert run(*words, readings=Readings(*TWO)).exit_code == 2


# On a terminal: the session in a process of its own, on a pseudo terminal


@dataclass
class Session:
    process: subprocess.Popen[bytes]
    terminal: int
    seen: str = ""

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def expect(self, pattern: str) -> str:
        """What was written up to `pattern`, without what was expected before."""
        deadline = time.monotonic() + 20
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < deadline, f"{pattern}: not in {self.seen[-3000:]!r}"
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.seen += os.read(self.terminal, 65536).decode()
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def hang_up(self) -> None:
        os.close(self.terminal)
        self.terminal = -1

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.terminal)[3] & termios.ECHO)

    def end(self) -> int:
        """The exit status; the terminal has to be as it was before."""
        self.expect(re.escape(LEAVE))
        status = self.process.wait(timeout=20)
        assert self.echoes()
        return status


ENTER, LEAVE = "\x1b[?1049h", "\x1b[?1049l"

# It makes the terminal its own, so that Ctrl-Z typed there reaches it.
CHILD = """
import fcntl, pickle, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from pathlib import Path
from lb.cli.main import cli
cli(["top", *sys.argv[2:]], obj=pickle.loads(Path(sys.argv[1]).read_bytes()))
"""


@pytest.fixture
def on_terminal(tmp_path: Path) -> Iterator[Callable[..., Session]]:
    """Starts `xdp-lb top` with words over readings, on a terminal of 80x24."""
    with ExitStack() as sessions:

        def start(*words: str, readings: Readings) -> Session:
            (tmp_path / "readings").write_bytes(pickle.dumps(readings))
            return sessions.enter_context(_session(tmp_path / "readings", words))

        yield start


def own_size(environment: Mapping[str, str]) -> dict[str, str]:
    """Without that of the terminal of who runs the tests."""
    return {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}


@contextmanager
def _session(readings: Path, words: tuple[str, ...]) -> Iterator[Session]:
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(readings), *words],
        stdin=end,
        stdout=end,
        stderr=end,
        env=own_size(os.environ) | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"},
        start_new_session=True,
    )
    session = Session(process, terminal)
    session.resize(80, 24)
    os.close(end)
    try:
        yield session
    finally:
        process.kill()
        process.wait()
        if session.terminal >= 0:
            session.hang_up()


def test_session_shows_rates_and_ends_with_q(on_terminal: Callable[..., Session]) -> None:
    session = on_terminal("-d", "0.1", readings=Readings(*TWO))
    session.expect(re.escape(ENTER) + ".*measuring.*conn/s.*10.0.0.1:80/tcp")
    assert not session.echoes()
    session.type("q")
    assert session.end() == 0


def test_session_ends_after_so_many_readings(on_terminal: Callable[..., Session]) -> None:
    assert on_terminal("-d", "0.1", "-n", "3", readings=Readings(*TWO)).end() == 0


@pytest.mark.parametrize(("number", "exit_status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_session_that_is_ended_gives_the_terminal_back(
    on_terminal: Callable[..., Session], number: int, exit_status: int
) -> None:
    session = on_terminal(readings=Readings(*TWO))
    session.expect("measuring")
    session.process.send_signal(number)
    assert session.end() == exit_status


def test_session_follows_the_size_of_the_terminal(on_terminal: Callable[..., Session]) -> None:
    session = on_terminal("-d", "3600", readings=Readings(*TWO))
    session.expect("REPLY/S")
    session.resize(40, 10)
    assert "REPLY/S" not in session.expect("STATE       PKT/S BIT/S *\x1b")


def test_keys_sort_pause_and_scroll(on_terminal: Callable[..., Session]) -> None:
    session = on_terminal("-d", "0.1", readings=Readings(*MANY))
    session.expect("by packets.*1-19 of 40")
    session.type(" ")
    session.expect("paused")
    for keys, pattern in (
        ("s", "by bits"),
        ("\x1b[B\x1b[B\x1b[A", "2-20 of 40"),
        ("\x1b[6~", "21-39 of 40"),
        ("\x1b[F", "22-40 of 40"),
        ("\x1b[5~", "3-21 of 40"),
        ("\x1b[H", "1-19 of 40"),
    ):
        session.type(keys)
        session.expect(pattern)
    session.type("?q")
    assert session.end() == 0


def test_paused_session_waits_for_keys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []

    def nothing_is_typed(*arguments: Any) -> tuple[list[int], list[int], list[int]]:
        waits.append(arguments[3])
        return [7], [], []

    session = top_session.Session(lambda: measured(*TWO), 60, None)
    monkeypatch.setattr(select, "select", nothing_is_typed)
    for key in (b" ", b" "):
        session._press(key)
        session._wait(8, 9)
    assert waits[0] is None
    assert 0 < (waits[1] or 0) <= 60


def test_session_can_be_suspended(on_terminal: Callable[..., Session]) -> None:
    session = on_terminal("-d", "0.1", readings=Readings(*TWO))
    session.expect("measuring")
    session.type("\x1a")
    session.expect(re.escape(LEAVE))
    assert os.WIFSTOPPED(os.waitpid(session.process.pid, os.WUNTRACED)[1])
    assert session.echoes()
    session.process.send_signal(signal.SIGCONT)
    session.expect(re.escape(ENTER) + ".*conn/s")
    session.type("q")
    assert session.end() == 0


def test_reading_that_fails_is_told_of_and_the_next_one_goes_on(on_terminal: Callable[..., Session]) -> None:
    readings = Readings(TWO[0], DataplaneError("the kernel is busy"), TWO[1])
    session = on_terminal("-d", "0.2", readings=readings)
    session.expect("the kernel is busy")
    session.expect("conn/s.*q quit")
    session.type("q")
    assert session.end() == 0


def test_terminal_that_goes_away_ends_the_session(on_terminal: Callable[..., Session]) -> None:
    session = on_terminal("-d", "3600", readings=Readings(*TWO))
    session.expect("measuring")
    session.hang_up()
    session.process.wait(timeout=20)

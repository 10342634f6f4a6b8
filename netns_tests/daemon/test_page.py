"""The web page in a real browser: headless Chromium in the client's namespace, a daemon with TLS, real traffic."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright

from netns_tests.bed.daemon import certificate_of, end, socket_of, start
from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import Bed, Host, wait_until
from netns_tests.bed.traffic import connections, deaf, loading, trying

VIP = "10.99.1.100:80"
FIRST, SECOND, THIRD = "10.99.2.11:80", "10.99.2.12:80", "10.99.2.13:80"
QUIET = [
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]
ROLES = ("read", "write")
WAIT_S = 15


@dataclass
class Site:
    """The daemon's page as the client sees it, and a token of each role."""

    bed: Bed
    browser: Browser
    url: str
    tokens: dict[str, str]


@dataclass
class Visit:
    """A page that is open, and what the browser has said of it since."""

    page: Page
    asked: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(message.text)

    def log_in(self, token: str) -> None:
        self.page.get_by_label("Token").fill(token)
        self.page.keyboard.press("Enter")

    def rate(self, backend: str) -> float:
        """Packets a second, as the table has it; -1: not yet."""
        shown = self.row(backend).locator('[data-label="pkt/s"]').text_content(timeout=1000 * WAIT_S) or "-"
        return -1 if shown == "-" else float(shown.replace("k", "e3"))

    def row(self, backend: str) -> Locator:
        return self.page.get_by_role("row").filter(has=self.page.get_by_role("rowheader", name=backend, exact=True))


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Bed(backends=3, router=True) as bed:
        for backend in bed.backends:
            start_http(bed, backend, [80])
        bed.xdp_lb("attach", "eth0", "--vip", VIP, "--backends", "10.99.2.11,10.99.2.12", "--ring-size", "251")
        tokens = {role: bed.xdp_lb("token", "create", role, "--role", role).stdout.strip() for role in ROLES}
        certificate, key = certificate_of(bed)
        address = f"{bed.lb.ipv4}:8443"
        process = start(bed, "--listen", address, "--tls-cert", str(certificate), "--tls-key", str(key))
        with chromium(bed.client, bed.directory) as browser:
            yield Site(bed, browser, f"https://{address}/", tokens)
        assert end(process) == 0


@contextmanager
def chromium(host: Host, directory: Path) -> Iterator[Browser]:
    """A browser in the namespace of a host: Debian's, or else the one that playwright has installed."""
    with sync_playwright() as playwright:
        program = shutil.which("chromium") or playwright.chromium.executable_path
        wrapper = directory / "chromium"
        wrapper.write_text(f'#!/bin/sh\nexec ip netns exec {host.name} {program} "$@"\n')
        wrapper.chmod(0o755)
        browser = playwright.chromium.launch(executable_path=wrapper, args=QUIET)
        yield browser
        browser.close()


@contextmanager
def visiting(site: Site, origin: str = "") -> Iterator[Visit]:
    """A visit by a browser that knows nothing yet. In the end it has met no error that a test has not taken away, and
    has not left the origin."""
    expect.set_options(timeout=1000 * WAIT_S)
    context = site.browser.new_context(ignore_https_errors=True)
    context.set_default_timeout(1000 * WAIT_S)
    made = Visit(context.new_page())
    made.page.goto(site.url)
    yield made
    context.close()
    assert [url for url in made.asked if not url.startswith(origin or site.url)] == []
    assert made.faults == []


@pytest.fixture
def visitor(site: Site) -> Iterator[Visit]:
    with visiting(site) as visit:
        yield visit


@pytest.fixture(scope="module")
def operator(site: Site) -> Iterator[Visit]:
    """Who may change things, logged in for all tests of the module."""
    with visiting(site) as visit:
        visit.log_in(site.tokens["write"])
        yield visit


def configured(site: Site) -> dict[str, tuple[int, bool]]:
    """Backend -> weight, and whether it drains, as the command line has it."""
    found = json.loads(site.bed.xdp_lb("backend", "list", "--json").stdout)
    return {each["backend"]: (each["weight"], each["draining"]) for each in found}


# Who sees what


def test_a_visitor_without_a_token_sees_a_prompt_and_nothing_else(site: Site, visitor: Visit) -> None:
    expect(visitor.page.get_by_label("Token")).to_be_focused()
    expect(visitor.page.locator("main")).to_be_empty()
    assert "10.99." not in visitor.page.content()
    assert [url for url in visitor.asked if "/v1/" in url] == []


FORWARD = """
import asyncio, sys

async def copy(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()

async def forward(reader, writer):
    far_reader, far_writer = await asyncio.open_unix_connection(sys.argv[1])
    await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer), return_exceptions=True)

async def main():
    open("/proc/self/comm", "w").write("sshd")
    server = await asyncio.start_server(forward, "127.0.0.1", 8080)
    print("listening", flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


@contextmanager
def forwarded_socket(bed: Bed) -> Iterator[str]:
    """As by ssh -L 8080:SOCKET from the client."""
    command = [sys.executable, "-c", FORWARD, str(socket_of(bed))]
    process = bed.client.popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout
        assert process.stdout.readline() == "listening\n"
        yield "http://localhost:8080/"
    finally:
        process.kill()
        process.wait()


def test_a_link_logs_in_once_through_a_forwarded_socket(site: Site) -> None:
    with forwarded_socket(site.bed) as url:
        link = site.bed.xdp_lb("web", "--url", url).stdout.strip()
        forwarded = replace(site, url=link)
        with visiting(forwarded, origin=url) as visit:
            expect(visit.page.locator("#caller")).to_contain_text("web page of uid 0")
            expect(visit.page.locator("#where")).to_contain_text("eth0")
            assert visit.page.url == url
            visit.page.reload()
            expect(visit.page.locator("#where")).to_contain_text("eth0")
        with visiting(forwarded, origin=url) as visit:
            expect(visit.page.get_by_role("alert")).to_have_text("code expired or used: run xdp-lb web again")
            expect(visit.page.locator("main")).to_be_empty()
            visit.faults.clear()  # the browser says 401
        with visiting(replace(site, url=url)) as visit:
            expect(visit.page.get_by_label("Token")).to_be_focused()


def test_a_wrong_token_is_said_to_be_wrong_and_is_kept_nowhere(site: Site, visitor: Visit) -> None:
    visitor.log_in("xlb_guessed")
    expect(visitor.page.get_by_role("alert")).to_have_text("invalid token: see xdp-lb token list")
    assert "10.99." not in visitor.page.content()
    assert visitor.page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [0, 0, ""]
    assert "guessed" not in visitor.page.url
    (refused,) = visitor.faults
    assert "status of 401" in refused
    visitor.faults.clear()


def test_a_token_is_kept_by_the_tab_until_log_out_and_then_nothing_is_left(site: Site, visitor: Visit) -> None:
    visitor.log_in(site.tokens["read"])
    expect(visitor.row(FIRST)).to_be_visible()
    visitor.page.reload()
    expect(visitor.row(FIRST)).to_be_visible()
    assert site.tokens["read"] not in visitor.page.content() + visitor.page.url + " ".join(visitor.asked)
    visitor.page.get_by_role("button", name="Log out").click()
    expect(visitor.page.get_by_label("Token")).to_be_focused()
    assert "10.99." not in visitor.page.content()
    assert visitor.page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [0, 0, ""]


def test_a_token_that_is_revoked_ends_the_session(site: Site, visitor: Visit) -> None:
    token = site.bed.xdp_lb("token", "create", "leaver").stdout.strip()
    visitor.log_in(token)
    expect(visitor.row(FIRST)).to_be_visible()
    site.bed.xdp_lb("token", "revoke", "leaver")
    expect(visitor.page.get_by_role("alert")).to_have_text("The token is no longer valid.")
    assert "10.99." not in visitor.page.content()
    assert all("status of 401" in fault for fault in visitor.faults)
    visitor.faults.clear()


def test_who_may_only_read_is_offered_no_change(site: Site, visitor: Visit) -> None:
    visitor.log_in(site.tokens["read"])
    expect(visitor.page.get_by_text("read-only")).to_be_visible()
    expect(visitor.row(FIRST)).to_be_visible()
    expect(visitor.page.get_by_role("button", name="Drain")).to_have_count(0)


# What is done


def test_traffic_is_seen_to_move_when_a_backend_is_drained_by_keyboard(site: Site, operator: Visit) -> None:
    with loading(site.bed, f"http://{VIP}/", connections=4):
        wait_until(lambda: operator.rate(FIRST) > 1 and operator.rate(SECOND) > 1, "rates of both", WAIT_S)
        expect(operator.page.get_by_role("img", name="Map: clients, 1 service, 2 active")).to_be_visible()
        focus_by_tab(operator.page, f"Drain… {SECOND} of {VIP}/tcp")
        operator.page.keyboard.press("Enter")
        dialog = operator.page.get_by_role("dialog", name=f"Drain {SECOND}")
        expect(dialog).to_contain_text(re.compile(r"12\d of 251 slots move"))
        expect(dialog).to_contain_text("connections older than the change stay on their backend")
        assert configured(site)[SECOND] == (1, False)  # a plan changes nothing
        focus_by_tab(operator.page, "Drain")
        operator.page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        expect(operator.page.get_by_role("status")).to_contain_text("done")
        expect(operator.row(SECOND)).to_contain_text("draining")
        expect(operator.page.get_by_role("log")).to_contain_text(f"backend {SECOND} draining")
        wait_until(lambda: operator.rate(SECOND) == 0 and operator.rate(FIRST) > 1, "traffic elsewhere", WAIT_S)
        assert configured(site) == {FIRST: (1, False), SECOND: (1, True)}
        operator.row(SECOND).get_by_role("button", name="Undrain…").click()
        operator.page.get_by_role("button", name="Undrain", exact=True).click()
        wait_until(lambda: operator.rate(SECOND) > 1, "traffic here again", WAIT_S)
    assert configured(site) == {FIRST: (1, False), SECOND: (1, False)}


def test_a_backend_that_hears_no_syn_is_seen_by_what_clients_repeat(site: Site, operator: Visit) -> None:
    with deaf(site.bed.backends[1]), trying(site.bed, VIP.partition(":")[0]):
        expect(operator.row(SECOND).locator('[data-label="retry/s"]')).to_have_text(re.compile(r"^[1-9]"))
        expect(operator.row(FIRST).locator('[data-label="retry/s"]')).to_have_text("0")


def test_escape_closes_the_dialog_and_changes_nothing(site: Site, operator: Visit) -> None:
    before = configured(site)
    remove = operator.row(FIRST).get_by_role("button", name="Remove…")
    remove.focus()
    operator.page.keyboard.press("Enter")
    dialog = operator.page.get_by_role("dialog")
    expect(dialog.get_by_role("button", name="Remove")).to_be_enabled()
    expect(dialog).to_contain_text(re.compile(r"Ends (no|[0-9]+) open connections?\."))
    operator.page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(remove).to_be_focused()
    assert configured(site) == before


def test_the_dialog_says_how_many_of_the_open_connections_in_the_table_end(site: Site, operator: Visit) -> None:
    with connections(site.bed, VIP.partition(":")[0], count=30) as held:
        assert {connection.ask() for connection in held} == {"b1", "b2"}
        shown = operator.row(FIRST).locator('[data-label="open"]')
        expect(shown).to_have_text(re.compile(r"^[1-9]"))
        operator.row(FIRST).get_by_role("button", name="Remove…").click()
        of_first = sum(connection.ask() == "b1" for connection in held)
        expect(shown).to_have_text(str(of_first))
        expect(operator.page.get_by_role("dialog")).to_contain_text(f"Ends {of_first} open connections.")
        operator.page.keyboard.press("Escape")


def test_a_backend_is_added_weighed_and_removed_and_a_wrong_address_is_told_at_its_field(
    site: Site, operator: Visit
) -> None:
    operator.page.get_by_role("button", name="Add a backend…").click()
    address = operator.page.get_by_label("Address")
    address.fill("10.99.2.300")
    expect(address).to_have_accessible_description(re.compile("^address 10.99.2.300: not an IPv4 or IPv6 address "))
    operator.faults.clear()  # the browser tells of each answer that is no success
    address.fill("10.99.2.13")
    operator.page.get_by_role("button", name="Add 10.99.2.13").click()
    expect(operator.row(THIRD)).to_contain_text("active")
    operator.row(THIRD).get_by_role("button", name="Weight…").click()
    operator.page.get_by_role("button", name="increase").click()
    operator.page.get_by_role("button", name="increase").click()
    operator.page.get_by_role("button", name="Set weight to 3").click()
    expect(operator.row(THIRD).locator('[data-label="weight"]')).to_have_text("3")
    assert configured(site)[THIRD] == (3, False)
    operator.row(THIRD).get_by_role("button", name="Remove…").click()
    expect(operator.page.get_by_role("dialog")).to_contain_text("Existing connections of this backend break.")
    operator.page.get_by_role("button", name="Remove", exact=True).click()
    expect(operator.row(THIRD)).to_have_count(0)
    assert THIRD not in configured(site)


def test_who_comes_second_is_told_what_the_first_has_changed(site: Site, operator: Visit) -> None:
    operator.row(FIRST).get_by_role("button", name="Drain…").click()
    dialog = operator.page.get_by_role("dialog")
    confirm = dialog.get_by_role("button", name="Drain", exact=True)
    expect(confirm).to_be_enabled()
    site.bed.xdp_lb("backend", "weight", VIP, "10.99.2.12", "7")
    confirm.click()
    expect(dialog.get_by_role("alert").first).to_contain_text(f"{SECOND} weight changed from 1 to 7")
    expect(confirm).to_be_enabled()  # for the plan as it is now
    assert configured(site)[FIRST] == (1, False)
    operator.page.keyboard.press("Escape")
    site.bed.xdp_lb("backend", "weight", VIP, "10.99.2.12", "1")
    (refused,) = operator.faults
    assert "status of 412" in refused
    operator.faults.clear()


def test_a_daemon_that_does_not_answer_is_missed_and_found_again(site: Site, visitor: Visit) -> None:
    """The page says that its figures are old, and goes on when there is an answer."""
    visitor.log_in(site.tokens["read"])
    expect(visitor.row(FIRST)).to_be_visible()
    visitor.page.context.set_offline(True)
    expect(visitor.page.get_by_role("alert")).to_contain_text("no response from the daemon: no data since")
    visitor.page.context.set_offline(False)
    expect(visitor.page.locator("#trouble")).to_be_hidden()
    visitor.faults.clear()


def test_nothing_is_wider_than_the_window(site: Site, operator: Visit) -> None:
    for width in (360, 1600):
        operator.page.set_viewport_size({"width": width, "height": 800})
        expect(operator.row(FIRST).get_by_role("button", name="Remove…")).to_be_visible()
        assert operator.page.evaluate("document.documentElement.scrollWidth") <= width


def focus_by_tab(page: Page, name: str) -> None:
    """Press Tab until the button of that name has the focus."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == name:
            return
    raise AssertionError(f"{name}: not reached by Tab")

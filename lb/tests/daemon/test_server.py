"""The daemon's life, and what it does to those who mean it ill: TLS, tokens, time limits, many connections."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from lb.api import access as access_module
from lb.api import middleware
from lb.api.access import Access, Role
from lb.cli.main import cli
from lb.client.client import Client
from lb.control.balancer import Balancer
from lb.daemon import listener, sd_notify, server
from lb.errors import DaemonError, InvalidInput
from lb.model.state import State
from lb.model.vip import Vip
from lb.runtime.balancer_thread import BalancerThread
from lb.store.store import Store
from lb.tests.fakes.daemon import Running, running, serving, through
from lb.tests.fakes.host import RING, WEB, Host
from lb.tests.fakes.tls import Certificate, Remote, serving_tcp

DEADLINE_S = 20.0
TOML = '[[service]]\nvip = "{vip}"\nring_size = 251\nbackends = ["10.0.0.11"]\n'


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.01)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path / "default" / "state.db")
    assert host.run("attach", "eth0", "--backends", "10.0.0.11,10.0.0.12", *RING).exit_code == 0
    return host


def stored(host: Host) -> State:
    with Store.open(host.store, write=False) as store:
        return store.load()


# Beginning and end


def test_what_is_stored_is_in_force_when_the_daemon_is_ready(host: Host, tmp_path: Path) -> None:
    host.dataplane.forget()  # the host has booted
    with serving(host, tmp_path) as daemon:
        assert host.dataplane.attachments().keys() == {"eth0"}
        assert host.dataplane.published == {Vip.parse(WEB)}
        with Client.unix(daemon.settings.socket) as client:
            assert client.status().loaded


def test_the_end_leaves_programs_and_maps_alone_and_takes_the_socket_away(host: Host, tmp_path: Path) -> None:
    with serving(host, tmp_path) as daemon:
        mode = daemon.settings.socket.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o660
        writes = host.dataplane.fuse.writes
    assert host.dataplane.fuse.writes == writes
    assert host.dataplane.attachments()
    assert not daemon.settings.socket.exists()


def test_a_socket_that_a_dead_daemon_has_left_is_taken_over(host: Host, tmp_path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as left:
        left.bind(str(tmp_path / "api.sock"))
    with serving(host, tmp_path) as daemon, Client.unix(daemon.settings.socket) as client:
        assert client.services().value


def test_a_place_where_no_socket_can_be_is_one_line(host: Host, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, error in ((tmp_path / "file" / "api.sock", "File exists"), (tmp_path / ("x" * 120), "too long")):
        settings = server.Settings(place, tmp_path / "access.db")
        with pytest.raises(DaemonError, match=error), running(lambda: host.open(write=True), settings):
            pass


def test_a_daemon_that_the_kernel_refuses_is_up_but_not_ready_and_tries_again(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "AGAIN_S", 0.01)
    host.dataplane.forget()
    host.dataplane.foreign.add("eth0")
    with serving(host, tmp_path) as daemon, get(daemon) as http:
        answer = http.get("/readyz")
        assert (answer.status_code, http.get("/healthz").status_code) == (503, 200)
        assert answer.json()["detail"].startswith("eth0: another XDP program is attached (id 7)")
        assert [line["log_level"] for line in daemon.said].count("error") == 1  # said once
        host.dataplane.foreign.clear()
        wait_for(lambda: http.get("/readyz").status_code == 200, "ready")
        assert host.dataplane.attachments()


def test_a_daemon_that_is_not_ready_yet_goes_on_with_the_file_that_was_read_last(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "AGAIN_S", 0.01)
    host.dataplane.forget()
    host.dataplane.foreign.add("eth0")
    file = tmp_path / "lb.toml"
    file.write_text(TOML.format(vip=WEB))
    with serving(host, tmp_path, config=file) as daemon, get(daemon) as http:
        file.write_text(TOML.format(vip=WEB) + TOML.format(vip="10.0.0.51:80"))
        daemon.call(daemon.daemon.reload)
        wait_for(lambda: reload_failures(daemon), "the kernel's refusal")
        host.dataplane.foreign.clear()
        wait_for(lambda: http.get("/readyz").json() == {"status": "ready"}, "ready")
        assert vips(host) == [WEB, "10.0.0.51:80/tcp"]


def test_an_answer_on_its_way_is_finished_before_the_end(host: Host, tmp_path: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert go_on.wait(DEADLINE_S)

    with serving(host, tmp_path) as daemon, get(daemon) as http:
        host.dataplane.fuse.fail_after(1, blow=wait)
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(http.patch("/v1/services/10.0.0.1:80/backends/10.0.0.11", json={"weight": 5}))
        )
        asking.start()
        assert entered.wait(DEADLINE_S)
        daemon.call(daemon.daemon.stop)
        go_on.set()
        asking.join()
        daemon.join()
    assert answers[0].status_code == 200
    assert stored(host).services[0].backends[0].weight == 5


@contextmanager
def get(daemon: Running) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(daemon.settings.socket))
    with httpx.Client(transport=transport, base_url="http://xdp-lb") as client:
        yield client


# The configuration file


def vips(host: Host) -> list[str]:
    return [str(service) for service in stored(host).services]


def reload_failures(daemon: Running) -> list[str]:
    return [line["reason"] for line in daemon.said if "reload failed" in line["event"]]


def test_a_file_is_what_is_served_and_is_read_again_when_told(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "lb.toml"
    both = TOML.format(vip=WEB) + TOML.format(vip="10.0.0.51:80")
    file.write_text(TOML.format(vip=WEB))
    with serving(host, tmp_path, config=file) as daemon, get(daemon) as http:
        assert vips(host) == [WEB]
        file.write_text(both)
        daemon.call(daemon.daemon.reload)
        wait_for(lambda: vips(host) == [WEB, "10.0.0.51:80/tcp"], "the new file")
        file.write_text("nonsense")
        daemon.call(daemon.daemon.reload)
        wait_for(lambda: reload_failures(daemon), "the error")
        assert vips(host) == [WEB, "10.0.0.51:80/tcp"]
        assert http.get("/readyz").json() == {"status": "ready", "problem": reload_failures(daemon)[0]}
        file.write_text(both)
        daemon.call(daemon.daemon.reload)
        wait_for(lambda: http.get("/readyz").json() == {"status": "ready"}, "the file to be right")


def test_a_file_that_removes_most_of_what_is_served_is_refused_and_says_the_way_out(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "lb.toml"
    file.write_text(TOML.format(vip=WEB))
    fault = f"{file}: would remove 1 of 1 service ({WEB}): to do so: xdp-lb apply --prune -f {file}"
    with serving(host, tmp_path, config=file) as daemon, get(daemon) as http:
        before = stored(host)
        file.write_text("")
        daemon.call(daemon.daemon.reload)
        wait_for(lambda: reload_failures(daemon) == [fault], "the refusal")
        assert stored(host) == before
        assert http.get("/readyz").json() == {"status": "ready", "problem": fault}
        assert "xdp_lb_config_last_reload_successful 0.0" in http.get("/metrics").text
        command = through(host, daemon)
        status = CliRunner().invoke(cli, ["status"], obj=command).stdout
        assert status.startswith(f"configuration file not applied: {fault}\n")
        assert CliRunner().invoke(cli, ["apply", "--prune", "-f", str(file)], obj=command).exit_code == 0
        assert http.get("/v1/status").json()["config_fault"] is None
        assert vips(host) == []


def test_a_file_that_is_empty_from_the_start_leaves_what_is_stored_in_force(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "lb.toml"
    file.write_text("")
    with serving(host, tmp_path, config=file) as daemon, get(daemon) as http:
        assert vips(host) == [WEB]
        assert "would remove 1 of 1 service" in http.get("/readyz").json()["problem"]


def test_a_reload_keeps_drains_and_weights_that_the_file_does_not_give_and_says_what_it_overrides(
    host: Host, tmp_path: Path
) -> None:
    file = tmp_path / "lb.toml"
    file.write_text(TOML.format(vip=WEB))
    with serving(host, tmp_path, config=file) as daemon, Client.unix(daemon.settings.socket) as client:
        served = client.services().value[0]
        client.set_weight(served.vip, served.backends[0], 5)
        client.drain_backend(served.vip, served.backends[0])
        drained = stored(host)
        daemon.call(daemon.daemon.reload)
        wait_for(lambda: "reloaded" in [line["event"] for line in daemon.said], "the reload")
        assert stored(host) == drained
        file.write_text(TOML.format(vip=WEB).replace('"10.0.0.11"', '"10.0.0.11@2"'))
        daemon.call(daemon.daemon.reload)
        wait_for(lambda: stored(host) != drained, "the new file")
        (backend,) = stored(host).services[0].backends
        assert (backend.weight, backend.draining) == (2, True)
        wait_for(lambda: [line["event"] for line in daemon.said].count("reloaded") == 2, "the log")
        said, where = [line["event"] for line in daemon.said], f"{WEB}: backend 10.0.0.11:80"
        assert f"{where}: draining kept: drain is not in the file" in said
        assert f"{where}: weight 5 -> weight 2: given by the file" in said


def test_a_file_that_is_wrong_from_the_start_is_one_line(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "lb.toml"
    file.write_text("nonsense")
    with pytest.raises(InvalidInput, match="not valid TOML"), serving(host, tmp_path, config=file):
        pass
    assert stored(host).services


# What runs beside


@dataclass
class Counting:
    """A task that fails at first."""

    failures: int = 1
    runs: int = 0
    seen: list[State] = field(default_factory=list)
    cancelled: bool = False

    async def run(self, thread: BalancerThread) -> None:
        self.runs += 1
        if self.runs <= self.failures:
            raise ZeroDivisionError("in a task")
        self.seen.append(await thread.call(lambda balancer: balancer.state))
        thread.events.publish("health", {"backend": "10.0.0.11:80", "state": "down"})
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled = True


def test_a_task_reaches_the_balancer_and_is_started_again_when_it_fails(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "AGAIN_S", 0.01)
    task, other = Counting(), Counting(failures=0)
    with serving(host, tmp_path, tasks=[task, other]) as daemon, Client.unix(daemon.settings.socket) as client:
        wait_for(lambda: task.seen and other.seen, "both tasks at work")
        assert task.seen == [stored(host)]
        events = client.events(after="nothing-0")
        assert {next(events).kind for _ in range(3)} >= {"health"}
    assert (task.runs, task.cancelled, other.runs, other.cancelled) == (2, True, 1, True)


def test_all_work_on_the_balancer_is_done_by_one_thread(host: Host, tmp_path: Path) -> None:
    threads: set[str] = set()

    @contextmanager
    def opener() -> Iterator[Balancer]:
        threads.add(threading.current_thread().name)
        with host.open(write=True) as balancer:
            yield balancer
        threads.add(threading.current_thread().name)

    async def work() -> None:
        async with BalancerThread.open(opener) as thread:
            calls = [thread.call(lambda balancer: threads.add(threading.current_thread().name)) for _ in range(9)]
            await asyncio.gather(*calls)

    asyncio.run(work())
    assert len(threads) == 1
    assert threading.current_thread().name not in threads


# systemd


def test_the_service_manager_hears_of_the_beginning_the_end_and_of_life(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(DEADLINE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "20000")
        with serving(host, tmp_path):
            assert [manager.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
        said = [manager.recv(100)]
        while said[-1] != b"STOPPING=1":
            said.append(manager.recv(100))
        assert set(said[:-1]) <= {b"WATCHDOG=1"}


def test_an_abstract_notify_socket_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"xdp-lb-test-{id(monkeypatch)}"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        manager.bind("\0" + name)
        manager.settimeout(DEADLINE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        sd_notify.notify("READY=1")
        assert manager.recv(100) == b"READY=1"


def test_without_a_service_manager_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    sd_notify.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    sd_notify.notify("READY=1")


def test_the_unit_file_names_this_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/opt/somewhere/xdp-lb"])
    printed = CliRunner().invoke(cli, ["serve", "--print-unit"]).stdout
    assert "ExecStart=/opt/somewhere/xdp-lb serve\n" in printed
    assert "CapabilityBoundingSet=CAP_NET_ADMIN CAP_BPF CAP_PERFMON CAP_NET_RAW\n" in printed


@pytest.mark.parametrize(("place", "homes"), [("/opt/xdp-lb", "yes"), ("/home/me/.venv", "read-only")])
def test_the_unit_file_does_not_hide_the_program_from_itself(
    place: str, homes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [f"{place}/bin/xdp-lb"])
    monkeypatch.setattr("sys.base_prefix", "/usr")
    monkeypatch.setattr("lb.cli.commands.serve.__file__", f"{place}/lib/serve.py")
    assert f"\nProtectHome={homes}\n" in CliRunner().invoke(cli, ["serve", "--print-unit"]).stdout


@pytest.mark.parametrize(
    "words",
    [
        ("--listen", "192.0.2.1:8443"),
        ("--tls-cert", "x.pem"),
        ("--listen", "192.0.2.1:8443", "--tls-key", "x.key"),
    ],
)
def test_tcp_without_tls_is_a_usage_error(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli, ["serve", *words])
    assert result.exit_code == 2
    assert "--tls-cert" in result.stderr


# TCP: TLS and tokens


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return Certificate(tmp_path)


@pytest.fixture
def remote(host: Host, tmp_path: Path, certificate: Certificate) -> Iterator[Remote]:
    with serving_tcp(host, tmp_path, certificate) as made:
        yield made


def audit(remote: Remote) -> list[access_module.Entry]:
    with Access.open(remote.running.settings.access) as access:
        return access.entries(100)


def test_a_client_far_away_works_as_one_on_the_host(remote: Remote) -> None:
    with Client(remote.url, token=remote.tokens[Role.WRITE], verify=remote.certificate.trusted) as client:
        vip = Vip.parse(WEB)
        client.drain_backend(vip, client.service(vip).value.backends[0])
        assert client.service(vip).value.backends[0].draining
    (entry,) = audit(remote)
    assert (entry.who, entry.address, entry.method, entry.outcome) == ("token write", "127.0.0.1", "PATCH", "200")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Basic eGxi", "xlb_0", "Bearer\txlb_0"])
def test_without_a_token_nothing_is_seen(remote: Remote, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    with remote.http() as http:
        for path in ("/v1/services", "/v1/status", "/v1/events", "/openapi.json", "/v1/nothing"):
            answer = http.get(path, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
            assert "10.0.0." not in answer.text
        assert http.put("/v1/config", json={"services": []}, headers=headers).status_code == 401
        assert http.get("/healthz", headers=headers).json() == {"status": "ok"}
        assert http.get("/readyz", headers=headers).json() == {"status": "ready"}
    assert stored_count(remote) == 1


def stored_count(remote: Remote) -> int:
    with get(remote.running) as http:
        return len(http.get("/v1/services").json())


def test_a_wrong_token_is_refused_and_recorded_and_never_repeated(remote: Remote) -> None:
    wrong = remote.tokens[Role.WRITE][:-1] + "?"
    with remote.http(wrong) as http:
        answer = http.delete("/v1/services/10.0.0.1:80")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    (entry,) = audit(remote)
    assert (entry.who, entry.address, entry.outcome) == ("unknown", "127.0.0.1", "401: invalid token")
    everything = f"{answer.text} {answer.headers} {entry} {remote.running.said}"
    for secret in (wrong, *remote.tokens.values()):
        assert secret.removeprefix("xlb_") not in everything


def test_two_tokens_at_once_are_none(remote: Remote) -> None:
    value = f"Bearer {remote.tokens[Role.READ]}"
    with remote.http() as http:
        assert http.get("/v1/status", headers=[("Authorization", value)] * 2).status_code == 401


def test_a_token_that_may_read_changes_nothing(remote: Remote) -> None:
    with remote.http(remote.tokens[Role.READ]) as http:
        for path in ("/v1/services", "/v1/status", "/v1/stats", "/v1/config", "/v1/interfaces", "/openapi.json"):
            assert http.get(path).status_code == 200
        assert http.post("/v1/plan", json={"services": []}).json()["dry_run"]
        for method, path, body in (
            ("PUT", "/v1/config", {"services": []}),
            ("PUT", "/v1/config?dry_run=true", {"services": []}),
            ("DELETE", "/v1/services/10.0.0.1:80", None),
            ("POST", "/v1/plan/", {"services": []}),
            ("POST", "/v1/interfaces", {"interfaces": [{"name": "eth1"}]}),
            ("DELETE", "/v1/interfaces", None),
        ):
            answer = http.request(method, path, json=body)
            assert (answer.status_code, answer.headers["content-type"]) == (403, "application/problem+json")
    assert stored_count(remote) == 1
    assert {entry.who for entry in audit(remote)} == {"token read"}


def test_programs_to_run_are_set_on_the_host_itself_alone(remote: Remote) -> None:
    check = {"health": "script /bin/true", "mss": 1400}
    service = {"ring_size": 251, "options": check, "backends": [{"backend": "10.0.0.11"}]}
    path = "/v1/services/10.0.0.1:80"
    with remote.http(remote.tokens[Role.WRITE]) as far, get(remote.running) as near:
        for method, where, body in (
            ("PUT", path, service),
            ("PATCH", path, {"options": check}),
            ("PUT", "/v1/config", {"services": [{"vip": "10.0.0.1:80", **service}]}),
            (
                "POST",
                "/v1/interfaces",
                {"interfaces": [{"name": "eth0"}], "services": [{"vip": "10.0.0.9:80", **service}]},
            ),
        ):
            answer = far.request(method, where, json=body)
            assert (answer.status_code, far.get(path).json()["options"]["health"]) == (403, ""), where
        browser = {"Sec-Fetch-Site": "same-origin", "Authorization": f"Bearer {remote.tokens[Role.WRITE]}"}
        assert near.put(path, json=service, headers=browser).status_code == 403
        assert near.put(path, json=service).status_code == 200
        assert far.put(path, json=service).json()["changes"] == []
        assert far.patch(path, json={"options": {"mss": 1300}}).status_code == 200
        assert far.patch(path, json={"options": {"health": "tcp"}}).status_code == 200


def test_programs_to_run_are_set_by_root_alone(host: Host, root_directory: Path) -> None:
    """Not by the group that may write to the socket."""
    body = '{"options": {"health": "script /bin/true"}}'
    with serving(host, root_directory) as daemon:
        asked = ["curl", "-s", "-X", "PATCH", "-H", "Content-Type: application/json", "-d", body]
        asked += ["--unix-socket", str(daemon.settings.socket), "http://xdp-lb/v1/services/10.0.0.1:80"]
        by_group = ["setpriv", "--reuid=65534", "--regid=0", "--clear-groups", *asked]
        for command, answer in (
            (by_group, "can only be set by root on the balancer's host"),
            (asked, '"dry_run":false'),
        ):
            assert answer in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_programs_that_others_can_change_are_refused(host: Host, root_directory: Path) -> None:
    script = root_directory / "check"
    script.write_text("#!/bin/sh\n")
    words = ("vip", "set", WEB, "--health", f"script {script}")
    told = f"xdp-lb: vip {WEB}: health check script {script}: "
    assert host.error(*words) == f"{told}not executable: run chmod +x {script}"
    script.chmod(0o777)
    assert host.error(*words) == f"{told}writable by others than root: run chmod go-w {script}"
    script.chmod(0o755)
    host.lines(*words)
    script.chmod(0o777)
    host.lines("vip", "set", WEB, "--mss", "1400")  # nothing about the script
    script.unlink()
    with serving(host, root_directory) as daemon, get(daemon) as http:
        answer = http.patch("/v1/services/10.0.0.1:80", json={"options": {"health": "script /nowhere/check"}})
        assert (answer.status_code, answer.json()["detail"]) == (
            422,
            f"vip {WEB}: health check script /nowhere/check: not found",
        )


def test_a_revoked_token_is_worth_nothing_at_once(remote: Remote) -> None:
    with remote.http(remote.tokens[Role.WRITE]) as http:
        assert http.get("/v1/status").status_code == 200
        with Access.open(remote.running.settings.access) as access:
            access.revoke("write")
        assert http.get("/v1/status").status_code == 401


def test_who_guesses_is_made_to_wait(remote: Remote) -> None:
    with remote.http("xlb_wrong") as http:
        answers = [http.get("/v1/status") for _ in range(12)]
    assert [answer.status_code for answer in answers] == [401] * 10 + [429] * 2
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    with remote.http(remote.tokens[Role.WRITE]) as http:  # the right token is not locked out by wrong ones
        assert http.get("/v1/status").status_code == 200
        assert http.get("/healthz").status_code == 200
    assert len(audit(remote)) == 10  # waiting fills no log
    assert stored_count(remote) == 1  # on the host itself all goes on


def test_tcp_speaks_tls_and_nothing_else(remote: Remote) -> None:
    with closing(socket.create_connection(remote.address, timeout=DEADLINE_S)) as plain:
        plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: xdp-lb\r\n\r\n")
        assert b"HTTP" not in plain.recv(1000)
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    with pytest.warns(DeprecationWarning, match="TLSVersion"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with closing(socket.create_connection(remote.address, timeout=DEADLINE_S)) as outdated, pytest.raises(ssl.SSLError):
        old.wrap_socket(outdated)


def test_a_new_certificate_is_taken_up_and_a_wrong_one_is_not(remote: Remote) -> None:
    remote.certificate.renew()
    with remote.http() as http, pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        http.get("/healthz")
    remote.running.call(remote.running.daemon.reload)
    wait_for(lambda: "certificate loaded" in [line["event"] for line in remote.running.said], "the certificate")
    with remote.http() as http:
        assert http.get("/healthz").status_code == 200
    old = remote.certificate.trusted
    remote.certificate.key.write_text("no key")
    remote.running.call(remote.running.daemon.reload)
    wait_for(lambda: reload_failures(remote.running), "the error")
    with httpx.Client(base_url=remote.url, verify=old, trust_env=False) as http:
        assert http.get("/healthz").status_code == 200


def test_a_certificate_and_a_file_are_loaded_whatever_is_wrong_with_the_other(
    host: Host, tmp_path: Path, certificate: Certificate
) -> None:
    file = tmp_path / "lb.toml"
    file.write_text(TOML.format(vip=WEB))
    with serving_tcp(host, tmp_path, certificate, config=file) as remote:
        certificate.renew()
        file.write_text("nonsense")
        remote.running.call(remote.running.daemon.reload)
        wait_for(lambda: reload_failures(remote.running), "the error")
        with remote.http() as http:
            assert http.get("/healthz").status_code == 200
        certificate.key.write_text("no key")
        file.write_text(TOML.format(vip=WEB) + TOML.format(vip="10.0.0.51:80"))
        remote.running.call(remote.running.daemon.reload)
        wait_for(lambda: vips(host) == [WEB, "10.0.0.51:80/tcp"], "the new file")
        unreadable, no_key = reload_failures(remote.running)
        assert "not valid TOML" in unreadable
        assert "not a PEM certificate and its key" in no_key


@pytest.mark.parametrize(("text", "error"), [("no certificate", "not a PEM certificate"), (None, "No such file")])
def test_a_certificate_that_is_none_is_one_line(
    host: Host, tmp_path: Path, certificate: Certificate, text: str | None, error: str
) -> None:
    certificate.certificate.unlink()
    if text:
        certificate.certificate.write_text(text)
    with pytest.raises(InvalidInput, match=error), serving_tcp(host, tmp_path, certificate):
        pass


def test_an_address_that_is_taken_is_one_line(remote: Remote, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    settings: dict[str, Any] = {
        "listen": (remote.address,),
        "tls_certificate": remote.certificate.certificate,
        "tls_key": remote.certificate.key,
    }
    with pytest.raises(DaemonError, match="Address already in use"), serving(Host(other / "s.db"), other, **settings):
        pass
    assert not (other / "api.sock").exists()


# Those who take their time


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HEAD_S", 0.2)
    monkeypatch.setattr(listener, "HANDSHAKE_S", 0.2)
    monkeypatch.setattr(middleware, "BODY_S", 0.2)
    monkeypatch.setattr(middleware, "SEND_S", 0.2)


def ends(connection: socket.socket) -> bytes:
    """What comes until the other side closes the connection."""
    connection.settimeout(DEADLINE_S)
    found = b""
    try:
        while chunk := connection.recv(65536):
            found += chunk
    except ConnectionResetError:
        pass
    return found


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"G",
        b"GET / HTTP/1.1\r\nHost: xdp-lb\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: xdp-lb\r\n\r\nGET / HTTP/1.1\r\nX:",
    ],
)
def test_a_head_that_does_not_come_ends_the_connection(
    short_limits: None, host: Host, tmp_path: Path, beginning: bytes
) -> None:
    with serving(host, tmp_path) as daemon, local(daemon) as connection:
        connection.sendall(beginning)
        answer = ends(connection)
        assert answer.count(b"HTTP/1.1 200") == beginning.count(b"\r\n\r\n")


@contextmanager
def local(daemon: Running) -> Iterator[socket.socket]:
    with closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.connect(str(daemon.settings.socket))
        yield connection


def test_a_head_that_comes_drop_by_drop_ends_the_connection(short_limits: None, host: Host, tmp_path: Path) -> None:
    with serving(host, tmp_path) as daemon, local(daemon) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        wait_for(lambda: not goes_on(connection), "the end")


def goes_on(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"X: y\r\n")
    except OSError:
        return False
    return True


def test_a_body_that_does_not_come_is_not_waited_for(short_limits: None, host: Host, tmp_path: Path) -> None:
    head = b"PUT /v1/config HTTP/1.1\r\nHost: xdp-lb\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with serving(host, tmp_path) as daemon, local(daemon) as connection:
        connection.sendall(head)
        assert ends(connection).startswith(b"HTTP/1.1 408")
        assert stored(host).services


def test_a_reader_who_reads_nothing_is_cut_off(
    short_limits: None, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(host, tmp_path) as daemon, local(daemon) as connection:
        connection.sendall(b"GET /v1/events HTTP/1.1\r\nHost: xdp-lb\r\nLast-Event-ID: x-0\r\n\r\n")
        connections = daemon.daemon._listeners[0].server_state.connections
        wait_for(lambda: connections, "connected")
        wait_for(lambda: has_gone(connections, daemon), "cut off")


def has_gone(connections: set[Any], daemon: Running) -> bool:
    """Else there is more for it, published in the event loop's own thread."""
    thread = daemon.daemon.thread
    assert thread
    daemon.call(lambda: thread.events.publish("change", {"summary": "x" * 100_000}))
    return not connections


def test_a_client_that_never_speaks_tls_is_not_waited_for(
    short_limits: None, host: Host, tmp_path: Path, certificate: Certificate
) -> None:
    with (
        serving_tcp(host, tmp_path, certificate) as remote,
        closing(socket.create_connection(remote.address)) as connection,
    ):
        assert ends(connection) == b""


CONNECTIONS = int(os.environ.get("API_CONNECTIONS", "10000"))
CONNECT = """
import socket, sys
connections = [socket.socket(socket.AF_UNIX) for _ in range(int(sys.argv[2]))]
for connection in connections:
    connection.connect(sys.argv[1])
sys.stdin.read()
"""


def test_idle_connections_keep_nobody_out(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as API_CONNECTIONS, from another process, since each has two ends."""
    monkeypatch.setattr(listener, "HEAD_S", 600)
    with many_files(), serving(host, tmp_path) as daemon, get(daemon) as http:
        command = [sys.executable, "-c", CONNECT, str(daemon.settings.socket), str(CONNECTIONS)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as idle:
            connections = daemon.daemon._listeners[0].server_state.connections
            wait_for(lambda: len(connections) >= CONNECTIONS, "all of them connected")
            assert http.get("/v1/services").status_code == 200
            assert http.patch("/v1/services/10.0.0.1:80/backends/10.0.0.11", json={"weight": 3}).status_code == 200
            idle.communicate()
        wait_for(lambda: len(connections) <= 1, "all of them gone")


@contextmanager
def many_files() -> Iterator[None]:
    """As many open files as may be, as `serve` itself asks for."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    server._raise_limit()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_changes_of_many_at_once_are_all_made_one_after_the_other(host: Host, tmp_path: Path) -> None:
    with serving(host, tmp_path) as daemon:

        async def ask() -> list[int]:
            transport = httpx.AsyncHTTPTransport(uds=str(daemon.settings.socket))
            async with httpx.AsyncClient(transport=transport, base_url="http://xdp-lb", timeout=DEADLINE_S) as http:
                path = "/v1/services/10.0.0.1:80/backends"
                bodies = [{"backends": [{"backend": f"10.0.0.{n}"}]} for n in range(100, 120)]
                return [a.status_code for a in await asyncio.gather(*(http.post(path, json=b) for b in bodies))]

        assert asyncio.run(ask()) == [200] * 20
    assert len(stored(host).services[0].backends) == 22

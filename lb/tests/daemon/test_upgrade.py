"""The installed program takes over, or cannot: what commands and the daemon say and do."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from lb.client.client import Client
from lb.errors import DataplaneError
from lb.tests.fakes.daemon import Running, serving
from lb.tests.fakes.host import RING, Host

TAKEN_OVER = "program upgraded from xdp-lb 0.0.9 to the installed version"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path / "default" / "state.db")
    assert host.run("attach", "eth0", "--backends", "10.0.0.11,10.0.0.12", *RING).exit_code == 0
    host.dataplane.outdated = "0.0.9"
    return host


def ask(daemon: Running, path: str) -> httpx.Response:
    transport = httpx.HTTPTransport(uds=str(daemon.settings.socket))
    with httpx.Client(transport=transport, base_url="http://xdp-lb") as client:
        return client.get(path)


def refuse(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: object) -> bool:
        raise DataplaneError("the verifier says no")

    monkeypatch.setattr(type(host.dataplane), "upgrade", refused)


def test_attach_has_the_installed_program_take_over_and_says_so_once(host: Host) -> None:
    assert "the running program is of xdp-lb 0.0.9, not the installed version" in host.run("status").stdout
    assert TAKEN_OVER in host.run("attach", "eth0").stdout
    assert host.dataplane.outdated == ""
    assert TAKEN_OVER not in host.run("attach", "eth0").stdout


def test_dry_run_and_other_changes_leave_the_program_in_force(host: Host) -> None:
    host.run("attach", "eth0", "--dry-run")
    assert host.run("backend", "drain", "10.0.0.1:80", "10.0.0.11").exit_code == 0
    assert host.dataplane.outdated == "0.0.9"


def test_attach_that_the_kernel_refuses_changes_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(host, monkeypatch)
    writes = host.dataplane.fuse.writes
    done = host.run("attach", "eth0")
    assert (done.exit_code, done.stderr) == (1, "xdp-lb: the verifier says no\n")
    assert host.dataplane.fuse.writes == writes


def test_daemon_has_the_installed_program_take_over_at_its_start(host: Host, tmp_path: Path) -> None:
    with serving(host, tmp_path) as daemon, Client.unix(daemon.settings.socket) as client:
        assert client.status().outdated == ""
        assert ask(daemon, "/readyz").json() == {"status": "ready"}
        assert "xdp_lb_upgrade_refused 0.0" in ask(daemon, "/metrics").text
        assert TAKEN_OVER in [line["event"] for line in daemon.said]


def test_daemon_that_is_refused_serves_on_says_why_and_recovers(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refuse(host, patch)
        with serving(host, tmp_path) as daemon, Client.unix(daemon.settings.socket) as client:
            assert ask(daemon, "/readyz").json() == {"status": "ready", "problem": "the verifier says no"}
            assert "xdp_lb_upgrade_refused 1.0" in ask(daemon, "/metrics").text
            assert client.status().outdated == "0.0.9"
            service = client.services().value[0]
            client.drain_backend(service.vip, service.backends[0])
            host.dataplane.outdated = ""
            client.set_weight(service.vip, service.backends[0], 2)
            assert ask(daemon, "/readyz").json() == {"status": "ready"}
            assert "xdp_lb_upgrade_refused 0.0" in ask(daemon, "/metrics").text

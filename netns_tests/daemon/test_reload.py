"""SIGHUP and maintenance under real traffic: nothing is lost by a broken file, and a drain is waited for."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from netns_tests.bed.daemon import SERVE, WEB, end, start
from netns_tests.bed.servers import start_http
from netns_tests.bed.topology import Bed, wait_until
from netns_tests.bed.traffic import curl, go_on, loading


@pytest.fixture
def bed() -> Iterator[Bed]:
    with Bed(backends=2) as made:
        for backend in made.backends:
            start_http(made, backend, [80])
        made.xdp_lb(*SERVE)
        yield made


def status(bed: Bed) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(bed.xdp_lb("status", "--json").stdout)
    return document


def test_an_emptied_file_ends_no_service_and_a_reload_no_drain(bed: Bed) -> None:
    file = bed.directory / "lb.toml"
    whole = f'[[service]]\nvip = "{WEB}"\nring_size = 251\nbackends = ["10.99.2.11", "10.99.2.12"]\n'
    file.write_text(whole)
    process = start(bed, "--config", str(file))
    try:
        bed.xdp_lb("backend", "drain", WEB, "10.99.2.11")
        file.write_text("")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: status(bed)["config_fault"], "the refusal")
        assert f"xdp-lb apply --prune -f {file}" in status(bed)["config_fault"]
        assert curl(bed.client, f"http://{WEB}/") == "b2"
        file.write_text(whole)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: status(bed)["config_fault"] is None, "the file to be loaded")
        assert [each["state"] for each in status(bed)["services"][0]["backends"]] == ["draining", "active"]
        assert curl(bed.client, f"http://{WEB}/") == "b2"
    finally:
        assert end(process) == 0


def test_a_drain_waits_for_open_connections_and_ends_with_undrain(bed: Bed) -> None:
    both = ("10.99.2.11", "10.99.2.12")
    with loading(bed, f"http://{WEB}/", connections=5, keepalive=True) as load:
        waited = bed.xdp_lb("backend", "drain", WEB, *both, "--wait", "1", check=False)
        assert waited.returncode == 1
        assert f"{WEB}/tcp: still in use after 1 s: " in waited.stderr
        assert "no backend takes new connections" in bed.xdp_lb("status", "--down").stdout
        bed.xdp_lb("backend", "undrain", WEB, *both)
        go_on(20, load)
        report = load.stop()
    assert (report.failed, report.reasons) == (0, {})
    assert curl(bed.client, f"http://{WEB}/") in {"b1", "b2"}

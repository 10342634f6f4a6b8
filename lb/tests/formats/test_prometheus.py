"""The exposition as Prometheus reads it (by the parser of prometheus_client), and the files that build on its names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from click.testing import CliRunner, Result
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from lb.cli.main import cli
from lb.control.balancer import Balancer
from lb.formats.documents import read_status, status_document, to_json
from lb.formats.prometheus import exposition
from lb.model.conditions import Condition
from lb.model.forwarding import Attachment, Counters, OpenConnections
from lb.model.report import BackendStatus, InterfaceStatus, ServiceStatus, Status
from lb.model.state import Backend, Interface, Mode, Service
from lb.model.vip import Vip
from lb.runtime.metrics import DaemonMetrics
from lb.store.store import Store
from lb.tests.fakes.host import Opening
from lb.tests.fakes.memory import MemoryDataplane, MemoryNetwork

# What others build on. A name or a label that goes is a change that users have to be told of.
NAMES = {
    "xdp_lb_build_info": ("gauge", {"version"}),
    "xdp_lb_loaded": ("gauge", set()),
    "xdp_lb_interface_attached": ("gauge", {"interface"}),
    "xdp_lb_interface_info": ("gauge", {"interface", "xdp_mode"}),
    "xdp_lb_service_info": ("gauge", {"vip", "mode", "protocol"}),
    "xdp_lb_service_backends": ("gauge", {"vip", "state"}),
    "xdp_lb_service_ring_slots": ("gauge", {"vip"}),
    "xdp_lb_service_slots_in_transition": ("gauge", {"vip"}),
    "xdp_lb_service_flow_timeout_seconds": ("gauge", {"vip"}),
    "xdp_lb_backend_weight": ("gauge", {"vip", "backend"}),
    "xdp_lb_backend_draining": ("gauge", {"vip", "backend"}),
    "xdp_lb_backend_resolved": ("gauge", {"vip", "backend"}),
    "xdp_lb_backend_up": ("gauge", {"vip", "backend"}),
    "xdp_lb_backend_share_ratio": ("gauge", {"vip", "backend"}),
    "xdp_lb_backend_packets_total": ("counter", {"vip", "backend", "direction"}),
    "xdp_lb_backend_bytes_total": ("counter", {"vip", "backend", "direction"}),
    "xdp_lb_backend_open_connections": ("gauge", {"vip", "backend"}),
    "xdp_lb_backend_connections_total": ("counter", {"vip", "backend"}),
    "xdp_lb_backend_repeated_syns_total": ("counter", {"vip", "backend"}),
    "xdp_lb_dropped_packets_total": ("counter", {"reason"}),
    "xdp_lb_passed_packets_total": ("counter", {"reason"}),
    "xdp_lb_answered_packets_total": ("counter", {"reason"}),
    "xdp_lb_noted_packets_total": ("counter", {"reason"}),
    "xdp_lb_map_memory_bytes": ("gauge", {"map"}),
}

WEB, DNS6 = Vip.parse("10.0.0.1:80/tcp"), Vip.parse("[2001:db8::1]:53/udp")
FIRST, SECOND, THIRD = (Backend.parse(f"10.0.0.1{n}:80") for n in (1, 2, 3))
DRAINING = replace(SECOND, draining=True, weight=3)
SIXTH = Backend.parse("[2001:db8::11]:53")

STATUS = Status(
    netns="default",
    loaded=True,
    interfaces=(
        InterfaceStatus(Interface("eth0"), Attachment("eth0", "native", 37)),
        InterfaceStatus(Interface("eth1"), None),
    ),
    services=(
        ServiceStatus(
            Service(WEB, Mode.NAT, (FIRST, DRAINING, THIRD)),
            slots_in_transition=8190,
            backends=(
                BackendStatus(FIRST, True, Counters(12_345, 9_876_543, 9999, 2**53 + 1, 801), Condition(share=25)),
                BackendStatus(DRAINING, True, Counters(5, 300, 4, 9000, 1, 6), open=OpenConnections(37)),
                BackendStatus(THIRD, False, Counters(), Condition(down=True, share=100, why="refused", since=1.5)),
            ),
        ),
        ServiceStatus(
            Service(DNS6, Mode.DR, (SIXTH,), 251, 60),
            slots_in_transition=0,
            backends=(BackendStatus(SIXTH, False, Counters(7, 700, 0, 0, 0)),),
        ),
    ),
    answered={"answered_echo": 7},
    drops={"drop_no_backend": 0, "drop_malformed": 12},
    passes={"pass_not_ip": 1_234_567},
    noted={"noted_syn_not_recorded": 3},
    maps={"rings": 4_194_304, ".rodata": 4096},
)

Labels = frozenset[tuple[str, str]]


def parsed(text: str) -> list[Metric]:
    return list(text_string_to_metric_families(text))


def samples(text: str, name: str) -> dict[Labels, float]:
    found = [(frozenset(s.labels.items()), s.value) for m in parsed(text) for s in m.samples if s.name == name]
    assert len(dict(found)) == len(found), "two samples of the same labels"
    return dict(found)


def value(name: str, status: Status = STATUS, **labels: str) -> float:
    return samples(exposition(status), name)[frozenset(labels.items())]


def test_names_types_and_labels_are_those_that_were_promised() -> None:
    found = {
        sample.name: (metric.type, set(sample.labels))
        for metric in parsed(exposition(STATUS))
        for sample in metric.samples
    }
    assert found == NAMES


def test_all_names_are_declared_also_where_nothing_is_served() -> None:
    text = exposition(Status("default", False, (), (), {}, {}))
    assert re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M) == [(name, kind) for name, (kind, _) in NAMES.items()]
    assert samples(text, "xdp_lb_loaded") == {frozenset(): 0}


def test_every_name_has_a_help_of_one_line() -> None:
    assert re.findall(r"^# HELP (\S+) \S.*\.$", exposition(STATUS), re.M) == list(NAMES)


def test_counters_are_exact() -> None:
    line = 'xdp_lb_backend_bytes_total{vip="10.0.0.1:80/tcp",backend="10.0.0.11:80",direction="to_client"} '
    assert f"{line}{2**53 + 1}\n" in exposition(STATUS)


def test_both_directions_of_nat_are_told_apart() -> None:
    name, vip, backend = "xdp_lb_backend_packets_total", "10.0.0.1:80/tcp", "10.0.0.11:80"
    assert value(name, vip=vip, backend=backend, direction="to_backend") == 12_345
    assert value(name, vip=vip, backend=backend, direction="to_client") == 9999


def test_replies_that_cannot_be_seen_are_not_counted_as_none() -> None:
    found = samples(exposition(STATUS), "xdp_lb_backend_packets_total")
    of_dr = [dict(labels)["direction"] for labels in found if ("vip", str(DNS6)) in labels]
    assert of_dr == ["to_backend"]


def test_syns_that_came_again_are_counted_where_there_are_syns() -> None:
    found = samples(exposition(STATUS), "xdp_lb_backend_repeated_syns_total")
    counts = {(dict(labels)["vip"], dict(labels)["backend"]): count for labels, count in found.items()}
    assert counts == {(str(WEB), "10.0.0.11:80"): 0, (str(WEB), "10.0.0.12:80"): 6, (str(WEB), "10.0.0.13:80"): 0}


def test_open_connections_are_those_of_backends_of_which_they_are_known() -> None:
    found = samples(exposition(STATUS), "xdp_lb_backend_open_connections")
    assert {dict(labels)["backend"]: count for labels, count in found.items()} == {"10.0.0.12:80": 37}


def test_memory_is_told_of_each_map() -> None:
    assert value("xdp_lb_map_memory_bytes", map="rings") == 4_194_304


def test_backends_are_counted_by_state() -> None:
    counts = {
        (vip, state): value("xdp_lb_service_backends", vip=vip, state=state)
        for vip in (str(WEB), str(DNS6))
        for state in ("active", "draining", "unresolved", "down")
    }
    assert {key for key, count in counts.items() if count} == {
        (str(WEB), "active"),
        (str(WEB), "draining"),
        (str(WEB), "down"),
        (str(DNS6), "unresolved"),
    }
    assert set(counts.values()) == {0, 1}


def test_health_is_only_of_backends_that_are_checked() -> None:
    text = exposition(STATUS)
    up = {dict(labels)["backend"]: alive for labels, alive in samples(text, "xdp_lb_backend_up").items()}
    assert up == {"10.0.0.11:80": 1, "10.0.0.13:80": 0}
    assert value("xdp_lb_backend_share_ratio", vip=str(WEB), backend="10.0.0.11:80") == 0.25


def test_neighbours_are_not_called_unresolved_while_nothing_is_attached() -> None:
    text = exposition(replace(STATUS, loaded=False))
    assert samples(text, "xdp_lb_backend_resolved") == {}
    assert samples(text, "xdp_lb_service_backends")[frozenset({("vip", str(DNS6)), ("state", "unresolved")})] == 0


def test_every_sample_names_a_namespace_other_than_the_default_one() -> None:
    metrics = parsed(exposition(replace(STATUS, netns="lb1")))
    assert {sample.labels.get("netns") for metric in metrics for sample in metric.samples} == {"lb1"}


def test_characters_of_the_format_are_escaped_in_names_of_interfaces() -> None:
    name = 'e"\\0\n'
    status = replace(STATUS, interfaces=(InterfaceStatus(Interface(name), None),))
    assert value("xdp_lb_interface_attached", status, interface=name) == 0


def test_status_that_came_as_a_document_gives_the_same() -> None:
    document = json.loads(to_json(status_document(STATUS)))
    assert exposition(read_status(document)) == exposition(STATUS)


# The command


@contextmanager
def balancer(store: Path) -> Iterator[Balancer]:
    with Store.open(store, write=True) as opened:
        opened.load()
        yield Balancer(opened, MemoryDataplane(), MemoryNetwork({"eth0": ["10.0.0.1/24"]}))


def run(tmp_path: Path, *words: str) -> Result:
    def open_it(*, write: bool) -> AbstractContextManager[Balancer]:
        return balancer(tmp_path / "default" / "state.db")

    return CliRunner().invoke(cli, ["metrics", *words], obj=Opening(open_it))


def test_command_prints_the_exposition(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [metric.name for metric in parsed(result.stdout)] == [name.removesuffix("_total") for name in NAMES]


def test_file_is_replaced_and_readable_by_all(tmp_path: Path) -> None:
    path = tmp_path / "xdp-lb.prom"
    path.write_text("old")
    before = path.stat().st_ino
    mask = os.umask(0o077)
    try:
        result = run(tmp_path, "-o", str(path))
    finally:
        os.umask(mask)
    assert (result.exit_code, result.output) == (0, "")
    assert path.read_text() == run(tmp_path).stdout
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.stat().st_ino != before, "written in place: a reader may see half of it"
    assert sorted(tmp_path.glob("*.prom*")) == [path]


def test_file_that_cannot_be_written_is_named_and_nothing_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "xdp-lb.prom"
    result = run(tmp_path, "-o", str(path))
    assert (result.exit_code, result.stderr) == (1, f"xdp-lb: {path}: No such file or directory\n")
    (tmp_path / "taken.prom").mkdir()
    assert run(tmp_path, "-o", str(tmp_path / "taken.prom")).exit_code == 2
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "xdp-lb.prom"
    path.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    assert run(tmp_path, "-o", str(path)).stderr == f"xdp-lb: {path}: No space left on device\n"
    assert (path.read_text(), list(tmp_path.glob(".*"))) == ("old", [])


# What is shipped: alert rules and a dashboard.

SHIPPED = {"--alerts": "alerts.yml", "--dashboard": "grafana-dashboard.json"}


def shipped(name: str) -> str:
    return files("lb.formats").joinpath("monitoring", name).read_text(encoding="utf-8")


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(shipped("alerts.yml"))["groups"]
    return list(group["rules"])


def dashboard() -> dict[str, Any]:
    return dict(json.loads(shipped("grafana-dashboard.json")))


def queries() -> list[str]:
    variables = [v["definition"] for v in dashboard()["templating"]["list"] if v["type"] == "query"]
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    return [*(rule["expr"] for rule in rules()), *variables, *panels]


@pytest.mark.parametrize("option", SHIPPED)
def test_shipped_files_are_printed(tmp_path: Path, option: str) -> None:
    assert run(tmp_path, option).stdout == shipped(SHIPPED[option])


@pytest.mark.parametrize("query", queries())
def test_queries_use_metrics_and_labels_that_exist(query: str) -> None:
    for name, matchers in re.findall(r"\b(xdp_lb_\w+)(?:\{([^}]*)\})?", query):
        labels = set(re.findall(r"(\w+)\s*[=!]", matchers))
        if name in NAMES:
            assert labels <= NAMES[name][1] | {"instance", "netns"}, name
        else:
            assert name in daemon_names()
            assert not labels


def daemon_names() -> set[str]:
    """Of the metrics about the daemon itself."""
    return {family.name for family in text_string_to_metric_families(DaemonMetrics().exposition())}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_alerts_are_promql(rule: dict[str, Any]) -> None:
    promql_parser.parse(rule["expr"])


def test_panels_ask_in_promql() -> None:
    asked = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    assert asked
    for expression in asked:
        promql_parser.parse(expression.replace("$__rate_interval", "5m"))


def test_all_metrics_of_traffic_and_faults_are_on_the_dashboard_or_in_a_rule() -> None:
    used = set(re.findall(r"\bxdp_lb_\w+", " ".join(queries())))
    assert NAMES.keys() <= used


def test_counters_are_asked_for_rates_alone() -> None:
    for query in queries():
        for match in re.finditer(r"(\w+\()?xdp_lb_\w+_total\b", query):
            assert match[1] == "rate(", query


def test_rules_say_how_grave_it_is_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in rules()}) == len(rules())
    for rule in rules():
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}


def test_dashboard_is_one_that_grafana_imports() -> None:
    board = dashboard()
    panels = board["panels"]
    assert (board["schemaVersion"], board["id"]) == (39, None)
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == [
        "Traffic",
        "Backends",
        "Drops",
        "Ring changes",
        "Memory",
    ]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel.get("targets", []))


def test_panels_do_not_cover_each_other() -> None:
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in dashboard()["panels"])
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len(set(cells))

"""Filter rules, explanations and stages through the daemon: with no more rights than its unit gives it, on real
packets, and by the command with the words that it has without a daemon."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import booleans
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lb.client.client import Client
from lb.errors import DaemonError, InvalidInput, NotFound
from lb.explain.packet import SYN, parse_flow
from lb.model.rule_report import ApplyOptions, RuleSpec
from lb.model.rules import Action, At
from lb.stages.source import EXAMPLES
from netns_tests.bed.daemon import UNDER, WITHOUT_CODE, end, places, socket_of, start
from netns_tests.bed.stage import running
from netns_tests.bed.topology import XDP_LB, Bed, wait_until
from netns_tests.oracle.packets import frame, ip4, udp

PORT = 8443
ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").exists())
API_PAGE = ROOT / "docs/api.md"


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """A balancer of one service in mode dr."""
    with Bed(backends=2) as b:
        backends = ",".join(backend.ipv4 for backend in b.backends)
        b.xdp_lb("attach", "eth0", "--vip", f"{b.vip4}:80", "--mode", "dr", "--backends", backends)
        assert b.client.pings(b.lb.ipv4)
        yield b
        b.xdp_lb("detach")
        b.xdp_lb("filter", "flush", "--all")


@contextmanager
def daemon(bed: Bed, *options: str) -> Iterator[subprocess.Popen[str]]:
    """With the three capabilities, and no memory for code; its bpffs are mounted before, as the unit does it."""
    for name in ("bpf", "filter/bpf"):
        mount_point = bed.directory / "run" / name
        mount_point.mkdir(parents=True, exist_ok=True)
        if not mount_point.is_mount():
            subprocess.run(["mount", "-t", "bpf", "-o", "mode=0700", "bpf", str(mount_point)], check=True)
    process = start(bed, *options, under=[*UNDER, *WITHOUT_CODE])
    try:
        yield process
    finally:
        assert end(process) == 0


def typed(bed: Bed, *words: str, ssh: str = "") -> tuple[int, str, str]:
    """What a command answers, over an SSH connection; what is another each time is left out."""
    environment = {name: value for name, value in os.environ.items() if name != "SSH_CONNECTION"} | places(bed)
    environment |= {"SSH_CONNECTION": ssh} if ssh else {}
    done = bed.lb.run([str(XDP_LB), *words], check=False, env=environment, cwd=bed.directory)
    return done.returncode, re.sub(r'("(left_s|program_id)": )\d+', r"\1N", done.stdout), done.stderr


def flushed(bed: Bed) -> None:
    typed(bed, "filter", "flush", "--all")


# The command


def commands(bed: Bed) -> list[tuple[str, ...]]:
    """One after the other; the last leaves nothing."""
    flow = ("tcp", f"{bed.client.ipv4}:40000", f"{bed.vip4}:80")
    (bed.directory / "bad.txt").write_text("192.0.2.0/24\n2001:db8::/32  # doc\n")
    (bed.directory / "worse.txt").write_text("192.0.2.0/24\n192.0.2.1/33\n")
    (bed.directory / "in.pcap").write_bytes(capture([packet(bed, port) for port in (53, 54, 53)]))
    (bed.directory / "no.pcap").write_bytes(b"nothing of the kind")
    return [
        ("filter", "add", "eth0", "drop", "udp port 53", "--dry-run"),
        ("filter", "add", "eth0", "drop", "udp port 53"),
        ("filter", "add", "eth0", "limit", "1k/s", "tcp[tcpflags] == tcp-syn", "--position", "1", "--json"),
        ("filter", "add", "eth0", "count", "--set", "bad.txt", "--for", "2d12h30m", "--no-selftest"),
        ("filter", "add", "eth1", "pass", "tcp port 4711", "--at", "tc-out"),
        ("filter", "add", "eth0", "drop", "tcp", "--position", "1"),
        ("filter", "add", "eth0", "drop", "--set", "worse.txt"),
        ("filter", "add", "eth0", "drop", "--set", "none.txt"),
        ("filter", "add", "eth0", "drop", "udp prot 53"),
        ("filter", "add", "nope0", "drop"),
        ("filter", "move", "eth0", "3", "1"),
        ("filter", "reload", "eth0", "1"),
        ("filter", "reload", "eth0", "2"),
        ("filter", "list"),
        ("filter", "list", "eth0", "--json"),
        ("filter", "test", "eth0", "-r", "in.pcap", "-w", "out.pcap"),
        ("filter", "test", "--rule", "drop udp port 54", "-r", "in.pcap", "--json"),
        ("filter", "test", "eth0", "-r", "no.pcap"),
        ("explain", *flow, "--syn"),
        ("explain", *flow, "--flags", "PA", "--json"),
        ("explain", *flow, "--in", "eth7"),
        ("explain", "--pcap", "in.pcap"),
        ("explain", "--pcap", "in.pcap", "-n", "1", "--json"),
        ("explain", "--pcap", "in.pcap", "-n", "4"),
        ("filter", "restore"),
        ("filter", "del", "eth0", "2"),
        ("filter", "del", "eth0", "9"),
        ("filter", "flush", "--all"),
    ]


def packet(bed: Bed, port: int) -> bytes:
    return bytes(frame(ip4(bed.client.ipv4, bed.vip4), udp(40000, port)))


def capture(frames: list[bytes]) -> bytes:
    from filters.records.pcap import file_header, record

    return file_header(1, 65535, nano=False) + b"".join(record(1, n, f, len(f)) for n, f in enumerate(frames))


def test_every_command_says_the_same_with_and_without_the_daemon(bed: Bed) -> None:
    ssh = f"{bed.client.ipv4} 50022 {bed.lb.ipv4} 22"
    without = [(words, typed(bed, *words, ssh=ssh)) for words in commands(bed)]
    dropped = (bed.directory / "out.pcap").read_bytes()
    (bed.directory / "out.pcap").unlink()
    with daemon(bed):
        for words, expected in without:
            assert typed(bed, *words, ssh=ssh) == expected, words
        audit = json.loads(bed.xdp_lb("audit", "--json").stdout)
    assert (bed.directory / "out.pcap").read_bytes() == dropped
    failed = {words: answer for words, answer in without if answer[0]}
    assert len(failed) == 10
    assert "would drop the SSH connection" in failed["filter", "add", "eth0", "drop", "tcp", "--position", "1"][2]
    assert sum(entry["path"].startswith("/v1/filter") for entry in audit) == 15  # all that change something, or would


def test_a_file_larger_than_a_request_is_tested_piece_by_piece(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    path, kept = bed.directory / "large.pcap", bed.directory / "kept.pcap"
    path.write_bytes(capture([packet(bed, 53 + n % 3) for n in range(300)]))
    monkeypatch.setattr("lb.client.filters.CHUNK", 1000)
    with daemon(bed), Client.unix(socket_of(bed)) as client:
        specs = [
            RuleSpec("", Action.DROP, expression="udp port 53"),
            RuleSpec("", Action.COUNT, expression="udp port 54"),
        ]
        trial = client.filters.test_specs(specs, str(path), str(kept))
    assert (trial.packets, trial.dropped, trial.untested) == (300, 100, 0)
    assert list(trial.matched.values()) == [100, 100]
    assert kept.read_bytes()[24:].count(packet(bed, 53)) == 100


def test_stages_are_listed_shown_and_ended_through_the_daemon(bed: Bed) -> None:
    path = EXAMPLES / "packet_sizes.c"
    with running(bed, bed.lb, path) as stage:
        without = [typed(bed, *words) for words in (("stage", "list"), ("stage", "list", "--json"))]
        assert (without[0][0], "packet_sizes.c" in without[0][1]) == (0, True)
        with daemon(bed):
            assert [typed(bed, *words) for words in (("stage", "list"), ("stage", "list", "--json"))] == without
            assert bed.client.pings(bed.lb.ipv4)
            wait_until(lambda: frames_seen(bed) > 0, "packets in the stage's table")
            assert typed(bed, "stage", "tables", "1")[1].startswith("frame_bytes\n")
            assert typed(bed, "stage", "tables", "2")[2] == ("xdp-lb: stage 2: not running: see xdp-lb stage list\n")
            with Client.unix(socket_of(bed)) as client:
                with pytest.raises(NotFound):
                    client.stages.stop([1, 2])
                assert [s["number"] for s in client.stages.stop([1])] == [1]
                assert client.stages.listed() == []
        assert stage.process.wait(timeout=20) == 0
    assert not list((bed.directory / "run" / "stages" / bed.lb.name).iterdir())


def frames_seen(bed: Bed) -> int:
    (table,) = json.loads(typed(bed, "stage", "tables", "1", "--json")[1])
    return sum(bucket["count"] for histogram in table["histograms"] for bucket in histogram["buckets"])


# The API


@dataclass
class Api:
    """A daemon on the Unix socket and on TCP, and clients of it."""

    bed: Bed
    certificate: Path
    tokens: dict[str, str]

    @property
    def url(self) -> str:
        return f"https://{self.bed.lb.ipv4}:{PORT}"

    @property
    def here(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(socket_of(self.bed)))
        return httpx.Client(transport=transport, base_url="http://xdp-lb", timeout=30)

    @contextmanager
    def remote(self, role: str = "write") -> Iterator[Client]:
        """From the client's namespace."""
        trusted = ssl.create_default_context(cafile=str(self.certificate))
        with self.bed.client.entered(), Client(self.url, token=self.tokens[role], verify=trusted) as client:
            yield client


@pytest.fixture(scope="module")
def api(bed: Bed) -> Iterator[Api]:
    certificate, key = bed.directory / "lb.pem", bed.directory / "lb.key"
    subject = ["-subj", "/CN=lb", "-addext", f"subjectAltName=IP:{bed.lb.ipv4}"]
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *subject]
    subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    roles = ("read", "write")
    tokens = {role: bed.xdp_lb("token", "create", role, "--role", role).stdout.strip() for role in roles}
    listen = ("--listen", f"{bed.lb.ipv4}:{PORT}", "--tls-cert", str(certificate), "--tls-key", str(key))
    with daemon(bed, *listen):
        yield Api(bed, certificate, tokens)


@pytest.fixture
def http(api: Api) -> Iterator[httpx.Client]:
    """No rules when a test begins."""
    with api.here as client:
        assert client.delete("/v1/filters").status_code == 200
        yield client


def arrived(bed: Bed, port: int, count: int = 5) -> int:
    """How many of these datagrams get from the client to the balancer."""
    with bed.lb.entered():
        sinks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    with bed.client.entered():
        out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sinks[0], sinks[1], out:
        for sink, number in zip(sinks, (port, 9), strict=True):
            sink.bind((bed.lb.ipv4, number))
            sink.settimeout(5)
        for number in (*[port] * count, 9):
            out.sendto(b"a datagram", (bed.lb.ipv4, number))
        sinks[1].recv(100)  # behind all others
        sinks[0].setblocking(False)
        found = 0
        try:
            while sinks[0].recv(100):
                found += 1
        except BlockingIOError:
            return found
    return found


DROP = {"action": "drop", "expression": "udp port 53"}
ETH0 = "/v1/filters/eth0"


def problem(answer: httpx.Response, status: int) -> tuple[str, str | None]:
    document = answer.json()
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    return document["detail"], document["field"]


def rules(http: httpx.Client) -> list[tuple[str, int]]:
    return [(rule["expression"], rule["packets"]) for rule in http.get("/v1/filters").json()]


def test_rules_are_in_the_kernel_when_a_change_is_answered(http: httpx.Client, bed: Bed) -> None:
    assert http.post(ETH0, json=DROP).json()["changes"][0]["number"] == 1
    assert [arrived(bed, port) for port in (53, 54)] == [0, 5]
    assert rules(http) == [("udp port 53", 5)]
    assert http.post(ETH0, json={"action": "pass", "position": 1, "expression": "udp"}).status_code == 200
    assert arrived(bed, 53) == 5
    assert http.patch(f"{ETH0}/2", json={"number": 1}).json()["changes"][0]["detail"] == "to 1"
    assert arrived(bed, 53) == 0
    assert http.delete(f"{ETH0}/1").status_code == 200
    assert arrived(bed, 53) == 5
    assert [len(http.delete(ETH0).json()["changes"]), rules(http)] == [1, []]


def test_put_makes_them_all_and_what_stays_keeps_its_counters(http: httpx.Client, bed: Bed) -> None:
    listed = {"path": "bad", "list": f"{bed.client.ipv4}\n"}
    wanted: dict[str, Any] = {"rules": [DROP, {"action": "count", "expression": "udp", "set": listed}]}
    done = http.put(ETH0, json=wanted)
    assert [change["change"] for change in done.json()["changes"]] == ["added", "added"]
    assert arrived(bed, 53) == 0
    for again in (wanted, http.get(ETH0).json()):  # with the list of the set, and as it was read, without
        answer = http.put(ETH0, json=again)
        assert (answer.json()["changes"], answer.headers["etag"]) == ([], done.headers["etag"])
    turned = {"rules": [*http.get(ETH0).json()["rules"][::-1], {"action": "count", "expression": "arp"}]}
    changes = http.put(ETH0, json=turned).json()["changes"]
    assert [(c["change"], c["number"], c["detail"]) for c in changes] == [
        ("moved", 2, "to 1"),
        ("moved", 1, "to 2"),
        ("added", 3, ""),
    ]
    assert [packets for _, packets in rules(http)][:2] == [1, 5]  # of the first, the one to port 9
    other = http.put(ETH0, json={"rules": [{**wanted["rules"][1], "set": {**listed, "list": "192.0.2.1"}}]})
    assert [change["change"] for change in other.json()["changes"]] == ["deleted", "deleted", "deleted", "added"]


def test_entity_tag_keeps_two_from_undoing_each_other(http: httpx.Client) -> None:
    http.post(ETH0, json=DROP)
    etag = http.get(ETH0).headers["etag"]
    assert http.get(ETH0, headers={"If-None-Match": etag}).status_code == 304
    bound = {"If-Match": etag}
    assert http.post(ETH0, json={"action": "count"}, headers=bound).status_code == 200
    for late in (
        http.put(ETH0, json={"rules": []}, headers=bound),
        http.delete(f"{ETH0}/1", headers=bound),
        http.delete(ETH0, headers=bound),
        http.patch(f"{ETH0}/1", json={"number": 2}, headers=bound),
    ):
        assert problem(late, 412)[0].startswith("filter rules of eth0: modified since it was read")
    assert len(rules(http)) == 2


def test_set_is_a_text_of_prefixes_and_is_replaced_in_place(http: httpx.Client, bed: Bed) -> None:
    http.post(ETH0, json={**DROP, "set": {"path": "bad", "list": ""}})
    assert (rules(http), arrived(bed, 53)) == ([("udp port 53", 0)], 5)
    text = {"Content-Type": "text/plain"}
    loaded = http.put(f"{ETH0}/1/set", content=f"{bed.client.ipv4}\n192.0.2.0/24  # more\n", headers=text).json()
    assert (loaded["changes"][0]["detail"], loaded["changes"][0]["set"]["prefixes"]) == ("2 added, 0 removed", 2)
    assert arrived(bed, 53) == 0
    assert http.put(f"{ETH0}/1/set", headers=text).json()["changes"][0]["detail"] == "0 added, 2 removed"
    assert arrived(bed, 53) == 5
    assert problem(http.put(f"{ETH0}/1/set", content=b"1.2.3.4\nnonsense", headers=text), 422)[0] == (
        "bad:2: 'nonsense': not an IPv4 or IPv6 prefix or range"
    )
    assert problem(http.put(f"{ETH0}/1/set", json=["1.2.3.4"]), 415)[0].startswith("unsupported content type")
    assert typed(bed, "filter", "reload", "eth0", "1")[2] == (
        "xdp-lb: eth0: rule 1: set bad: not read from a file: upload it again\n"
    )


def test_rule_ends_when_it_was_to_end(http: httpx.Client) -> None:
    until = int(time.time()) + 3600
    http.post(ETH0, json={**DROP, "until": until})
    http.post(ETH0, json={"action": "count", "for_s": 7200})
    first, second = http.get(ETH0).json()["rules"]
    assert first["until"] == until
    assert until + 3590 < second["until"] <= until + 3610
    assert http.put(ETH0, json={"rules": [first, second]}).json()["changes"] == []


FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"action": "fly"}, "/action", "action: "),
    ({"action": "drop", "expression": "udp prot 53"}, "/expression", "expression 'udp prot 53': can't parse"),
    ({"action": "drop", "expression": "udp\x1b[2J"}, "/expression", "expression: contains unprintable"),
    ({"action": "limit"}, "/rate", "rate (empty): not a packet rate"),
    ({"action": "drop", "rate": "1/s"}, "/rate", "rate 1/s: requires action limit, not drop"),
    ({"action": "drop", "set": {"path": "bad"}}, "/set/list", "set bad: list: missing"),
    ({"action": "drop", "set": {"path": "bad", "list": "1.2.3.4/33"}}, "/set/list", "bad:1: '1.2.3.4/33': not an"),
    ({"action": "drop", "set": {"path": "bad", "side": "up", "list": ""}}, "/set/side", "set.side: "),
    ({"action": "drop", "until": 1}, "/until", "until 1: not within"),
    ({"action": "drop", "for_s": 5, "until": 2**33}, "/for_s", "for_s 5: "),
    ({"action": "drop", "at": "roof"}, "/at", "at: "),
]


@pytest.mark.parametrize(("body", "field", "words"), FAULTS)
def test_fault_is_named_with_its_place(http: httpx.Client, body: dict[str, Any], field: str, words: str) -> None:
    detail, found = problem(http.post(ETH0, json=body), 422)
    assert (found, detail[: len(words)]) == (field, words)
    listed = {key: value for key, value in body.items() if key != "for_s"}
    if "for_s" not in body:
        assert problem(http.put(ETH0, json={"rules": [DROP, listed]}), 422)[1] == f"/rules/1{field}"
    assert rules(http) == []


def test_changes_of_rules_are_events_and_dry_runs_are_none(api: Api, http: httpx.Client) -> None:
    with Client.unix(socket_of(api.bed)) as client:
        client.filters.add(
            RuleSpec("eth0", Action.DROP, expression="udp port 1701"), options=ApplyOptions(dry_run=True)
        )
        client.filters.add(RuleSpec("eth0", Action.DROP, expression="udp port 1702"))
        seen = []
        for event in client.events(after="nothing-0"):
            seen.append(event.document.get("summary", ""))
            if "udp port 1702" in seen[-1]:
                break
    assert (event.kind, event.document["change"], seen[-1]) == (
        "filter",
        "added",
        "eth0: rule 1 added: drop at xdp: udp port 1702",
    )
    assert not [summary for summary in seen if "1701" in summary]


# Who may, from where


def test_token_that_may_read_sees_and_explains_and_changes_nothing(api: Api, http: httpx.Client) -> None:
    http.post(ETH0, json=DROP)
    flow = parse_flow("tcp", f"{api.bed.client.ipv4}:40000", f"{api.bed.vip4}:80")
    pcap = b64encode(capture([packet(api.bed, 53)])).decode()
    with api.remote("read") as client:
        assert [each.rule.expression for each in client.filters.status()] == ["udp port 53"]
        assert client.explainer.flow(flow, SYN)["reason"] == "forwarded"
        (told,) = client.explainer.capture(capture([packet(api.bed, 53)]))
        assert told["ended_by"][0]["rule"] == "rule 1: drop udp port 53"
        assert client.stages.listed() == []
        with pytest.raises(DaemonError, match="read-only"):
            client.filters.flush()
        with pytest.raises(DaemonError, match="read-only"):
            client.stages.stop()
        token = {"Authorization": f"Bearer {api.tokens['read']}"}
        trusted = ssl.create_default_context(cafile=str(api.certificate))
        with httpx.Client(base_url=api.url, headers=token, verify=trusted) as plain:
            there = plain.post("/v1/filter-test", json={"interface": "eth0", "pcap": pcap})
            assert there.json()["dropped_packets"] == [0]
            own = plain.post("/v1/filter-test", json={"rules": [DROP], "pcap": pcap})
            assert "role write" in problem(own, 403)[0]
    assert rules(http) == [("udp port 53", 1)]  # what was explained


def test_rule_that_would_end_the_request_it_comes_by_is_refused(api: Api, http: httpx.Client) -> None:
    here = api.bed.client.ipv4
    with api.remote() as client:
        for expression in ("tcp", f"src host {here}", f"tcp dst port {PORT}"):
            with pytest.raises(InvalidInput, match=rf"would drop the connection from {here} port \d+ of this request"):
                client.filters.add(RuleSpec("eth0", Action.DROP, expression=expression))
        with pytest.raises(InvalidInput, match="would drop the connection"):
            client.filters.add(RuleSpec("eth0", Action.DROP, expression=f"tcp src port {PORT}", at=At.TC_OUT))
        client.filters.add(RuleSpec("eth0", Action.DROP, expression="tcp port 22"))
        client.filters.add(RuleSpec("eth0", Action.DROP, expression="udp"), options=ApplyOptions(force=True))
    refused = http.post(ETH0, json={"action": "drop", "expression": "tcp"}, headers={"SSH-Connection": "nonsense"})
    assert problem(refused, 422)[0].startswith("SSH-Connection: not CLIENT PORT SERVER PORT")
    assert [expression for expression, _ in rules(http)] == ["tcp port 22", "udp"]


def test_no_file_of_the_balancer_is_read_for_who_is_elsewhere(api: Api, http: httpx.Client) -> None:
    """Also not for a set that is empty."""
    secret = api.bed.directory / "lb.key"
    named = {"action": "count", "set": {"path": "../../etc/hostname", "list": ""}}
    assert http.post(ETH0, json=named).json()["changes"][0]["set"]["prefixes"] == 0
    assert http.delete(ETH0).status_code == 200
    with api.remote() as client, pytest.raises(InvalidInput, match="files of the balancer's host are not read"):
        client.filters.add(RuleSpec("eth0", Action.COUNT, set_path=str(secret), set_list="192.0.2.1"))
    spec = {"action": "count", "set": {"path": str(secret)}}
    assert problem(http.put(ETH0, json={"rules": [spec]}), 422)[1] == "/rules/0/set/list"
    assert rules(http) == []


def test_large_sets_come_from_elsewhere_too_and_other_large_bodies_do_not(api: Api, http: httpx.Client) -> None:
    prefixes = "".join(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}\n" for n in range(1 << 17))
    assert len(prefixes) > 1 << 20
    with api.remote() as client:
        report = client.filters.add(RuleSpec("eth0", Action.COUNT, set_path="many", set_list=prefixes))
        assert report.changes[0].rule.set
        assert report.changes[0].rule.set.prefixes == 1 << 17
        with pytest.raises(DaemonError, match="request body larger than 1048576 bytes"):
            client.explainer.capture(bytes(1 << 20))


def test_rules_stay_in_force_when_the_balancer_leaves_their_interface(api: Api, http: httpx.Client) -> None:
    """The daemon may open no program by its number: that takes CAP_SYS_ADMIN."""
    http.post(ETH0, json=DROP)
    assert http.delete("/v1/interfaces").status_code == 200
    try:
        assert (arrived(api.bed, 53), arrived(api.bed, 54)) == (0, 5)
    finally:
        attached = http.post("/v1/interfaces", json={"interfaces": [{"name": "eth0"}]})
    assert attached.status_code == 200, attached.text
    assert (arrived(api.bed, 53), arrived(api.bed, 54)) == (0, 5)
    assert rules(http) == [("udp port 53", 10)]


def test_the_examples_of_the_documentation_work(api: Api, http: httpx.Client) -> None:
    text = API_PAGE.read_text().partition("\n## Filter rules, explain and stages\n")[2]
    shell, python = (text.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("sh", "python"))
    function = re.search(r"^api\(\) .*$", API_PAGE.read_text(), re.MULTILINE)
    assert function
    assert shell.count("api ") == 5
    own = {"/run/xdp-lb/default/api.sock": str(socket_of(api.bed)), "curl -sS": "curl -sSf", "10.0.0.100": api.bed.vip4}
    script = f"{function[0]}\n{shell}"
    for written, here in own.items():
        script = script.replace(written, here)
    done = api.bed.lb.run(["bash", "-ec", script], check=False, cwd=api.bed.directory)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert len(rules(http)) == 2
    code = python.replace("Paths.here().socket", f"Path({str(socket_of(api.bed))!r})")
    (api.bed.directory / "in.pcap").write_bytes(capture([packet(api.bed, 53)]))
    code = code.replace("in.pcap", str(api.bed.directory / "in.pcap"))
    exec(code, {})
    assert rules(http) == [("udp port 53", 1)]  # what was explained


# By the description of the API

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES_EACH = 6
THERE = {"interface": "eth0", "number": "1"}
OURS = ("/v1/filter", "/v1/explain", "/v1/stages")


def test_every_answer_is_one_that_is_described(api: Api, http: httpx.Client) -> None:
    http.post(ETH0, json={**DROP, "set": {"path": "bad", "list": ""}})
    schema = schemathesis.openapi.from_dict(http.get("/openapi.json").json())
    operations: list[Any] = [each.ok() for each in schema.get_all_operations()]  # type: ignore[union-attr]
    ours = [operation for operation in operations if operation.path.startswith(OURS)]
    assert len(ours) == 15
    with api.bed.lb.entered():
        for operation in ours:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                if mode is GenerationMode.POSITIVE or operation.method.upper() != "GET":
                    answers_as_described(api, operation, mode)
    assert http.get("/readyz").status_code == 200
    assert "internal error" not in (api.bed.directory / "serve.log").read_text()


def answers_as_described(api: Api, operation: Any, mode: GenerationMode) -> None:
    token = {"Authorization": f"Bearer {api.tokens['write']}"}

    @settings(
        max_examples=EXAMPLES_EACH,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), is_there=booleans())
    def check(case: Any, is_there: bool) -> None:
        if is_there:
            case.path_parameters = {**(case.path_parameters or {}), **THERE}
        case.call_and_validate(base_url=api.url, headers=token, verify=str(api.certificate), checks=CHECKS)

    check()

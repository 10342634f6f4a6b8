"""The API as HTTP: paths, bodies, entity tags, and errors that point at what is wrong."""

from __future__ import annotations

import json
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lb.api.access import Access
from lb.api.middleware import LARGEST_BODY
from lb.formats.prometheus import CONTENT_TYPE
from lb.model.forwarding import OpenConnections
from lb.model.vip import Vip
from lb.tests.fakes.daemon import Running, serving
from lb.tests.fakes.host import Host

WEB = "/v1/services/10.0.0.1:80%2Ftcp"
SERVICE = {"ring_size": 251, "backends": [{"backend": "10.0.0.11"}, {"address": "10.0.0.12", "weight": 3}]}
PROBLEM = "application/problem+json"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One daemon for all tests of the module, on a host in memory with eth0 attached."""
    directory = tmp_path_factory.mktemp("api")
    host = Host(directory / "state.db")
    assert host.run("attach", "eth0", "--backends", "10.0.0.12", "--ring-size", "251").exit_code == 0
    with serving(host, directory) as daemon:
        daemon.host = host  # type: ignore[attr-defined]
        yield daemon


@pytest.fixture
def http(running: Running) -> Iterator[httpx.Client]:
    """What is served is SERVICE alone when a test begins."""
    transport = httpx.HTTPTransport(uds=str(running.settings.socket))
    with httpx.Client(transport=transport, base_url="http://xdp-lb") as client:
        done = client.put("/v1/config?prune=true", json={"services": [{"vip": "10.0.0.1:80", **SERVICE}]})
        assert done.status_code == 200, done.text
        yield client


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM), answer.text
    document: dict[str, Any] = answer.json()
    assert document.keys() == {"type", "title", "status", "detail", "field"}
    assert document["status"] == status
    assert "Traceback" not in answer.text
    return document


def backends(http: httpx.Client, service: str = WEB) -> dict[str, int]:
    return {b["backend"]: b["weight"] for b in http.get(f"{service}/backends").json()}


# What is desired


def test_a_service_is_read_under_its_vip(http: httpx.Client) -> None:
    document = http.get(WEB).json()
    assert document["vip"] == "10.0.0.1:80/tcp"
    assert http.get("/v1/services").json() == [document]
    assert http.get("/v1/config").json() == {"services": [document]}
    assert http.get("/v1/services/10.0.0.1:80").json() == document  # /tcp may be left out, as everywhere


def test_lists_come_in_pages_that_make_up_the_whole(http: httpx.Client) -> None:
    http.put("/v1/services/10.0.0.2:80", json=SERVICE)
    http.put("/v1/services/10.0.0.3:80", json=SERVICE)
    for url in ("/v1/services", f"{WEB}/backends"):
        whole, found = http.get(url).json(), []
        page: str | None = f"{url}?limit=1"
        while page:
            answer = http.get(page)
            assert len(answer.json()) == 1
            found += answer.json()
            page = str(answer.url.join(answer.links["next"]["url"])) if "next" in answer.links else None
        assert found == whole
        assert http.get(url, params={"offset": len(whole) - 1}).json() == whole[-1:]
        assert http.get(url, params={"offset": 99}).json() == []
        assert http.get(url, params={"limit": 0}).status_code == 422


def test_put_makes_a_service_and_making_it_again_changes_nothing(http: httpx.Client) -> None:
    made = http.put("/v1/services/10.0.0.100:443%2Fudp", json=SERVICE)
    assert [change["change"] for change in made.json()["changes"]] == ["add"]
    assert made.json()["notes"] == ["10.0.0.100: added to eth0"]
    again = http.put("/v1/services/10.0.0.100:443%2Fudp", json=SERVICE)
    assert again.json()["changes"] == []
    assert again.headers["etag"] == made.headers["etag"]


def test_put_replaces_what_is_there(http: httpx.Client) -> None:
    body = {"ring_size": 251, "options": {"mss": 1400}, "backends": [{"backend": "10.0.0.13@5"}]}
    report = http.put(WEB, json=body).json()
    (change,) = report["changes"]
    assert (change["change"], change["plan"]["slots"]) == ("change", 251)
    assert backends(http) == {"10.0.0.13:80": 5}
    assert http.get(WEB).json()["options"]["mss"] == 1400


def test_what_was_read_can_be_sent_back(http: httpx.Client) -> None:
    assert http.put(WEB, json=http.get(WEB).json()).json()["changes"] == []
    assert http.put("/v1/config", json=http.get("/v1/config").json()).json()["changes"] == []


def test_a_vip_keeps_off_the_interfaces_if_so_wanted(http: httpx.Client) -> None:
    answers = (
        http.put("/v1/services/10.0.0.101:80?own_address=false", json=SERVICE),
        http.patch("/v1/services/10.0.0.101:80/backends/10.0.0.11:80", json={"weight": 4}),
    )
    assert [(len(a.json()["changes"]), a.json()["notes"]) for a in answers] == [(1, []), (1, [])]
    report = http.put("/v1/services/10.0.0.101:80", json=SERVICE).json()
    assert report["notes"] == ["10.0.0.101: added to eth0"]


def test_patch_changes_what_it_names_and_nothing_else(http: httpx.Client) -> None:
    http.patch(WEB, json={"options": {"mss": 1400, "syn_limit": 10}})
    http.patch(WEB, json={"options": {"echo": True, "syn_limit": 0}})
    options = http.get(WEB).json()["options"]
    assert (options["mss"], options["syn_limit"], options["echo"]) == (1400, 0, True)


def test_backends_are_added_weighed_drained_and_removed(http: httpx.Client) -> None:
    http.post(f"{WEB}/backends", json={"backends": [{"backend": "10.0.0.13"}, {"backend": "10.0.0.14:81@2"}]})
    http.patch(f"{WEB}/backends/10.0.0.11:80", json={"weight": 9})
    http.patch(f"{WEB}/backends/10.0.0.12", json={"draining": True})
    http.delete(f"{WEB}/backends/10.0.0.13:80")
    assert backends(http) == {"10.0.0.11:80": 9, "10.0.0.12:80": 3, "10.0.0.14:81": 2}
    assert [b["draining"] for b in http.get(f"{WEB}/backends").json()] == [False, True, False]
    http.patch(f"{WEB}/backends/10.0.0.12", json={"weight": 1})
    assert http.get(f"{WEB}/backends").json()[1]["draining"]  # its weight alone does not end a drain


def test_several_backends_are_changed_or_none(http: httpx.Client) -> None:
    url = f"{WEB}/backends"
    http.post(url, json={"backends": [{"backend": "10.0.0.13"}]})
    both = [{"backend": "10.0.0.12", "draining": True}, {"backend": "10.0.0.13", "weight": 5}]
    assert http.patch(url, json={"backends": both}).status_code == 200
    before = http.get(url).json()
    assert [(b["weight"], b["draining"]) for b in before] == [(1, False), (3, True), (5, False)]
    unknown = http.patch(url, json={"backends": [{"backend": "10.0.0.12", "weight": 9}, {"backend": "10.0.0.99"}]})
    assert (unknown.status_code, unknown.json()["field"]) == (422, "/backends/1")
    assert http.delete(url, params={"backend": ["10.0.0.12", "10.0.0.99"]}).status_code == 404
    assert http.get(url).json() == before
    assert http.delete(url, params={"backend": ["10.0.0.12", "10.0.0.13"]}).status_code == 200
    assert len(http.get(url).json()) == 1
    assert http.delete(url).status_code == 422


def test_delete_takes_a_service_away(http: httpx.Client) -> None:
    http.put("/v1/services/10.0.0.102:80", json=SERVICE)
    assert http.delete("/v1/services/10.0.0.102:80").json()["changes"][0]["change"] == "remove"
    gone = problem(http.get("/v1/services/10.0.0.102:80"), 404)
    assert gone["detail"] == "vip 10.0.0.102:80/tcp: no such service: see xdp-lb vip list"


def test_plan_and_dry_runs_say_what_would_change_and_change_nothing(http: httpx.Client) -> None:
    before = http.get("/v1/config")
    body = {"services": [{"vip": "10.0.0.1:80", "ring_size": 251, "backends": [{"backend": "10.0.0.12"}]}]}
    planned = http.post("/v1/plan", json=body).json()
    assert planned["dry_run"]
    assert planned["changes"][0]["plan"]["moved"] > 0
    assert http.put("/v1/config?dry_run=true", json=body).json() == planned
    assert http.delete(WEB, params={"dry_run": True}).json()["dry_run"]
    assert http.get("/v1/config").headers["etag"] == before.headers["etag"]


def test_a_configuration_that_removes_most_is_refused_unless_told_to_prune(http: httpx.Client) -> None:
    empty: dict[str, Any] = {"services": []}
    refused = http.put("/v1/config", json=empty)
    assert (refused.status_code, refused.json()["type"]) == (409, "urn:xdp-lb:problem:prune-required")
    assert "prune=true" in refused.json()["detail"]
    assert http.get("/v1/services").json()
    assert "would remove" in http.post("/v1/plan", json=empty).json()["warnings"][0]
    assert http.put("/v1/config", json=empty, params={"prune": True}).status_code == 200
    assert http.get("/v1/services").json() == []


def test_interfaces_are_attached_and_detached(http: httpx.Client) -> None:
    attached = http.post("/v1/interfaces", json={"interfaces": [{"name": "eth1", "xdp_mode": "generic"}]}).json()
    assert {a["name"]: a["xdp_mode"] for a in attached["attached"]} == {"eth0": "native", "eth1": "generic"}
    assert http.delete("/v1/interfaces", params={"name": "eth1"}).json()["detached"] == ["eth1"]
    assert [i["name"] for i in http.get("/v1/interfaces").json()] == ["eth0"]


def test_counters_come_with_the_status_and_alone(http: httpx.Client) -> None:
    (service,) = http.get("/v1/status").json()["services"]
    (alone,) = http.get("/v1/stats").json()["services"]
    assert alone["vip"] == service["vip"]
    for key in ("packets", "open"):
        assert [b[key] for b in alone["backends"]] == [b[key] for b in service["backends"]]


def test_plans_and_changes_say_how_many_open_connections_end(http: httpx.Client, running: Running) -> None:
    opened = running.host.dataplane.opened  # type: ignore[attr-defined]
    opened[Vip.parse("10.0.0.1:80"), "10.0.0.11:80"] = OpenConnections(40)
    counted = {"connections": 40, "estimated": False}
    assert http.get("/v1/stats").json()["services"][0]["backends"][0]["open"] == counted
    config = {"services": [{"vip": "10.0.0.1:80", "ring_size": 251, "backends": [{"backend": "10.0.0.12"}]}]}
    for report in (
        http.post("/v1/plan", json=config).json(),
        http.delete(WEB, params={"dry_run": True}).json(),
        http.delete("/v1/interfaces", params={"dry_run": True}).json(),
        http.delete(f"{WEB}/backends/10.0.0.11:80").json(),
    ):
        assert report["ending"] == counted
    assert http.patch(f"{WEB}/backends/10.0.0.12:80", json={"draining": True}).json()["ending"] is None


# Entity tags


def test_a_replayed_change_meets_a_changed_service(http: httpx.Client) -> None:
    tag = {"If-Match": http.get(WEB).headers["etag"]}
    patch = {"weight": 7}
    first = http.patch(f"{WEB}/backends/10.0.0.11:80", json=patch, headers=tag)
    assert first.status_code == 200
    assert first.headers["etag"] == http.get(WEB).headers["etag"]
    replayed = http.patch(f"{WEB}/backends/10.0.0.11", json=patch, headers=tag)
    assert "modified since it was read" in problem(replayed, 412)["detail"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", WEB, SERVICE),
        ("PATCH", WEB, {"options": {"echo": True}}),
        ("DELETE", WEB, None),
        ("POST", f"{WEB}/backends", {"backends": [{"backend": "10.0.0.19"}]}),
        ("PATCH", f"{WEB}/backends/10.0.0.11", {"weight": 2}),
        ("DELETE", f"{WEB}/backends/10.0.0.11", None),
        ("PUT", "/v1/config", {"services": []}),
        ("PUT", "/v1/services/10.0.0.1:81", SERVICE),
    ],
)
def test_every_change_of_what_is_desired_can_be_bound_to_what_was_read(
    http: httpx.Client, method: str, path: str, body: object
) -> None:
    before = http.get("/v1/config").headers["etag"]
    answer = http.request(method, path, json=body, headers={"If-Match": '"something-else"'})
    assert problem(answer, 412)["type"] == "urn:xdp-lb:problem:conflict"
    assert http.get("/v1/config").headers["etag"] == before


def test_if_match_knows_lists_and_the_star(http: httpx.Client) -> None:
    etag = http.get(WEB).headers["etag"]
    for header in (f'"other", {etag}', "*"):
        assert http.put(WEB, json=SERVICE, headers={"If-Match": header}).status_code == 200
    assert http.put("/v1/services/10.0.0.1:82", json=SERVICE, headers={"If-Match": "*"}).status_code == 412


def test_what_is_known_is_not_sent_again(http: httpx.Client) -> None:
    for path in (WEB, "/v1/services", "/v1/config"):
        etag = http.get(path).headers["etag"]
        known = http.get(path, headers={"If-None-Match": f'"x", W/{etag}'})
        assert (known.status_code, known.content, known.headers["etag"]) == (304, b"", etag)
        assert http.get(path, headers={"If-None-Match": '"x"'}).status_code == 200


def test_create_only_meets_what_is_there(http: httpx.Client) -> None:
    only = {"If-None-Match": "*"}
    assert problem(http.put(WEB, json=SERVICE, headers=only), 412)["type"] == "urn:xdp-lb:problem:already-exists"
    assert http.put("/v1/services/10.0.0.1:83", json=SERVICE, headers=only).status_code == 200
    problem(http.put("/v1/services/10.0.0.1:84", json=SERVICE, headers={"If-None-Match": '"tag"'}), 400)


# What is wrong, and where


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"ring_size": 250}, "/ring_size"),
        ({"ring_size": "251"}, "/ring_size"),
        ({"ring_size": True}, "/ring_size"),
        ({"ring_size": 10**30}, "/ring_size"),
        ({"flow_timeout_s": 0}, "/flow_timeout_s"),
        ({"mode": "ipvs"}, "/mode"),
        ({"vip": "10.0.0.2:80"}, "/vip"),
        ({"vip": "nonsense"}, "/vip"),
        ({"port": 81}, "/port"),
        ({"nothing": 1}, "/nothing"),
        ({"a/b~c": 1}, "/a~1b~0c"),
        ({"options": {"mss": 3}}, "/options/mss"),
        ({"options": {"echo": 1}}, "/options/echo"),
        ({"options": {"gue_port": 6081}}, "/options"),
        ({"options": {"sources": ["10.0.0.1/8"]}}, "/options/sources"),
        ({"options": {"sources": [7]}}, "/options/sources/0"),
        ({"backends": [{}]}, "/backends/0/backend"),
        ({"backends": [{"backend": "10.0.0.11"}, {"backend": "10.0.0.500"}]}, "/backends/1/backend"),
        ({"backends": [{"backend": "10.0.0.11"}, {"backend": "2001:db8::1"}]}, "/backends/1"),
        ({"backends": [{"backend": "10.0.0.11"}, {"backend": "10.0.0.11:80"}]}, "/backends"),
        ({"backends": [{"backend": "10.0.0.11", "address": "10.0.0.12"}]}, "/backends/0/address"),
        ({"backends": [{"backend": "10.0.0.11:80", "port": 81}]}, "/backends/0/port"),
        ({"backends": [{"address": "10.0.0.11", "weight": 65536}]}, "/backends/0/weight"),
        ({"backends": [{"address": "10.0.0.11", "server_ids": ["x"]}]}, "/backends/0/server_ids"),
        ({"backends": [{"address": "10.0.0.11", "server_ids": ["0:0a"]}]}, "/backends/0"),
        ({"backends": "10.0.0.11"}, "/backends"),
        ([], ""),
    ],
)
def test_a_body_that_makes_no_service_is_pointed_at(http: httpx.Client, body: object, field: str) -> None:
    assert problem(http.put(WEB, json=body), 422)["field"] == field


def test_a_configuration_is_pointed_into(http: httpx.Client) -> None:
    wrong = [{"vip": "10.0.0.1:80"}, {"vip": "10.0.0.2:80", "backends": [{"backend": "x"}]}]
    assert problem(http.put("/v1/config", json={"services": wrong}), 422)["field"] == "/services/1/backends/0/backend"
    twice = [{"vip": "10.0.0.1:80"}, {"vip": "10.0.0.1:80/tcp"}]
    assert problem(http.put("/v1/config", json={"services": twice}), 422)["field"] == "/services/1/vip"
    assert problem(http.put("/v1/config", json={"services": [{}]}), 422)["field"] == "/services/0/vip"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b'{"ring_size": NaN}', 422),
        (b'{"vip": "\\ud800"}', 422),
        (b"[" * 100_000, 400),
        (b'{"ring_size": ' + b"9" * 10_000 + b"}", 400),
        (b"null", 422),
        (b"", 422),
    ],
)
def test_a_body_that_is_no_json_is_refused(http: httpx.Client, content: bytes, status: int) -> None:
    problem(http.put(WEB, content=content, headers={"Content-Type": "application/json"}), status)
    assert http.get(WEB).status_code == 200


def test_a_body_has_to_say_that_it_is_json(http: httpx.Client) -> None:
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}, {}):
        problem(http.put(WEB, content=json.dumps(SERVICE).encode(), headers=headers), 415)


def test_a_body_that_is_too_large_is_refused(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lb.api.middleware.LARGEST_LOCAL_BODY", LARGEST_BODY)
    headers = {"Content-Type": "application/json"}
    refused = http.put(WEB, content=b" " * (LARGEST_BODY + 1), headers=headers)
    assert problem(refused, 413)["detail"] == "request body larger than 1048576 bytes"
    chunks = (b" " * 65536 for _ in range(17))  # of a length that nobody tells
    problem(http.put(WEB, content=chunks, headers=headers), 413)
    problem(http.put(WEB, content=b" " * LARGEST_BODY, headers=headers), 400)


@pytest.mark.parametrize(
    "path",
    [
        "/v1",
        "/v1/services/",
        "/v1//services",
        "/v1/services/10.0.0.1:80/tcp",
        "/v1/services/..%2f..%2fetc%2fpasswd/x",
        "/v2/services",
        "/docs",
        "/redoc",
        "/v1/services%3F",
    ],
)
def test_paths_that_lead_nowhere(http: httpx.Client, path: str) -> None:
    assert problem(http.get(path), 404)["type"] == "urn:xdp-lb:problem:not-found"


ODD = ["..", "..%2f..", "%2e%2e%2fx", "%00", "%ff%fe", "10.0.0.1", "%0d%0aSet-Cookie:x", "%C3%A9", "a" * 4000, "%252F"]


@pytest.mark.parametrize("vip", ODD)
def test_vips_in_paths_that_are_none(running: Running, http: httpx.Client, vip: str) -> None:
    """Sent as they are: clients would tidy them up."""
    head = f"GET /v1/services/{vip}/backends HTTP/1.1\r\nHost: xdp-lb\r\nConnection: close\r\n\r\n"
    answer = raw(running, head.encode())
    status = int(answer.split()[1])
    assert status in (404, 422)
    assert b"Set-Cookie" not in answer.split(b"\r\n\r\n")[0]
    assert PROBLEM.encode() in answer


def raw(running: Running, request: bytes) -> bytes:
    with closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.settimeout(10)
        connection.connect(str(running.settings.socket))
        connection.sendall(request)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def test_what_is_no_http_is_answered_as_a_problem(running: Running) -> None:
    answer = raw(running, b"\x16\x03\x01 this is TLS\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert PROBLEM.encode() in answer


def test_a_head_that_has_no_end_is_refused(running: Running) -> None:
    answer = raw(running, b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 100_000)
    assert answer.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", WEB, "DELETE, GET, PATCH, PUT"),
        ("DELETE", "/v1/status", "GET"),
        ("GET", f"{WEB}/backends/10.0.0.11:80", "DELETE, PATCH"),
        ("TRACE", "/v1/config", "GET, PUT"),
    ],
)
def test_a_method_that_means_nothing_names_those_that_do(
    http: httpx.Client, method: str, path: str, allowed: str
) -> None:
    answer = http.request(method, path)
    problem(answer, 405)
    assert answer.headers["allow"] == allowed


def test_a_kernel_that_refuses_is_the_servers_fault_and_changes_nothing(running: Running, http: httpx.Client) -> None:
    before = http.get("/v1/config").headers["etag"]
    running.host.dataplane.fuse.fail_after(1)  # type: ignore[attr-defined]
    answer = http.delete(f"{WEB}/backends/10.0.0.11:80")
    assert problem(answer, 503)["type"] == "urn:xdp-lb:problem:dataplane-error"
    assert answer.headers["retry-after"] == "1"
    assert http.get("/v1/config").headers["etag"] == before


def test_an_error_of_our_own_is_told_without_its_trace(running: Running, http: httpx.Client) -> None:
    def blow() -> None:
        raise ZeroDivisionError("a secret of the inside")

    running.host.dataplane.fuse.fail_after(1, blow=blow)  # type: ignore[attr-defined]
    answer = http.delete(f"{WEB}/backends/10.0.0.11:80")
    assert "secret" not in problem(answer, 500)["detail"]
    assert http.get(WEB).status_code == 200


def test_what_is_changed_is_in_the_audit_log_and_what_is_read_is_not(running: Running, http: httpx.Client) -> None:
    http.patch(f"{WEB}/backends/10.0.0.11:80", json={"weight": 6})
    http.get("/v1/status")
    http.post("/v1/plan", json={"services": []})
    http.patch(f"{WEB}/backends/10.0.0.99:80", json={"weight": 6})
    with Access.open(running.settings.access) as access:
        changed, failed = access.entries(2)
    assert (changed.who, changed.address, changed.method) == ("uid 0 (root)", "unix", "PATCH")
    assert changed.path == "/v1/services/10.0.0.1:80/tcp/backends/10.0.0.11:80"
    assert changed.change.startswith("10.0.0.1:80/tcp: backend 10.0.0.11:80 weight 1 -> 6: ")
    assert changed.outcome == "200"
    assert failed.outcome == "404: backend 10.0.0.99:80: not in service 10.0.0.1:80/tcp"


def test_the_description_needs_nothing_from_elsewhere(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert set(document["paths"]) >= {"/v1/services/{vip}", "/v1/config", "/v1/events", "/healthz"}
    assert "http://" not in json.dumps(document).replace("http://json-schema.org", "")
    assert "https://" not in json.dumps(document)


def test_the_examples_of_the_documentation_work(running: Running, http: httpx.Client) -> None:
    """Those of the shell, one after the other, then that of Python."""
    root = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").exists())
    text = (root / "docs/api.md").read_text().partition("\n## Services\n")[2]
    shell, python = (text.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("sh", "python"))
    assert shell.count("\napi ") == 4
    asked = shell.replace("/run/xdp-lb/default/api.sock", str(running.settings.socket)).replace("curl -sS", "curl -sSf")
    done = subprocess.run(["bash", "-ec", asked], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    service = "/v1/services/10.0.0.100:443"
    assert [(b["weight"], b["draining"]) for b in http.get(f"{service}/backends").json()] == [(1, True), (3, False)]
    http.patch(f"{service}/backends/10.0.0.11:443", json={"draining": False})
    assert python.count("Paths.here().socket") == 1
    exec(python.replace("Paths.here().socket", f"Path({str(running.settings.socket)!r})"), {"Path": Path})
    assert [b["draining"] for b in http.get(f"{service}/backends").json()] == [True, False]


# For Prometheus


def samples(http: httpx.Client) -> Counter[tuple[str, ...]]:
    """Name and label values -> value."""
    answer = http.get("/metrics")
    assert answer.headers["content-type"] == CONTENT_TYPE
    families = text_string_to_metric_families(answer.text)
    return Counter({(s.name, *s.labels.values()): s.value for family in families for s in family.samples})


def test_metrics_are_the_kernels_and_the_daemons_own(http: httpx.Client) -> None:
    before = samples(http)
    http.put("/v1/services/10.0.0.100:443%2Fudp", json=SERVICE)
    found = samples(http) - before
    assert found["xdp_lb_service_ring_slots", "10.0.0.100:443/udp"] == SERVICE["ring_size"]
    assert found["xdp_lb_changes_total", "add"] == 1
    assert found["xdp_lb_ring_slots_moved_total",] == SERVICE["ring_size"]


def test_metrics_time_answers_by_route_and_never_by_path(http: httpx.Client) -> None:
    before = samples(http)
    for path in (WEB, "/v1/services/nonsense", "/nowhere"):
        http.get(path)
    found = samples(http) - before
    times = {
        tuple(labels): n for (name, *labels), n in found.items() if name == "xdp_lb_api_request_duration_seconds_count"
    }
    assert times == {
        ("GET", "/v1/services/{vip}", "200"): 1,
        ("GET", "/v1/services/{vip}", "422"): 1,
        ("GET", "none", "404"): 1,
        ("GET", "/metrics", "200"): 1,
    }

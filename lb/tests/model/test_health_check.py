"""The words of health checks: what they mean, the way back, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.errors import InvalidInput
from lb.model.health_check import HealthCheck, Kind

WORDS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x2FF), max_size=20)
TIMES = {
    "interval_s": st.integers(100, 3_600_000).map(lambda ms: ms / 1000),
    "timeout_s": st.integers(10, 3_600_000).map(lambda ms: ms / 1000),
    "rise": st.integers(1, 1000),
    "fall": st.integers(1, 1000),
    "jitter": st.integers(0, 100),
}
PORTS = st.integers(0, 65535)
HTTP = {
    "path": st.from_regex(r"/[!-~]{0,20}", fullmatch=True),
    "host": st.just("www.example.org"),
    "method": st.sampled_from(["GET", "HEAD"]),
    "status": st.sampled_from([((200, 200),), ((200, 299), (301, 301)), ((200, 399),)]),
    "body": st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    "match": st.just(r"^ok \d+$"),
    "port": PORTS,
}
CHECKS = st.one_of(
    st.builds(HealthCheck, st.just(Kind.TCP), port=PORTS, **TIMES),
    st.builds(HealthCheck, st.just(Kind.HTTP), **HTTP, **TIMES),
    st.builds(HealthCheck, st.just(Kind.HTTPS), verify=st.booleans(), ca=WORDS, **HTTP, **TIMES),
    st.builds(HealthCheck, st.just(Kind.UDP), send=st.binary(), expect=st.binary(), port=PORTS, **TIMES),
    st.builds(HealthCheck, st.just(Kind.SCRIPT), command=st.lists(WORDS).map(lambda more: ("/bin/x", *more)), **TIMES),
)


@given(CHECKS)
def test_a_check_is_the_same_after_its_text(check: HealthCheck) -> None:
    assert HealthCheck.parse(str(check)) == check


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("tcp", HealthCheck(Kind.TCP)),
        (
            "http /up host=www.example.org status=200-299,301 body='all good' interval=1s fall=2",
            HealthCheck(
                Kind.HTTP,
                "/up",
                host="www.example.org",
                status=((200, 299), (301, 301)),
                body="all good",
                interval_s=1,
                fall=2,
            ),
        ),
        ("https / verify=off timeout=500ms", HealthCheck(Kind.HTTPS, verify=False, timeout_s=0.5)),
        ("udp send=0x00ff expect=pong jitter=20%", HealthCheck(Kind.UDP, send=b"\0\xff", expect=b"pong", jitter=20)),
        (
            "script interval=1m /usr/local/bin/check -H x=y fall=1",
            HealthCheck(Kind.SCRIPT, command=("/usr/local/bin/check", "-H", "x=y", "fall=1"), interval_s=60),
        ),
    ],
)
def test_words_mean(text: str, check: HealthCheck) -> None:
    assert HealthCheck.parse(text) == check


def test_text_has_only_what_is_not_the_default() -> None:
    assert str(HealthCheck.parse("http interval=2s rise=2 port=0")) == "http /"
    assert str(HealthCheck.parse("udp send=0x70696e67")) == "udp send=ping"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "health check (empty): unknown: use tcp, http, https, udp or script"),
        ("icmp", "health check icmp: unknown: use tcp, http, https, udp or script"),
        ("http 'x", "health check http 'x: no closing quotation"),
        (
            "tcp body=x",
            "health check tcp: body=x: unknown option: known options are port=, interval=, timeout=, rise=, fall=,"
            " jitter=",
        ),
        ("tcp fall=1 fall=2", "health check tcp: fall: given twice"),
        ("tcp fall=x", "health check tcp: fall x: not a number"),
        ("tcp fall=0", "health check: fall 0: out of range 1 to 1000"),
        ("tcp interval=2h", "health check tcp: interval 2h: not a duration such as 500ms or 2s"),
        ("tcp interval=10ms", "health check: interval 0.01 s: out of range 0.1 to 3600 s"),
        ("tcp port=65536", "health check: port 65536: out of range 0 to 65535"),
        ("http status=20", "health check http: status: not from 100 to 599"),
        ("http match=[", "health check http: match: not a regular expression in RE2 syntax: missing ]: ["),
        (
            "http match='(?=x)'",
            "health check http: match: not a regular expression in RE2 syntax: invalid perl operator: (?=",
        ),
        ("http method=get", "health check http: method: not a method in capital letters"),
        ("https verify=no", "health check https: verify no: not on or off"),
        ("https", "health check https: host: missing: give the host name of the certificate, or verify=off"),
        ("udp send=0xf", "health check udp: send 0xf: not hexadecimal digits"),
        (
            "script check",
            "health check script: check: unknown option: known options are interval=, timeout=, rise=, fall=, jitter=",
        ),
        (
            "script",
            "health check script: command: missing: give the script's path from the root,"
            " such as script /usr/local/bin/check",
        ),
    ],
)
def test_what_is_wrong_is_named(text: str, line: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        HealthCheck.parse(text)
    assert str(caught.value) == line

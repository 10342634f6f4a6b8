"""What /openapi.json says beyond paths and types: what fields mean, an example of each, groups, and who may ask.

Enters: the document as FastAPI makes it. Leaves: the same, complete. A field of one name means one thing wherever it
is; the few exceptions are listed under SCHEMA.FIELD.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lb.api.models.common import ProblemAnswer

# Tag -> what it is about, and how the paths of its operations begin.
TAGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "services": ("Services, their options and backends", ("/v1/services",)),
    "configuration": ("All services at once", ("/v1/config", "/v1/plan")),
    "interfaces": ("Where the balancer is attached", ("/v1/interfaces",)),
    "status": ("State, counters, events, the caller", ("/v1/status", "/v1/stats", "/v1/events", "/v1/whoami")),
    "filters": ("Filter rules in front of the balancer", ("/v1/filter",)),
    "explain": ("Why a packet goes where it goes", ("/v1/explain",)),
    "stages": ("Your own programs in the packet's path", ("/v1/stages",)),
    "sessions": ("How the web page logs in without a token", ("/v1/session-codes", "/v1/sessions")),
    "daemon": ("Health of the daemon, and Prometheus metrics", ("/metrics", "/healthz", "/readyz")),
}
BEARER = {
    "type": "http",
    "scheme": "bearer",
    "description": "Over TLS: a token of xdp-lb token create. Role read: GET and explain; write: everything. On the "
    "Unix socket no token is needed, except by browsers and through ssh: the mode of its file says who may connect.",
}
WITHOUT_TOKEN = ("/healthz", "/readyz", "/v1/sessions")

_VIP, _BACKEND = "10.0.0.100:443/tcp", "10.0.0.11:443"
_SERVICE = {"vip": _VIP, "mode": "dr", "backends": [{"backend": _BACKEND, "weight": 1}]}
_RULE = {"at": "xdp", "action": "drop", "expression": "udp port 53"}

# Name of a field -> what it is, and an example.
FIELDS: dict[str, tuple[str, Any]] = {
    "action": ("What the rule does with a packet it matches", "drop"),
    "address": ("IPv4 or IPv6 address, or the network address of a prefix", "10.0.0.11"),
    "affinity": ("Whether the backend follows from the client's address alone", False),
    "affinity_s": ("Seconds for which all connections of a client address go to one backend; 0: off", 600),
    "after": ("The service as it is after the change; null: it is removed", None),
    "answered": ("Packets answered by the balancer itself, by reason", {"answered_echo": 3}),
    "at": ("Attach point: xdp, or tc ingress or egress", "xdp"),
    "attached": ("Whether the program is attached as configured", True),
    "backend": ("ADDR[:PORT]; in a body also ADDR[:PORT]@WEIGHT", _BACKEND),
    "backends": ("The backends of the service", [{"backend": _BACKEND, "weight": 1}]),
    "before": ("The service as it was before the change; null: it is new", None),
    "bytes": ("Bytes: of frames from clients to backends, or of the frame", 64000),
    "change": ("add, change or remove", "add"),
    "changes": ("What changed, or in a dry run would change", []),
    "code": ("Opens one session of the web page, once", "9Zk3v0yQe6pTn1sXb7uWcA"),
    "config_fault": ("Why the configuration file is not in force; null: it is, or there is none", None),
    "connections": ("TCP SYNs; in mode nat, new flows", 1000),
    "destination": ("ADDR:PORT; for protocol icmp, ADDR", "10.0.0.100:443"),
    "detached": ("Interfaces that the balancer was detached from", ["eth1"]),
    "detail": ("What it is about, in a sentence", "vip 10.0.0.100:443/tcp: not found"),
    "disagreement": ("How program and maps differ, which is a bug; null: they agree", None),
    "draining": ("Gets no new connections; open ones stay", False),
    "dropped": ("Number of packets dropped", 2),
    "dropped_bytes": ("Bytes of the packets that the rule dropped", 12800),
    "dropped_packets": ("Packets that the rule dropped", 200),
    "drops": ("Packets dropped, by reason", {"drop_no_backend": 2}),
    "dry_run": ("Whether nothing was changed", False),
    "echo": ("Answer ICMP echo requests to the VIP", False),
    "egress": ("Interface on which the packet leaves; null: it does not", "eth1"),
    "ended_by": ("The filter or stage that ended the packet's way", []),
    "ending": (
        "Open connections that the change ends; null: nothing leaves service",
        {"connections": 9, "estimated": False},
    ),
    "estimated": ("Whether the number is an estimate", False),
    "expired": ("Whether the rule's lifetime is over", False),
    "expires_in_s": ("Seconds until it is worth nothing", 300),
    "expression": ("tcpdump expression; empty: all packets", "udp port 53"),
    "fail_closed": ("Drop connections if health checks find all backends down, instead of using all", False),
    "field": ("JSON Pointer of the value at fault in the body; null: the request as a whole", "/backends/0/weight"),
    "file": ("The source file of the stage", "/root/hello.c"),
    "fix": ("What to do about it; null: nothing", None),
    "flags": ("TCP flags out of F S R P A U E W; default: A", "S"),
    "flow_timeout_s": ("Seconds after which a silent connection may be forgotten", 3600),
    "for_s": ("Lifetime in seconds, instead of until", 600),
    "function": ("The function of the stage", "hello"),
    "gue_port": ("UDP destination port of mode gue", 6080),
    "headers": ("One line per header, outermost first", ["IPv4 192.0.2.7 > 10.0.0.100, ttl 64, TCP 40000 > 443 [S]"]),
    "health": ("The health check as written on the command line; empty: none", "tcp interval=2s"),
    "hex": ("An Ethernet frame as hexadecimal digits", "02000000000202000000000108004500"),
    "in_force": ("Whether the rule is in the kernel", True),
    "in_transition": ("Slots in transition after the change", 164),
    "interface": ("Interface name", "eth0"),
    "interfaces": ("Interfaces of the balancer", [{"name": "eth0", "xdp_mode": "auto"}]),
    "kind": ("Kind of the table", "hash"),
    "last_port": ("Last port of a port range; else as port", 443),
    "left_s": ("Seconds until the rule expires; null: it does not", 540),
    "length": ("Original length of a truncated frame", 1514),
    "list": ("One prefix per line", "192.0.2.0/24\n2001:db8::/32\n"),
    "loaded": ("Whether programs and maps are in the kernel", True),
    "maps": ("Bytes of kernel memory, by map", {"rings": 4194304}),
    "matched": ("Packets that the rule matched", 3),
    "member": ("The backend chosen, and its next hop", {"backend": _BACKEND, "resolved": True}),
    "minimum": ("The fewest slots that any change to these backends has to move", 5461),
    "mode": ("Forwarding mode", "dr"),
    "moved": ("Slots that move to another backend", 5461),
    "mss": ("The largest MSS that SYNs may announce; 0: as they come", 1400),
    "name": ("Interface name", "eth0"),
    "netns": ("Network namespace; default: the host's own", "default"),
    "noted": ("Events counted beside the packet's own reason", {"noted_syn_not_recorded": 0}),
    "notes": ("What else was done, in sentences", []),
    "number": ("Number of the rule, stage or packet, from 1", 1),
    "open": ("Connections open now", {"connections": 37, "estimated": False}),
    "options": ("Options of the service; those left out have their defaults", {"mss": 1400}),
    "out": ("The frame that leaves; null: none does", None),
    "outdated": ("Version of the loaded program, if it is not the installed one; else null", None),
    "outer_checksum": ("Mode gue: compute the outer UDP checksum", False),
    "own_address": ("Add a VIP that is no host's address to an interface", True),
    "packet": ("The frame that came in", {"bytes": 54, "headers": [], "hex": "020000000002"}),
    "packets": ("Packets: from clients to backends, matched by the rule, or in the file", 1000),
    "passes": ("Packets passed to the host, by reason", {"pass_not_a_service": 7}),
    "path": ("Name of the set", "bad"),
    "pcap": ("A capture file, in base64", "1MOyoQIABAAAAAAAAAAAAAAABAABAAAA"),
    "pid": ("Process of the stage", 4711),
    "place": ("Place in the packet's path; null: there is no balancer", 1),
    "plan": ("What the change does to the ring; null: nothing is attached", None),
    "port": ("Port, or first port of a range; 0: every port", 443),
    "position": ("Number of the new rule; default: after the last", 1),
    "prefix_length": ("Length of the VIP's prefix in bits; 32 or 128: one address", 32),
    "prefixes": ("Number of prefixes in the set; read-only", 2),
    "problem": ("Why the installed program is not in force; null: it is", None),
    "program_id": ("Kernel ID of the BPF program, as in bpftool; null: none", 42),
    "protocol": ("tcp or udp; for explain also icmp", "tcp"),
    "rate": ("Packets per period, with action limit", "1k/s"),
    "reason": ("As counted in status; null: the packet did not reach the balancer", "forwarded"),
    "repeated_syns": ("SYN retransmissions", 0),
    "reply_bytes": ("Bytes from backends to clients (mode nat)", 96000),
    "reply_packets": ("Packets from backends to clients (mode nat)", 900),
    "reply_to": ("Of a reply in mode nat: the client", None),
    "resolved": ("Whether the next hop's MAC address is known", True),
    "ring_size": ("Slots of the hash ring, a prime", 16381),
    "role": ("read or write", "write"),
    "rules": ("Rules in their order", [_RULE]),
    "second_chance": ("Mode gue: name the other possible backend while slots are in transition", False),
    "server_ids": ("CONFIG:HEX, the server's IDs in QUIC connection IDs", ["0:0a"]),
    "service": ("The service that the packet matched; null: none", {"vip": _VIP, "mode": "dr"}),
    "services": ("Services", [_SERVICE]),
    "set": ("Set of backends for clients from certain prefixes; empty: the VIP's own", ""),
    "side": ("Which address is looked up in the set", "src"),
    "since": ("Start of the stage, RFC 3339", "2026-01-01T12:00:00+00:00"),
    "slot": ("Place of the packet in the hash ring", {"number": 4711, "ring_size": 16381}),
    "slots": ("Slots of the ring", 16381),
    "slots_in_transition": ("Slots whose connections are tracked after a change", 0),
    "slow_start_s": ("Seconds in which a backend that comes up gets its full share", 30),
    "source": ("ADDR:PORT; for protocol icmp, ADDR", "192.0.2.7:40000"),
    "sources": ("Client prefixes that the service is for; empty: all", ["192.0.2.0/24"]),
    "state": ("compiling, running or orphaned", "running"),
    "status": ("ok or ready", "ok"),
    "syn": ("The first packet of a TCP connection", True),
    "syn_limit": ("New connections per second; 0: no limit", 10000),
    "syn_limit_of_source": ("New connections per second and client /24 or /64; 0: no limit", 100),
    "table": ("Name of the table", "counts"),
    "time": ("When it was read, RFC 3339", "2026-01-01T12:00:00+00:00"),
    "title": ("The kind of problem", "Not Found"),
    "tunnel_sources": ("Outer source addresses or prefixes of tunnels", ["198.18.0.0/16"]),
    "token": ("Sent as Authorization: Bearer", "xls_1f0c..."),
    "type": ("URI of the kind of problem", "about:blank"),
    "untested": ("Packets too short or too long for a test run", 0),
    "until": ("Unix time in seconds at which the rule expires; null: never", 1767225600),
    "verdict": ("What became of the packet, in a sentence", "forwarded to 10.0.0.11:443"),
    "vip": ("ADDR:PORT/PROTO; also a prefix, a port range, or with @SET", _VIP),
    "vip_address": ("Add the VIP to an interface where it is no host's address", True),
    "warnings": ("What to look after, in sentences", []),
    "weight": ("Share of new connections, relative to the other backends; 0: none", 1),
    "who": ("Name of the token, or local user", "root"),
    "xdp_mode": ("native, generic, or auto: native where the driver can", "native"),
    "ExplanationAnswer.action": ("XDP action: pass, drop, tx, redirect or aborted", "tx"),
    "ExplanationAnswer.source": ("Where the backend was found", "ring_current"),
    "MoveBody.number": ("New number of the rule", 1),
    "NewRuleBody.set": ("Packets with an address in a list of prefixes; null: none", None),
    "OpenAnswer.connections": ("Open connections; null: unknown", 37),
    "ProblemAnswer.status": ("The HTTP status", 404),
    "ReportAnswer.attached": ("Interfaces attached to", [{"name": "eth0", "xdp_mode": "native", "program_id": 42}]),
    "RuleBody.set": ("Packets with an address in a list of prefixes; null: none", None),
    "RuleChangeAnswer.set": ("Packets with an address in a list of prefixes; null: none", None),
    "RuleStatusAnswer.set": ("Packets with an address in a list of prefixes; null: none", None),
    "TrialAnswer.dropped_packets": ("Positions in the file of the packets dropped, from 0", [0, 4]),
    "TriedRuleAnswer.set": ("Packets with an address in a list of prefixes; null: none", None),
    "WantedRuleAnswer.set": ("Packets with an address in a list of prefixes; null: none", None),
}
PARAMETERS = {
    "vip": "ADDR:PORT/PROTO, percent-encoded: 10.0.0.100:443%2Ftcp",
    "backend": "ADDR:PORT",
    "interface": "Interface name",
    "number": "Number of the rule or stage, from 1",
}


def described(document: dict[str, Any]) -> dict[str, Any]:
    """The document, which is changed."""
    schemas = document["components"]["schemas"]
    schemas["ProblemAnswer"] = ProblemAnswer.model_json_schema()  # which all problems refer to
    for name, schema in schemas.items():
        for field, about in schema.get("properties", {}).items():
            _describe(about, FIELDS.get(f"{name}.{field}") or FIELDS.get(field))
    document["tags"] = [{"name": name, "description": text} for name, (text, _) in TAGS.items()]
    document["components"]["securitySchemes"] = {"bearer": BEARER}
    for path, operation in _operations(document):
        operation["tags"] = [tag for tag, (_, paths) in TAGS.items() if path.startswith(paths)]
        operation["security"] = [] if path in WITHOUT_TOKEN else [{"bearer": []}]
        for parameter in operation.get("parameters", ()):
            parameter.setdefault("description", PARAMETERS.get(parameter["name"], ""))
    return document


def _describe(about: dict[str, Any], known: tuple[str, Any] | None) -> None:
    if known:
        about.setdefault("description", known[0])
        about.setdefault("examples", [known[1]])


def _operations(document: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            yield path, operation

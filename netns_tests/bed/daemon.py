"""`xdp-lb serve` on the balancer of a bed: started until it is ready, asked, and ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lb.client.connect import daemon_listens
from netns_tests.bed.topology import XDP_LB, Bed, wait_until

WEB = "10.99.1.100:80"
SERVE = ("attach", "eth0", "--vip", WEB, "--backends", "10.99.2.11,10.99.2.12", "--ring-size", "251")
UNDER = ("setpriv", "--bounding-set=-all,+net_admin,+bpf,+perfmon", "--inh-caps=-all")
THREE = 1 << 12 | 1 << 38 | 1 << 39  # CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF
# What systemd's MemoryDenyWriteExecute= asks for: no memory that is or becomes executable.
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
WITHOUT_CODE = (
    sys.executable,
    "-c",
    "import ctypes, os, sys\n"
    f"ctypes.CDLL(None).prctl({PR_SET_MDWE}, {PR_MDWE_REFUSE_EXEC_GAIN}, 0, 0, 0)\n"
    "os.execv(sys.argv[1], sys.argv[1:])",
)


def socket_of(bed: Bed) -> Path:
    return bed.directory / "run" / bed.lb.name / "api.sock"


def places(bed: Bed) -> dict[str, str]:
    return {"XDP_LB_STATE_DIR": str(bed.directory / "state"), "XDP_LB_RUN_DIR": str(bed.directory / "run")}


def start(bed: Bed, *options: str, under: Sequence[str] = ()) -> subprocess.Popen[str]:
    """A daemon that answers."""
    log = (bed.directory / "serve.log").open("w")
    with log:
        command = [*under, str(XDP_LB), "serve", *options]
        process = bed.lb.popen(command, env=os.environ | places(bed), stderr=log)
    wait_until(lambda: process.poll() is not None or is_ready(bed), "the daemon ready", timeout_s=30)
    assert process.poll() is None, (bed.directory / "serve.log").read_text()
    return process


def is_ready(bed: Bed) -> bool:
    path = socket_of(bed)
    asked = ["curl", "-sf", "--max-time", "5", "--unix-socket", str(path), "http://xdp-lb/readyz"]
    return daemon_listens(path) and bed.lb.run(asked, check=False).returncode == 0


def end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> int:
    process.send_signal(number)
    return process.wait(timeout=20)


def certificate_of(bed: Bed) -> tuple[Path, Path]:
    """The balancer's, signed by itself, and its key."""
    certificate, key = bed.directory / "lb.pem", bed.directory / "lb.key"
    subject = ["-subj", "/CN=lb", "-addext", f"subjectAltName=IP:{bed.lb.ipv4}"]
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *subject]
    subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


def backends(bed: Bed) -> list[str]:
    return [each["backend"] for each in json.loads(bed.xdp_lb("backend", "list", "--json").stdout)]


def states(bed: Bed) -> list[str]:
    (service,) = json.loads(bed.xdp_lb("status", "--json").stdout)["services"]
    return [each["state"] for each in service["backends"]]


def effective(process: subprocess.Popen[str]) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("CapEff:"))
    return int(line.split()[1], 16)

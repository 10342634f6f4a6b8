"""What holds on the kernel that this runs on: each program's verdict of the verifier, features, groups of tests.

Enters: where to write. Leaves: a Column as JSON, written anew after each check, so that a kernel that hangs leaves
what it has got through. `python -m netns_tests.kernels` runs this on one kernel after another. Of the tests there are
as many as an emulated machine does in some minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from ipaddress import ip_address
from pathlib import Path
from xml.etree import ElementTree

from netns_tests.bed.servers import REPOSITORY
from netns_tests.bed.topology import Bed
from xdp import libbpf
from xdp.attach import GENERIC, NATIVE, attach
from xdp.errors import XdpError
from xdp.features import verified
from xdp.object import BpfObject, Program

OBJECTS = sorted((REPOSITORY / "xdp" / "bpf").glob("*/*.bpf.o"))
PROGRAM_TESTS = (
    *sorted(map(str, (REPOSITORY / "netns_tests" / "program").glob("test_program*.py"))),
    "netns_tests/program/test_decap.py",
)
CAPTURE_TESTS = ("filters/tests/capture/test_traced.py", "netns_tests/dump/test_dump_beside.py")
TRAFFIC_TESTS = ("netns_tests/traffic/test_traffic.py", "netns_tests/host/test_decap_command.py")
KERNEL_BTF = Path("/sys/kernel/btf/vmlinux")
TESTS_TIMEOUT_S = 900
SHOWN_OF_LOG = 40

# include/uapi/linux: bpf.h, neighbour.h
BPF_PROG_TYPE_XDP = 6
BPF_FUNC_KTIME_GET_COARSE_NS = 160
CALL, R0_IS, EXIT = 0x85, 0xB7, 0x95  # struct bpf_insn's low word, little-endian; the high one is the constant
XDP_PASS = 2
NTF_USE, NTF_EXT_MANAGED = 0x01, 0x01


@dataclass(frozen=True)
class Check:
    """A cell of the table. `details` is what to read where it has failed."""

    name: str
    value: str
    failed: bool = False
    details: str = ""


@dataclass
class Column:
    """A kernel's cells, in the order in which they were found out."""

    kernel: str
    checks: list[Check] = field(default_factory=list)
    complete: bool = False

    @classmethod
    def read(cls, path: Path) -> Column:
        document = json.loads(path.read_text())
        checks = [Check(**check) for check in document["checks"]]
        return cls(document["kernel"], checks, document["complete"])

    def write(self, path: Path) -> None:
        """Whole or not at all, whenever the machine is stopped."""
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self)))
        new.replace(path)


@dataclass(frozen=True)
class Group:
    """A run of pytest: its arguments, and what it needs in the environment."""

    name: str
    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


TEST_GROUPS = (
    # Without the thousands of packets of a flood or of a race: emulated they take longer than all the others.
    Group("tests: packet by packet", (*PROGRAM_TESTS, "-k", "not flood and not cpus")),
    Group("tests: program against model", ("netns_tests/program/test_differential.py",), (("FUZZ_PACKETS", "500"),)),
    Group("tests: attaching, maps, pins", ("xdp/tests", "--ignore=xdp/tests/test_btf.py", "-k", "not any_name")),
    Group("tests: real traffic", (*TRAFFIC_TESTS, "-k", "curl or pings or status_lists or attaching_again")),
    # Some of these are skipped where a hardened kernel lets nobody trace programs.
    Group("tests: captures", (*CAPTURE_TESTS, "-k", "traced")),
    Group("tests: filter", ("netns_tests/host/test_filter.py", "-k", "dropped_and_counted and ipv4")),
    Group("tests: under systemd", ("netns_tests/daemon/test_systemd.py", "-k", "capabilities")),
)


def checks() -> Iterator[Check]:
    for path in OBJECTS:
        yield load(path)
    for name, probe in FEATURES.items():
        yield feature(name, probe)
    for group in TEST_GROUPS:
        yield run_tests(group)


# The verifier


def load(path: Path) -> Check:
    """How many instructions the verifier walked for all programs of the object."""
    with contextlib.closing(BpfObject.open(path)) as bpf:
        try:
            bpf.load()
        except XdpError as error:
            return Check(f"verified: {path.name}", "refused", failed=True, details=str(error))
        walked = sum(verified(fd).instructions for fd in bpf._program_fds.values())
    return Check(f"verified: {path.name}", f"{walked} instructions")


# Features: the lack of one is no failure


def feature(name: str, probe: Callable[[], bool]) -> Check:
    try:
        return Check(name, "yes" if probe() else "no")
    except (OSError, XdpError) as error:
        return Check(name, f"no: {error}")


def has_coarse_clock() -> bool:
    try:
        with loaded(CALL | BPF_FUNC_KTIME_GET_COARSE_NS << 32):
            return True
    except OSError:
        return False


def knows(name: str) -> Callable[[], bool]:
    """Whether the kernel's own types have something of this name."""
    return lambda: f"\0{name}\0".encode() in KERNEL_BTF.read_bytes()


def runs_in(mode: str) -> Callable[[], bool]:
    """Whether an XDP program can be attached to a veth in this mode."""

    def probe() -> bool:
        with Bed(backends=0) as bed, loaded() as program, bed.lb.netlink() as ip, bed.lb.entered():
            (index,) = ip.link_lookup(ifname="eth0")
            return attach(index, program.fd, program.id, mode).mode == mode

    return probe


def keeps_neighbours() -> bool:
    """Whether the kernel resolves a neighbour, and goes on asking for it, with no process behind it."""
    with Bed(backends=0) as bed, bed.lb.netlink() as ip:
        (index,) = ip.link_lookup(ifname="eth0")
        neighbour = {"dst": str(ip_address(bed.client.ipv4) + 100), "ifindex": index}
        ip.neigh("replace", state=0, flags=NTF_USE, flags_ext=NTF_EXT_MANAGED, **neighbour)
        (entry,) = ip.neigh("get", **neighbour)
        return bool((entry.get_attr("NDA_FLAGS_EXT") or 0) & NTF_EXT_MANAGED)


@contextlib.contextmanager
def loaded(*first: int) -> Iterator[Program]:
    """An XDP program of these instructions, which then passes the packet. Raises OSError."""
    instructions = [*first, R0_IS | XDP_PASS << 32, EXIT]
    code = b"".join(instruction.to_bytes(8, "little") for instruction in instructions)
    fd = libbpf.program_load(BPF_PROG_TYPE_XDP, b"probe", b"GPL", code, len(instructions), None)
    try:
        yield Program("probe", fd)
    finally:
        os.close(fd)


FEATURES: dict[str, Callable[[], bool]] = {
    "XDP on veth, native": runs_in(NATIVE),
    "XDP on veth, generic": runs_in(GENERIC),
    "bpf_ktime_get_coarse_ns": has_coarse_clock,
    "managed neighbours": keeps_neighbours,
    "tcx": knows("BPF_TCX_INGRESS"),
    "dynptr of XDP": knows("bpf_dynptr_from_xdp"),
}


# Tests


def run_tests(group: Group) -> Check:
    with tempfile.TemporaryDirectory() as name:
        report, log = Path(name, "report.xml"), Path(name, "log")
        ended = run_pytest(group, report, log)
        if not report.exists():
            return Check(group.name, "no report" if ended else "no end", failed=True, details=last_lines(log))
        return summary(group.name, report)


def run_pytest(group: Group, report: Path, log: Path) -> bool:
    """Whether it came to an end."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", f"--junitxml={report}", *group.arguments]
    with log.open("w") as said:
        try:
            subprocess.run(
                command,
                cwd=REPOSITORY,
                env=os.environ | dict(group.environment),
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=TESTS_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return False
    return True


def summary(name: str, report: Path) -> Check:
    """Of a report in JUnit's format: a case holds what became of it, or nothing where it has passed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    counts = {"passed": len(cases) - len(failed) - len(skipped), "failed": len(failed), "skipped": len(skipped)}
    value = ", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "passed")
    return Check(name, value, bool(failed) or not counts["passed"], "\n".join(told(case) for case in failed))


def told(case: ElementTree.Element) -> str:
    """The last line of what pytest says of a case has the place where it failed."""
    (outcome,) = (child for child in case if child.tag in ("failure", "error"))
    place = (outcome.text or "").strip().rpartition("\n")[2]
    return f"{case.get('classname')}.{case.get('name')}: {outcome.get('message')}\n  {place}"


def last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_OF_LOG:])


def main() -> None:
    (path,) = map(Path, sys.argv[1:])
    column = Column(platform.release())
    column.write(path)
    for check in checks():
        column.checks.append(check)
        column.write(path)
    column.complete = True
    column.write(path)


if __name__ == "__main__":
    main()

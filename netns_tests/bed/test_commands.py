"""A command that is forked beside the same one that is started: the tests of the bed may take one for the other."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from netns_tests.bed import commands
from netns_tests.bed.commands import Command, Server, serving
from netns_tests.bed.dump import XDP_DUMP, Dump
from netns_tests.bed.servers import start_udp_echo
from netns_tests.bed.topology import XDP_LB, Bed, wait_until
from netns_tests.bed.traffic import load

NAMESPACE_FOLDERS = ("/run/netns", "/var/run/netns")
VIP = "10.99.1.100:80"
# Of /proc/PID/status: what it may do, what signals do to it, what it is counted to.
FACTS = re.compile(r"(Umask|Uid|Gid|Groups|Threads|Sig(?:Blk|Ign|Cgt)|Cap\w+|NoNewPrivs|Seccomp|Cpus_allowed):\t(.*)")


@pytest.fixture(scope="module")
def server(nothing_is_left_behind: None) -> Iterator[Server]:
    with contextlib.closing(Server()) as made:
        yield made


@pytest.fixture(scope="module")
def bed(server: Server) -> Iterator[Bed]:
    with Bed(backends=1) as made:
        made.xdp_lb("attach", "eth0", "--vip", VIP, "--backends", "10.99.2.11", "--ring-size", "251")
        yield made


@pytest.fixture(params=["started", "forked"])
def how(request: pytest.FixtureRequest, server: Server) -> Iterator[str]:
    with serving(server if request.param == "forked" else None):
        yield request.param


def both(bed: Bed, server: Server, *argv: str, **options: Any) -> list[tuple[int, str, str]]:
    """Status, output and errors: started, then forked."""
    places = {"XDP_LB_STATE_DIR": str(bed.directory / "state"), "XDP_LB_RUN_DIR": str(bed.directory / "run")}
    options = {"check": False, "env": os.environ | places} | options
    results = []
    for each in (None, server):
        with serving(each):
            done = bed.lb.run(argv, **options)
        assert bool(each) is (done.args == list(argv))
        results.append((done.returncode, done.stdout, done.stderr))
    return results


def facts(pid: int) -> dict[str, Any]:
    """Of a process, as others see it."""
    process = Path(f"/proc/{pid}")
    return {
        "status": dict(FACTS.findall((process / "status").read_text())),
        "name": (process / "comm").read_text(),
        "parent, group, session": (process / "stat").read_text().rpartition(") ")[2].split()[1:4],
        "network": (process / "ns" / "net").readlink(),
        "folder": (process / "cwd").readlink(),
        "limits": (process / "limits").read_text(),
        "descriptors": {int(fd.name): str(fd.readlink()).partition("[")[0] for fd in (process / "fd").iterdir()},
        "mounts": sorted(_mounts((process / "mountinfo").read_text())),
        "devices": sorted(device.name for device in (process / "root" / "sys" / "class" / "net").iterdir()),
    }


def _mounts(text: str) -> Iterator[tuple[str, str, str]]:
    """Root, place and kind (proc(5)), but where other beds come and go."""
    for line in text.splitlines():
        mount, _, system = line.partition(" - ")
        root, place = mount.split()[3:5]
        if not any(Path(place).is_relative_to(folder) for folder in (tempfile.gettempdir(), *NAMESPACE_FOLDERS)):
            yield root, place, system.split()[0]


def test_a_forked_process_is_what_a_started_one_is(bed: Bed, server: Server, tmp_path: Path) -> None:
    """Descriptors and threads too, once it runs: it has opened what the other one has, and nothing came with it."""
    seen = []
    for each in (None, server):
        with serving(each):
            dump = Dump(bed.lb, XDP_DUMP, ["-i", "eth0", "-w", "/dev/null"], cwd=tmp_path)
        assert isinstance(dump.process, Command) is bool(each)
        seen.append(facts(dump.process.pid))
        assert seen[-1]["network"] != Path("/proc/self/ns/net").readlink()
        assert Path(f"/proc/{dump.process.pid}/ns/mnt").readlink() != Path("/proc/self/ns/mnt").readlink()
        assert dump.end()[0] == 0
    assert seen[0] == seen[1]


def test_a_forked_load_is_what_a_started_one_is(bed: Bed, server: Server) -> None:
    seen = []
    for each in (None, server):
        with serving(each):
            echo = start_udp_echo(bed.client, 5353)
        assert isinstance(echo, Command) is bool(each)
        seen.append(facts(echo.pid))
        assert load(bed.lb, f"udp://{bed.client.ipv4}:5353", requests=10).requests == 10
        echo.kill()
        assert echo.wait(timeout=20) == -signal.SIGKILL
    assert seen[0] == seen[1]


def test_the_server_has_one_thread_and_its_own_descriptors(bed: Bed, server: Server) -> None:
    with serving(server):
        assert bed.xdp_lb("--version").returncode == 0
    assert server._process
    process = Path(f"/proc/{server._process.pid}")
    assert len(list((process / "task").iterdir())) == 1
    targets = [str(fd.readlink()) for fd in (process / "fd").iterdir() if int(fd.name) > 2]
    assert [target.partition("[")[0] for target in targets] == ["socket:"]
    assert (process / "ns" / "net").readlink() == Path("/proc/self/ns/net").readlink()


@pytest.mark.parametrize(
    "words",
    [
        ("--version",),
        ("nonsense",),
        ("attach",),
        ("vip", "list", "--json"),
        ("backend", "list"),
        ("backend", "drain", VIP, "10.0.0.1"),
        ("apply", "-f", "/nowhere"),
        ("status",),
        ("audit",),
        ("token", "list"),
        ("filter", "list"),
        ("decap", "status"),
        ("stage", "list"),
        ("doctor", "lo"),
        ("explain", "tcp", "10.99.1.1:1000", VIP),
    ],
    ids=" ".join,
)
def test_each_command_says_the_same_and_ends_alike(bed: Bed, server: Server, words: tuple[str, ...]) -> None:
    started, forked = both(bed, server, str(XDP_LB), *words)
    assert forked == started


@pytest.mark.parametrize("words", [("--version",), ("-D",), ("-i", "nothing"), ("-d", "tcp port 80")], ids=" ".join)
def test_xdp_dump_says_the_same_and_ends_alike(bed: Bed, server: Server, words: tuple[str, ...]) -> None:
    started, forked = both(bed, server, str(XDP_DUMP), *words)
    assert forked == started


def test_input_is_read(bed: Bed, server: Server) -> None:
    text = f'[[service]]\nvip = "{VIP}"\nring_size = 251\nbackends = ["10.99.2.11"]\n'
    started, forked = both(bed, server, str(XDP_LB), "apply", "-f", "/dev/stdin", "--dry-run", input=text)
    assert forked == started
    assert started[0] == 0, started


def test_text_is_of_the_encoding_that_is_asked_for(bed: Bed, server: Server) -> None:
    words = (str(XDP_LB), "vip", "list", "--\xe9")
    for encoding in ("utf-8", "latin-1"):
        started, forked = both(bed, server, *words, encoding=encoding)
        assert forked == started
        assert ("\xe9" in started[2]) is (encoding == "utf-8")


def test_environment_is_the_callers(bed: Bed, how: str) -> None:
    assert VIP in bed.xdp_lb("vip", "list").stdout
    elsewhere = {"XDP_LB_STATE_DIR": "/nowhere", "XDP_LB_RUN_DIR": "/nowhere"}
    done = bed.lb.run([str(XDP_LB), "vip", "list"], env=os.environ | elsewhere)
    assert VIP not in done.stdout, how


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it_with_that_status(bed: Bed, how: str, number: signal.Signals, tmp_path: Path) -> None:
    dump = Dump(bed.lb, XDP_DUMP, ["-i", "eth0", "-w", "/dev/null"], cwd=tmp_path)
    status, _, _ = dump.end(number)
    assert status == (0 if number is signal.SIGTERM else -number), how


def test_a_reader_that_goes_away_ends_it_alike(bed: Bed, server: Server) -> None:
    statuses = []
    for each in (None, server):
        reader, writer = os.pipe()
        os.close(reader)
        with serving(each), os.fdopen(writer, "w") as pipe:
            process = bed.lb.popen([str(XDP_LB), "--help"], stdout=pipe, stderr=subprocess.PIPE)
            _, errors = process.communicate(timeout=20)
        statuses.append((process.returncode, errors))
    assert statuses[0] == statuses[1]


def test_what_does_not_end_in_time_is_killed(bed: Bed, how: str) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        bed.lb.run([str(XDP_DUMP), "-i", "lo", "-w", "/dev/null"], timeout=0.5)
    wait_until(lambda: _listeners(bed) == [], f"{how}: nothing runs there")


def _listeners(bed: Bed) -> list[str]:
    return bed.lb.run(["ip", "netns", "pids", bed.lb.name]).stdout.split()[1:]  # the first is this command


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["sh", "-c", "exit 0"], {"text": True}),
        ([str(XDP_LB), "status"], {"text": True, "start_new_session": True}),
        ([str(XDP_LB), "status"], {"text": True, "env": {"LD_PRELOAD": "libfaketime.so.1"}}),
        ([str(XDP_LB), "status"], {"text": True, "env": {"PYTHONPATH": "/elsewhere"}}),
        ([str(XDP_LB), "status"], {}),
    ],
    ids=["another program", "a session", "a library", "other modules", "bytes"],
)
def test_what_a_fork_cannot_do_is_started(server: Server, argv: list[str], options: dict[str, Any]) -> None:
    assert server.can_run([str(XDP_LB), "status"], {"text": True})
    assert not server.can_run(argv, options)


def test_a_server_for_other_modules_runs_those(bed: Bed, tmp_path: Path) -> None:
    about = tmp_path / "xdp_lb-9.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: xdp-lb\nVersion: 9.9\n")
    (about / "entry_points.txt").write_text("[console_scripts]\nxdp-lb = lb.cli.main:main\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with contextlib.closing(Server(environment)) as made:
        started, forked = both(bed, made, str(XDP_LB), "--version", env=environment)
    assert forked == started == (0, "xdp-lb 9.9\n", "")


def test_a_server_that_has_ended_is_told(bed: Bed) -> None:
    with contextlib.closing(Server()) as made, serving(made):
        bed.xdp_lb("--version")
        assert made._process
        made._process.kill()
        made._process.wait()
        with pytest.raises(RuntimeError, match="ended"):
            bed.xdp_lb("--version")


def test_scripts_are_those_that_are_installed() -> None:
    assert set(commands.scripts()) == {str(XDP_LB), str(XDP_DUMP)}

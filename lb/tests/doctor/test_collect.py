"""What the doctor reads of files that a test can make up; the rest is read from real interfaces in netns_tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from lb.doctor import collect
from lb.doctor.collect import Roots, free_memory, read_host
from lb.doctor.facts import Refusal
from lb.paths import Paths
from xdp.errors import XdpError

MIB = 1 << 20


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    """A host with 1000 MiB, and a process in a control group of version 1 alone."""
    write(tmp_path / "proc/meminfo", "MemTotal: 9999999 kB\nMemAvailable: 1024000 kB\nHugePages_Total: 0\n")
    write(tmp_path / "proc/self/cgroup", "4:memory:/lb\n")
    return Roots(tmp_path / "proc", tmp_path / "cgroup")


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "state", tmp_path / "run")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def limit_group(roots: Roots, group: str, most: str, current_mib: int, reclaimable_mib: int = 0) -> None:
    folder = roots.cgroup / group
    write(folder / "memory.max", f"{most}\n")
    write(folder / "memory.current", f"{current_mib * MIB}\n")
    write(folder / "memory.stat", f"anon 1\ninactive_file {reclaimable_mib * MIB}\n")


def test_without_a_limit_the_memory_of_the_host_is_free(roots: Roots) -> None:
    assert free_memory(roots) == (1000 * MIB, None)


@pytest.mark.parametrize("limited", ["outer", "outer/inner"])
def test_limit_of_the_control_group_or_of_one_around_it_bounds_the_maps(roots: Roots, limited: str) -> None:
    write(roots.proc / "self/cgroup", "0::/outer/inner\n")
    for group in ("outer", "outer/inner"):
        limit_group(roots, group, "max", 0)
    limit_group(roots, limited, str(300 * MIB), current_mib=250, reclaimable_mib=150)
    assert free_memory(roots) == (200 * MIB, str(roots.cgroup / limited / "memory.max"))


def test_limit_above_the_memory_of_the_host_does_not_matter(roots: Roots) -> None:
    write(roots.proc / "self/cgroup", "0::/lb\n")
    limit_group(roots, "lb", str(5000 * MIB), 0)
    assert free_memory(roots) == (1000 * MIB, None)


def test_setting_that_this_kernel_lacks_is_none(roots: Roots) -> None:
    write(roots.proc / "sys/net/ipv4/conf/eth0.5/rp_filter", "2\n")
    assert roots.sysctl("net/ipv4/conf/eth0.5/rp_filter") == "2"
    assert roots.sysctl("net/ipv4/neigh/default/gc_thresh3") is None


def test_program_that_was_not_built_is_a_refusal(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = paths.run_dir / "lb.bpf.o"
    monkeypatch.setattr(collect, "LB_OBJECT", missing)
    assert read_host(paths).dataplane == Refusal(f"{missing}: not found: run `make build`", "make build")


def test_refusal_of_the_kernel_is_given_with_the_last_line_of_its_log(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: Path) -> None:
        raise XdpError("lb.bpf.o: rejected by the kernel: Permission denied\n  prog 'xdp_lb'\n  too large")

    monkeypatch.setattr("lb.doctor.collect.BpfObject.open", refuse)
    assert read_host(paths).dataplane == Refusal(
        "lb.bpf.o: rejected by the kernel: Permission denied: too large", collect.OTHER_KERNEL
    )


def test_host_with_nothing_stored_is_judged_for_ipv4_in_the_default_mode(paths: Paths) -> None:
    host = read_host(paths)
    assert (host.services, host.modes, host.families, host.loaded) == (0, frozenset(), frozenset({4}), False)
    assert host.pins == str(paths.run_dir / "bpf")
    assert host.has_bpffs

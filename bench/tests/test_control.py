"""The benchmarks of ring and control plane: what is timed is a change that takes place. No test asserts a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from bench import control, ring
from bench.control import Scale
from bench.report import BenchError
from lb.formats import config
from lb.hashing import native
from netns_tests.bed.topology import remaining_namespaces

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> list[dict[str, object]]:
    command = [sys.executable, "-m", "bench", *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures: list[dict[str, object]] = json.loads(done.stdout)
    return figures


def test_ring_measures_compiled_code_beside_python() -> None:
    figures = bench("ring", "--size", "251", "--backends", "3", "--rounds", "1")
    assert [(figure["case"], figure["unit"]) for figure in figures] == [
        ("size=251 backends=3 by=native", "ms"),
        ("size=251 backends=3 by=python", "ms"),
    ]


def test_the_change_that_is_timed_gives_the_new_backend_its_slots() -> None:
    _, words = ring.timed(251, 3, rounds=2)
    ring.check("", words, 3)
    with pytest.raises(BenchError, match="4 members hold slots instead of 5"):
        ring.check("", words, 4)


def test_without_native_code_the_pure_functions_work() -> None:
    before = native.library
    with ring.without_native():
        assert native.library is None
    assert native.library is before is not None


def test_a_ring_size_that_is_no_prime_is_one_line() -> None:
    command = [sys.executable, "-m", "bench", "ring", "--size", "1000"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    (line,) = refused.stderr.strip().splitlines()
    assert "not a prime" in line


def test_control_measures_time_latencies_and_memory() -> None:
    figures = bench("control", "--scale", "2x3", "--changes", "2", "--checks", "2", "--starts", "1")
    cases = [(str(figure["case"]), figure["unit"]) for figure in figures]
    assert [case for case in cases if "path=checks" not in case[0]] == [
        *cases_of("path=library services=2 backends=3"),
        ("path=library services=2 backends=3 metric=maps", "bytes"),
        ("path=library services=2 backends=3 metric=rss", "bytes"),
        *cases_of("path=api services=2 backends=3"),
        ("path=api services=2 backends=3 metric=rss", "bytes"),
        *[
            (f"path=start command={command}", "ms")
            for command in ("help", "vip-list", "backend-list", "status", "metrics", "filter-list", "stage-list")
        ],
    ]
    assert all(isinstance(figure["value"], int | float) and figure["value"] > 0 for figure in figures)
    assert not [name for name in remaining_namespaces() if "control" in name]


def cases_of(always: str) -> list[tuple[str, str]]:
    changes = [
        (f"{always} change={change} quantile={quantile}", "ms")
        for change in ("add", "weight", "drain", "remove")
        for quantile in ("p50", "p99")
    ]
    together = [(f"{always} quantile=p99", "ms"), (f"{always} metric=rate", "changes/s")]
    return [(f"{always} metric=apply", "s"), *changes, *together]


def test_what_is_applied_is_what_the_scale_says() -> None:
    services = config.parse(Scale(3, 5).toml).services
    assert [len(service.backends) for service in services] == [5, 5, 5]


def test_a_kernel_that_holds_something_else_fails_the_benchmark(tmp_path: Path) -> None:
    with control.namespace() as host, control.attached(host, tmp_path) as (balancer, _):
        control.apply(balancer, Scale(2, 3), tmp_path)
        with pytest.raises(BenchError, match="2 services and 6 backends instead of 2 and 7"):
            control.check(balancer, 2, 7)


@pytest.mark.parametrize("text", ["10", "0x5", "5x1", "5x251", "axb"])
def test_a_scale_out_of_range_is_a_usage_error(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Scale.parse(text)


def test_p99_lies_within_what_was_measured() -> None:
    assert control.p99([3.0]) == 3
    assert control.p99([float(n) for n in range(101)]) == 99

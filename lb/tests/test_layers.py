"""Imports between the top-level packages go one way; ``ast`` reads them from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("xdp", "lb", "filters", "netns_tests", "bench")

# What each package may import of the others. A module listed by itself goes by its own line.
MAY_IMPORT = {
    "xdp": (),
    "filters": ("xdp",),
    "lb": ("filters",),
    "lb.dataplane": ("filters", "xdp"),
    "lb.programs": ("filters", "xdp"),  # those of lb.dataplane
    "lb.kernel_errors": ("filters", "xdp"),
    "lb.filter_dataplane": ("filters", "xdp"),  # filter rules, in front of the balancer's program or without it
    "lb.decap_dataplane": ("filters", "xdp"),  # another program on another host: it shares nothing with the balancer's
    "lb.stage_kernel": ("filters", "xdp"),  # a user's own program, in a place of the balancer's or alone
    "lb.explain_facts": ("filters", "xdp"),  # sends a packet through the program in force, and leaves all as it was
    "lb.explain_probe": ("filters", "xdp"),
    "lb.explain_tables": ("filters", "xdp"),
    "lb.check_path": ("filters", "xdp"),  # a program for the host's own packets: it shares nothing with the balancer's
    "lb.doctor_facts": ("filters", "xdp"),  # asks the kernel what it could do, not to do it
    "lb.tests.test_dataplane": ("filters", "xdp"),
    "lb.tests.test_doctor_facts": ("filters", "xdp"),
    "netns_tests": ("lb", "filters", "xdp"),
    "bench": ("lb", "filters", "xdp", "netns_tests.bed.topology"),
}


def forbidden_imports(root: Path) -> list[str]:
    """Each import under root that goes the wrong way, as ``lb/cli.py:3: xdp.maps``."""
    return [
        f"{path.relative_to(root)}:{line}: {imported}"
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
        for line, imported in imports(path)
        if not is_allowed(module_name(path, root), imported)
    ]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a file imports. Relative imports never leave a package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def is_allowed(importer: str, imported: str) -> bool:
    own, other = package_of(importer), package_of(imported)
    if other == own or other not in PACKAGES:
        return True
    allowed = MAY_IMPORT.get(importer, MAY_IMPORT[own])
    return any(is_within(imported, name) for name in allowed)


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def package_of(name: str) -> str:
    return name.partition(".")[0]


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_imports_of_this_tree_go_one_way() -> None:
    assert forbidden_imports(ROOT) == []


def test_this_tree_is_where_the_packages_are() -> None:
    assert (ROOT / "xdp" / "__init__.py").exists()
    assert Path(__file__).is_relative_to(ROOT / "lb")


@pytest.mark.parametrize(
    ("file", "source", "imported"),
    [
        ("xdp/maps.py", "import lb", "lb"),
        ("xdp/tests/test_maps.py", "from filters.expr import parse", "filters.expr.parse"),
        ("filters/program.py", "import lb.model", "lb.model"),
        ("lb/balancer.py", "from xdp import maps", "xdp.maps"),
        ("lb/web/dataplane.py", "import xdp", "xdp"),
        ("lb/cli.py", "def main():\n    from xdp.attach import attach", "xdp.attach.attach"),
        ("lb/store.py", "from netns_tests.bed.topology import Bed", "netns_tests.bed.topology.Bed"),
        ("netns_tests/demo.py", "import bench.dataplane", "bench.dataplane"),
        ("bench/live.py", "from netns_tests.oracle import packets", "netns_tests.oracle.packets"),
        ("bench/live.py", "import netns_tests.bed.topology_extra", "netns_tests.bed.topology_extra"),
    ],
)
def test_an_import_the_wrong_way_is_found(tmp_path: Path, file: str, source: str, imported: str) -> None:
    write(tmp_path / file, source)
    line = source.count("\n") + 1
    assert forbidden_imports(tmp_path) == [f"{file}:{line}: {imported}"]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("xdp/object.py", "import xdp.libbpf, ctypes\nfrom . import btf"),
        ("filters/program.py", "from xdp.object import load"),
        ("lb/dataplane.py", "from xdp import maps"),
        ("lb/cli.py", "import filters\nimport lbx\nfrom lb.model import Service"),
        ("netns_tests/conftest.py", "import lb.cli\nfrom xdp.object import load"),
        ("bench/live.py", "from netns_tests.bed.topology import Bed\nfrom netns_tests.bed import topology"),
    ],
)
def test_an_import_the_right_way_is_not_reported(tmp_path: Path, file: str, source: str) -> None:
    write(tmp_path / file, source)
    assert forbidden_imports(tmp_path) == []


def write(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(source)

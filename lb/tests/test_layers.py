"""Imports go one way, package by package; ``ast`` reads them from the source.

One row says what a package may import besides itself and its top level's `errors` and `paths`. No module has a row of
its own, and a name is imported from where it is defined.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP_LEVEL = ("xdp", "filters", "lb", "netns_tests", "bench")
ANY_LB = "lb"

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "xdp": (),
    "filters.errors": (),
    "filters.native": (),
    "filters.compiler": (),
    "filters.interfaces": ("filters.compiler",),
    "filters.programs": ("filters.compiler", "xdp"),
    "filters.records": ("filters.native",),
    "filters.selftest": ("filters.compiler", "filters.programs", "xdp"),
    "filters.files": (
        "filters.records", "filters.selftest", "filters.programs", "filters.compiler", "filters.native", "xdp",
    ),
    "filters.capture": (
        "filters.records", "filters.programs", "filters.selftest", "filters.compiler", "filters.native",
        "filters.interfaces", "xdp",
    ),
    "filters.cli": ("filters", "xdp"),
    "filters": (),
    "lb": ("lb",),  # lb/__init__.py, the public face
    "lb.errors": (),
    "lb.paths": (),
    "lb.hashing": (),
    "lb.model": ("lb.hashing",),
    "lb.formats": ("lb.model", "lb.hashing", "filters.files", "filters.records", "filters.errors"),
    "lb.host": ("lb.model", "xdp.netlink"),
    "lb.store": ("lb.model",),
    "lb.dataplane": ("lb.model", "lb.hashing", "filters.errors", "xdp"),
    "lb.firewall": ("lb.dataplane", "lb.store", "lb.formats", "lb.host", "lb.model", "filters", "xdp"),
    "lb.health": ("lb.dataplane", "lb.host", "lb.hashing", "lb.model", "xdp"),
    "lb.stages": ("lb.dataplane", "lb.store", "lb.formats", "lb.host", "xdp"),
    "lb.decap": ("lb.dataplane", "lb.store", "lb.formats", "lb.host", "lb.model", "xdp"),
    "lb.explain": (
        "lb.stages", "lb.firewall", "lb.dataplane", "lb.store", "lb.formats", "lb.hashing", "lb.model", "filters",
        "xdp",
    ),
    "lb.doctor": ("lb.dataplane", "lb.health", "lb.host", "lb.store", "lb.model", "xdp"),
    "lb.top": ("lb.formats", "lb.model"),
    "lb.control": ("lb.firewall", "lb.health", "lb.dataplane", "lb.store", "lb.host", "lb.model", "lb.hashing"),
    "lb.client": (
        "lb.control", "lb.store", "lb.explain", "lb.firewall", "lb.stages", "lb.formats", "lb.host", "lb.model",
    ),
    "lb.runtime": ("lb.control", "lb.firewall", "lb.explain", "lb.formats", "lb.host", "lb.model"),
    "lb.api": (
        "lb.runtime", "lb.control", "lb.firewall", "lb.explain", "lb.stages", "lb.formats", "lb.host", "lb.model",
        "filters.files",
    ),
    "lb.daemon": ("lb.api", "lb.runtime", "lb.control", "lb.health", "lb.formats", "lb.host", "lb.model"),
    "lb.cli": ("lb", "filters"),
    "netns_tests": ("lb", "filters", "xdp"),
    "bench": ("lb", "filters", "xdp", "netns_tests.bed.topology"),
}  # fmt: skip
EVERYWHERE = {"lb": ("lb.errors", "lb.paths"), "filters": ("filters.errors",)}


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def package_of(module: str) -> str:
    """The longest row that a module belongs to."""
    return max((row for row in MAY_IMPORT if is_within(module, row)), key=len, default="")


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def sources(root: Path, *, tests: bool) -> Iterator[tuple[str, Path]]:
    for top in TOP_LEVEL:
        for path in sorted((root / top).rglob("*.py")):
            if tests or "tests" not in path.relative_to(root).parts:
                yield module_name(path, root), path


@cache
def imports(path: Path, root: Path) -> list[tuple[int, str, str]]:
    """Line, module and name (or nothing) of each import."""
    return list(_imports(path, root))


def _imports(path: Path, root: Path) -> Iterator[tuple[int, str, str]]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                if is_module(root, f"{node.module}.{alias.name}"):
                    yield node.lineno, f"{node.module}.{alias.name}", ""
                else:
                    yield node.lineno, node.module, alias.name


@cache
def is_module(root: Path, name: str) -> bool:
    place = root.joinpath(*name.split("."))
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


def is_allowed(importer: str, imported: str) -> bool:
    top = imported.partition(".")[0]
    if top not in TOP_LEVEL:
        return True
    own, other = package_of(importer), package_of(imported)
    if own == other or any(is_within(imported, each) for each in EVERYWHERE.get(importer.partition(".")[0], ())):
        return True
    return any(is_within(imported, each) for each in MAY_IMPORT[own])


def forbidden_imports(root: Path) -> list[str]:
    """Each import under root that goes the wrong way, as ``lb/cli/main.py:3: xdp.maps``."""
    return [
        f"{path.relative_to(root)}:{line}: {imported}"
        for module, path in sources(root, tests=False)
        for line, imported, _ in imports(path, root)
        if not is_allowed(module, imported)
    ]


def reexports(root: Path) -> list[str]:
    """Names of the project's own that are imported from a module that itself imports them."""
    found = []
    for _, path in sources(root, tests=True):
        for line, module, name in imports(path, root):
            source = root.joinpath(*module.split(".")).with_suffix(".py")
            if name and source.exists() and name in own_names_imported_by(source, root):
                found.append(f"{path.relative_to(root)}:{line}: {module}.{name}")
    return found


@cache
def own_names_imported_by(path: Path, root: Path) -> set[str]:
    """At the top level: what a function imports is a name of its own."""
    top = {node.lineno for node in parsed(path).body if isinstance(node, ast.ImportFrom)}
    return {name for line, module, name in imports(path, root) if line in top and module.partition(".")[0] in TOP_LEVEL}


def circles(root: Path) -> list[str]:
    """Packages that import each other by way of others: none of the rows may make one."""
    rows = {
        row: {package_of(each) for each in allowed if each in MAY_IMPORT and each not in TOP_LEVEL}
        for row, allowed in MAY_IMPORT.items()
    }
    return [row for row in rows if row in reachable(rows, row)]


def reachable(rows: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(rows[start])
    while waiting:
        if (row := waiting.pop()) not in found:
            found.add(row)
            waiting += rows[row]
    return found


def test_imports_of_this_tree_go_one_way() -> None:
    assert forbidden_imports(ROOT) == []


def test_names_are_imported_from_where_they_are_defined() -> None:
    assert reexports(ROOT) == []


def test_rows_allow_no_circle() -> None:
    assert circles(ROOT) == []


def test_every_package_has_a_row() -> None:
    packages = {
        f"{top}.{path.name}"
        for top in ("lb", "filters")
        for path in (ROOT / top).iterdir()
        if (path / "__init__.py").exists() and path.name != "tests"
    }
    assert packages
    assert packages <= MAY_IMPORT.keys()


def test_no_test_module_imports_a_test_module() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for _, path in sources(ROOT, tests=True)
        for line, module, _ in imports(path, ROOT)
        if module.rpartition(".")[2].startswith("test_") and module.partition(".")[0] in TOP_LEVEL
    ]
    assert found == []


@pytest.mark.parametrize(
    ("file", "source", "imported"),
    [
        ("xdp/maps.py", "import lb", "lb"),
        ("filters/programs/program.py", "import lb.model", "lb.model"),
        ("filters/compiler/graph.py", "from filters.programs.program import load", "filters.programs.program"),
        ("lb/control/balancer.py", "from xdp import maps", "xdp"),
        ("lb/model/state.py", "from lb.store.store import Store", "lb.store.store"),
        ("lb/cli/main.py", "def main():\n    from xdp.attach import attach", "xdp.attach"),
        ("lb/api/app.py", "from lb.client.client import Client", "lb.client.client"),
        ("lb/store/store.py", "from netns_tests.bed.topology import Bed", "netns_tests.bed.topology"),
        ("netns_tests/demo.py", "import bench.dataplane", "bench.dataplane"),
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
        ("filters/programs/program.py", "from xdp.object import load\nfrom filters.errors import FilterError"),
        ("lb/dataplane/programs.py", "from xdp import maps\nfrom lb.paths import Paths"),
        ("lb/cli/main.py", "import filters\nimport lbx\nfrom lb.model.state import Service"),
        ("netns_tests/conftest.py", "import lb.cli.main\nfrom xdp.object import load"),
        ("bench/live.py", "from netns_tests.bed.topology import Bed\nfrom netns_tests.bed import topology"),
    ],
)
def test_an_import_the_right_way_is_not_reported(tmp_path: Path, file: str, source: str) -> None:
    write(tmp_path / file, source)
    write(tmp_path / "netns_tests/bed/topology.py", "")
    assert forbidden_imports(tmp_path) == []


def test_a_name_by_way_of_another_module_is_found(tmp_path: Path) -> None:
    write(tmp_path / "lb/model/vip.py", "class Vip: ...")
    write(tmp_path / "lb/model/state.py", "from lb.model.vip import Vip")
    write(tmp_path / "lb/store/store.py", "from lb.model.state import Vip")
    assert reexports(tmp_path) == ["lb/store/store.py:1: lb.model.state.Vip"]


def write(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
